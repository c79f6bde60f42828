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
from tests.pipeline.data.helpers import PAIRS, edit, flip, pair_row, refer, write

TOKENS = {"dvae": "abc", "grid": 2, "n_vocab": 40, "crops": 1}


def make(folder, kind="tokens", n=25):
    """Shards of 10 rows with record batches of 4; the third and the last row are to validate."""
    rows = []
    for i in range(n):
        if kind == "pairs":
            rows.append(pair_row(f"k{i}", b"%d" % i, caption="½"))
        else:
            row = {"key": f"k{i}", "caption": "½", "image_sha": image_sha(b"%d" % i)}
            rows.append(row | {"image_tokens": np.arange(i, i + 4) % 40, "crops": np.ones(4)})
    made_of = TOKENS if kind == "tokens" else PAIRS | {"source": "über"}
    if kind == "reference":
        rows, made_of = refer(folder.parent / "in", [b"picture %d" % i for i in range(n)])
    write(folder, "tokens" if kind == "tokens" else "pairs", rows, 10, made_of, val={2, n - 1})
    if kind == "reference":
        (folder / "sources.json").write_text(json.dumps([str(folder.parent / "in")]))
    return folder


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(commit, "BATCH_ROWS", 4)


def run(folder, *options):
    return subprocess.run(
        [sys.executable, "-m", "data_prep.verify", str(folder), *options],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kind", ["tokens", "pairs", "reference"])
def test_a_sound_set_passes_and_any_flipped_byte_is_found(tmp_path, kind):
    folder = make(tmp_path / "set", kind)
    assert len(verify(folder)) == 25
    rng = np.random.default_rng(0)
    names = [f"shard-0000{k}.{suffix}" for k in range(3) for suffix in ("arrow", "json")]
    for name in [*names, "manifest.json"]:
        path = folder / name
        size = path.stat().st_size
        for place in {0, 8, size - 1, *rng.integers(0, size, 25).tolist()}:
            bit = int(rng.integers(8))
            flip(path, place, bit)
            with pytest.raises(InputError) as caught:
                verify(folder)
            assert str(caught.value).startswith(f"{folder}"), (name, place, bit)
            assert "\n" not in str(caught.value)
            if name.endswith(".arrow"):
                words = f"1 of 3 shards are damaged: {name} has sha256"
                assert words in str(caught.value), (name, place, bit)
            flip(path, place, bit)
    verify(folder)


def test_a_description_that_is_written_otherwise_is_found(tmp_path):
    # JSON allows it, but it is not what was written
    make(tmp_path)
    for name in ("manifest.json", "shard-00001.json"):
        path = tmp_path / name
        text = path.read_text()
        for other in (text + " ", text.replace(": 10", ":\t10"), text.replace("\n}", ',"x": 1\n}')):
            path.write_text(other)
            with pytest.raises(InputError, match=rf"{name} (is not written as|has the fields)"):
                verify(tmp_path)
        path.write_text(text)
    verify(tmp_path)


def test_all_damage_is_named(tmp_path):
    make(tmp_path, n=100)
    record = json.loads((tmp_path / "shard-00004.json").read_text())
    for k in (1, 4, 9):
        flip(tmp_path / f"shard-{k:05d}.arrow", record["batches"][1][1] + 300)
    flip(tmp_path / "shard-00004.arrow", record["batches"][2][1] + 300)
    flip(tmp_path / "shard-00009.json", 30)
    done = run(tmp_path)
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"error: {tmp_path}: 3 of 10 shards are damaged: ")
    assert [k for k in range(10) if f"shard-{k:05d}" in message] == [1, 4, 9]
    assert "damaged in record batch 1, 2 of 3" in message
    assert "Traceback" not in done.stderr
    os.truncate(tmp_path / "shard-00002.arrow", 30)
    (tmp_path / "shard-00003.arrow").unlink()
    flip(tmp_path / "shard-00005.arrow", 3)
    with pytest.raises(InputError, match=r"6 of 10 shards.*; and 1 more;") as caught:
        verify(tmp_path)
    assert "shard-00003.arrow cannot be read (No such file or directory)" in str(caught.value)
    flip(tmp_path / "shard-00005.arrow", 3)
    (tmp_path / "shard-00003.json").unlink()
    with pytest.raises(InputError, match=r"5 of 10 .*shard-00003\.json cannot be read"):
        verify(tmp_path)


def test_damage_around_the_record_batches_is_told_from_damage_in_them(tmp_path):
    make(tmp_path)
    flip(tmp_path / "shard-00000.arrow", 20)
    with pytest.raises(InputError, match="its record batches are as they were written, what lies"):
        verify(tmp_path)


