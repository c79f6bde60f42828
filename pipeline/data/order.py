"""Which sample comes when: arithmetic on the position, no index in memory and none on disk.

Position ``p`` of an endless stream belongs to epoch ``p // n``; inside an epoch a keyed permutation
of ``0..n-1`` gives the sample. The permutation is a balanced Feistel network over the smallest even
number of bits that holds n, walked along its cycle until the value is below n. Six rounds: three
leave a visible pattern (chi2 of neighbouring differences 3090 against 255), four and more none.

On a disk that gives rows one by one too slowly, the order can keep to blocks of neighbouring rows:
the blocks are permuted, and the rows of each ``window`` blocks that then follow one another are
permuted among themselves. A reader that holds these blocks in memory fetches each of them once an
epoch.
"""

from functools import lru_cache
from hashlib import blake2b

import numpy as np

from pipeline.console import InputError

N_ROUND = 6
WINDOW = 64  # blocks
CHUNK = 8192  # positions computed at once: one by one they cost ten times as much


def keyed(seed: int, label: object) -> int:
    """64 bits that depend on ``seed`` and ``label`` alone."""
    digest = blake2b(f"{seed}:{label}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@lru_cache(maxsize=64)
def _round_keys(seed: int, label: str) -> tuple[int, ...]:
    """``N_ROUND`` keys of 64 bits, from ``blake2b("seed:label:round")``."""
    return tuple(keyed(seed, f"{label}:{i}") for i in range(N_ROUND))


def mix(x: np.ndarray, key: int) -> np.ndarray:
    """The finalizer of splitmix64 on ``x`` plus a key; uint64 in, uint64 out, wraps around."""
    x = x + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(x: np.ndarray, n: int, seed: int, label: str) -> np.ndarray:
    """Values of a permutation of 0..n-1 at ``x``, int64 in 0..n-1; int64 of the same shape."""
    keys = _round_keys(seed, label)
    half = np.uint64((max(2, (n - 1).bit_length()) + 1) // 2)
    low = np.uint64((1 << int(half)) - 1)

    def feistel(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for key in keys:
            left, right = right, left ^ (mix(right, key) & low)
        return (left << half) | right

    y = feistel(x.astype(np.uint64))
    # the network permutes up to 4 n values: follow the cycle until it is back below n
    while (outside := np.flatnonzero(y >= np.uint64(n))).size:
        y[outside] = feistel(y[outside])
    return y.astype(np.int64)


class Order:
    """The sample at every position of an endless stream that shows each sample once an epoch.

    The whole state is the position: any start, world size and batch size read the same stream.

    Args:
        n: samples in the set, at least 1.
        seed: a different seed is a different order in every epoch.
        block: samples of a block of neighbours; 0 permutes all samples among themselves.
        window: blocks that are permuted together.

    Raises:
        InputError: n or window is below 1, or block below 0.
    """

    def __init__(self, n: int, seed: int, *, block: int = 0, window: int = WINDOW) -> None:
        if n < 1:
            raise InputError(f"an order over {n} samples is empty: it needs at least 1")
        if block < 0 or window < 1:
            raise InputError(
                f"an order of blocks of {block} samples in windows of {window}: take at least 1"
            )
        self.n, self.seed = int(n), int(seed)
        self.block, self.window = int(block), int(window)
        self._chunk = lru_cache(maxsize=2)(self._computed)

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
        start, stop, parts = int(start), int(stop), []
        while start < stop:
            epoch, first = divmod(start, self.n)
            chunk = first // CHUNK
            last = min(self.n, first + stop - start, (chunk + 1) * CHUNK)
            offset = chunk * CHUNK
            parts.append(self._chunk(epoch, chunk)[first - offset : last - offset])
            start += last - first
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _computed(self, epoch: int, chunk: int) -> np.ndarray:
        """Samples of up to ``CHUNK`` positions of one epoch."""
        start, stop = chunk * CHUNK, min(self.n, (chunk + 1) * CHUNK)
        if not self.block:
            return permuted(np.arange(start, stop), self.n, self.seed, str(epoch))
        # the rows of each window among themselves: slots of blocks, and rows in these
        parts, size = [], self.block * self.window
        for window in range(start // size, (stop - 1) // size + 1):
            first, last = window * size, min(self.n, (window + 1) * size)
            inside = np.arange(max(start, first), min(stop, last)) - first
            label = f"{epoch}:window {window}"
            parts.append(first + permuted(inside, last - first, self.seed, label))
        slot, row = np.divmod(np.concatenate(parts), self.block)
        # what is left over for a short block comes last; the others are permuted
        n_whole = self.n // self.block
        whole = np.flatnonzero(slot < n_whole)
        if whole.size:
            slot[whole] = permuted(slot[whole], n_whole, self.seed, f"{epoch}:blocks")
        # turned by a number of its own, an epoch has its seams and its short block elsewhere
        turn = keyed(self.seed, f"{epoch}:turn") % self.n
        return (slot * self.block + row + turn) % self.n
