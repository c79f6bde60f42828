"""What holds of every kind of source, on a disk and in a bucket."""

import itertools
import json
import os
import random
import subprocess
import sys
import zlib
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources import Piece, coco, open_source
from pipeline.console import InputError
from pipeline.data.places import Place
from tests.data_prep.sources.helpers import fill, make_tar
from tests.pipeline.data.s3_server import s3_server

KINDS = ["folder", "archive", "table", "paths", "coco", "tsv"]
MAX_ROWS = (1, 2, 3, 5, 8, 13, 10_000)


def picture(n):
    return random.Random(n).randbytes(100 + n)


def make_folder(root):
    """Pairs at three depths, halves of pairs, an archive and a table."""
    for n in range(17):
        folder = root / ("", "en", "en/new")[n % 3]
        folder.mkdir(parents=True, exist_ok=True)
        if n % 5:
            (folder / f"{n}.jpg").write_bytes(picture(n))
        if n % 7:
            (folder / f"{n}.txt").write_text(f"caption {n}")
    members = [
        (f"{n}.{suffix}", data)
        for n in range(100, 107)
        for suffix, data in (("png", picture(n)), ("txt", b"of the archive %d" % n))
    ]
    make_tar(root / "en" / "a.tar", *members[:-1])
    images = [picture(n) for n in range(200, 211)]
    pq.write_table(pa.table({"image": images, "text": ["t"] * 11}), root / "en" / "t.parquet", 4)
    return root, None


def make_archive(root):
    root.mkdir()
    make_folder(root / "folder")
    return root / "folder" / "en" / "a.tar", None


def make_table(root):
    root.mkdir()
    captions = pa.array([[f"c{n}", "second"][: n % 3] for n in range(31)], pa.list_(pa.string()))
    images = pa.array([picture(n) if n % 4 else None for n in range(31)])
    pq.write_table(pa.table({"image": images, "captions": captions}), root / "t.parquet", 9)
    return root / "t.parquet", None


def make_paths(root):
    make_folder(root)
    names = [f"en/{n}.jpg" for n in range(1, 23, 3)]
    pq.write_table(pa.table({"file_name": names, "text": names, "key": names}), root / "p.parquet")
    return root / "p.parquet", None


def make_coco(root):
    make_folder(root / "pictures")
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(0, 17, 3)]
    notes = [{"id": -n, "image_id": n % 6 * 3, "caption": f"c{n}"} for n in range(20)]
    (root / "captions.json").write_text(json.dumps({"images": images[1:], "annotations": notes}))
    return root / "captions.json", root / "pictures"


def make_tsv(root):
    (root / "training").mkdir(parents=True)
    urls = [f"http://host/{n}" for n in range(8)]
    (root / "list.tsv").write_text("".join(f"c{n}\t{url}\n" for n, url in enumerate(urls)))
    for n in range(0, 8, 2):
        name = f"{n}_{zlib.crc32(urls[n].encode())}.jpg"
        (root / "training" / name).write_bytes(picture(n))
    return root / "list.tsv", root / "training"


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


@pytest.fixture(params=KINDS)
def made(request, tmp_path):
    """A source of each kind, and the folder of its pictures where that is another."""
    return globals()[f"make_{request.param}"](tmp_path / "made")


def in_bucket(server, root, made, key):
    """The same source after an upload of ``root``."""
    server.put_folder(root, key)
    return [p and server.uri(f"{key}/{p.relative_to(root).as_posix()}".rstrip("/.")) for p in made]


def through_json(piece):
    return Piece(**json.loads(json.dumps(asdict(piece))))


def digest(row):
    image = row.image and sha256(row.image).hexdigest()
    return repr(replace(row, image=image))


def test_pieces_of_any_size_hold_every_row_once(made):
    whole = open_source(*made)
    (*_, last) = whole.pieces(10_000)
    assert last.n_bytes > 0
    expected = [row for piece in whole.pieces(10_000) for row in whole.rows(piece)]
    assert len({row.key for row in expected}) == len(expected) > 6
    assert any(row.problem for row in expected)
    assert sum(row.problem is None for row in expected) > 3
    for max_rows in MAX_ROWS:
        source = open_source(*made)
        pieces = [through_json(piece) for piece in source.pieces(max_rows)]
        assert pieces == list(source.pieces(max_rows))
        found = [list(source.rows(piece)) for piece in pieces]
        assert list(itertools.chain(*found)) == expected
        for piece, rows in zip(pieces, found, strict=True):
            if not piece.unit.endswith(".tar") and piece.unit != "t.parquet":  # several captions
                assert len(rows) == piece.n_rows <= max_rows
        total = sum(piece.n_bytes for piece in pieces)
        assert total == sum(piece.n_bytes for piece in whole.pieces(10_000))
        assert sum(row.n_bytes for row in expected) == pytest.approx(total, rel=0.35, abs=50)


