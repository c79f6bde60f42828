"""Tile sizes of the Triton kernels: a table, read and never searched at run time.

``tiles.json`` holds one line per chip, head width, bytes of an element, pattern and pass;
``python -m kernels.tune`` measures candidates on the GPU at hand and rewrites its lines. A fixed
table makes a run repeatable: no timing noise chooses the order in which a sum is rounded.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch

from kernels.patterns import Kind, Pattern

TABLE = Path(__file__).with_name("tiles.json")

Pass = Literal["forward", "dq", "dkdv"]
PASSES: tuple[Pass, ...] = get_args(Pass)
WIDTHS = (32, 64, 128)
# shared memory that one program may have, bytes: CUDA C++ Programming Guide, compute capabilities
CHIPS = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448}
# a tensor core's product is at least 16 on each side
SMALLEST = 16


@dataclass(frozen=True)
class Tile:
    """How one pass over one pattern is cut.

    Args:
        rows: queries of one program; in the pass "dkdv" its keys.
        step: keys (queries in "dkdv") that it meets at a time where all of them count.
        local: the same inside the window of the pattern, where each pair is tested.
        warps: of 32 threads each.
        stages: depth of the software pipeline.
    """

    rows: int
    step: int
    local: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name in ("rows", "step", "local", "warps"):
            value, least = getattr(self, name), 1 if name == "warps" else SMALLEST
            if value < least or value & (value - 1):
                raise ValueError(f"{name} is {value}; it must be a power of two from {least} on")
        if self.local > self.rows:
            raise ValueError(f"local is {self.local}; it must be at most rows, {self.rows}")
        if self.stages < 1:
            raise ValueError(f"stages is {self.stages}; it must be at least 1")


def chip_of(device: torch.device) -> str | None:
    """The column of the table for a device; None where there is none for it.

    A CPU stands for sm_80, so that the interpreter runs what an A100 would.
    """
    if device.type == "cpu":
        return "sm_80"
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (8, 0):
        return "sm_80"
    # 99 KB of shared memory: consumer Ampere, Ada and Blackwell
    if major == 8 or major == 12:
        return "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(major)


def key(chip: str, width: int, itemsize: int, kind: Kind, which: Pass) -> str:
    """Name of a line of the table."""
    return f"{chip} D{width} {8 * itemsize}-bit {kind} {which}"


@lru_cache(maxsize=1)
def table() -> dict[str, Tile]:
    """All lines of ``tiles.json``."""
    return {name: Tile(**sizes) for name, sizes in json.loads(TABLE.read_text()).items()}


def write_table(tiles: dict[str, Tile]) -> None:
    """Replace ``tiles.json``: one line a tile, in the order of its keys."""
    lines = (f"  {json.dumps(name)}: {json.dumps(asdict(tile))}" for name, tile in tiles.items())
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    table.cache_clear()
    tile_for.cache_clear()


@lru_cache(maxsize=256)
def tile_for(chip: str, width: int, itemsize: int, pattern: Pattern, which: Pass) -> Tile:
    """The tile for a pattern, its step shrunk to a short text so that it divides it if it can."""
    tile = table()[key(chip, width, itemsize, pattern.kind, which)]
    step = tile.step
    while pattern.n_text % step and step > SMALLEST and which != "dkdv":
        step //= 2
    return replace(tile, step=step)
