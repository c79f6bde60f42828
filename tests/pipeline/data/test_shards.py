import json
import os
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc

from pipeline.console import InputError
from pipeline.data import commit
from pipeline.data.shards import (
    ShardReader,
    ShardWriter,
    image_sha,
    split_indices,
    split_of,
    write_manifest,
    write_shard,
)

TOKENS = {"dvae": "d" * 64, "grid": 3, "n_vocab": 500, "crops": 2, "image_size": 24}


def token_rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "key": f"k{i:05d}",
            "caption": f"caption {i} ½ 😀",
            "image_tokens": rng.integers(0, 500, 18).astype(np.uint16),
            "crops": rng.random(8).astype(np.float32),
            "image_sha": image_sha(bytes([i % 256])),
        }
        for i in range(n)
    ]


def pair_rows(n):
    rng = np.random.default_rng(1)
    rows = []
    for i in range(n):
        image = rng.bytes(int(rng.integers(1, 300)))
        size = {"width": 20 + i, "height": 30}
        sha = image_sha(image)
        rows.append({"key": f"p{i}", "caption": "a", "image": image, **size, "image_sha": sha})
    return rows


def write(folder, kind, rows, rows_per_shard=None, made_of=None):
    made_of = made_of or (TOKENS if kind == "tokens" else {"source": "test"})
    with ShardWriter(folder, kind, made_of, rows_per_shard) as writer:
        for row in rows:
            writer.add(row)
    return writer.manifest


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_tokens_come_back_as_they_went_in(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "BATCH_ROWS", 8)
    rows = token_rows(45)
    manifest = write(tmp_path, "tokens", rows, rows_per_shard=20)
    reader = ShardReader(tmp_path)
    assert (len(reader), reader.kind, reader.made_of) == (45, "tokens", TOKENS)
    assert [shard["rows"] for shard in manifest["shards"]] == [20, 20, 5]
    for i, row in enumerate(rows):
        got = reader[i]
        assert list(got) == ["key", "caption", "image_tokens", "crops", "image_sha"]
        assert (got["key"], got["caption"], got["image_sha"]) == tuple(
            row[name] for name in ("key", "caption", "image_sha")
        )
        assert got["image_tokens"].dtype == np.uint16
        assert got["crops"].dtype == np.float32
        np.testing.assert_array_equal(got["image_tokens"], row["image_tokens"])
        np.testing.assert_array_equal(got["crops"], row["crops"])
    # in any order, with repeats, over the seams of batches and shards
    ids = np.random.default_rng(2).integers(0, 45, 200)
    tokens = reader.image_tokens(ids)
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens, np.stack([rows[i]["image_tokens"] for i in ids]))
    assert reader.captions(ids) == [rows[i]["caption"] for i in ids]
    assert reader.keys(ids) == [rows[i]["key"] for i in ids]
    assert list(reader.all_keys()) == [row["key"] for row in rows]
    assert reader.image_tokens(np.array([], np.int64)).shape == (0, 18)


def test_pairs_come_back_as_they_went_in(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "BATCH_BYTES", 400)
    rows = pair_rows(30)
    write(tmp_path, "pairs", rows, rows_per_shard=16)
    reader = ShardReader(tmp_path, kind="pairs")
    assert [reader[i] for i in range(30)] == rows
    assert reader.column("image", np.arange(29, -1, -1)) == [row["image"] for row in rows[::-1]]
    with pa.memory_map(str(tmp_path / "shard-00000.arrow")) as source:
        file = ipc.open_file(source)
        sizes = [
            sum(map(len, file.get_batch(i).column("image").to_pylist()))
            for i in range(file.num_record_batches)
        ]
    assert len(sizes) > 2
    # a batch closes with the row that fills it
    assert max(sizes) < 400 + 300
    assert min(sizes[:-1]) >= 400


