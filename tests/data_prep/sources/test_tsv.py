import zlib

import pytest

from data_prep.sources import open_source, tsv
from pipeline.console import InputError
from pipeline.data.places import Place
from tests.data_prep.sources.helpers import fill, rows


def brief(found):
    return [(row.key, row.image or row.problem, row.caption) for row in found]


def url(n):
    return f"http://host/{n}?é".encode()


def named(n):
    """What the downloader calls the picture of row n."""
    return f"{n}_{zlib.crc32(url(n))}"


def test_the_lists_of_cc3m_and_cc12m(tmp_path):
    pictures = tmp_path / "training"
    pictures.mkdir()
    for n, suffix in enumerate(("", ".jpg", ".jpeg", ".png", ".webp", ".gif")):
        (pictures / f"{named(n)}{suffix}").write_bytes(b"i%d" % n)
    (pictures / str(zlib.crc32(url(6)))).write_bytes(b"i6")
    (pictures / f"{zlib.crc32(url(7))}.jpg").write_bytes(b"i7")
    (pictures / f"9_{zlib.crc32(url(10))}").write_bytes(b"of another row")
    cc3m = b"".join(b'caption "%d\t%s\n' % (n, url(n)) for n in range(9))
    cc12m = b"".join(b'%s\tcaption "%d\r\n' % (url(n), n) for n in range(9))
    labels = b"".join(b'caption "%d\t%s\ttree,sky\t0.9\n' % (n, url(n)) for n in range(9))
    for content in (cc3m, cc12m, cc12m[:-2], labels, b"\xef\xbb\xbf" + cc12m):
        (tmp_path / "Train.tsv").write_bytes(content)
        found = rows(tmp_path / "Train.tsv", pictures)
        expected = [(f"Train/{n}", b"i%d" % n, b'caption "%d' % n) for n in range(8)]
        assert brief(found) == [*expected, ("Train/8", "image missing", None)]
        for row in found[:8]:
            assert Place(pictures).read(row.file, row.offset, len(row.image)) == row.image
            assert row.group == row.file


@pytest.mark.parametrize("header", ["caption\tfile", "TEXT\tfilepath", "url\tcaption\tpath\tx"])
def test_a_header_names_the_columns(tmp_path, header):
    fill(tmp_path, p__a_jpg=b"A", p__b_jpg=b"B")
    names = header.split("\t")
    values = {"caption": "one", "file": "p/a.jpg", "url": "http://h/1", "x": ""}
    values |= {"TEXT": "one", "filepath": "p/a.jpg", "path": "p/a.jpg"}
    lines = [header, *("\t".join(values[name] for name in names) for _ in range(2)), ""]
    (tmp_path / "t.tsv").write_text("\n".join(lines))
    assert brief(rows(tmp_path / "t.tsv")) == [("t/0", b"A", b"one"), ("t/1", b"A", b"one")]
    assert {row.group for row in rows(tmp_path / "t.tsv")} == {"p/a.jpg"}
    (tmp_path / "elsewhere" / "p").mkdir(parents=True)
    (tmp_path / "elsewhere" / "p" / "a.jpg").write_bytes(b"other")
    assert {row.image for row in rows(tmp_path / "t.tsv", tmp_path / "elsewhere")} == {b"other"}


def test_a_row_without_a_path_goes_by_its_url(tmp_path):
    (tmp_path / named(1)).write_bytes(b"i")
    (tmp_path / "a.jpg").write_bytes(b"A")
    lines = [b"caption\turl\tfile", b"c\t%s\ta.jpg" % url(0), b"d\t%s\t" % url(1), b"e\t\t", b""]
    (tmp_path / "t.tsv").write_bytes(b"\n".join(lines))
    assert brief(rows(tmp_path / "t.tsv")) == [
        ("t/0", b"A", b"c"),
        ("t/1", b"i", b"d"),
        ("t/2", "image missing", None),
    ]


def test_lines_that_are_no_rows_are_named_or_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(tsv, "LINE_LIMIT", 64)
    for n in range(7):
        (tmp_path / named(n)).write_bytes(b"i%d" % n)
    content = b"\n".join(
        [
            b"",
            b"c0\t" + url(0),
            b"",
            b" \t ",
            b"a tab\tin it\t" + url(1),
            b"one column",
            b"x" * 200,
            b"x" * 64,
            b"c5\t" + url(5),
            b"\xff\t" + url(6),
            b"bad\thttp://\xff",
        ]
    )
    (tmp_path / "t.tsv").write_bytes(content)
    for max_rows in (1, 2, 3, 100):
        assert brief(rows(tmp_path / "t.tsv", tmp_path, max_rows)) == [
            ("t/0", b"i0", b"c0"),
            ("t/1", "damaged line", None),
            ("t/2", "damaged line", None),
            ("t/3", "damaged line", None),
            ("t/4", "damaged line", None),
            ("t/5", b"i5", b"c5"),
            ("t/6", b"i6", b"\xff"),
            ("t/7", "image missing", None),
        ]


def test_pieces_are_whole_lines_and_all_bytes(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b"".join(b"c%d\t%s\n\n" % (n, url(n)) for n in range(100)))
    size = (tmp_path / "t.tsv").stat().st_size
    for max_rows in (1, 7, 99, 100, 101):
        pieces = list(open_source(tmp_path / "t.tsv", tmp_path).pieces(max_rows))
        assert [piece.start for piece in pieces] == [0, *(p.stop for p in pieces[:-1])]
        assert pieces[-1].stop == size == sum(piece.n_bytes for piece in pieces)
        assert sum(piece.n_rows for piece in pieces) == 100
        assert all(0 < piece.n_rows <= max_rows for piece in pieces)


@pytest.mark.parametrize(
    "content", ["", "\n\n", "a\tb\nc\thttp://x\n", "http://x\n", "caption\tx\n", "url\tfile\n"]
)
def test_a_list_that_names_no_columns_is_an_input_error(tmp_path, content):
    (tmp_path / "t.tsv").write_text(content)
    with pytest.raises(InputError, match=r"t\.tsv: its first line has neither a URL"):
        open_source(tmp_path / "t.tsv", tmp_path)


def test_pictures_have_to_be_named(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b"c\t" + url(0))
    with pytest.raises(InputError, match=r"t\.tsv has no paths: name the folder"):
        open_source(tmp_path / "t.tsv")


def test_a_list_that_changed_stops_the_job(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b"c\t" + url(0))
    source = open_source(tmp_path / "t.tsv", tmp_path)
    (piece,) = source.pieces(10)
    (tmp_path / "t.tsv").write_bytes(b"longer\t" + url(0))
    with pytest.raises(InputError, match=r"t\.tsv: it has \d+ bytes and had \d+ when"):
        list(source.rows(piece))
