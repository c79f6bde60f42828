"""An invisible mark in the pixels: it says that a picture was drawn here, and survives JPEG.

The luma of a picture is cut into blocks of 8 x 8 pixels, and the five lowest frequencies of each
block's discrete cosine transform, its mean excepted, are moved to the nearest value that means a
bit: quantisation index modulation (Chen and Wornell 2001), where ``STEP * (n + 1/4)`` means one and
``STEP * (n - 1/4)`` zero, for any whole n. The bits are those of one fixed pattern of 64 x 64
pixels, laid side by side over the picture. A reader lays all repeats over each other and counts the
bits that agree, wherever the pattern may begin: so it also finds the mark in what was cut out.

How sure it is follows from counting alone. Whatever an unmarked picture holds, its bits are fixed
and the pattern's were drawn without looking at it: each agrees with a probability of at most 1/2.

Thin strokes on saturated colours lose bits to JPEG, which keeps colours at half the size. What it
takes from such a picture is added beforehand.

The pattern is public. The mark tells the origin of pictures whose makers are honest about it. It is
no protection: whoever wants to can remove it, and can put it on a photograph. Scaling, turning and
mirroring a picture remove it too, and so do blur and JPEG below a quality of about 60.

Letters: Y X pixels, C three colours, P Q blocks, U V frequencies, K marked frequencies.
"""

import functools
import hashlib
import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import require

BLOCK = 8  # pixels a side: JPEG's blocks, so that its rounding meets single frequencies
TILE = 8  # blocks a side of the pattern
PERIOD = BLOCK * TILE  # pixels
SMALLEST = 32  # pixels a side of a picture that has room for enough bits
LARGEST = 1024  # pixels a side that are read: they hold the pattern 256 times
# between values of one meaning: a bit outlives JPEG's rounding while its steps here, 2 or 3 at
# quality 90 and 6 to 8 at 70, stay below half of it
STEP = 20.0
CHANCE = 1e-9  # at most, that an unmarked picture is taken for a marked one
CLOSE = STEP / 50  # to the wanted value: far below what rounding to whole numbers does
ROUNDS = 24  # of moving frequencies and clipping: on white most of them are needed
ENOUGH = 0.75  # of the bits behind JPEG: a chance of 1e-19 in a picture of 64 pixels
EXTRA = STEP / 16  # what is added in one go; with STEP / 4 some pictures fall below 39 dB
EXTRAS = 8
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in JPEG
# (u, v): JPEG rounds the next ones more coarsely
FREQUENCIES = [(0, 1), (1, 0), (0, 2), (1, 1), (2, 0)]
SEED = b"daikon mark 1"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """What ``find_mark`` saw."""

    found: bool
    matched: int  # bits of the pattern
    of: int  # bits that the picture has room for
    chance: float  # bound on the probability of so good a match in an unmarked picture