def test_record_batches_hold_8192_rows(tmp_path):
    rows = token_rows(1) * 8200
    write(tmp_path, "tokens", rows)
    with pa.memory_map(str(tmp_path / "shard-00000.arrow")) as source:
        file = ipc.open_file(source)
        assert [file.get_batch(i).num_rows for i in range(2)] == [8192, 8]
        assert file.schema.field("image_tokens").type == pa.list_(pa.uint16(), 18)


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


def test_manifest_and_sidecar_tell_the_truth(tmp_path):
    manifest = write(tmp_path, "tokens", token_rows(30), 20)
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    for shard in manifest["shards"]:
        data = (tmp_path / shard["name"]).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == sha256(data).hexdigest()
        sidecar = json.loads((tmp_path / shard["name"]).with_suffix(".json").read_text())
        assert {name: sidecar[name] for name in shard} == shard
        assert (sidecar["kind"], sidecar["made_of"]) == ("tokens", TOKENS)
    both = "".join(shard["sha256"] for shard in manifest["shards"]).encode()
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
def test_a_wrong_row_is_named(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        write(tmp_path, "tokens", [token_rows(1)[0] | change])
    assert not list(tmp_path.glob("*"))


def test_a_wrong_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="'vectors' is unknown"):
        ShardWriter(tmp_path, "vectors", {})
    with pytest.raises(InputError, match=r"'n_vocab'\] of a token set is 65537"):
        ShardWriter(tmp_path, "tokens", TOKENS | {"n_vocab": 65537})
    with pytest.raises(InputError, match=r"'grid'\] of a token set is None"):
        ShardWriter(tmp_path, "tokens", {"n_vocab": 1, "crops": 1})
    with pytest.raises(InputError, match="rows_per_shard is 0"):
        ShardWriter(tmp_path, "tokens", TOKENS, 0)
    write(tmp_path, "tokens", token_rows(1))
    with pytest.raises(InputError, match="holds a finished set"):
        ShardWriter(tmp_path, "tokens", TOKENS)


def test_damage_is_found_before_a_shard_is_mapped(tmp_path):
    write(tmp_path, "tokens", token_rows(30), 20)
    path = tmp_path / "shard-00001.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=rf"shard-00001\.arrow has {len(whole) - 1} bytes"):
        ShardReader(tmp_path)
    path.write_bytes(whole)
    reader = ShardReader(tmp_path)
    os.truncate(path, 100)
    # between opening the set and touching the shard
    with pytest.raises(InputError, match=r"shard-00001\.arrow has 100 bytes"):
        reader.image_tokens(np.array([25]))
    path.unlink()
    with pytest.raises(InputError, match=r"shard-00001\.arrow is missing"):
        ShardReader(tmp_path)
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(InputError, match=r"shard-00001\.arrow is damaged"):
        ShardReader(tmp_path)[20]
    # the same bytes, but of another set
    path.write_bytes(whole)
    edit(tmp_path / "manifest.json", made_of=TOKENS | {"grid": 4})
    with pytest.raises(InputError, match="has the columns"):
        ShardReader(tmp_path)[0]


def test_a_manifest_that_is_wrong_is_named(tmp_path):
    manifest = write(tmp_path, "tokens", token_rows(30), 20)
    path = tmp_path / "manifest.json"
    with pytest.raises(InputError, match="is a set of tokens, a set of pairs is needed"):
        ShardReader(tmp_path, kind="pairs")
    edit(path, schema_version=2)
    with pytest.raises(InputError, match="schema version 2, this program reads 1"):
        ShardReader(tmp_path)
    edit(path, schema_version=1, rows=31)
    with pytest.raises(InputError, match="30 rows and claims 31"):
        ShardReader(tmp_path)
    moved = [manifest["shards"][0] | {"rows": 21}, manifest["shards"][1] | {"rows": 9}]
    edit(path, rows=30, shards=moved)
    with pytest.raises(InputError, match=r"shard-00000\.arrow has 20 rows, the manifest says 21"):
        ShardReader(tmp_path)[0]
    edit(path, fingerprint="0" * 64)
    with pytest.raises(InputError, match="has fingerprint 000"):
        ShardReader(tmp_path)
    edit(path, fingerprint=manifest["fingerprint"])
    moved[0]["name"] = "../shard-00000.arrow"
    edit(path, shards=moved)
    with pytest.raises(InputError, match="which is no shard"):
        ShardReader(tmp_path)
    edit(path, shards=None)
    with pytest.raises(InputError, match="lacks or garbles"):
        ShardReader(tmp_path)
    path.write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        ShardReader(tmp_path)
    path.write_text("[]")
    with pytest.raises(InputError, match="schema version None"):
        ShardReader(tmp_path)


