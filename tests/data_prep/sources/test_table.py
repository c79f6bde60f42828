import io
import os
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources import CAPTION_LIMIT, open_source
from data_prep.sources import table as tables
from data_prep.sources.table import cut
from pipeline.console import InputError
from pipeline.data.places import Place
from tests.data_prep.sources.helpers import fill, make_tar, problems, rows

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, group=3, /, **columns):
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def brief(found):
    return [(row.key, row.image, row.caption, row.problem) for row in found]


def test_bytes_captions_and_keys(tmp_path):
    table = write(
        tmp_path / "t.parquet",
        image=pa.array([b"i0", None, b"i2", b"i3"]),
        caption=["c0", "c1", None, "é"],
        key=["k0", None, "k2", ""],
        other=[1, 2, 3, 4],
    )
    assert brief(rows(table)) == [
        ("k0", b"i0", b"c0", None),
        ("t/1", None, None, "image missing"),
        ("k2", None, None, "caption missing"),
        ("t/3", b"i3", "é".encode(), None),
    ]
    assert not open_source(table).can_refer
    assert {(row.file, row.group) for row in rows(table)} == {("", "")}


@pytest.mark.parametrize("image", ["image", "jpg", "png", "webp"])
@pytest.mark.parametrize("caption", ["caption", "text", "txt"])
@pytest.mark.parametrize("key", ["key", "__key__", "id"])
def test_columns_by_name(tmp_path, image, caption, key):
    columns = {image: pa.array([b"i"]), caption: ["c"], key: [7]}
    assert brief(rows(write(tmp_path / "t.parquet", **columns))) == [("7", b"i", b"c", None)]


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_texts_of_any_type(tmp_path, kind):
    caption = pa.array(["c", None, "é"]).cast(kind)
    table = write(tmp_path / "t.parquet", image=pa.array([b"i"] * 3), caption=caption, key=caption)
    assert brief(rows(table)) == [
        ("c", b"i", b"c", None),
        ("t/1", None, None, "caption missing"),
        ("é", b"i", "é".encode(), None),
    ]


def test_pictures_as_hugging_face_keeps_them(tmp_path):
    fill(tmp_path, images__p_jpg=b"by path")
    images = pa.array(
        [
            {"bytes": b"by bytes", "path": "whatever.jpg"},
            {"bytes": None, "path": "images/p.jpg"},
            {"bytes": None, "path": None},
            None,
            {"bytes": b"", "path": None},
        ],
        STRUCT,
    )
    table = write(tmp_path / "t.parquet", photo=images, text=list("abcde"))
    found = rows(table)
    assert brief(found) == [
        ("t/0", b"by bytes", b"a", None),
        ("t/1", b"by path", b"b", None),
        ("t/2", None, None, "image missing"),
        ("t/3", None, None, "image missing"),
        ("t/4", b"", b"e", None),
    ]
    assert [row.file for row in found] == ["", "images/p.jpg", "", "", ""]
    assert not open_source(table).can_refer
    only_paths = write(tmp_path / "p.parquet", image=images[1:3], text=["b", "c"])
    assert open_source(only_paths).can_refer


def test_several_captions_are_rows_of_one_group(tmp_path):
    captions = pa.array([["a", "b"], [], None, [None, "c"]], pa.list_(pa.string()))
    table = write(tmp_path / "t.parquet", image=pa.array([b"i"] * 4), captions=captions)
    assert brief(rows(table)) == [
        ("t/0-0", b"i", b"a", None),
        ("t/0-1", b"i", b"b", None),
        ("t/1", None, None, "caption missing"),
        ("t/2", None, None, "caption missing"),
        ("t/3-0", None, None, "caption missing"),
        ("t/3-1", b"i", b"c", None),
    ]
    assert [row.group for row in rows(table)] == ["t/0", "t/0", "", "", "t/3", "t/3"]


