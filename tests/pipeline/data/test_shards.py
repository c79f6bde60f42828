import json

import numpy as np
import pytest

from pipeline.console import InputError
from pipeline.data import commit
from pipeline.data.gather import Located
from pipeline.data.shards import ShardReader, ShardWriter, Side, split_of
from tests.pipeline.data.helpers import (
    PAIRS,
    TOKENS,
    edit,
    pair_row,
    pair_rows,
    refer,
    token_rows,
    write,
)


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
    assert tokens.flags.writeable
    np.testing.assert_array_equal(tokens, np.stack([rows[i]["image_tokens"] for i in ids]))
    assert reader.captions(ids) == [rows[i]["caption"] for i in ids]
    assert reader.keys(ids) == [rows[i]["key"] for i in ids]
    assert reader.image_tokens(np.array([], np.int64)).shape == (0, 18)
    assert reader.captions(np.array([], np.int64)) == []
    # lists of numbers as arrays
    crops = reader.column("crops", ids)
    np.testing.assert_array_equal(crops, np.stack([rows[i]["crops"] for i in ids]))


def test_one_crop_of_each_row_may_be_asked_for(tmp_path):
    rows = token_rows(30)
    write(tmp_path, "tokens", rows, 20)
    reader = ShardReader(tmp_path)
    rng = np.random.default_rng(3)
    for ids in (rng.integers(0, 30, 200), np.arange(30)):
        which = rng.integers(0, 2, len(ids))
        tokens = reader.image_tokens(ids, which)
        assert tokens.shape == (len(ids), 9)
        for i, crop, got in zip(ids, which, tokens, strict=True):
            assert got.tolist() == rows[i]["image_tokens"][9 * crop : 9 * crop + 9].tolist()
    with pytest.raises(IndexError, match=r"crops 0\.\.2 of a set of 2"):
        reader.image_tokens(np.arange(3), np.arange(3))


def test_pairs_come_back_as_they_went_in(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "BATCH_BYTES", 400)
    rows = pair_rows(30)
    write(tmp_path, "pairs", rows, rows_per_shard=16)
    reader = ShardReader(tmp_path, kind="pairs")
    assert [reader[i] for i in range(30)] == rows
    backwards = np.arange(29, -1, -1)
    assert reader.images(backwards) == [row["image"] for row in rows[::-1]]
    assert reader.column("image_sha", backwards) == [row["image_sha"] for row in rows[::-1]]
    assert reader.column("phash", backwards).tolist() == [row["phash"] for row in rows[::-1]]
    assert reader.column("width", backwards).tolist() == [row["width"] for row in rows[::-1]]


# ---- pictures by reference


@pytest.fixture
def images():
    rng = np.random.default_rng(4)
    return [rng.bytes(50 + i) for i in range(12)]


@pytest.fixture
def referring(tmp_path, images):
    """A set that refers to tmp_path/in/all.bin."""
    rows, made_of = refer(tmp_path / "in", images)
    write(tmp_path / "set", "pairs", rows, 5, made_of)
    (tmp_path / "set/sources.json").write_text(json.dumps([str(tmp_path / "in")]))
    return tmp_path / "set"


def test_pictures_are_read_where_they_stand(referring, images):
    reader = ShardReader(referring)
    assert reader.images(np.array([11, 0, 4, 4])) == [images[i] for i in (11, 0, 4, 4)]
    row = reader[7]
    assert row["image"] == images[7]
    assert (row["source"], row["file"], row["size"]) == (0, "all.bin", 57)
    # no byte of a picture is in the set
    for path in referring.iterdir():
        assert not [image for image in images if image in path.read_bytes()]


def test_sources_may_move(referring, images, tmp_path):
    (tmp_path / "in").rename(tmp_path / "moved")
    words = r"picture 'p3': .*in.* does not exist.* name its new place in sources\.json"
    with pytest.raises(InputError, match=words):
        ShardReader(referring).images(np.array([3]))
    (referring / "sources.json").write_text(json.dumps([str(tmp_path / "moved")]))
    assert ShardReader(referring).images(np.array([3])) == [images[3]]


