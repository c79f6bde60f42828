import numpy as np
import pytest

from pipeline.console import InputError
from pipeline.data.order import Order


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 1000, 65537])
def test_every_epoch_shows_each_sample_once(n):
    order = Order(n, seed=3)
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


def test_order_does_not_depend_on_how_it_is_cut():
    n = 97
    order = Order(n, seed=5)
    whole = order.samples(0, 4 * n)
    for width in (1, 7, 96, 97, 98, 250):
        cut = [order.samples(p, min(p + width, 4 * n)) for p in range(0, 4 * n, width)]
        assert np.array_equal(np.concatenate(cut), whole)
    assert np.array_equal(Order(n, seed=5).samples(213, 300), whole[213:300])
    assert order.samples(9, 9).shape == (0,)


def test_neighbours_are_unrelated():
    n = 65537
    ids = Order(n, seed=0).samples(0, n)
    # standard error of the correlation is 1 / sqrt(n) = 0.004
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.016
    # the steps must be spread evenly too: over 256 cells chi2 has mean 255, deviation 22.6
    steps = np.diff(ids) % n * 256 // n
    counts = np.bincount(steps, minlength=256)
    expected = (n - 1) / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * 22.6


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


def test_an_empty_set_and_a_backward_range_are_refused():
    with pytest.raises(InputError, match="0 samples"):
        Order(0, seed=0)
    with pytest.raises(InputError, match=r"-1\.\.4"):
        Order(3, seed=0).samples(-1, 4)
    with pytest.raises(InputError, match=r"5\.\.4"):
        Order(3, seed=0).samples(5, 4)