def test_paths_from_the_table_then_from_the_root(tmp_path):
    fill(tmp_path, a_jpg=b"root", sub__a_jpg=b"beside", b_jpg=b"only root")
    names = ["a.jpg", "b.jpg", "../b.jpg", "c.jpg", "../../a.jpg", "/etc/passwd", "nul\0", ""]
    names += [str(tmp_path / "b.jpg"), "./a.jpg", "sub"]
    text = [str(i) for i in range(len(names))]
    write(tmp_path / "sub" / "t.parquet", path=names, text=text, id=text)
    expected = {
        "sub/0": b"beside",
        "sub/1": b"only root",
        "sub/2": b"only root",
        "sub/3": "image missing",
        "sub/4": "path escapes the folder",
        "sub/5": "path escapes the folder",
        "sub/6": "image missing",
        "sub/7": "image missing",
        "sub/8": b"only root",
        "sub/9": b"beside",
        "sub/10": "not a regular file",
    }
    found = [row for row in rows(tmp_path) if row.key.startswith("sub/") and row.key != "sub/a"]
    assert {row.key: row.image or row.problem for row in found} == expected
    for row in found:
        if row.image is not None:
            assert Place(tmp_path).read(row.file, row.offset, len(row.image)) == row.image
            assert row.group == row.file
    alone = rows(tmp_path / "sub" / "t.parquet")
    assert [row.problem for row in alone][:3] == [None, "image missing", "path escapes the folder"]
    elsewhere = rows(tmp_path / "sub" / "t.parquet", images=tmp_path)
    assert [row.image for row in elsewhere][:2] == [b"root", b"only root"]


def test_what_is_too_large_or_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "IMAGE_LIMIT", 100)
    not_utf8 = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    table = write(
        tmp_path / "t.parquet",
        image=pa.array([b"i", bytes(101), b"i"]),
        caption=pa.concat_arrays([not_utf8, pa.array(["c", "x" * (CAPTION_LIMIT + 1)])]),
        key=pa.concat_arrays([not_utf8, pa.array(["b", "c"])]),
    )
    assert [row[0::2] + row[3:] for row in brief(rows(table))] == [
        ("\\xff", b"\xff", None),
        ("b", None, "image file too large"),
        ("c", None, "caption too long"),
    ]
    paths = write(tmp_path / "p.parquet", path=not_utf8, caption=["c"])
    assert problems(paths) == {"p/0": "file name not UTF-8"}


@pytest.mark.parametrize("seed", range(30))
def test_pieces_hold_every_row_once_and_are_small(seed):
    draw = random.Random(seed)
    groups = [draw.choice([0, 1, 2, 5, 40]) for _ in range(draw.randrange(12))]
    for max_rows in (1, 2, 3, 7, 50, 10_000):
        ranges = list(cut(groups, max_rows))
        numbers = [n for start, stop in ranges for n in range(start, stop)]
        assert numbers == list(range(sum(groups)))
        assert all(0 < stop - start <= max_rows for start, stop in ranges)
        edges = {sum(groups[:i]) for i in range(len(groups) + 1)}
        for start, _ in ranges:  # a cut inside a group only where the group is too large
            if start not in edges:
                inside = next(i for i in range(len(groups)) if start < sum(groups[: i + 1]))
                assert groups[inside] > max_rows


def test_the_bytes_of_pieces_and_rows_are_those_of_the_columns(tmp_path):
    images = [os.urandom(100 + i) for i in range(50)]
    table = write(
        tmp_path / "t.parquet", 7, image=images, text=["c"] * 50, waste=[os.urandom(999)] * 50
    )
    for max_rows in (1, 7, 10, 100):
        pieces = list(open_source(table).pieces(max_rows))
        total = sum(piece.n_bytes for piece in pieces)
        assert sum(map(len, images)) < total < 2 * sum(map(len, images))
        assert sum(row.n_bytes for row in rows(table, max_rows=max_rows)) == pytest.approx(
            total, abs=50
        )


def flipped(path, start, n_bytes):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\xff" * n_bytes)


def test_a_damaged_row_group_costs_its_own_rows_by_name(tmp_path):
    table = write(tmp_path / "t.parquet", 4, image=[os.urandom(500)] * 12, text=["c"] * 12)
    column = pq.ParquetFile(table).metadata.row_group(1).column(0)
    flipped(table, column.dictionary_page_offset or column.data_page_offset, 200)
    for max_rows in (3, 4, 5, 12):
        found = rows(table, max_rows=max_rows)
        assert [row.key for row in found] == [f"t/{i}" for i in range(12)]
        assert [row.problem for row in found] == [None] * 4 + ["damaged table"] * 4 + [None] * 4
    assert all(row.detail for row in found[4:8])


@pytest.mark.parametrize("damage", ["cut", "empty", "footer", "text"])
def test_what_is_no_table_is_named(tmp_path, damage):
    table = write(tmp_path / "t.parquet", image=[b"i"], text=["c"])
    fill(tmp_path, a_png=b"i", a_txt=b"c")
    size = table.stat().st_size
    if damage == "cut":
        os.truncate(table, size - 9)
    elif damage == "empty":
        os.truncate(table, 0)
    elif damage == "footer":
        flipped(table, size - 60, 40)
    else:
        table.write_text("hello")
    with pytest.raises(InputError, match=r"t\.parquet has no pairs: its footer cannot be read"):
        open_source(table)
    assert problems(tmp_path) == {"a": None, "t.parquet": "damaged table"}


