"""What every launch of the Triton kernels needs: compile-time constants, grids, strides."""

import math
from typing import Any

import triton
from torch import Tensor

from kernels.patterns import Pattern
from kernels.tiles import Tile

# the kernels take powers of two, one instruction each: exp(x) = 2 ** (x * LOG2_E)
LOG2_E = 1 / math.log(2)

# offsets from the first token of a head are 32-bit
LONGEST = 2**31


def is_too_long(x_BNHD: Tensor) -> bool:
    """Whether the tokens of a head lie too far apart for the kernels."""
    return x_BNHD.shape[1] * x_BNHD.stride(1) >= LONGEST


def constants(pattern: Pattern, width: int, tile: Tile) -> dict[str, Any]:
    """The compile-time arguments of a kernel, by name."""
    return {
        "T": pattern.n_text,
        "W": pattern.grid,
        "R": pattern.radius,
        "REACH": pattern.reach,
        "KIND": "clamp" if pattern.edge == "clamp" else pattern.kind,
        "D": width,
        "ROWS": tile.rows,
        "STEP": tile.step,
        "LOCAL": tile.local,
    }


def n_programs(pattern: Pattern, tile: Tile, n_heads: int) -> int:
    """Programs that cover the text and the image of ``n_heads`` heads of all samples."""
    text, image = pattern.n_text, pattern.n_image
    return n_heads * (triton.cdiv(text, tile.rows) + triton.cdiv(image, tile.rows))


def strides(x_BNHD: Tensor) -> tuple[int, int, int]:
    """Strides of sample, token and head; that of the width must be 1."""
    b, n, h, d = x_BNHD.stride()
    assert d == 1, "op.py lets only a contiguous head width through"
    return b, n, h
