import io
import os
import tarfile

import pytest

from data_prep.sources import all_rows, files, survey
from data_prep.sources.rows import CAPTION_LIMIT, IMAGE_LIMIT
from pipeline.console import InputError


def fill(folder, **files):
    """Write files named ``sub__name_suffix``: ``__`` is a slash and the last ``_`` a dot."""
    for name, content in files.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def make_tar(path, *members):
    """An archive of (name, bytes) and of ready-made TarInfo members."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def link(name, kind=tarfile.SYMTYPE, to="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def rows(path):
    return list(all_rows(path))


def problems(path):
    return {row.key: row.problem for row in all_rows(path)}


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

    def read(file):
        raise AssertionError("read")

    monkeypatch.setattr(files, "_read", read)
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
    scandir, read = os.scandir, files._read

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    def unreadable(file):
        if file.stem == "a":
            raise OSError(5, "Input/output error")
        return read(file)[: -1 if file.stem == "shrunk" else None]

    monkeypatch.setattr(os, "scandir", denied)
    monkeypatch.setattr(files, "_read", unreadable)
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
    for look in (survey, rows):
        with pytest.raises(InputError, match=path):
            look(tmp_path / path)


# ---- archives


def test_an_archive_gives_sorted_pairs_in_any_order(tmp_path):
    members = [("./b.txt", b"two"), ("a.png", b"A"), ("sub/b.png", b"S"), ("a.txt", b"one")]
    archive = make_tar(tmp_path / "x.tar", *members, ("sub/b.txt", b"three"), ("./b.png", b"B"))
    found = rows(archive)
    assert [row.key for row in found] == ["a", "b", "sub/b"]
    assert [row.image for row in found] == [b"A", b"B", b"S"]
    assert [row.caption for row in found] == [b"one", b"two", b"three"]


def test_long_and_unicode_names_in_an_archive(tmp_path):
    name = "日本/" + "long" * 60
    archive = make_tar(tmp_path / "x.tar", (f"{name}.png", b"i"), (f"{name}.txt", b"c"))
    assert problems(archive) == {name: None}


def test_archives_in_a_folder_are_read_in_place(tmp_path):
    fill(tmp_path, a_png=b"i", a_txt=b"c")
    (tmp_path / "en").mkdir()
    make_tar(tmp_path / "a.tar", ("0.png", b"i"), ("0.txt", b"c"))
    make_tar(tmp_path / "b.tar", ("0.png", b"i"), ("0.txt", b"c"))
    make_tar(tmp_path / "en" / "a.tar", ("0.png", b"i"), ("0.txt", b"c"))
    found = rows(tmp_path)
    assert [row.key for row in found] == ["a", "0", "0", "en/0"]
    assert {row.problem for row in found} == {None}


def test_members_that_escape_or_are_no_files_are_rejected(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    device = tarfile.TarInfo("device.png")
    device.type = tarfile.CHRTYPE
    archive = make_tar(
        tmp_path / "x.tar",
        ("../up.png", b"i"),
        ("../up.txt", b"c"),
        ("/absolute.png", b"i"),
        ("a/../../b.png", b"i"),
        ("C:\\windows.png", b"i"),
        link("soft.png", to=str(secret)),
        ("soft.txt", b"c"),
        link("hard.png", tarfile.LNKTYPE, "good.png"),
        device,
        ("good.png", b"i"),
        ("good.txt", b"c"),
    )
    assert problems(archive) == {
        "../up": "path escapes the archive",
        "/absolute": "path escapes the archive",
        "C:\\windows": "path escapes the archive",
        "a/../../b": "path escapes the archive",
        "device": "not a regular file",
        "good": None,
        "hard": "not a regular file",
        "soft": "not a regular file",
    }
    assert sorted(os.listdir(tmp_path)) == ["secret.png", "x.tar"]


def whole(path):
    image = os.urandom(3000)
    return make_tar(path, ("a.png", image), ("a.txt", b"c"), ("b.png", image), ("b.txt", b"c"))


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (100, {"x.tar": "truncated archive"}),
        (512, {"a": "truncated archive", "x.tar": "truncated archive"}),
        (2000, {"a": "truncated archive", "x.tar": "truncated archive"}),
        (5000, {"a": None, "x.tar": "truncated archive"}),
        (5120, {"a": None, "b": "truncated archive", "x.tar": "truncated archive"}),
        (7000, {"a": None, "b": "truncated archive", "x.tar": "truncated archive"}),
        (9216, {"a": None, "b": None, "x.tar": "truncated archive"}),
        (9728, {"a": None, "b": None}),
    ],
)
def test_a_truncated_archive_gives_what_is_whole_and_says_so(tmp_path, cut, expected):
    os.truncate(whole(tmp_path / "x.tar"), cut)
    make_tar(tmp_path / "y.tar", ("z.png", b"i"), ("z.txt", b"c"))
    assert problems(tmp_path) == expected | {"z": None}


def test_damage_inside_an_archive_is_no_silent_end(tmp_path):
    whole(tmp_path / "x.tar")
    with open(tmp_path / "x.tar", "r+b") as file:
        file.seek(4608)
        file.write(b"\xff" * 512)
    assert problems(tmp_path) == {"a": None, "x.tar": "damaged archive"}
    assert rows(tmp_path)[-1].detail == "no header can be read at byte 4608"


def test_joined_archives_and_other_files_are_named(tmp_path):
    for name in ("x.tar", "y.tar"):
        make_tar(tmp_path / name, ("a.png", b"i"), ("a.txt", b"c"))
    with open(tmp_path / "x.tar", "ab") as file:
        file.write((tmp_path / "y.tar").read_bytes())
    (tmp_path / "y.tar").write_bytes(b"")
    (tmp_path / "z.tar").write_bytes(os.urandom(2000))
    assert problems(tmp_path) == {
        "a": None,
        "x.tar": "damaged archive",
        "y.tar": "not a tar archive",
        "z.tar": "not a tar archive",
    }


def test_survey_sees_sizes_and_names_but_not_places(tmp_path):
    for place in ("one", "two"):
        fill(tmp_path / place, a_png=b"image", a_txt=b"c", sub__b_png=b"i")
    size, digest = survey(tmp_path / "one")
    assert size == 7 == sum(row.n_bytes for row in rows(tmp_path / "one"))
    assert survey(tmp_path / "two") == (size, digest)
    fill(tmp_path / "two", a_txt=b"cc")
    assert survey(tmp_path / "two")[1] != digest
    archive = whole(tmp_path / "x.tar")
    size, _ = survey(archive)
    assert size == 10240
    assert sum(row.n_bytes for row in rows(archive)) == 9216
