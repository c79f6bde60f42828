import json

import pytest

from data_prep.sources import open_source
from pipeline.console import InputError
from pipeline.data.places import Place
from tests.data_prep.sources.helpers import fill, rows


def write(path, images, annotations, **more):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, **more}))
    return path


def image(n, name=None):
    return {"id": n, "file_name": name or f"{n}.jpg"}


def note(n, image_id, caption):
    return {"id": n, "image_id": image_id, "caption": caption}


def brief(found):
    return [(row.key, row.image, row.caption, row.problem, row.group) for row in found]


def test_a_row_is_a_caption_and_captions_of_a_picture_are_a_group(tmp_path):
    pictures = fill(tmp_path / "pictures", **{"2_jpg": b"two", "10_jpg": b"ten"})
    captions = write(
        tmp_path / "annotations" / "captions.json",
        [image(10), image(2)],
        [note(5, 10, "e"), note(1, 2, "a"), note(30, 2, "b"), note(4, 2, "é")],
        info={"year": 2014},
    )
    found = rows(captions, pictures)
    assert brief(found) == [
        ("2-0", b"two", b"a", None, "2.jpg"),
        ("2-1", b"two", "é".encode(), None, "2.jpg"),
        ("2-2", b"two", b"b", None, "2.jpg"),
        ("10-0", b"ten", b"e", None, "10.jpg"),
    ]
    for row in found:
        assert Place(pictures).read(row.file, row.offset, len(row.image)) == row.image
    source = open_source(captions, pictures)
    assert (source.kind, source.name, source.place.uri) == ("coco", "captions.json", str(pictures))
    pieces = list(source.pieces(3))
    assert [(piece.start, piece.stop, piece.n_rows) for piece in pieces] == [(0, 3, 3), (3, 4, 1)]
    assert sum(piece.n_bytes for piece in pieces) == captions.stat().st_size
    assert sum(row.n_bytes for row in found) == captions.stat().st_size


def test_what_does_not_fit_together_is_named(tmp_path):
    pictures = fill(tmp_path, **{"0_jpg": b"i", "1_jpg": b"i", "5_jpg": b"i", "6_jpg": b"i"})
    captions = write(
        tmp_path / "c.json",
        [
            *[image(0), image(0), image(1), image(2), image(3, "../x.jpg"), image(4, "../x.jpg")],
            *[image(5), image(5, "6.jpg"), image("a", "0.jpg"), image(7, "half\ud800.jpg")],
            *[{"id": 6}, {"file_name": "5.jpg"}, "image", {"id": 8, "file_name": None}],
        ],
        [
            *[note(0, 0, "a"), note(0, 0, "b"), note(1, 2, "c"), note(2, 3, "d"), note(3, 5, "e")],
            *[note(4, 99, "f"), note(5, "a", "g"), note(6, 6, "h"), note(7, 7, "i")],
            *[note(8, 1, None), note(9, 1, "half \ud800"), {"id": 10, "caption": "j"}, 11],
        ],
    )
    assert [row[:1] + row[2:4] for row in brief(rows(captions, pictures))] == [
        ("0-0", b"a", None),
        ("0-1", b"b", None),
        ("1-0", None, "caption missing"),
        ("1-1", b"half \xed\xa0\x80", None),
        ("2-0", None, "image missing"),
        ("3-0", None, "path escapes the folder"),
        ("4-0", None, "caption missing"),
        ("5-0", None, "several images of one name"),
        ("6-0", None, "image missing"),
        ("7-0", None, "file name not UTF-8"),
        ("99-0", None, "image missing"),
        ("a-0", b"g", None),
        ("images[10]", None, "image missing"),
        ("images[11]", None, "image missing"),
        ("images[12]", None, "image missing"),
        ("images[13]", None, "image missing"),
        ("annotations[11]", None, "image missing"),
        ("annotations[12]", None, "image missing"),
    ]
    assert all(row.detail for row in rows(captions, pictures) if row.problem)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"a": "\xff"}', "is no JSON"),
        ("[]", "no list of images"),
        ('{"images": [], "annotations": {}}', "no list of images, or none of annotations"),
        ('{"images": [], "annotations": []}', "has no captions"),
        ('{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}', "has no captions"),
    ],
)
def test_a_json_of_something_else_is_an_input_error(tmp_path, content, error):
    (tmp_path / "c.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=rf"c\.json {error}|c\.json .*{error}"):
        rows(tmp_path / "c.json", tmp_path)


def test_pictures_have_to_be_named(tmp_path):
    captions = write(tmp_path / "c.json", [image(1)], [note(1, 1, "a")])
    with pytest.raises(InputError, match=r"c\.json names pictures: name the folder"):
        open_source(captions)
    with pytest.raises(InputError, match=r"nowhere is no folder"):
        open_source(captions, tmp_path / "nowhere")


def test_a_json_that_changed_stops_the_job(tmp_path):
    captions = write(tmp_path / "c.json", [image(1)], [note(1, 1, "a")])
    source = open_source(captions, tmp_path)
    (piece,) = source.pieces(10)
    write(tmp_path / "c.json", [image(1)], [note(1, 1, "other")])
    with pytest.raises(InputError, match=r"c\.json: it has \d+ bytes and had \d+ when"):
        list(source.rows(piece))
