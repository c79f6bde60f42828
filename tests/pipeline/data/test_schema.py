import json

import pyarrow as pa
import pytest

from pipeline.console import InputError
from pipeline.data.schema import (
    image_sha,
    read_batch_table,
    read_manifest,
    schema_of,
    split_of,
)
from tests.pipeline.data.helpers import PAIRS, TOKENS, edit, token_rows, write


def test_identity_of_a_picture_is_that_of_its_bytes():
    # of nothing: the well-known start of its sha256
    assert image_sha(b"").hex() == "e3b0c44298fc1c149afbf4c8996fb924"


def test_split_depends_on_the_group_alone():
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


def test_pairs_hold_pictures_or_say_where_they_are():
    both = ["key", "caption"]
    last = ["width", "height", "image_sha", "phash"]
    assert schema_of("pairs", PAIRS).names == [*both, "image", *last]
    by_reference = schema_of("pairs", PAIRS | {"bytes": "reference"})
    assert by_reference.names == [*both, "source", "file", "offset", "size", *last]
    assert by_reference.field("phash").type == pa.uint64()


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("vectors", {}, "'vectors' is unknown: it is one of pairs, tokens"),
        ("tokens", {"n_vocab": 65537}, r"'n_vocab'\] of a token set is 65537.* 1\.\.65536"),
        ("tokens", {"grid": None}, r"'grid'\] of a token set is None"),
        ("tokens", {"crops": True}, r"'crops'\] of a token set is True"),
        ("pairs", {"bytes": "tar"}, r"'bytes'\] of a pair set is 'tar'.* inline, reference"),
        ("pairs", {"val_fraction": 1.5}, r"'val_fraction'\] of a pair set is 1\.5"),
        ("pairs", {"image_size": 0}, r"'image_size'\] of a pair set is 0"),
        ("pairs", {"upscale": None}, r"'upscale'\] of a pair set is None"),
    ],
)
def test_a_set_that_is_not_described_is_refused(kind, change, words):
    with pytest.raises(InputError, match=words):
        schema_of(kind, (TOKENS if kind == "tokens" else PAIRS) | change)


def test_a_manifest_that_is_wrong_is_named(tmp_path):
    manifest = write(tmp_path, "tokens", token_rows(30), 20)
    path = tmp_path / "manifest.json"

    def wrong(words, **changes):
        path.write_text(json.dumps(manifest | changes))
        with pytest.raises(InputError, match=words):
            read_manifest(tmp_path)

    wrong("schema version 1, this program reads 2", schema_version=1)
    wrong("30 rows and claims 31", rows=31)
    wrong("has fingerprint 000", fingerprint="0" * 64)
    wrong("lacks or garbles shards", shards=None)
    wrong("lacks or garbles made_of", made_of=[])
    first, second = manifest["shards"]
    wrong("which is no shard", shards=[first | {"name": "../shard-00000.arrow"}, second])
    wrong("lacks or garbles bytes", shards=[first | {"bytes": "9"}, second])
    wrong("lacks or garbles name", shards=[{}, second])
    wrong("lacks or garbles name", shards=[first, 3])
    wrong("21 of the 20 rows of shard-00000.arrow", shards=[first | {"val_rows": 21}, second])
    # the content is another one when other rows validate
    wrong("has fingerprint", shards=[first | {"val_rows": 1}, second])
    path.write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        read_manifest(tmp_path)
    path.write_text("[]")
    with pytest.raises(InputError, match="schema version None"):
        read_manifest(tmp_path)
    with pytest.raises(InputError, match=r"nowhere/manifest\.json cannot be read"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 19}, "has rows 19, the manifest says 20: copy it again"),
        ({"made_of": {}}, "has made_of {}, the manifest says"),
        ({"batches": [[19, 0, 9, 9]]}, "batches of 19 rows in all, the manifest says 20"),
        ({"batches": [[21, 0, 9, 9], [-1, 0, 9, 9]]}, "batches of 20 rows"),
        ({"batches": [[20, 0, 9, 9], [0, 0, 9, 9]]}, "batches of 20 rows"),
        ({"batches": [[20, 0, 9]]}, "garbles its batches"),
        ({"batches": None}, "garbles its batches"),
        ({"batches": [[20, 0, 9, 1 << 70]]}, "garbles its batches"),
    ],
)
def test_a_sidecar_that_is_wrong_is_named(tmp_path, change, words):
    manifest = write(tmp_path, "tokens", token_rows(20))
    described = {name: manifest[name] for name in ("kind", "made_of")}
    table = read_batch_table(tmp_path, manifest["shards"][0], described)
    assert table.shape == (1, 4)
    edit(tmp_path / "shard-00000.json", **change)
    with pytest.raises(InputError, match=rf"shard-00000\.json .*{words}"):
        read_batch_table(tmp_path, manifest["shards"][0], described)
