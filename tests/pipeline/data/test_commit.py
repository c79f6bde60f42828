import errno
import json
import os
import subprocess
import sys
import zlib
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc

from pipeline.console import InputError
from pipeline.data import commit
from pipeline.data.commit import ShardWriter, write_manifest, write_shard
from pipeline.data.shards import ShardReader
from tests.pipeline.data.helpers import PAIRS, TOKENS, pair_rows, token_rows, write
from tests.tiny import ROOT


def arrow_file(path):
    return ipc.open_file(pa.OSFile(str(path)))


def test_record_batches_hold_2048_rows(tmp_path):
    write(tmp_path, "tokens", token_rows(1) * 4100)
    file = arrow_file(tmp_path / "shard-00000.arrow")
    assert [file.get_batch(i).num_rows for i in range(3)] == [2048, 2048, 4]
    assert file.schema.field("image_tokens").type == pa.list_(pa.uint16(), 18)


def test_record_batches_of_pictures_are_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "BATCH_BYTES", 400)
    write(tmp_path, "pairs", pair_rows(30), rows_per_shard=16)
    file = arrow_file(tmp_path / "shard-00000.arrow")
    sizes = [
        sum(map(len, file.get_batch(i).column("image").to_pylist()))
        for i in range(file.num_record_batches)
    ]
    assert len(sizes) > 2
    # a batch closes with the row that fills it
    assert max(sizes) < 400 + 300
    assert min(sizes[:-1]) >= 400


def test_validation_rows_come_last_in_every_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "BATCH_ROWS", 4)
    val = {0, 1, 9, 10, 15, 19, 22}
    manifest = write(tmp_path / "a", "tokens", token_rows(25), 10, val=val)
    assert [shard["val_rows"] for shard in manifest["shards"]] == [3, 3, 1]
    found = []
    for k, start in enumerate((0, 10, 20)):
        ids = range(start, min(start + 10, 25))
        keys = arrow_file(tmp_path / f"a/shard-0000{k}.arrow").read_all()["key"].to_pylist()
        expected = [i for i in ids if i not in val] + [i for i in ids if i in val]
        assert keys == [f"k{i:05d}" for i in expected]
        found.append(expected)
    # written apart, the same bytes
    (tmp_path / "b").mkdir()
    for k, (start, shard) in enumerate(zip((0, 10, 20), manifest["shards"], strict=True)):
        rows = token_rows(25)[start : start + 10]
        sides = [
            [row for i, row in enumerate(rows, start) if (i in val) == is_val]
            for is_val in (False, True)
        ]
        assert write_shard(tmp_path / "b", k, "tokens", sides[0], TOKENS, sides[1]) == shard
    assert write_manifest(tmp_path / "b", "tokens", 3, TOKENS) == manifest


def test_the_same_rows_give_the_same_bytes(tmp_path):
    a = write(tmp_path / "a", "tokens", token_rows(30), 20)
    b = write(tmp_path / "b", "tokens", token_rows(30), 20, dict(reversed(TOKENS.items())))
    c = write(tmp_path / "c", "tokens", token_rows(30, seed=1), 20)
    assert a == b
    assert a["fingerprint"] != c["fingerprint"]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "manifest.json",
        "shard-00000.arrow",
        "shard-00000.json",
        "shard-00001.arrow",
        "shard-00001.json",
    ]


def test_manifest_and_sidecar_tell_the_truth(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "BATCH_ROWS", 8)
    manifest = write(tmp_path, "tokens", token_rows(30), 20, val={3, 4, 25})
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    for shard, n_rows in zip(manifest["shards"], ([8, 8, 4], [8, 2]), strict=True):
        data = (tmp_path / shard["name"]).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == sha256(data).hexdigest()
        sidecar = json.loads((tmp_path / shard["name"]).with_suffix(".json").read_text())
        assert {name: sidecar[name] for name in shard} == shard
        assert (sidecar["kind"], sidecar["made_of"]) == ("tokens", TOKENS)
        # the record batches as Arrow finds them
        file = arrow_file(tmp_path / shard["name"])
        assert [rows for rows, *_ in sidecar["batches"]] == n_rows
        for i, (rows, at, size, crc) in enumerate(sidecar["batches"]):
            message = data[at : at + size]
            assert zlib.crc32(message) == crc
            batch = ipc.read_record_batch(ipc.read_message(message), file.schema)
            assert batch.equals(file.get_batch(i))
            assert batch.num_rows == rows
        ends = [at + size for _, at, size, _ in sidecar["batches"]]
        assert ends[:-1] == [at for _, at, _, _ in sidecar["batches"][1:]]
    both = "".join(f"{s['sha256']} {s['val_rows']}\n" for s in manifest["shards"]).encode()
    assert manifest["fingerprint"] == sha256(both).hexdigest()
    assert manifest["rows"] == 30


def test_a_writer_that_fails_leaves_no_manifest_and_no_half_shard(tmp_path):
    def interrupted():
        yield from token_rows(30)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "tokens", interrupted(), 20)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["shard-00000.arrow", "shard-00000.json"]
    with pytest.raises(InputError, match=r"manifest\.json cannot be read"):
        ShardReader(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, 7, "tokens", interrupted(), TOKENS)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, 7, "tokens", [], TOKENS, interrupted())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    # the next run replaces what is there
    assert write(tmp_path, "tokens", token_rows(3, seed=5))["rows"] == 3
    assert len(ShardReader(tmp_path)) == 3