@functools.cache
def _pattern_PQK() -> Floats:
    """The bits as +1 and -1, from a hash: the same in every version of every library."""
    n = TILE * TILE * len(FREQUENCIES)
    bits = np.frombuffer(hashlib.shake_256(SEED).digest(n // 8), np.uint8)
    return np.unpackbits(bits).reshape(TILE, TILE, -1).astype(np.float64) * 2 - 1


@functools.cache
def _cosines_YU() -> Floats:
    """The orthonormal cosine transform of 8 values, up to the highest marked frequency."""
    y, u = np.mgrid[:BLOCK, : 1 + max(max(pair) for pair in FREQUENCIES)]
    columns = np.cos((2 * y + 1) * u * np.pi / (2 * BLOCK)) * math.sqrt(2 / BLOCK)
    columns[:, 0] /= math.sqrt(2)
    return columns


def add_mark(image_YXC: np.ndarray) -> np.ndarray:
    """The picture with the mark; pixels of a block that is cut off at the edge stay as they are.

    Args:
        image_YXC: uint8, three colours.

    Raises:
        InputError: a side is below ``SMALLEST``.
    """
    height, width = image_YXC.shape[:2]
    require(
        min(height, width) >= SMALLEST,
        f"a picture of {width} x {height} pixels has no room for the invisible mark, which takes "
        f"{SMALLEST} a side; leave the mark out",
    )
    rows, columns = height // BLOCK, width // BLOCK
    bits_PQK = _pattern_PQK()[np.arange(rows) % TILE][:, np.arange(columns) % TILE]
    offset_PQK = bits_PQK * STEP / 4
    was_PQK = _frequencies_PQK(image_YXC)
    wanted_PQK = np.round((was_PQK - offset_PQK) / STEP) * STEP + offset_PQK
    aim_PQK = wanted_PQK
    best = marked = _moved(image_YXC, aim_PQK)
    most = 0
    for _ in range(1 + EXTRAS):
        left_PQK = _frequencies_PQK(_through_jpeg(marked))
        survivors = int((np.sign(np.sin(left_PQK * (2 * np.pi / STEP))) == bits_PQK).sum())
        if survivors > most:
            best, most = marked, survivors
        if most >= ENOUGH * bits_PQK.size:
            break
        aim_PQK = aim_PQK + (wanted_PQK - left_PQK).clip(-EXTRA, EXTRA)
        marked = _moved(image_YXC, aim_PQK)
    return best


def _frequencies_PQK(image_YXC: np.ndarray) -> Floats:
    """The marked frequencies of the whole blocks' luma."""
    rows, columns = (side // BLOCK for side in image_YXC.shape[:2])
    luma_YX = image_YXC[: rows * BLOCK, : columns * BLOCK] @ LUMA
    blocks_PYQX = luma_YX.reshape(rows, BLOCK, columns, BLOCK)
    return np.tensordot(blocks_PYQX, _waves_YXK(), ((1, 3), (0, 1)))


@functools.cache
def _waves_YXK() -> Floats:
    us, vs = np.transpose(FREQUENCIES)
    cosines_YU = _cosines_YU()
    return cosines_YU[:, None, us] * cosines_YU[:, vs]


def _moved(image_YXC: np.ndarray, wanted_PQK: Floats) -> np.ndarray:
    """The picture whose marked frequencies are as near to the wanted ones as its pixels can be."""
    waves_YXK = _waves_YXK()
    rows, columns = wanted_PQK.shape[:2]
    cut = image_YXC[: rows * BLOCK, : columns * BLOCK]
    pixels = cut.reshape(rows, BLOCK, columns, BLOCK, 3).astype(np.float64)
    # what clipping takes away is put back where there is room: two convex sets, met in turns
    for _ in range(ROUNDS):
        change_PQK = wanted_PQK - np.tensordot(pixels @ LUMA, waves_YXK, ((1, 3), (0, 1)))
        if np.abs(change_PQK).max() < CLOSE:
            break
        change_PQYX = np.tensordot(change_PQK, waves_YXK, (2, 2))
        pixels += change_PQYX.transpose(0, 2, 1, 3)[..., None]
        np.clip(pixels, 0, 255, out=pixels)
    out = image_YXC.copy()
    out[: rows * BLOCK, : columns * BLOCK] = np.round(pixels).reshape(cut.shape)
    return out


def _through_jpeg(image_YXC: np.ndarray) -> np.ndarray:
    """The picture as JPEG of quality 90 with colours of half the size leaves it."""
    file = io.BytesIO()
    Image.fromarray(image_YXC).save(file, "JPEG", quality=90)
    with Image.open(file) as image:
        return np.asarray(image)


def find_mark(image_YXC: np.ndarray) -> Finding:
    """Look for the mark wherever it may begin.

    Args:
        image_YXC: uint8, three colours, any size; of a large one the upper left part is read.
    """
    image_YXC = image_YXC[:LARGEST, :LARGEST]
    height, width = image_YXC.shape[:2]
    if min(height, width) < BLOCK:
        return Finding(False, 0, 0, 1.0)
    signs_KYX, seen_YX = _folded(image_YXC @ LUMA)
    # block p, q of phase y, x is what stands at 8 p + y, 8 q + x
    signs = signs_KYX.reshape(-1, TILE, BLOCK, TILE, BLOCK).transpose(1, 3, 0, 2, 4)
    # not by BLAS: beside other work its threads wait for each other far longer than this takes
    agreement = np.einsum("sb,bf->sf", _shifted_patterns(), signs.reshape(-1, BLOCK * BLOCK))
    voted = np.abs(signs).sum((0, 1, 2)).reshape(-1)
    matched = np.round((agreement + voted) / 2).astype(int)  # [shifts of the pattern, phases]
    seen = seen_YX.reshape(TILE, BLOCK, TILE, BLOCK).sum((0, 2)).reshape(-1) * len(FREQUENCIES)
    # the most surprising place, by the normal approximation; its chance is then exact
    surprise = (2 * matched - seen) / np.sqrt(np.maximum(seen, 1))
    anywhere = np.unravel_index(int(surprise.argmax()), surprise.shape)
    # half of the odds go to a picture that was not cropped, the other half to all places
    findings = []
    for (shift, phase), places in (((0, 0), 1), (anywhere, PERIOD**2)):
        n, of = int(matched[shift, phase]), int(seen[phase])
        chance = min(1.0, 2 * places * _tail(n, of))
        findings.append(Finding(chance <= CHANCE, n, of, chance))
    return min(findings, key=lambda finding: finding.chance)


def _folded(luma_YX: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """What the frequencies say at each place modulo the pattern's period.

    Returns:
        -1, 0 or 1 float64 [K, PERIOD, PERIOD], and whether a whole block begins at such a place.
    """
    windows = np.lib.stride_tricks.sliding_window_view
    cosines_YU = _cosines_YU()
    across_YXV = np.tensordot(windows(luma_YX, BLOCK, axis=1), cosines_YU, 1)
    both_YXVU = np.tensordot(windows(across_YXV, BLOCK, axis=0), cosines_YU, 1)
    us, vs = np.transpose(FREQUENCIES)
    votes_YXK = np.sin(both_YXVU[:, :, vs, us] * (2 * np.pi / STEP))
    height, width = votes_YXK.shape[:2]
    # an unmarked flat block has all frequencies 0 but for rounding: it does not vote
    votes_YXK[np.abs(votes_YXK) < 1e-6] = 0
    padded = np.zeros((-(-height // PERIOD) * PERIOD, -(-width // PERIOD) * PERIOD, len(us)))
    padded[:height, :width] = votes_YXK
    folded = padded.reshape(-1, PERIOD, padded.shape[1] // PERIOD, PERIOD, len(us)).sum((0, 2))
    there = np.arange(PERIOD)
    return np.sign(folded).transpose(2, 0, 1), (there < height)[:, None] & (there < width)


@functools.cache
def _shifted_patterns() -> Floats:
    """The pattern as it looks when it begins at each block: [TILE * TILE, P * Q * K]."""
    pattern = _pattern_PQK()
    return np.stack(
        [np.roll(pattern, (p, q), (0, 1)).ravel() for p in range(TILE) for q in range(TILE)]
    )


def _tail(matched: int, of: int) -> float:
    """The probability of at least so many heads in ``of`` throws of a coin."""
    ways = term = math.comb(of, matched)
    for k in range(matched, of):
        term = term * (of - k) // (k + 1)
        ways += term
    return ways / 2**of
