import os
from pathlib import Path

import pytest

from data_prep.sources import CAPTION_LIMIT, IMAGE_LIMIT, open_source
from pipeline.console import InputError
from pipeline.data.places import Place
from tests.data_prep.sources.helpers import fill, make_tar, problems, rows


def test_a_folder_gives_sorted_pairs_with_path_keys(tmp_path):
    fill(tmp_path, b_png=b"B", b_txt=b"two", sub__b_jpg=b"S", sub__b_txt=b"three", a_gif=b"A")
    fill(tmp_path, a_txt=b"one")
    found = rows(tmp_path)
    assert [row.key for row in found] == ["a", "b", "sub/b"]
    assert [row.image for row in found] == [b"A", b"B", b"S"]
    assert [row.caption for row in found] == [b"one", b"two", b"three"]
    assert {row.problem for row in found} == {None}


def test_rows_come_sorted_by_key_across_folders(tmp_path):
    for name in ("a-b", "a/x", "a", "a0", "B", "a/W/z", "é", "a.b"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"i")
        path.with_name(path.name[:-4] + ".txt").write_bytes(b"c")
    keys = [row.key for row in rows(tmp_path)]
    assert keys == sorted(keys) == ["B", "a", "a-b", "a.b", "a/W/z", "a/x", "a0", "é"]


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "Png", "webp", "gif", "bmp", "tif", "TIFF"])
def test_every_suffix_counts_in_either_case(tmp_path, suffix):
    fill(tmp_path, **{f"a_{suffix}": b"image", "a_TXT": b"caption"})
    (row,) = rows(tmp_path)
    assert (row.key, row.image, row.caption, row.problem) == ("a", b"image", b"caption", None)


def test_halves_and_doubles_are_named(tmp_path):
    fill(tmp_path, a_png=b"i", b_txt=b"c", c_png=b"i", c_jpg=b"i", c_txt=b"c")
    fill(tmp_path, d_png=b"i", d_txt=b"c", d_TXT=b"c", e_json=b"{}", readme_md=b"")
    assert problems(tmp_path) == {
        "a": "caption missing",
        "b": "image missing",
        "c": "several images of one name",
        "d": "several captions of one name",
    }
    assert all(row.image is None and row.caption is None for row in rows(tmp_path))


def test_hidden_files_are_no_rows(tmp_path):
    fill(tmp_path, **{"._a_png": b"mac", ".git__b_png": b"git", "a_png": b"i", "a_txt": b"c"})
    assert problems(tmp_path) == {"a": None}
    archive = make_tar(tmp_path / "x.tar", ("._b.png", b""), ("__c/.d/e.png", b""), ("f.cls", b"1"))
    assert problems(archive) == {}


@pytest.mark.parametrize(
    ("name", "limit", "problem"),
    [("txt", CAPTION_LIMIT, "caption too long"), ("png", IMAGE_LIMIT, "image file too large")],
)
def test_huge_files_are_not_read(tmp_path, monkeypatch, name, limit, problem):
    fill(tmp_path, a_png=b"i", a_txt=b"c")
    os.truncate(tmp_path / f"a.{name}", limit)
    assert problems(tmp_path) == {"a": None}
    os.truncate(tmp_path / f"a.{name}", limit + 1)

    def pread(*args):
        raise AssertionError("read")

    monkeypatch.setattr(os, "pread", pread)
    assert problems(tmp_path) == {"a": problem}


def test_unicode_and_undecodable_names(tmp_path):
    fill(tmp_path, **{"кошка_png": b"i", "кошка_txt": b"c", "日本__犬 🐶_png": b"i"})
    fill(tmp_path, **{"日本__犬 🐶_txt": b"c"})
    for name in (b"bad\xff.png", b"bad\xff.txt"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"x")
    folder = os.path.join(os.fsencode(tmp_path), b"dir\xfe")
    os.mkdir(folder)
    with open(os.path.join(folder, b"a.png"), "wb") as file:
        file.write(b"x")
    assert problems(tmp_path) == {
        "bad\\udcff": "file name not UTF-8",
        "dir\\udcfe/a": "file name not UTF-8",
        "кошка": None,
        "日本/犬 🐶": None,
    }


def test_links_are_followed_but_loops_end(tmp_path):
    store = fill(tmp_path / "store", a_png=b"i", a_txt=b"c")
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (root / "linked").symlink_to(store)
    (root / "b.png").symlink_to(store / "a.png")
    (root / "b.txt").symlink_to(store / "a.txt")
    (root / "c.png").symlink_to("nowhere.png")
    (root / "d.png").symlink_to("d.png")
    (root / "deep" / "up").symlink_to("..")
    (root / "deep" / "e").symlink_to("e")
    assert problems(root) == {
        "b": None,
        "c": "broken link",
        "d": "link loop",
        "deep/up": "link loop",
        "linked/a": None,
    }