def test_shards_written_apart_make_the_same_set(tmp_path):
    rows = token_rows(30)
    whole = write(tmp_path / "a", "tokens", rows, 20)
    (tmp_path / "b").mkdir()
    write_shard(tmp_path / "b", 1, "tokens", iter(rows[20:]), TOKENS)
    with pytest.raises(InputError, match=r"shard-00000\.json"):
        write_manifest(tmp_path / "b", "tokens", 2, TOKENS)
    write_shard(tmp_path / "b", 0, "tokens", rows[:20], TOKENS)
    assert write_manifest(tmp_path / "b", "tokens", 2, TOKENS) == whole
    with pytest.raises(InputError, match="was made of"):
        write_manifest(tmp_path / "b", "tokens", 2, TOKENS | {"dvae": "e" * 64})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"caption": None}, "1 missing values"),
        ({"caption": "a\ud800"}, "'caption' of rows 'k00000'"),
        ({"image_tokens": np.full(18, 500)}, r"500\.\.500, tokens are whole numbers in 0\.\.499"),
        ({"image_tokens": np.full(18, -1)}, r"-1\.\.-1"),
        ({"image_tokens": np.full(18, 1.5)}, "float64"),
        ({"image_tokens": np.zeros(17, np.uint16)}, r"\(1, 17\).*\(1, 18\)"),
        ({"image_sha": b"short"}, "'image_sha'"),
        ({"phash": 1}, "columns"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("val", [(), (0,)], ids=["train", "val"])
def test_a_wrong_row_is_named(tmp_path, change, words, val):
    with pytest.raises(InputError, match=words):
        write(tmp_path, "tokens", [token_rows(1)[0] | change], val=val)
    assert not list(tmp_path.glob("*"))


def test_a_wrong_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="'vectors' is unknown"):
        ShardWriter(tmp_path, "vectors", {})
    with pytest.raises(InputError, match=r"'upscale'\] of a pair set is None"):
        ShardWriter(tmp_path, "pairs", PAIRS | {"upscale": None})
    with pytest.raises(InputError, match="rows_per_shard is 0"):
        ShardWriter(tmp_path, "tokens", TOKENS, 0)
    write(tmp_path, "tokens", token_rows(1))
    with pytest.raises(InputError, match="holds a finished set"):
        ShardWriter(tmp_path, "tokens", TOKENS)


FILL = """
import resource, sys
from pathlib import Path
from pipeline.console import command
from pipeline.data.commit import write_shard
from tests.pipeline.data.helpers import TOKENS, token_rows
folder = Path(sys.argv[1])
def main():
    for k in range(3):
        write_shard(folder, k, "tokens", token_rows(1) * (50 if k < 2 else 5000), TOKENS)
# the system signals it as it does a full disk: a write fails
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
command(main)
"""


def test_a_file_without_room_is_a_sentence_and_leaves_what_is_committed(tmp_path):
    command = [sys.executable, "-c", FILL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    path = tmp_path / "shard-00002.arrow"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {path}: File too large; raise ulimit -f and start again: what is committed stays\n"
    )
    names = [f"shard-0000{k}.{suffix}" for k in (0, 1) for suffix in ("arrow", "json")]
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("moment", ["write_batch", "close", "fsync", "sidecar"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_at_any_moment_names_the_shard(tmp_path, monkeypatch, moment, code):
    def full(*_):
        raise OSError(code, "Error writing bytes to file. Detail: ...")

    class Writer:
        """Arrow's, until the disk is full."""

        def __init__(self, writer):
            self._writer = writer

        def write_batch(self, batch):
            full() if moment == "write_batch" else self._writer.write_batch(batch)

        def close(self):
            full() if moment == "close" else self._writer.close()

    new_file = ipc.new_file
    monkeypatch.setattr(commit.ipc, "new_file", lambda *args: Writer(new_file(*args)))
    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    name = "shard-00007.arrow"
    if moment == "sidecar":
        name = "shard-00007.json"
        sync = os.fsync
        calls = []
        monkeypatch.setattr(os, "fsync", lambda n: full() if calls else calls.append(sync(n)))
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        write_shard(tmp_path, 7, "tokens", token_rows(3), TOKENS)
    assert caught.value.filename == str(tmp_path / name)
    # a shard without its sidecar counts as not done
    assert os.listdir(tmp_path) == (["shard-00007.arrow"] if moment == "sidecar" else [])


def test_of_two_jobs_that_make_one_shard_neither_takes_it_from_the_other(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    first, second = (commit.ShardFile(tmp_path / "out", 0, "tokens", TOKENS) for _ in range(2))
    for shard in (first, second):
        for row in token_rows(3):
            shard.add(row)
    sidecar = tmp_path / "out" / "shard-00000.json"
    read_bytes, unlink = Path.read_bytes, Path.unlink

    def late(path):
        """Nothing is there; and now the other job is done."""
        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        assert path == sidecar
        try:
            return read_bytes(path)
        finally:
            first.commit()

    def kept(path, missing_ok=False):
        assert path != sidecar
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "read_bytes", late)
    monkeypatch.setattr(Path, "unlink", kept)
    second.commit()
    assert commit.is_committed(tmp_path / "out", 0, TOKENS, 3)
