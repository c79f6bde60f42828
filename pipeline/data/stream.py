"""One endless stream of samples out of one or several sets, shared out over ranks.

The only state is the position, which counts samples that all ranks have consumed together: a batch
at position p holds the samples at p..p+batch-1, rank r of w takes p+r, p+r+w, ... So a run may stop
anywhere and go on with any number of ranks and any batch, and every epoch shows each sample once.

Several sets are read as if they were joined, or are mixed by weights of whole numbers: of every
W = sum of the weights positions a set has as many as its weight, spread evenly. The how manieth
sample of its set a position is follows from that by arithmetic, and each set has epochs of its own.
"""

from collections.abc import Sequence
from math import gcd

import numpy as np

from pipeline.console import InputError
from pipeline.data.order import Order, keyed

MAX_CYCLE = 1 << 16  # positions after which a mix repeats itself


def seed_of(seed: int, number: int) -> int:
    """The seed of set ``number`` of a stream; that of the first is the stream's own."""
    return seed if number == 0 else keyed(seed, f"set {number}")


class Stream:
    """Which samples this rank takes at a position, of which set, and in which epoch they are.

    Args:
        lengths: samples of each set, at least 1.
        batch: samples of all ranks together, a multiple of ``world``.
        rank: which process this is, from 0.
        world: how many processes there are.
        seed: of the order; None takes the samples in order, epoch after epoch.
        weights: of each set, at least 1; as if the sets were joined when None.
        block: see ``Order``.

    Raises:
        InputError: no set, an empty one, or numbers that do not fit together.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch: int,
        rank: int,
        world: int,
        seed: int | None,
        weights: Sequence[int] | None = None,
        block: int = 0,
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise InputError(f"a stream over sets of {list(lengths)} samples: each needs one")
        if not 0 <= rank < world:
            raise InputError(f"rank {rank} is outside 0..{world - 1}")
        if batch < 1 or batch % world:
            raise InputError(
                f"a batch of {batch} does not divide over {world} ranks: take a multiple of {world}"
            )
        self.batch, self.rank, self.world, self.seed = batch, rank, world, seed
        # joined sets are one lane, mixed sets are one each
        self._slots, self._lengths = np.zeros(1, np.int64), [sum(lengths)]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._is_mixed = weights is not None
        if weights is not None:
            self._slots, self._lengths = cycle_of(weights, len(lengths)), list(lengths)
        self._counts = np.bincount(self._slots, minlength=len(self._lengths))
        # how many slots of its lane come before each slot of the cycle
        self._before = np.empty_like(self._slots)
        for lane, count in enumerate(self._counts):
            self._before[self._slots == lane] = np.arange(count)
        self._orders = [
            None if seed is None else Order(n, seed_of(seed, lane), block=block)
            for lane, n in enumerate(self._lengths)
        ]

    def at(self, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sets, samples of these sets and epochs at ``position``, each int64 [batch // world].

        Raises:
            InputError: the position is negative.
        """
        if position < 0:
            raise InputError(f"position {position} is negative")
        places = np.arange(position, position + self.batch)
        if len(self._lengths) == 1:
            lanes = np.zeros_like(places)
            samples, epochs = self._in_lane(0, places)
        else:
            cycle, slot = np.divmod(places, len(self._slots))
            lanes = self._slots[slot]
            # the how manieth of its lane
            places = cycle * self._counts[lanes] + self._before[slot]
            samples, epochs = np.empty_like(places), np.empty_like(places)
            for lane in np.unique(lanes).tolist():
                here = np.flatnonzero(lanes == lane)
                samples[here], epochs[here] = self._in_lane(lane, places[here])
        mine = slice(self.rank, None, self.world)
        sets, samples, epochs = lanes[mine], samples[mine], epochs[mine]
        if not self._is_mixed:
            sets = np.searchsorted(self._ends, samples, side="right")
            samples = samples - np.concatenate([[0], self._ends])[sets]
        return sets, samples, epochs

    def _in_lane(self, lane: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples and epochs of a range of places of one lane."""
        epochs, first = np.divmod(places, self._lengths[lane])
        order = self._orders[lane]
        return (first if order is None else order.samples(places[0], places[-1] + 1)), epochs


def cycle_of(weights: Sequence[int], n_sets: int) -> np.ndarray:
    """The set at each position of a cycle, int64: as often as its weight, spread evenly.

    Set k of weight w would like its slots at (j + 1/2) / w of the cycle, j = 0..w-1; all of them
    in the order of these wishes. For two sets these are the points of Bresenham's line.

    Raises:
        InputError: the weights are no whole numbers from 1 on, too few, or too large.
    """
    if len(weights) != n_sets or not all(type(w) is int and w >= 1 for w in weights):
        raise InputError(
            f"the weights {list(weights)} of {n_sets} sets: give each one whole number from 1 on"
        )
    common = gcd(*weights)
    counts = np.array([w // common for w in weights])
    if counts.sum() > MAX_CYCLE:
        raise InputError(
            f"the weights {list(weights)} repeat after {counts.sum()} samples, {MAX_CYCLE} are the "
            "most: take smaller numbers"
        )
    wishes = np.concatenate([(2 * np.arange(w) + 1) / (2 * w) for w in counts])
    return np.repeat(np.arange(n_sets), counts)[np.argsort(wishes, kind="stable")]
