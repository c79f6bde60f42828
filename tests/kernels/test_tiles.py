from typing import get_args

import pytest
import torch

from kernels import Pattern, tiles
from kernels.patterns import Kind
from kernels.tiles import CHIPS, PASSES, WIDTHS, Tile, chip_of, key, table, tile_for, write_table

ROW = {"rows": 64, "step": 64, "local": 32, "warps": 4, "stages": 2}


def test_table_has_every_line_and_no_other():
    lines = {
        key(chip, width, itemsize, kind, which)
        for chip in CHIPS
        for width in WIDTHS
        for itemsize in (2, 4)
        for kind in get_args(Kind)
        for which in PASSES
    }
    assert set(table()) == lines


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 48}, "rows is 48; it must be a power of two from 16 on"),
        ({"rows": 8, "local": 8}, "rows is 8; it must be a power of two from 16 on"),
        ({"step": 0}, "step is 0; it must be a power of two from 16 on"),
        ({"local": -32}, "local is -32; it must be a power of two from 16 on"),
        ({"warps": 3}, "warps is 3; it must be a power of two from 1 on"),
        ({"local": 128}, "local is 128; it must be at most rows, 64"),
        ({"stages": 0}, "stages is 0; it must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_impossible_tile_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Tile(**ROW | change)


@pytest.mark.parametrize(
    ("n_text", "step"),
    [(256, 64), (64, 64), (48, 16), (32, 32), (31, 16), (0, 64)],
)
@pytest.mark.parametrize("which", ["forward", "dq"])
def test_step_shrinks_until_it_divides_the_text(n_text, step, which, monkeypatch):
    line = key("sm_80", 64, 2, "row", which)
    monkeypatch.setattr(tiles, "table", lambda: {line: Tile(**ROW)})
    tile_for.cache_clear()
    try:
        tile = tile_for("sm_80", 64, 2, Pattern("row", n_text, 8), which)
    finally:
        tile_for.cache_clear()
    assert tile == Tile(**ROW | {"step": step})


def test_step_of_dkdv_goes_over_queries_and_stays():
    pattern = Pattern("row", 48, 8)
    assert tile_for("sm_90", 64, 2, pattern, "dkdv") == table()[key("sm_90", 64, 2, "row", "dkdv")]


@pytest.mark.parametrize(
    ("capability", "chip"),
    [
        ((7, 5), None),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), None),
        ((12, 0), "sm_86"),
    ],
    ids=str,
)
def test_chip_of_a_capability(capability, chip, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert chip_of(torch.device("cuda", 0)) == chip


def test_chip_of_other_devices(monkeypatch):
    assert chip_of(torch.device("cpu")) == "sm_80"
    assert chip_of(torch.device("mps")) is None
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert chip_of(torch.device("cuda", 0)) is None


def test_table_is_written_as_it_was_read(tmp_path, monkeypatch):
    before = tiles.TABLE.read_text()
    old = dict(table())
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")
    try:
        write_table(old)
        assert tiles.TABLE.read_text() == before
        assert table() == old
        line = key("sm_90", 64, 2, "conv", "dq")
        write_table(old | {line: Tile(**ROW)})
        assert table()[line] == Tile(**ROW)
        assert tile_for("sm_90", 64, 2, Pattern("conv", 64, 8), "dq") == Tile(**ROW)
        assert len(tiles.TABLE.read_text().splitlines()) == len(old) + 2
    finally:
        table.cache_clear()
        tile_for.cache_clear()