def test_command_says_what_the_set_was_made_of_and_what_does_not_belong(tmp_path):
    make(tmp_path, "pairs")
    val = sum(shard["val_rows"] for shard in ShardReader(tmp_path).manifest["shards"])
    ledger = {"rows_in": 30, "rows_out": 25, "val_rows": val}
    ledger["rejects"] = {"empty file": 3, "caption blank": 2}
    (tmp_path / "rejects.json").write_text(json.dumps(ledger))
    (tmp_path / "plan").mkdir()
    for name in ("shard-00003.arrow", "shard-00003.json", ".shard-00004.arrow.12.tmp", "a.txt"):
        (tmp_path / name).write_bytes(b"old")
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (
        "made of  source: über",
        "rejected 3: empty file",
        "25 rows of pairs in 3 shards",
        ShardReader(tmp_path).fingerprint,
        "shard-00003.arrow is not part of the set",
        "shard-00003.json is not part of the set",
        ".shard-00004.arrow.12.tmp is not part of the set",
        "a.txt is not part of the set",
    ):
        assert words in done.stderr
    assert done.stderr.count("is not part of the set") == 4


def test_pictures_are_read_where_they_stand_unless_told_not_to(tmp_path):
    folder = make(tmp_path / "set", "reference")
    flip(tmp_path / "in/all.bin", 30)
    flip(tmp_path / "in/all.bin", 150)
    words = "every shard is as written, but 2 of 25 pictures are not where .*'p3': bytes"
    with pytest.raises(InputError, match=words):
        verify(folder)
    (tmp_path / "in/all.bin").unlink()
    done = run(folder)
    assert done.returncode == 2
    assert "every shard is as written, but 25 of 25 pictures are not where they" in done.stderr
    done = run(folder, "--no-sources")
    assert done.returncode == 0
    assert "25 rows of pairs in 3 shards" in done.stderr


def test_mistakes_of_a_writer_are_found_behind_right_hashes(tmp_path, monkeypatch):
    # a writer without its own checks, so that only the reading side can see it
    monkeypatch.setattr(commit.ShardFile, "_check", lambda *_: None)
    monkeypatch.setitem(TOKENS, "n_vocab", 27)
    make(tmp_path / "tokens", "tokens")
    with pytest.raises(
        InputError, match=r"shard-00002\.arrow holds token 27 of a vocabulary of 27"
    ):
        verify(tmp_path / "tokens")
    with ShardWriter(tmp_path / "pairs", "pairs", PAIRS) as writer:
        writer.add(pair_row("k7", b"picture", image_sha=image_sha(b"other")))
    with pytest.raises(InputError, match="picture 'k7' does not have its image_sha"):
        verify(tmp_path / "pairs")


def test_missing_and_mismatched_files_are_named(tmp_path):
    make(tmp_path)
    sidecar = tmp_path / "shard-00001.json"
    text = sidecar.read_text()
    edit(sidecar, made_of=TOKENS | {"dvae": "abd"})
    with pytest.raises(InputError, match=r"shard-00001\.json has made_of .*abd.*manifest says"):
        verify(tmp_path)
    sidecar.write_text(text)
    os.truncate(tmp_path / "shard-00000.arrow", 30)
    with pytest.raises(InputError, match=r"shard-00000\.arrow has sha256"):
        verify(tmp_path)
    with pytest.raises(InputError, match=r"manifest\.json cannot be read"):
        verify(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("ledger", "words"),
    [
        ({"rows_in": 31, "rows_out": 25, "rejects": {"a": 5}}, "31 rows in, 5 rejects and 25 rows"),
        ({"rows_in": 29, "rows_out": 24, "rejects": {"a": 5}}, "24 rows out, the set has 25"),
        ({"rows_in": 25, "rows_out": 25, "rejects": {}, "val_rows": 24}, "24 rows for validation"),
        ({"rows_in": 25, "rows_out": 25}, "garbles 'rejects'"),
        ({"rows_in": 25, "rows_out": 25, "rejects": []}, "garbles"),
        ([], "garbles"),
    ],
    ids=["sum", "rows", "val-rows", "no-rejects", "list", "no-object"],
)
def test_a_ledger_that_does_not_add_up_is_found(tmp_path, ledger, words):
    make(tmp_path, "pairs")
    assert check_ledger(verify(tmp_path)) is None
    if isinstance(ledger, dict):
        ledger = {"val_rows": 3} | ledger
    (tmp_path / "rejects.json").write_text(json.dumps(ledger))
    with pytest.raises(InputError, match=words):
        verify(tmp_path)
