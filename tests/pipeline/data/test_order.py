import numpy as np
import pytest

from pipeline.console import InputError
from pipeline.data.order import CHUNK, Order


@pytest.mark.parametrize("block", [0, 1, 10, 64, 2048])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 1000, 65537])
def test_every_epoch_shows_each_sample_once(n, block):
    order = Order(n, seed=3, block=block)
    for epoch in (0, 1, 11):
        ids = order.samples(epoch * n, (epoch + 1) * n)
        assert ids.dtype == np.int64
        assert np.array_equal(np.sort(ids), np.arange(n))


def test_epochs_and_seeds_have_orders_of_their_own():
    n = 1000
    first, second = Order(n, 0).samples(0, n), Order(n, 0).samples(n, 2 * n)
    other = Order(n, 1).samples(0, n)
    # two random permutations of n agree in one place on average
    assert (first == second).sum() < 10
    assert (first == other).sum() < 10
    assert (first == np.arange(n)).sum() < 10


@pytest.mark.parametrize("block", [0, 5])
@pytest.mark.parametrize("n", [97, CHUNK - 1, CHUNK + 1])
def test_order_does_not_depend_on_how_it_is_cut(n, block):
    order = Order(n, seed=5, block=block)
    whole = order.samples(0, 4 * n)
    for width in (n // 9, n - 1, n, n + 1, 2 * n + 56):
        cut = [order.samples(p, min(p + width, 4 * n)) for p in range(0, 4 * n, width)]
        assert np.array_equal(np.concatenate(cut), whole)
    start = 2 * n + 19
    assert np.array_equal(
        Order(n, seed=5, block=block).samples(start, start + 87), whole[start : start + 87]
    )
    assert order.samples(9, 9).shape == (0,)


def chi2(counts):
    """Against all cells alike."""
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum()


def test_neighbours_are_unrelated():
    n = 65537
    ids = Order(n, seed=0).samples(0, n)
    # standard error of the correlation is 1 / sqrt(n) = 0.004
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.016
    # the steps must be spread evenly too: over 256 cells chi2 has mean 255, deviation 22.6
    steps = np.diff(ids) % n * 256 // n
    assert chi2(np.bincount(steps, minlength=256)) < 255 + 5 * 22.6
    # and so must the pairs: over 64 x 64 cells it has mean 4095, deviation 90
    pairs = (ids[:-1] * 64 // n) * 64 + ids[1:] * 64 // n
    assert 4095 - 5 * 90 < chi2(np.bincount(pairs, minlength=4096)) < 4095 + 5 * 90


def test_order_is_the_same_in_every_version():
    # a checkpoint stores only a position: these values may never change
    assert Order(1000, seed=42).samples(998, 1006).tolist() == [
        789,
        827,
        965,
        434,
        871,
        766,
        376,
        708,
    ]
    assert Order(250_000_000, seed=0).samples(10**9, 10**9 + 3).tolist() == [
        19692546,
        202856715,
        164493311,
    ]

    order = Order(1000, seed=42, block=16, window=4)
    assert order.samples(998, 1006).tolist() == [482, 726, 214, 293, 206, 979, 292, 704]
    order = Order(250_000_000, seed=0, block=2048)
    assert order.samples(10**9, 10**9 + 3).tolist() == [52267065, 171010760, 95218982]


def windows_of(n, epoch, block, window, seed=1):
    """The samples of an epoch of ``Order``, window by window."""
    order = Order(n, seed, block=block, window=window)
    ids = order.samples(epoch * n, (epoch + 1) * n)
    return [ids[i : i + block * window] for i in range(0, n, block * window)]


@pytest.mark.parametrize("n", [640, 645, 1001])
def test_a_window_holds_whole_blocks_of_neighbours(n):
    block, window = 16, 4
    for epoch in range(3):
        parts = windows_of(n, epoch, block, window)
        for part in parts:
            # runs of neighbours, on a ring: the end of the set and its beginning may touch
            ids = np.sort(part)
            breaks = np.flatnonzero(np.diff(ids) != 1).size
            assert breaks <= window + 1
        # and they come mixed
        assert all(np.abs(np.diff(part)).mean() > block for part in parts[:-1])
    # other blocks together in every epoch
    first, second = (
        {frozenset(part.tolist()) for part in windows_of(n, epoch, block, window)}
        for epoch in (0, 1)
    )
    assert not first & second


def test_the_short_block_lies_elsewhere_in_every_epoch():
    n, block = 1003, 100
    lasts = set()
    for epoch in range(8):
        (*_, last) = windows_of(n, epoch, block, window=1)
        assert len(last) == 3
        lasts |= set(last.tolist())
    assert len(lasts) >= 20


def test_blocks_come_in_an_order_without_pattern():
    n_block, block = 65537, 3
    order = Order(n_block * block, 0, block=block, window=1)
    blocks = order.samples(0, 4000 * block)[::block] // block
    # standard error 1 / sqrt(4000)
    assert abs(np.corrcoef(blocks[:-1], blocks[1:])[0, 1]) < 4 / np.sqrt(4000)


def test_an_empty_set_and_a_backward_range_are_refused():
    with pytest.raises(InputError, match="0 samples"):
        Order(0, seed=0)
    with pytest.raises(InputError, match=r"-1\.\.4"):
        Order(3, seed=0).samples(-1, 4)
    with pytest.raises(InputError, match=r"5\.\.4"):
        Order(3, seed=0).samples(5, 4)
    for wrong in ({"block": -1}, {"block": 3, "window": 0}):
        with pytest.raises(InputError, match="take at least 1"):
            Order(3, seed=0, **wrong)
