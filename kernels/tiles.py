"""Tile sizes of the Triton kernels: a table, read and never searched at run time.

``tiles.json`` holds one line per chip, head width, bytes of an element, pattern and pass;
``python -m kernels.tune`` measures candidates on the GPU at hand and rewrites its lines. A fixed
table makes a run repeatable: no timing noise chooses the order in which a sum is rounded.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels.patterns import Kind, Pattern

TABLE = Path(__file__).with_name("tiles.json")
WAY_OUT = "restore it: git checkout kernels/tiles.json"

Pass = Literal["forward", "dq", "dkdv"]
PASSES: tuple[Pass, ...] = get_args(Pass)
WIDTHS = (32, 64, 128)
# bytes of an element
ITEMSIZES = (2, 4)
# what ``chip_of`` knows
SUPPORTED = "an NVIDIA GPU of compute capability 8.x, 9.0, 10.x or 12.x"
# shared memory that one program may have, bytes: CUDA C++ Programming Guide, compute capabilities
CHIPS = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448}
# a tensor core's product is at least 16 on each side
SMALLEST = 16

# 1,024 threads
MOST_WARPS = 32


@dataclass(frozen=True)
class Tile:
    """How one pass over one pattern is cut.

    Args:
        rows: queries of one program; in the pass "dkdv" its keys.
        step: keys (queries in "dkdv") that it meets at a time where all of them count.
        local: the same inside the window of the pattern, where each pair is tested.
        warps: of 32 threads each.
        stages: depth of the software pipeline, at least 1.

    Raises:
        ValueError: a size that is no int, no power of two, too small or too large.
    """

    rows: int
    step: int
    local: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name in ("rows", "step", "local", "warps"):
            value, least = getattr(self, name), 1 if name == "warps" else SMALLEST
            if type(value) is not int or value < least or value & (value - 1):
                raise ValueError(f"{name} is {value!r}; it must be a power of two from {least} on")
        if self.warps > MOST_WARPS:
            raise ValueError(f"warps is {self.warps}; a program has at most {MOST_WARPS}")
        if self.local > self.rows:
            raise ValueError(f"local is {self.local}; it must be at most rows, {self.rows}")
        if type(self.stages) is not int or self.stages < 1:
            raise ValueError(f"stages is {self.stages!r}; it must be at least 1")


def chip_of(device: torch.device) -> str | None:
    """The column of the table for a device; None where there is none for it.

    A CPU stands for sm_80, so that the interpreter runs what an A100 would.
    """
    if device.type == "cpu":
        return "sm_80"
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 0), (9, 0)):
        return f"sm_{major}0"
    # 99 KB of shared memory: consumer Ampere, Ada and Blackwell
    return {8: "sm_86", 10: "sm_100", 12: "sm_86"}.get(major)


def key(chip: str, width: int, itemsize: int, kind: Kind, which: Pass) -> str:
    """Name of a line of the table.

    Args:
        chip: one of ``CHIPS``.
        width: of a head, one of ``WIDTHS``.
        itemsize: bytes of an element, 2 or 4.
        kind: of the pattern.
        which: the pass.

    Raises:
        ValueError: an argument outside these bounds.
    """
    for name, value, known in (
        ("chip", chip, CHIPS),
        ("width", width, WIDTHS),
        ("itemsize", itemsize, ITEMSIZES),
        ("kind", kind, get_args(Kind)),
        ("which", which, PASSES),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; tiles.json knows {', '.join(map(str, known))}")
    return f"{chip} D{width} {8 * itemsize}-bit {kind} {which}"


@lru_cache(maxsize=1)
def table() -> dict[str, Tile]:
    """All lines of ``tiles.json``.

    Raises:
        ValueError: the file is no JSON, or a line of it is no ``Tile``.
    """
    try:
        lines = json.loads(TABLE.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{TABLE} is no JSON ({error}); {WAY_OUT}") from error
    return {name: _tile(name, sizes) for name, sizes in lines.items()}


def _tile(name: str, sizes: dict[str, Any]) -> Tile:
    """The tile of one line, which is named when it is none."""
    known = [field.name for field in fields(Tile)]
    if unknown := [field for field in sizes if field not in known]:
        wrong = f"{', '.join(unknown)} is unknown; a tile has {', '.join(known)}"
    elif missing := [field for field in known if field not in sizes]:
        wrong = f"{', '.join(missing)} is missing"
    else:
        try:
            return Tile(**sizes)
        except ValueError as error:
            wrong = str(error)
    raise ValueError(f'{TABLE}, "{name}": {wrong}; correct it, or {WAY_OUT}')


def write_table(tiles: dict[str, Tile]) -> None:
    """Replace ``tiles.json``: one line a tile, in the order of its keys."""
    lines = (f"  {json.dumps(name)}: {json.dumps(asdict(tile))}" for name, tile in tiles.items())
    # whole or not at all: who is stopped here must not leave half a table
    part = TABLE.with_name(TABLE.name + ".part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    part.replace(TABLE)
    table.cache_clear()
    tile_for.cache_clear()


@lru_cache(maxsize=256)
def tile_for(chip: str, width: int, itemsize: int, pattern: Pattern, which: Pass) -> Tile:
    """The tile for a pattern, its step shrunk to a short text so that it divides it if it can.

    Args:
        chip: one of ``CHIPS``.
        width: of a head, one of ``WIDTHS``.
        itemsize: bytes of an element, 2 or 4.
        pattern: whose kind names the line.
        which: the pass.

    Raises:
        ValueError: an argument outside these bounds, or a table without that line.
    """
    name = key(chip, width, itemsize, pattern.kind, which)
    tile = table().get(name)
    if tile is None:
        raise ValueError(f'{TABLE} has no line "{name}"; {WAY_OUT}')
    step = tile.step
    while pattern.n_text % step and step > SMALLEST and which != "dkdv":
        step //= 2
    return replace(tile, step=step)


def tile_on(x: Tensor, pattern: Pattern, which: Pass) -> Tile:
    """The tile of a pass for the chip that ``x`` is on.

    Args:
        x: q, k or v, whose last axis is the width of a head.
        pattern: as in ``tile_for``.
        which: the pass.

    Raises:
        ValueError: no kernels are built for the device, or what ``tile_for`` refuses.
    """
    chip = chip_of(x.device)
    if chip is None:
        raise ValueError(
            f"the tensors are on {x.device} and Triton kernels need {SUPPORTED}; "
            "leave backend out, and a path that runs there is taken"
        )
    return tile_for(chip, x.shape[-1], x.element_size(), pattern, which)