def test_rows_outside_the_set_are_refused(tmp_path):
    write(tmp_path, "tokens", token_rows(3))
    reader = ShardReader(tmp_path)
    assert len(list(reader)) == 3
    for index in (3, -1):
        with pytest.raises(IndexError):
            reader[index]
        with pytest.raises(IndexError):
            reader.captions(np.array([0, index]))
        with pytest.raises(IndexError):
            reader.image_tokens(np.array([0, index]))


def test_identity_of_a_picture_is_that_of_its_bytes():
    # of nothing: the well-known start of its sha256
    assert image_sha(b"").hex() == "e3b0c44298fc1c149afbf4c8996fb924"


def test_split_depends_on_the_key_alone(tmp_path):
    keys = [f"key {i}" for i in range(5000)]
    val = {key for key in keys if split_of(key, 0.1) == "val"}
    # a golden value: a held-out sample may never move to the training side
    assert sorted(key for key in val if len(key) < 7) == [
        "key 19",
        "key 26",
        "key 54",
        "key 63",
        "key 68",
        "key 71",
        "key 8",
        "key 92",
    ]
    # 500 expected, standard deviation 21
    assert 500 - 5 * 21 < len(val) < 500 + 5 * 21
    assert val < {key for key in keys if split_of(key, 0.2) == "val"}
    assert {split_of(key, 0.0) for key in keys} == {"train"}
    assert {split_of(key, 1.0) for key in keys} == {"val"}
    with pytest.raises(InputError, match="val_fraction 5"):
        split_of("a", 5)
    rows = token_rows(40)
    write(tmp_path, "tokens", rows, 16)
    train_ids, val_ids = split_indices(ShardReader(tmp_path), 0.3)
    assert sorted([*train_ids, *val_ids]) == list(range(40))
    assert val_ids.tolist() == [i for i in range(40) if split_of(rows[i]["key"], 0.3) == "val"]
    assert val_ids.dtype == train_ids.dtype == np.int64
    assert 0 < len(val_ids) < 40


def test_a_reader_keeps_no_file_open(tmp_path):
    write(tmp_path, "tokens", token_rows(100), 10)
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(tmp_path)
    tokens = reader.image_tokens(np.arange(100))
    assert len(os.listdir("/proc/self/fd")) == before
    np.testing.assert_array_equal(tokens, reader.image_tokens(np.arange(100)))


def test_damaged_text_is_a_sentence(tmp_path):
    made_of = {"source": "test"}
    row = {"key": "kkkkkkkk", "caption": "cccccccc", "image": b"i", "width": 1, "height": 1}
    with ShardWriter(tmp_path, "pairs", made_of) as writer:
        writer.add(row | {"image_sha": image_sha(b"i")})
    path = tmp_path / "shard-00000.arrow"
    path.write_bytes(
        path.read_bytes().replace(b"k" * 8, b"\xff" * 8).replace(b"c" * 8, b"\xff" * 8)
    )
    reader = ShardReader(tmp_path)
    for read in (lambda: list(reader.all_keys()), lambda: reader.captions(np.array([0]))):
        with pytest.raises(InputError, match=r"damaged .*data_prep\.verify finds the shard"):
            read()
