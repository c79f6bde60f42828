"""Which sample comes when: arithmetic on the position, no index in memory and none on disk.

Position ``p`` of an endless stream belongs to epoch ``p // n``; inside an epoch a keyed permutation
of ``0..n-1`` gives the sample. The permutation is a balanced Feistel network over the smallest even
number of bits that holds n, walked along its cycle until the value is below n. Six rounds: three
leave a visible pattern (chi2 of neighbouring differences 3090 against 255), four and more none.
"""

from functools import lru_cache
from hashlib import blake2b

import numpy as np

from pipeline.console import InputError

N_ROUND = 6


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """``N_ROUND`` keys of 64 bits, from ``blake2b("seed:epoch:round")``."""
    digests = (blake2b(f"{seed}:{epoch}:{i}".encode(), digest_size=8) for i in range(N_ROUND))
    return tuple(int.from_bytes(digest.digest(), "little") for digest in digests)


def _mix(x: np.ndarray, key: int) -> np.ndarray:
    """The finalizer of splitmix64 on ``x`` plus a key; uint64 in, uint64 out, wraps around."""
    x = x + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order:
    """The sample at every position of an endless stream that shows each sample once an epoch.

    The whole state is the position: any start, world size and batch size read the same stream.

    Args:
        n: samples in the set, at least 1.
        seed: a different seed is a different order in every epoch.

    Raises:
        InputError: n is below 1.
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise InputError(f"an order over {n} samples is empty: it needs at least 1")
        self.n, self.seed = int(n), int(seed)
        bits = max(2, (self.n - 1).bit_length())
        self._half = np.uint64((bits + 1) // 2)
        self._low = np.uint64((1 << int(self._half)) - 1)

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Samples of the positions ``start <= p < stop``.

        Returns:
            int64 [stop - start], each in 0..n-1; the range may span epochs.

        Raises:
            InputError: start is negative or behind stop.
        """
        if not 0 <= start <= stop:
            raise InputError(
                f"positions {start}..{stop} are no range: 0 <= start <= stop is needed"
            )
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.n)
            last = min(self.n, first + stop - start)
            parts.append(self._permuted(np.arange(first, last, dtype=np.uint64), epoch))
            start += last - first
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _permuted(self, x: np.ndarray, epoch: int) -> np.ndarray:
        """Values of one epoch's permutation at ``x``, uint64 below n; returns int64."""
        keys = _round_keys(self.seed, epoch)
        x = self._feistel(x, keys)
        # the network permutes up to 4 n values: follow the cycle until it is back below n
        while (outside := np.flatnonzero(x >= np.uint64(self.n))).size:
            x[outside] = self._feistel(x[outside], keys)
        return x.astype(np.int64)

    def _feistel(self, x: np.ndarray, keys: tuple[int, ...]) -> np.ndarray:
        left, right = x >> self._half, x & self._low
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & self._low)
        return (left << self._half) | right