def test_pipes_and_devices_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.tar")
    assert problems(tmp_path) == {"a": "not a regular file", "b.tar": "not a regular file"}


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    fill(tmp_path, a_png=b"i", a_txt=b"c", locked__b_png=b"i", z_png=b"i", z_txt=b"c")
    fill(tmp_path, shrunk_png=b"i", shrunk_txt=b"c")
    scandir, pread = os.scandir, os.pread

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    def unreadable(descriptor, n_bytes, offset):
        stem = Path(os.readlink(f"/proc/self/fd/{descriptor}")).stem
        if stem == "a":
            raise OSError(5, "Input/output error")
        return pread(descriptor, n_bytes, offset)[: -1 if stem == "shrunk" else None]

    monkeypatch.setattr(os, "scandir", denied)
    monkeypatch.setattr(os, "pread", unreadable)
    assert problems(tmp_path) == {
        "a": "file cannot be read",
        "locked": "folder cannot be read",
        "shrunk": "file cannot be read",
        "z": None,
    }


def test_a_tree_without_end_is_cut(tmp_path):
    folder = tmp_path.joinpath(*["d"] * 70)
    folder.mkdir(parents=True)
    (found,) = rows(tmp_path)
    assert (found.problem, found.key.count("d")) == ("folder cannot be read", 64)


@pytest.mark.parametrize("path", ["missing", "missing.tar", "notes.txt", "a.tar.gz"])
def test_a_missing_or_wrong_source_is_an_input_error(tmp_path, path):
    fill(tmp_path, notes_txt=b"c", **{"a.tar_gz": b""})
    with pytest.raises(InputError, match=path):
        open_source(tmp_path / path)


def test_archives_in_a_folder_are_read_in_place(tmp_path):
    fill(tmp_path, a_png=b"i", a_txt=b"c")
    (tmp_path / "en").mkdir()
    make_tar(tmp_path / "a.tar", ("0.png", b"i"), ("0.txt", b"c"))
    make_tar(tmp_path / "b.tar", ("0.png", b"i"), ("0.txt", b"c"))
    make_tar(tmp_path / "en" / "a.tar", ("0.png", b"i"), ("0.txt", b"c"))
    found = rows(tmp_path)
    assert [row.key for row in found] == ["a", "0", "0", "en/0"]
    assert {row.problem for row in found} == {None}


def test_pieces_take_what_their_files_do(tmp_path):
    fill(tmp_path, a_png=b"image", a_txt=b"c", sub__b_png=b"i")
    (piece,) = open_source(tmp_path).pieces(10)
    assert piece.n_bytes == 7 == sum(row.n_bytes for row in rows(tmp_path))


def test_what_changed_since_the_listing_is_a_row_with_a_problem(tmp_path):
    fill(tmp_path, a_png=b"i", a_txt=b"c", b_png=b"i", b_txt=b"c", c_png=b"i", c_txt=b"c")
    fill(tmp_path, d_png=b"i", d_txt=b"c")
    source = open_source(tmp_path)
    (piece,) = source.pieces(10)
    (tmp_path / "a.txt").unlink()
    fill(tmp_path, b_png=b"longer", e_png=b"i", e_txt=b"c")
    os.truncate(tmp_path / "c.png", IMAGE_LIMIT + 1)
    found = {row.key: (row.problem, row.detail) for row in source.rows(piece)}
    assert found == {
        "a": ("file cannot be read", ".txt: there is no such file"),
        "b": ("file cannot be read", ".png has 6 bytes and had 1 when it was listed"),
        "c": ("file cannot be read", f".png: {IMAGE_LIMIT + 1} bytes, the limit is {IMAGE_LIMIT}"),
        "d": (None, ""),
    }


def test_a_folder_that_is_gone_loses_no_row_in_silence(tmp_path):
    root = fill(tmp_path / "root", a_png=b"i", a_txt=b"c")
    source = open_source(root)
    (piece,) = source.pieces(10)
    root.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"root does not exist: bring it back"):
        list(source.rows(piece))


def test_units_are_pieces_of_their_own_and_stems_go_by_the_number(tmp_path):
    for i in range(7):
        fill(tmp_path, **{f"{i}_png": b"image", f"{i}_txt": b"cap"})
    make_tar(tmp_path / "3.tar", ("x.png", b"i"), ("x.txt", b"c"))
    pieces = list(open_source(tmp_path).pieces(2))
    assert [(piece.unit, piece.n_rows, piece.n_bytes) for piece in pieces] == [
        ("", 2, 16),
        ("", 2, 16),
        ("3.tar", -1, 10240),
        ("", 2, 16),
        ("", 1, 8),
    ]


def test_suffixes_keep_their_case_in_what_refers_to_them(tmp_path):
    fill(tmp_path, a_JPG=b"image", a_TXT=b"caption")
    (row,) = rows(tmp_path)
    assert (row.file, row.offset) == ("a.JPG", 0)
    assert Place(tmp_path).read(row.file) == b"image"


def test_an_archive_with_an_undecodable_name_is_named(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"x\xff.tar")
    with open(path, "wb") as file:
        file.write(make_tar(tmp_path / "y.tar", ("a.png", b"i"), ("a.txt", b"c")).read_bytes())
    assert problems(tmp_path) == {"x\\udcff.tar": "file name not UTF-8", "a": None}
