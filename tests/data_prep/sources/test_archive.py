import io
import json
import os
import tarfile

import pytest

from data_prep.sources import CAPTION_LIMIT, open_source
from pipeline.console import InputError
from pipeline.data.places import Place
from tests.data_prep.sources.helpers import make_tar, problems, rows


def link(name, kind=tarfile.SYMTYPE, to="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


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


def test_headers_count_as_what_a_row_takes(tmp_path):
    archive = whole(tmp_path / "x.tar")
    (piece,) = open_source(archive).pieces(10)
    assert piece.n_bytes == 10240
    assert sum(row.n_bytes for row in rows(archive)) == 9216


def note(**content):
    return json.dumps(content).encode()


def test_the_caption_of_a_json_counts_where_there_is_no_txt(tmp_path):
    archive = make_tar(
        tmp_path / "x.tar",
        *[("0.jpg", b"i0"), ("0.txt", b"text"), ("0.json", note(caption="note"))],
        *[("1.jpg", b"i1"), ("1.json", note(caption="é a note"))],
        *[("2.jpg", b"i2"), ("2.json", note(caption=None))],
        *[("3.jpg", b"i3"), ("3.json", b"{")],
        *[("4.jpg", b"i4"), ("4.json", b"[" * 100_000)],
        *[("5.jpg", b"i5"), ("5.json", note(caption="x" * (CAPTION_LIMIT + 1)))],
        *[("6.jpg", b"i6"), ("6.json", note(pad="x" * (1 << 20), caption="c"))],
        *[("7.jpg", b"i7"), ("7.txt", b"c"), ("7.json", b"{")],
        *[("8.json", note(caption="no picture")), ("9.cls", b"1"), ("stats.json", b"{}")],
        *[("a.txt", b"c"), ("a.json", note(caption="c")), ("b.jpg", b"i")],
    )
    found = {row.key: (row.caption, row.problem, row.detail) for row in rows(archive)}
    assert found.pop("0") == (b"text", None, "")
    assert found.pop("1") == ("é a note".encode(), None, "")
    no_txt = "no .txt beside the .jpg"
    missing = (None, "caption missing", f'{no_txt}, and no "caption" in the .json')
    assert found.pop("2") == missing
    for key in "346":
        caption, problem, detail = found.pop(key)
        assert (caption, problem) == (None, "caption missing")
        assert detail.startswith(f"{no_txt}, and the .json cannot be read: ")
    assert found.pop("5")[:2] == (None, "caption too long")
    assert found.pop("7") == (b"c", None, "")
    assert found.pop("a")[:2] == (None, "image missing")
    assert found.pop("b")[:2] == (None, "caption missing")
    assert not found


def test_rows_refer_to_bytes_inside_the_archive(tmp_path):
    archive = whole(tmp_path / "x.tar")
    for row in rows(archive):
        data = archive.read_bytes()[row.offset : row.offset + 3000]
        assert row.image == data == Place(tmp_path).read(row.file, row.offset, 3000)


def test_an_archive_that_is_gone_or_another_stops_the_job(tmp_path):
    archive = whole(tmp_path / "x.tar")
    source = open_source(archive)
    (piece,) = source.pieces(10)
    with open(archive, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(InputError, match=r"x\.tar: it has 10752 bytes and had 10240"):
        list(source.rows(piece))
    archive.unlink()
    with pytest.raises(InputError, match=r"x\.tar: there is no such file; bring it back"):
        list(source.rows(piece))


def test_an_archive_that_cannot_be_opened_is_a_row(tmp_path, monkeypatch):
    whole(tmp_path / "x.tar")
    source = open_source(tmp_path)
    (piece,) = source.pieces(10)
    real = os.open

    def denied(path, *args, **kwargs):
        if str(path).endswith("x.tar"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    (row,) = source.rows(piece)
    assert (row.key, row.problem) == ("x.tar", "file cannot be read")
    assert (row.detail, row.n_bytes) == ("Permission denied", 10240)


def pairs_tar(path, names="abcdef"):
    members = [(f"{n}.{kind}", n.encode() * 900) for n in names for kind in ("png", "txt")]
    return make_tar(path, *members)


def test_an_archive_that_goes_on_as_zeros_says_so(tmp_path):
    archive = pairs_tar(tmp_path / "x.tar")
    whole = archive.read_bytes()
    # preallocated and not downloaded to its end; from the middle of a member, and from a header
    for cut in (4000, 4096 + 2 * 1536):
        archive.write_bytes(whole[:cut].ljust(1 << 20, b"\0"))
        found = problems(archive)
        assert found["x.tar"] == "truncated archive"
        assert None in found.values()
    # padded as other programs do it
    archive.write_bytes(whole.ljust(len(whole) // 65_536 * 65_536 + 65_536, b"\0"))
    assert problems(archive) == dict.fromkeys("abcdef")


@pytest.mark.parametrize("gap", [0, 1024, 20 * 1024, 3 << 20])
def test_what_follows_an_end_is_noticed_however_far_it_is(tmp_path, gap):
    archive, other = pairs_tar(tmp_path / "x.tar", "abc"), pairs_tar(tmp_path / "y.tar", "def")
    archive.write_bytes(archive.read_bytes() + bytes(gap) + other.read_bytes())
    assert problems(archive)["x.tar"] == "damaged archive"


def test_a_header_that_leads_backwards_ends(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("readme"))
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = 10, {"size": "-1536"}
        tar.addfile(info, io.BytesIO(b"0123456789"))
    assert problems(path)["x.tar"] == "not a tar archive"