def test_a_table_of_other_things_is_named(tmp_path):
    table = write(tmp_path / "t.parquet", x=[1], text=["c"])
    with pytest.raises(InputError, match=r"no column of pictures .* is among x, text"):
        open_source(table)
    assert problems(tmp_path) == {"t.parquet": "damaged table"}
    with pytest.raises(InputError, match=r"no column of caption .* is among image, x"):
        open_source(write(tmp_path / "t.parquet", image=[b"i"], x=["c"]))
    assert problems(tmp_path) == {"t.parquet": "damaged table"}


def test_what_img2dataset_knows_of_its_archives_is_no_rows(tmp_path):
    make_tar(tmp_path / "00000.tar", ("0.jpg", b"i"), ("0.txt", b"c"))
    known = {"key": ["0"], "status": ["success"], "error_message": [None], "caption": ["c"]}
    write(tmp_path / "00000.parquet", **known)
    fill(tmp_path, **{"00000_stats_json": b"{}", "00001__1_jpg": b"i", "00001__1_txt": b"c"})
    write(tmp_path / "00001.parquet", **known)
    assert problems(tmp_path) == {"0": None, "00001/1": None}
    # with the pictures in it, it is a table like any other
    make_tar(tmp_path / "00002.tar", ("1.jpg", b"i"), ("1.txt", b"c"))
    write(tmp_path / "00002.parquet", **known, jpg=[b"i"])
    assert [row.key for row in rows(tmp_path)] == ["0", "00001/1", "0", "1"]


def test_a_table_that_changed_or_is_gone_stops_the_job(tmp_path):
    table = write(tmp_path / "t.parquet", image=[b"i"], text=["c"])
    source = open_source(table)
    (piece,) = source.pieces(10)
    write(tmp_path / "t.parquet", image=[b"i", b"j"], text=["c", "d"])
    with pytest.raises(InputError, match=r"t\.parquet: it has \d+ bytes and had \d+ when"):
        list(source.rows(piece))
    table.unlink()
    with pytest.raises(InputError, match=r"t\.parquet: there is no such file; bring it back"):
        list(source.rows(piece))


def test_two_columns_of_one_name_are_named(tmp_path):
    twice = pa.Table.from_arrays(
        [pa.array([b"i"]), *[pa.array(["c"])] * 2], ["jpg", "text", "text"]
    )
    pq.write_table(twice, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"two columns have one name: jpg, text, text"):
        open_source(tmp_path / "t.parquet")


def test_memory_holds_a_few_pictures_and_no_row_group(tmp_path):
    size, n_rows = 1 << 18, 128
    schema = pa.schema([("image", pa.binary()), ("text", pa.string())])
    # pyarrow looks at the size of a page every write_batch_size rows, 1024 by default
    how = {"compression": "none", "use_dictionary": False, "write_batch_size": 1}
    with pq.ParquetWriter(tmp_path / "t.parquet", schema, **how) as writer:
        images = [os.urandom(size) for _ in range(n_rows)]
        writer.write_table(pa.table({"image": images, "text": ["c"] * n_rows}, schema))
    source = open_source(tmp_path / "t.parquet")
    (piece,) = source.pieces(n_rows)
    before, in_arrow = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    for row, image in zip(source.rows(piece), images, strict=True):
        assert row.image == image
        in_arrow = max(in_arrow, pa.total_allocated_bytes() - before)
    in_python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert in_arrow + in_python < 2 * tables.BATCH_ROWS * size + (12 << 20) < n_rows * size


def test_a_stream_that_breaks_in_a_column_stops_the_job(tmp_path, monkeypatch):
    table = write(tmp_path / "t.parquet", image=[os.urandom(1 << 20)] * 4, text=["c"] * 4)
    source = open_source(table)
    (piece,) = source.pieces(10)
    content = table.read_bytes()

    class Broken(io.BytesIO):
        def readinto(self, buffer):
            if self.tell() < len(content) // 2:
                raise InputError("the server cannot be reached")
            return super().readinto(buffer)

        def read(self, size=-1):
            if self.tell() < len(content) // 2:
                raise InputError("the server cannot be reached")
            return super().read(size)

    monkeypatch.setattr(Place, "open", lambda self, file="": Broken(content))
    with pytest.raises(InputError, match="the server cannot be reached"):
        list(source.rows(piece))
