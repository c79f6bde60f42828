"""Files are whole or not there."""

import errno
import json
import os

import pytest

from pipeline.files import write_bytes, write_json


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_bytes(path, b"new")
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_without_room_names_the_file_in_the_systems_words(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: ...")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_bytes(tmp_path / "value.json", b"new")
    assert caught.value.filename == str(tmp_path / "value.json")
    assert caught.value.errno == errno.ENOSPC


def test_the_same_content_gives_the_same_bytes(tmp_path):
    write_json(tmp_path / "a", {"one": 1, "two": "é"})
    write_json(tmp_path / "b", {"two": "é", "one": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
