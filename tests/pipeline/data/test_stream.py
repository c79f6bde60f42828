import tracemalloc
from collections import Counter

import numpy as np
import pytest

from pipeline.console import InputError
from pipeline.data.order import Order
from pipeline.data.shards import Side
from pipeline.data.stream import MAX_CYCLE, Stream, cycle_of, seed_of


def stream_of(lengths, batch=12, rank=0, world=1, seed=3, **changes):
    return Stream(lengths, batch=batch, rank=rank, world=world, seed=seed, **changes)


def read(lengths, plan, **changes):
    """(set, sample, epoch) at every position that a run reads.

    ``plan`` has (position, batch, world); a position that two steps read must hold the same sample.
    """
    found = {}
    for position, batch, world in plan:
        for rank in range(world):
            stream = stream_of(lengths, batch, rank, world, **changes)
            parts = stream.at(position)
            assert [part.dtype for part in parts] == [np.int64] * 3
            assert {len(part) for part in parts} == {batch // world}
            for k, sample in enumerate(zip(*(part.tolist() for part in parts), strict=True)):
                assert found.setdefault(position + rank + k * world, sample) == sample
    return found


def plan_of(total, batch):
    """Steps up to ``total``, with another world in nearly every one and batches that change."""
    steps, position, i = [], 0, 0
    while position < total:
        world = 1 + i * 5 % 16
        size = world * max(1, (batch + i % 7) // world)
        steps.append((position, size, world))
        position += size
        i += 1
    return steps


BATCH = 24


@pytest.mark.parametrize("block", [0, 16], ids=["full", "block"])
@pytest.mark.parametrize("n", [1, 7, BATCH - 1, BATCH, 10_007])
def test_each_epoch_shows_each_sample_once_whatever_ranks_and_batches(n, block):
    # at least three epochs, and long enough for every world to come up
    n_epoch = max(3, 400 // n)
    plan = plan_of(n_epoch * n, BATCH if n < 10_000 else 1000)
    assert {world for _, _, world in plan} == set(range(1, 17))
    assert len({batch for _, batch, _ in plan}) > 5
    found = read([n], plan, block=block)
    for epoch in range(n_epoch):
        shown = [found[p] for p in range(epoch * n, (epoch + 1) * n)]
        assert sorted(sample for _, sample, _ in shown) == list(range(n))
        assert {(k, e) for k, _, e in shown} == {(0, epoch)}


@pytest.mark.parametrize("world", range(1, 17))
def test_every_world_reads_the_same_stream(world):
    n, batch = 100, world * (120 // world)
    plan = [(p, batch, world) for p in range(0, 3 * n, batch)]
    found = read([n], plan)
    order = Order(n, 3)
    for position, (_, sample, epoch) in found.items():
        assert sample == order.samples(position, position + 1)[0]
        assert epoch == position // n


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [5, 2, 3], [100, 1, 10]])
def test_a_mix_shows_each_sample_of_each_set_once_an_epoch_of_its_own(weights):
    lengths = [11, 30, 7][: len(weights)]
    total = 900
    found = read(lengths, plan_of(total, BATCH), weights=weights)
    streams = {k: [] for k in range(len(weights))}
    for position in range(total):
        k, sample, epoch = found[position]
        streams[k].append((sample, epoch))
    for k, shown in streams.items():
        n = lengths[k]
        # the set's own endless stream, epoch after epoch
        order = Order(n, seed_of(3, k))
        assert [sample for sample, _ in shown] == order.samples(0, len(shown)).tolist()
        assert [epoch for _, epoch in shown] == [i // n for i in range(len(shown))]
        assert len(shown) == pytest.approx(total * weights[k] / sum(weights), abs=len(weights))


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [5, 2, 3], [100, 1, 10], [7, 7, 1, 3]])
def test_a_mix_is_even_at_every_position(weights):
    cycle = cycle_of(weights, len(weights))
    assert Counter(cycle.tolist()) == dict(enumerate(weights))
    slots = np.tile(cycle, 3)
    for k, weight in enumerate(weights):
        had = np.cumsum(slots == k)
        due = np.arange(1, len(slots) + 1) * weight / sum(weights)
        # never more than a sample and a half from its share
        assert np.abs(had - due).max() <= 1.5


def test_common_factors_of_weights_change_nothing():
    assert cycle_of([2, 4], 2).tolist() == cycle_of([1, 2], 2).tolist() == [1, 0, 1]
    assert cycle_of([MAX_CYCLE] * 3, 3).tolist() == [0, 1, 2]
    assert cycle_of([9], 1).tolist() == [0]


def test_sets_without_weights_are_read_as_if_joined():
    lengths = [11, 30, 7]
    found = read(lengths, plan_of(200, BATCH))
    order = Order(48, 3).samples(0, 200)
    starts = [0, 11, 41]
    for position in range(200):
        k, sample, epoch = found[position]
        assert starts[k] + sample == order[position]
        assert epoch == position // 48


def test_without_a_seed_samples_come_in_order():
    sets, samples, epochs = stream_of([3, 2], seed=None).at(0)
    assert list(zip(sets.tolist(), samples.tolist(), strict=True))[:6] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (0, 0)
    ]  # fmt: skip
    assert epochs.tolist() == [0] * 5 + [1] * 5 + [2] * 2
    sets, samples, _ = stream_of([3, 2], seed=None, weights=[2, 1], batch=6).at(6)
    assert sets.tolist() == [0, 1, 0, 0, 1, 0]
    assert samples.tolist() == [1, 0, 2, 0, 1, 1]


