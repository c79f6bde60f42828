import json
import os
import subprocess
import sys

import numpy as np
import pytest

from data_prep.verify import check_ledger, verify
from pipeline.console import InputError
from pipeline.data import commit
from pipeline.data.shards import ShardReader, ShardWriter, image_sha

TOKENS = {"dvae": "abc", "grid": 2, "n_vocab": 40, "crops": 1}


def write(folder, kind, n=25):
    made_of = TOKENS if kind == "tokens" else {"source": "über"}
    with ShardWriter(folder, kind, made_of, rows_per_shard=10) as writer:
        for i in range(n):
            row = {"key": f"k{i}", "caption": "½", "image_sha": image_sha(b"%d" % i)}
            if kind == "tokens":
                row |= {"image_tokens": np.arange(i, i + 4) % 40, "crops": np.ones(4)}
            else:
                row |= {"image": b"%d" % i, "width": 1, "height": 1}
            writer.add(row)
    return folder


def flip(path, place, bit=0):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run(folder):
    return subprocess.run(
        [sys.executable, "-m", "data_prep.verify", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kind", ["tokens", "pairs"])
def test_a_sound_set_passes_and_any_flipped_byte_is_found(tmp_path, kind):
    write(tmp_path, kind)
    assert len(verify(tmp_path)) == 25
    size = (tmp_path / "shard-00001.arrow").stat().st_size
    places = {*np.random.default_rng(0).integers(0, size, 60).tolist(), 0, 8, size - 1}
    for place in places:
        path = tmp_path / "shard-00001.arrow"
        flip(path, place, bit=place % 8)
        with pytest.raises(InputError, match=r"1 of 3 shards are damaged: shard-00001\.arrow has"):
            verify(tmp_path)
        flip(path, place, bit=place % 8)
    verify(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00002.json"])
def test_a_flipped_byte_of_a_description_is_found(tmp_path, name):
    write(tmp_path, "tokens")
    path = tmp_path / name
    before, size = json.loads(path.read_text()), path.stat().st_size
    found = 0
    for place in range(0, size, 3):
        flip(path, place)
        try:
            same = json.loads(path.read_text()) == before
        except ValueError:
            same = False
        if not same:
            found += 1
            with pytest.raises(InputError):
                verify(tmp_path)
        flip(path, place)
    assert found > size / 6
    verify(tmp_path)


def test_every_damaged_shard_is_named(tmp_path, caplog):
    write(tmp_path, "tokens", 100)
    for k in (1, 4, 9):
        flip(tmp_path / f"shard-{k:05d}.arrow", 700)
    done = run(tmp_path)
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"error: {tmp_path}: 3 of 10 shards are damaged: ")
    assert [k for k in range(10) if f"shard-{k:05d}" in message] == [1, 4, 9]
    assert "Traceback" not in done.stderr
    for k in (2, 3, 5):
        flip(tmp_path / f"shard-{k:05d}.arrow", 700)
    with pytest.raises(InputError, match=r"6 of 10 shards.*; and 1 more;"):
        verify(tmp_path)


def test_command_says_what_the_set_was_made_of(tmp_path):
    write(tmp_path, "pairs")
    ledger = {"rows_in": 30, "rows_out": 25, "rejects": {"empty file": 3, "caption blank": 2}}
    (tmp_path / "rejects.json").write_text(json.dumps(ledger))
    (tmp_path / "shard-00003.arrow").write_bytes(b"old")
    (tmp_path / ".shard-00004.arrow.12345678.tmp").write_bytes(b"old")
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (
        "made of  source: über",
        "rejected 3: empty file",
        "25 rows of pairs in 3 shards",
        ShardReader(tmp_path).fingerprint,
        "shard-00003.arrow is not part of the set",
        "12345678.tmp is not part of the set",
    ):
        assert words in done.stderr
    assert done.stderr.count("is not part of the set") == 2


def test_mistakes_of_a_writer_are_found_behind_right_hashes(tmp_path, monkeypatch):
    # a writer without its own checks, so that only the reading side can see it
    monkeypatch.setattr(commit.ShardFile, "_check", lambda *_: None)
    monkeypatch.setitem(TOKENS, "n_vocab", 27)
    write(tmp_path / "tokens", "tokens")
    with pytest.raises(
        InputError, match=r"shard-00002\.arrow holds token 27 of a vocabulary of 27"
    ):
        verify(tmp_path / "tokens")
    with ShardWriter(tmp_path / "pairs", "pairs", {}) as writer:
        row = {"key": "k7", "caption": "a", "image": b"picture", "width": 1, "height": 1}
        writer.add(row | {"image_sha": image_sha(b"other")})
    with pytest.raises(InputError, match="picture 'k7' does not have its image_sha"):
        verify(tmp_path / "pairs")


def test_missing_and_mismatched_files_are_named(tmp_path):
    write(tmp_path, "tokens")
    sidecar = tmp_path / "shard-00001.json"
    text = sidecar.read_text()
    sidecar.unlink()
    with pytest.raises(InputError, match=r"shard-00001\.json cannot be read"):
        verify(tmp_path)
    sidecar.write_text(text)
    edit(sidecar, made_of=TOKENS | {"dvae": "abd"})
    with pytest.raises(InputError, match=r"shard-00001\.json and the manifest differ"):
        verify(tmp_path)
    sidecar.write_text(text)
    os.truncate(tmp_path / "shard-00000.arrow", 30)
    with pytest.raises(InputError, match=r"shard-00000\.arrow has 30 bytes"):
        verify(tmp_path)
    with pytest.raises(InputError, match=r"manifest\.json cannot be read"):
        verify(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("ledger", "words"),
    [
        ({"rows_in": 31, "rows_out": 25, "rejects": {"a": 5}}, "31 rows in, 5 rejects and 25 rows"),
        ({"rows_in": 29, "rows_out": 24, "rejects": {"a": 5}}, "24 rows out, the set has 25"),
        ({"rows_in": 25, "rows_out": 25}, "garbles 'rejects'"),
        ({"rows_in": 25, "rows_out": 25, "rejects": []}, "garbles"),
        ([], "garbles"),
    ],
    ids=["sum", "rows", "no-rejects", "list", "no-object"],
)
def test_a_ledger_that_does_not_add_up_is_found(tmp_path, ledger, words):
    write(tmp_path, "pairs")
    assert check_ledger(verify(tmp_path)) is None
    (tmp_path / "rejects.json").write_text(json.dumps(ledger))
    with pytest.raises(InputError, match=words):
        verify(tmp_path)
