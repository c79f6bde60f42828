"""What two pictures have in common: a perceptual hash, and lists of pictures to keep out of a set.

The hash finds the same picture at another size, quality or brightness. It does not find crops, nor
mirrored or turned pictures. The paper removed near-duplicates of its evaluation set with a
contrastive model that was trained for it; this finds re-encodings and claims no more.
"""

import re
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.console import InputError
from pipeline.data.images import Pixels

SIDE = 32  # cells a side of which the hash sees the mean, as in the classic pHash
LOW = 8  # frequencies a side: 64 bits
MAX_DISTANCE = 8  # bits of 64 in which two hashes of one picture may differ
MIN_BITS = 16  # that a hash has at least; half of them where no frequencies are equal
FEW_ROWS = 257  # whose sums of bytes fit 16 bits
LONG = 8192  # pixels
HASH = re.compile(r"(?:[0-9a-f]{32}|[0-9a-f]{16})")


def phash(luma_HW: Pixels) -> int:
    """The perceptual hash of a picture: 64 bits of its luma, uint8 [H, W], both sides at least 1.

    The classic pHash: means of 32x32 cells, their 8x8 lowest frequencies of a DCT-II, and for each
    whether it is above their median; row by row, the highest bit first. The sums of the cells are
    whole numbers, so exact, and the frequencies are rounded: every machine gives the same bits, and
    what has no structure has no bits. See ``is_telling``.
    """
    height, width = luma_HW.shape
    is_long = width > LONG
    if is_long:  # else 32 sums for each pixel of a row would take gigabytes
        luma_HW = np.ascontiguousarray(luma_HW.T)
    cells = _sum_columns(_sum_rows(luma_HW)) / (height * width)
    dct = _dct()
    # in gray levels times 32; sums of another order differ behind the tenth digit
    low = np.round(dct @ (cells.T if is_long else cells) @ dct.T, 6).reshape(-1)
    middle = np.sort(low)[LOW * LOW // 2 - 1 : LOW * LOW // 2 + 1]
    bits = np.packbits(low > middle.sum() / 2)
    return int.from_bytes(bits.tobytes())


def _sum_rows(values: Pixels) -> NDArray[np.float64]:
    """Sums over 32 bands of equal height, in 1/32 of a row: whole, float64 [32, W]."""
    height, width = values.shape
    edges = np.arange(SIDE + 1) * height
    # the row that an edge between bands cuts, and how much of it lies above
    row, above = edges // SIDE, edges % SIDE
    # 16 bits where they do: several times as fast, and this is where the time goes
    dtype = np.uint16 if height // SIDE + 1 <= FEW_ROWS else np.uint32
    whole = np.empty((SIDE, width), dtype)
    for i, (start, stop) in enumerate(pairwise(row.tolist())):
        np.add.reduce(values[start:stop], axis=0, dtype=dtype, out=whole[i])
    sums = np.multiply(whole, float(SIDE), dtype=np.float64)
    if above.any():
        cut = values[np.minimum(row, height - 1)] * above[:, None]
        sums += np.diff(cut, axis=0)
    return sums


def _sum_columns(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over 32 bands of equal width, in 1/32 of a column: [32, W] -> [32, 32], whole."""
    width = values.shape[1]
    edges = np.arange(SIDE + 1) * width
    column, left = edges // SIDE, edges % SIDE
    # reduceat gives one column where two edges cut the same one, and none lies between
    has_whole = np.diff(column) > 0
    sums = np.add.reduceat(values, column[:-1], axis=1) * (SIDE * has_whole)
    if left.any():
        cut = values[:, np.minimum(column, width - 1)] * left
        sums += np.diff(cut, axis=1)
    return np.asarray(sums)


@lru_cache(maxsize=1)
def _dct() -> NDArray[np.float64]:
    """The first rows of the orthonormal DCT-II of 32 values: [8, 32]."""
    angles = np.pi / SIDE * np.outer(np.arange(LOW), np.arange(SIDE) + 0.5)
    scale = np.full((LOW, 1), np.sqrt(2 / SIDE))
    scale[0] = np.sqrt(1 / SIDE)
    return np.cos(angles) * scale


def is_telling(phash: int) -> bool:
    """Whether equal or near hashes speak for equal pictures.

    They do not for pictures of one colour, which share a hash, nor for stripes and plain gradients.
    """
    return phash.bit_count() >= MIN_BITS


def hash_line(image_sha: bytes, phash: int) -> str:
    """One line of a hash list, without its end; ``HashList.from_file`` reads it."""
    return f"{image_sha.hex()} {phash:016x}"


class HashList:
    """Pictures to keep out, such as those of an evaluation set: some thousands of hashes.

    Args:
        exact: image_sha (16 bytes) of a picture -> the line of the list that names it.
        perceptual: pairs of a phash and its line.
    """

    def __init__(self, exact: dict[bytes, int], perceptual: list[tuple[int, int]]) -> None:
        self._exact = exact
        self._hashes = np.array([bits for bits, _ in perceptual], np.uint64)
        self._lines = [line for _, line in perceptual]

    def __len__(self) -> int:
        return len(self._exact) + len(self._lines)

    @classmethod
    def from_file(cls, path: str | Path) -> "HashList":
        """Read a list: a line is an image_sha in 32 hexadecimal digits, a phash in 16, or both.

        What follows a ``#`` is a comment. ``python -m data_prep.stats DIR --hashes FILE`` writes
        the list of a pair set.

        Raises:
            InputError: the file cannot be read, holds no hash, or has a line that is none.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise InputError(f"hash list {path} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise InputError(f"hash list {path} is no text: {error.reason}") from error
        exact: dict[bytes, int] = {}
        perceptual: list[tuple[int, int]] = []
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].lower().split()
            lengths = sorted(len(word) for word in words)
            if not words:
                continue
            if lengths not in ([16], [32], [16, 32]) or not all(map(HASH.fullmatch, words)):
                raise InputError(
                    f"hash list {path}, line {number}: {line.strip()[:80]!r} is neither an "
                    "image_sha (32 hexadecimal digits) nor a phash (16), nor both"
                )
            for word in words:
                if len(word) == 32:
                    exact.setdefault(bytes.fromhex(word), number)
                else:
                    perceptual.append((int(word, 16), number))
        if not exact and not perceptual:
            raise InputError(f"hash list {path} holds no hash: it would keep nothing out")
        return cls(exact, perceptual)

    def matches(self, image_sha: bytes, phash: int) -> str | None:
        """Which line of the list a picture matches and how, or None.

        A picture matches when its bytes are the same, or when its phash ``is_telling`` and at most
        ``MAX_DISTANCE`` bits away; then the nearest line is named.
        """
        if (line := self._exact.get(image_sha)) is not None:
            return f"the same bytes as line {line}"
        if not self._lines or not is_telling(phash):
            return None
        distances = np.bitwise_count(self._hashes ^ np.uint64(phash))
        nearest = int(distances.argmin())
        if (distance := int(distances[nearest])) > MAX_DISTANCE:
            return None
        return f"{distance} of 64 bits from line {self._lines[nearest]}"