def test_references_lead_to_the_very_bytes(made):
    source = open_source(*made)
    rows = [row for piece in source.pieces(7) for row in source.rows(piece)]
    referred = [row for row in rows if row.file]
    assert {row.image is not None for row in referred} <= {True}
    whole = [row for row in rows if row.problem is None]
    if source.kind == "table" and not source.can_refer:
        assert not referred
        return
    assert source.can_refer
    in_columns = [row for row in whole if not row.file]
    assert all(row.key.startswith("en/t/") for row in in_columns)
    assert len(in_columns) == (11 if source.kind == "folder" else 0)
    for row in referred:
        place = Place(source.place.uri)
        assert place.read(row.file, row.offset, len(row.image)) == row.image


SCRIPT = """
import json, sys
from data_prep.sources import Piece, open_source
from tests.data_prep.sources.test_sources import digest
for uri, images, pieces in json.load(sys.stdin):
    source = open_source(uri, images)
    for piece in pieces:
        for row in source.rows(Piece(**piece)):
            print(digest(row))
"""


def test_another_process_reads_the_same(tmp_path):
    sent, expected = [], []
    for kind in KINDS:
        made = globals()[f"make_{kind}"](tmp_path / kind)
        source = open_source(*made)
        pieces = list(source.pieces(4))
        expected += [digest(row) for piece in pieces for row in source.rows(piece)]
        sent.append([*(path and str(path) for path in made), [asdict(piece) for piece in pieces]])
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, input=json.dumps(sent), capture_output=True, text=True, env=env, check=False
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == expected
    assert len(expected) > 100


def test_a_bucket_gives_the_rows_of_the_disk(server, made, tmp_path, request):
    here = open_source(*made)
    key = f"same/{here.kind}-{request.node.name}"
    there = open_source(*in_bucket(server, tmp_path / "made", made, key))
    assert (there.kind, there.can_refer) == (here.kind, here.can_refer)
    pieces = list(there.pieces(3))
    assert pieces == list(here.pieces(3))
    for n, piece in enumerate(pieces):
        found = list(there.rows(through_json(piece)))
        assert found == list(here.rows(piece))
        for row in found[: n < 3]:
            if row.file:
                data = Place(there.place.uri).read(row.file, row.offset, len(row.image))
                assert data == row.image


@pytest.mark.parametrize("kind", ["archive", "table", "coco", "tsv"])
def test_what_is_deleted_from_a_bucket_is_a_sentence(server, tmp_path, kind):
    made = globals()[f"make_{kind}"](tmp_path / "made")
    fill(tmp_path / "made", other_txt=b"so that the folder stays")
    there = in_bucket(server, tmp_path / "made", made, f"deleted-{kind}")
    source = open_source(*there)
    (*_, piece) = source.pieces(5)
    server.delete(f"deleted-{kind}/{made[0].relative_to(tmp_path / 'made').as_posix()}")
    coco._captions.cache_clear()
    name = made[0].name.replace(".", r"\.")
    with pytest.raises(InputError, match=rf"file {name}: there is no such file; bring it back"):
        list(source.rows(piece))


def test_a_picture_deleted_from_a_bucket_is_a_row(server, tmp_path):
    fill(tmp_path, a_png=b"i", a_txt=b"c", b_png=b"i", b_txt=b"c")
    source = open_source(server.put_folder(tmp_path, "pair"))
    (piece,) = source.pieces(5)
    server.delete("pair/a.png")
    assert [(row.key, row.problem) for row in source.rows(piece)] == [
        ("a", "file cannot be read"),
        ("b", None),
    ]
    for name in ("a.txt", "b.png", "b.txt"):
        server.delete(f"pair/{name}")
    with pytest.raises(InputError, match=r"pair\?.* does not exist: bring it back"):
        list(source.rows(piece))


@pytest.mark.slow  # pyarrow itself tries for six seconds
def test_a_server_that_stops_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.places.RETRY_PAUSES", (0.1,))
    fill(tmp_path, a_png=b"i", a_txt=b"c", b_png=b"i", b_txt=b"c")
    with s3_server() as server:
        source = open_source(server.put_folder(tmp_path, "pair"))
        (piece,) = source.pieces(5)
        rows = source.rows(piece)
        assert next(rows).key == "a"
        server.stop()
        with pytest.raises(InputError) as caught:
            list(rows)
    text = str(caught.value)
    assert text.startswith(f"{source.uri}, file b.txt cannot be reached after 2 tries: look after")


@pytest.mark.parametrize("name", ["notes.txt", "a.tar.gz", "b.tsv.gz", "missing.tar", "missing"])
def test_what_is_no_source_is_a_sentence(server, tmp_path, name):
    fill(tmp_path, notes_txt=b"c", **{"a.tar_gz": b"", "b.tsv_gz": b""})
    for uri in (
        tmp_path / name,
        server.put_folder(tmp_path, "none").replace("none", f"none/{name}"),
    ):
        with pytest.raises(InputError, match=rf"source .*{name}.* (does not exist|neither)"):
            open_source(uri)


def test_pictures_are_named_only_where_a_list_needs_them(tmp_path):
    root, _ = make_folder(tmp_path / "f")
    for path in (root, root / "en" / "a.tar"):
        with pytest.raises(InputError, match=r"has its pictures with it: leave out"):
            open_source(path, tmp_path)