def test_equal_sets_of_a_mix_have_orders_of_their_own():
    sets, samples, _ = stream_of([1000, 1000], batch=400, weights=[1, 1]).at(0)
    assert (samples[sets == 0] == samples[sets == 1]).sum() < 10


def test_impossible_streams_are_named():
    for changes, words in [
        ({"world": 5}, "a batch of 12 does not divide over 5 ranks"),
        ({"batch": 0}, "a batch of 0"),
        ({"rank": 2, "world": 2}, r"rank 2 is outside 0\.\.1"),
        ({"lengths": []}, r"sets of \[\] samples"),
        ({"lengths": [3, 0]}, r"sets of \[3, 0\] samples: each needs one"),
        ({"weights": [1, 2]}, r"the weights \[1, 2\] of 1 sets"),
        ({"weights": [0]}, "whole number from 1 on"),
        ({"weights": [1.5]}, "whole number from 1 on"),
        ({"lengths": [3, 3], "weights": [1, 1 << 17]}, "repeat after 131073 samples, 65536 are"),
    ]:
        with pytest.raises(InputError, match=words):
            stream_of(**({"lengths": [9]} | changes))
    with pytest.raises(InputError, match="position -12"):
        stream_of([9]).at(-12)


# ---- a full-size set: 250 million rows, 1 % of them for validation


@pytest.fixture(scope="module")
def sides():
    n_shards, rows = 3815, 65_536
    n_val = np.random.default_rng(0).integers(600, 700, n_shards)
    first = np.arange(n_shards) * rows
    return Side(first, rows - n_val), Side(first + rows - n_val, n_val), rows - n_val


@pytest.mark.parametrize("block", [0, 2048], ids=["full", "block"])
def test_a_run_resumes_anywhere_in_250_million_rows_without_an_index(sides, block):
    train, val, _ = sides
    assert len(train) + len(val) == 250_019_840
    stream = stream_of([len(train), len(val)], 1024, 3, 8, weights=[99, 1], block=block)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for position in (2 * len(train) + 1024 * 7, 11, 10**12):
        sets, samples, _ = stream.at(position)
        rows = np.where(sets == 0, train.rows(samples % len(train)), val.rows(samples % len(val)))
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert rows.shape == (128,)
    assert grown < 1_000_000


def test_positions_of_the_third_epoch_agree_with_brute_force(sides):
    train, _, counts = sides
    n = len(train)
    position = 2 * n + 123_456_789
    _, samples, epochs = stream_of([n], 1024, 5, 8).at(position)
    assert set(epochs.tolist()) == {2}
    order = Order(n, 3)
    one_by_one = [order.samples(p, p + 1)[0] for p in range(position + 5, position + 1024, 8)]
    assert samples.tolist() == one_by_one
    # rows by walking over the shards
    for sample, row in zip(samples[:20].tolist(), train.rows(samples)[:20].tolist(), strict=True):
        k, left = 0, sample
        while left >= counts[k]:
            left -= counts[k]
            k += 1
        assert row == k * 65_536 + left
    # the batch that ends the second epoch and begins the third
    _, samples, epochs = stream_of([n], 1024).at(2 * n - 500)
    assert epochs.tolist() == [1] * 500 + [2] * 524
    assert len(set(samples[:500].tolist())) == 500
    assert len(set(samples[500:].tolist())) == 524
