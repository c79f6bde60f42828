import numpy as np
import pytest

from pipeline.console import InputError
from pipeline.data.sets import HELD_BATCHES, Data
from pipeline.data.shards import ShardReader, image_sha
from tests.pipeline.data.helpers import pair_row, token_rows, write


@pytest.fixture
def folders(tmp_path):
    """Token sets of 30 and 90 rows, ten of each for validation."""
    for name, n in (("a", 30), ("b", 90)):
        write(tmp_path / name, "tokens", token_rows(n), 40, val=range(10))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_one_set_is_read_whole(folders):
    data = Data("tokens", folders[0])
    assert [len(side) for _, side in data.train] == [20]
    assert [len(side) for _, side in data.val] == [10]
    assert data.order == {"weights": None, "block": 0}
    fingerprint = ShardReader(folders[0]).fingerprint
    assert data.identity() == {"tokens": [fingerprint], "weights": None, "block": 0}


def test_several_sets_carry_their_weights_and_all_fingerprints(folders):
    data = Data("tokens", folders, mix=[3, 1])
    assert data.order["weights"] == data.val_weights == [3, 1]
    assert data.identity()["weights"] == [3, 1]
    prints = [ShardReader(folder).fingerprint for folder in folders]
    assert data.identity()["tokens"] == prints
    assert Data("tokens", folders[::-1]).identity()["tokens"] == prints[::-1]


def test_validation_of_joined_sets_sees_all_of_them_in_about_their_shares(folders, tmp_path):
    # 20 and 80 rows to train on
    assert Data("tokens", folders).val_weights == [13, 51]
    write(tmp_path / "c", "tokens", token_rows(6000), val=range(10))
    assert Data("tokens", [folders[0], str(tmp_path / "c")]).val_weights == [1, 64]


def test_blocks_are_about_a_record_batch(folders, tmp_path):
    data = Data("tokens", folders, block_order=True)
    assert data.order["block"] == 2048
    assert data.identity()["block"] == 2048
    assert data.readers[0]._batches._n_held == HELD_BATCHES
    # pictures of a megabyte: 16 in a record batch
    big = np.random.default_rng(0).bytes(1 << 20)
    rows = [pair_row(f"p{i}", big, image_sha=image_sha(big)) for i in range(6)]
    write(tmp_path / "big", "pairs", rows, val=[0])
    assert Data("pairs", str(tmp_path / "big"), block_order=True).order["block"] == 15


def test_mistakes_are_named_when_a_run_begins(folders, tmp_path):
    with pytest.raises(InputError, match=r"the weights \[1\] of 2 sets"):
        Data("tokens", folders, mix=[1])
    with pytest.raises(InputError, match="is a set of tokens, a set of pairs is needed"):
        Data("pairs", folders)
    write(tmp_path / "c", "tokens", token_rows(5))
    with pytest.raises(InputError, match=r"c: of 5 rows, 5 are to train on and 0 to validate"):
        Data("tokens", [folders[0], str(tmp_path / "c")])
