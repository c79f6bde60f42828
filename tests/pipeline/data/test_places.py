import errno
import os

import pytest

from pipeline.console import InputError
from pipeline.data import places
from pipeline.data.places import FileInfo, FileProblem, Place


def fill(folder, **files):
    for name, content in files.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_files_of_one_stem_follow_one_another(tmp_path):
    fill(
        tmp_path, **{"b_png": b"12", "b_txt": b"1", "b-c_png": b"", "b__a_png": b"123", ".h_p": b""}
    )
    found = list(Place(tmp_path).files())
    assert found == [
        FileInfo("b.png", 2),
        FileInfo("b.txt", 1),
        FileInfo("b-c.png", 0),
        FileInfo("b/a.png", 3),
    ]
    assert list(Place(tmp_path / "b.png").files()) == [FileInfo("", 2)]


def test_any_range_of_a_file_can_be_read(tmp_path):
    data = os.urandom(1000)
    place = Place(fill(tmp_path, sub__a_bin=data))
    for offset in (0, 1, 999, 1000):
        for size in (0, 1, 1000 - offset, None):
            if size is not None and offset + size > 1000:
                continue
            expected = data[offset:] if size is None else data[offset : offset + size]
            assert place.read("sub/a.bin", offset, size) == expected
    assert Place(tmp_path / "sub" / "a.bin").read() == data
    with pytest.raises(FileProblem, match=r"it has 1000 bytes, bytes 1 to 1001 were asked for"):
        place.read("sub/a.bin", 1, 1000)


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("no.png", "missing"),
        ("a.png/b", "missing"),
        ("nul\0.png", "missing"),
        ("half\ud800.png", "missing"),
        ("../a.png", "escapes"),
        ("sub/../../a.png", "escapes"),
        ("/etc/passwd", "escapes"),
        ("sub", "not a regular file"),
        ("pipe.png", "not a regular file"),
        ("loop.png", "cannot be read"),
        ("long" * 100, "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, file, problem):
    fill(tmp_path, a_png=b"i", sub__b_png=b"i")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(FileProblem, match=tmp_path.name) as caught:
        Place(tmp_path).read(file)
    assert caught.value.problem == problem


def test_a_place_that_is_gone_is_no_matter_of_one_file(tmp_path):
    with pytest.raises(InputError, match=r"gone does not exist") as caught:
        Place(tmp_path / "gone").read("a.png")
    assert not isinstance(caught.value, FileProblem)
    with pytest.raises(InputError, match=r"gone does not exist"):
        list(Place(tmp_path / "gone").files())


def test_a_local_file_is_its_own_copy(tmp_path):
    fill(tmp_path, a_png=b"i")
    with Place(tmp_path).local("a.png") as path:
        assert path == tmp_path / "a.png"
    assert (tmp_path / "a.png").exists()


@pytest.fixture
def failing(monkeypatch):
    """Let opening a file fail: ``failing(errno, n)`` so many times; returns the pauses."""
    real, slept = os.open, []

    def start(number, n):
        left = [n]

        def opened(path, *args, **kwargs):
            if left[0] and str(path).endswith("a.png"):
                left[0] -= 1
                raise OSError(number, os.strerror(number))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(places.time, "sleep", slept.append)
        return slept

    return start


def test_a_network_disk_is_asked_again(tmp_path, failing):
    fill(tmp_path, a_png=b"i")
    assert failing(errno.ESTALE, 2) == []
    assert Place(tmp_path).read("a.png") == b"i"
    assert failing(errno.ESTALE, 0) == [1.0, 4.0]
    failing(errno.ESTALE, 99)
    with pytest.raises(InputError, match=r"a\.png cannot be reached after 4 tries") as caught:
        Place(tmp_path).read("a.png")
    assert not isinstance(caught.value, FileProblem)


def test_what_this_machine_lacks_is_no_matter_of_a_file(tmp_path, failing):
    fill(tmp_path, a_png=b"i")
    failing(errno.EMFILE, 99)
    with pytest.raises(OSError, match="Too many open files") as caught:
        Place(tmp_path).read("a.png")
    assert not isinstance(caught.value, InputError)


def test_the_first_of_several_files(tmp_path):
    fill(tmp_path, b_png=b"i", c_png=b"i")
    place = Place(tmp_path)
    assert place.first(["a.png", "b.png", "c.png"]) == "b.png"
    assert place.first(["a.png", "half\ud800.png", "nul\0"]) is None