def test_a_picture_that_is_not_what_was_ingested_is_named(referring, images, tmp_path):
    path = tmp_path / "in/all.bin"
    whole = path.read_bytes()
    path.write_bytes(b"x" + whole[1:])
    reader = ShardReader(referring)
    assert reader.images(np.arange(1, 12)) == images[1:]
    with pytest.raises(InputError, match=r"'p0': bytes 0\.\.50 of .*in all\.bin are not those"):
        reader.images(np.arange(12))
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"picture 'p11': .*all\.bin: it has"):
        reader.images(np.arange(1, 12))
    path.unlink()
    with pytest.raises(InputError, match=r"picture 'p4': .*all\.bin: there is no such file"):
        reader[4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"sources\.json cannot be read .* it is a list of the places"),
        ("{", r"sources\.json is no JSON"),
        ("{}", r"sources\.json is no list of places"),
        ("[3]", r"sources\.json is no list of places"),
        ("[]", r"sources\.json names 0 sources, picture 'p2' lies in number 0"),
    ],
)
def test_a_list_of_sources_that_is_wrong_is_named(referring, text, words):
    path = referring / "sources.json"
    path.unlink() if text is None else path.write_text(text)
    reader = ShardReader(referring)
    assert reader.keys(np.array([2])) == ["p2"]
    with pytest.raises(InputError, match=words):
        reader.images(np.array([2]))


def test_tokens_have_no_pictures(tmp_path):
    write(tmp_path, "tokens", token_rows(3))
    with pytest.raises(InputError, match="is a set of tokens, pictures come from pairs"):
        ShardReader(tmp_path).images(np.array([0]))


# ---- the set


def test_a_set_of_another_kind_is_refused(tmp_path):
    write(tmp_path, "tokens", token_rows(3))
    with pytest.raises(InputError, match="is a set of tokens, a set of pairs is needed"):
        ShardReader(tmp_path, kind="pairs")
    edit(tmp_path / "manifest.json", made_of=TOKENS | {"grid": 0})
    with pytest.raises(InputError, match=r"'grid'\] of a token set is 0"):
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


def test_text_that_is_damaged_behind_a_right_checksum_is_a_sentence(tmp_path, monkeypatch):
    with ShardWriter(tmp_path, "pairs", PAIRS) as writer:
        writer.add(pair_row("k", b"i"))
    reader = ShardReader(tmp_path)
    monkeypatch.setattr(Located, "variable", lambda *_: [b"\xff"])
    for read in (reader.keys, reader.captions):
        with pytest.raises(InputError, match=r"damaged .*data_prep\.verify finds the shard"):
            read(np.array([0]))


# ---- sides


def test_sides_share_out_the_rows_by_the_split_of_the_writer(tmp_path):
    rows = token_rows(40)
    val = {i for i in range(40) if split_of(rows[i]["key"], 0.3) == "val"}
    write(tmp_path, "tokens", rows, 16, val=val)
    reader = ShardReader(tmp_path)
    keys = {}
    for which in ("train", "val"):
        side = reader.split(which)
        ids = side.rows(np.arange(len(side)))
        assert ids.dtype == np.int64
        keys[which] = reader.keys(ids)
        assert keys[which] == sorted(keys[which])
        # in any order
        np.testing.assert_array_equal(side.rows(np.arange(len(side))[::-1]), ids[::-1])
        assert side.rows(np.empty(0, np.int64)).shape == (0,)
        for samples in ([len(side)], [-1]):
            with pytest.raises(IndexError, match="of a side of"):
                side.rows(np.array(samples))
    assert keys["val"] == [rows[i]["key"] for i in sorted(val)]
    assert keys["train"] == [row["key"] for i, row in enumerate(rows) if i not in val]


def test_a_side_skips_shards_without_rows_of_it():
    side = Side(np.array([0, 10, 20, 30, 40]), np.array([0, 3, 0, 0, 2]))
    assert len(side) == 5
    assert side.rows(np.arange(5)).tolist() == [10, 11, 12, 40, 41]


@pytest.mark.parametrize(
    ("kind", "val", "counts"),
    [
        ("tokens", (), "of 9 rows, 9 are to train on and 0 to validate with, and both need one"),
        ("pairs", range(9), "0 are to train on and 9 to validate with, at val_fraction 0.2, and"),
    ],
)
def test_a_side_without_rows_is_refused_with_the_way_out(tmp_path, kind, val, counts):
    rows = token_rows(9) if kind == "tokens" else pair_rows(9)
    write(tmp_path, kind, rows, 5, val=val)
    reader = ShardReader(tmp_path)
    full, empty = ("train", "val") if kind == "tokens" else ("val", "train")
    assert len(reader.split(full)) == 9
    words = f"{counts}.* add data or ingest again with another --val-fraction"
    with pytest.raises(InputError, match=words):
        reader.split(empty)
