import json
from typing import get_args

import pytest
import torch

from kernels import Pattern, tiles
from kernels.patterns import Kind
from kernels.tiles import (
    CHIPS,
    ITEMSIZES,
    PASSES,
    SUPPORTED,
    WIDTHS,
    Tile,
    chip_of,
    key,
    table,
    tile_for,
    tile_on,
    write_table,
)

ROW = {"rows": 64, "step": 64, "local": 32, "warps": 4, "stages": 2}


def test_table_has_every_line_and_no_other():
    lines = {
        key(chip, width, itemsize, kind, which)
        for chip in CHIPS
        for width in WIDTHS
        for itemsize in ITEMSIZES
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
        ({"warps": 64}, "warps is 64; a program has at most 32"),
        ({"local": 128}, "local is 128; it must be at most rows, 64"),
        ({"stages": 0}, "stages is 0; it must be at least 1"),
        ({"stages": 1.5}, "stages is 1.5; it must be at least 1"),
        ({"rows": "64"}, "rows is '64'; it must be a power of two from 16 on"),
        ({"step": 64.0}, "step is 64.0; it must be a power of two from 16 on"),
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
        ((9, 1), None),
        ((10, 3), "sm_100"),
        ((11, 0), None),
        ((12, 0), "sm_86"),
        ((12, 1), "sm_86"),
        ((13, 0), None),
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chip": "sm_70"}, "chip is 'sm_70'; tiles.json knows sm_80, sm_86, sm_90, sm_100"),
        ({"chip": None}, "chip is None; "),
        ({"width": 48}, "width is 48; tiles.json knows 32, 64, 128"),
        ({"itemsize": 16}, "itemsize is 16; tiles.json knows 2, 4"),
        ({"kind": "rows"}, "kind is 'rows'; tiles.json knows row, column, conv, dense"),
        ({"which": "dk"}, "which is 'dk'; tiles.json knows forward, dq, dkdv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_key_of_something_unknown_is_refused(change, words):
    known = {"chip": "sm_80", "width": 64, "itemsize": 2, "kind": "row", "which": "dq"}
    with pytest.raises(ValueError, match=words):
        key(**known | change)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Puts another line, or another text, in place of the table."""

    def write(content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "tiles.json").write_text(text)
        table.cache_clear()
        tile_for.cache_clear()

    monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")
    yield write
    table.cache_clear()
    tile_for.cache_clear()


LINE = "sm_90 D64 16-bit row dq"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, f'has no line "{LINE}"; restore it'),
        ({LINE: ROW | {"rows": 48}}, f'"{LINE}": rows is 48; it must be a power of two'),
        ({LINE: ROW | {"stages": "2"}}, f"\"{LINE}\": stages is '2'; it must be at least 1"),
        ({LINE: ROW | {"rowz": 64}}, f'"{LINE}": rowz is unknown; a tile has rows, step'),
        ({LINE: {"rows": 64, "step": 64, "local": 32}}, f'"{LINE}": warps, stages is missing'),
        ("{", "is no JSON (Expecting"),
    ],
    ids=["no line", "size", "type", "unknown", "missing", "no json"],
)
def test_a_broken_table_is_a_sentence(content, words, broken):
    broken(content)
    with pytest.raises(ValueError) as raised:
        tile_for("sm_90", 64, 2, Pattern("row", 256, 32), "dq")
    assert str(raised.value).startswith(str(tiles.TABLE))
    assert words in str(raised.value)
    assert "git checkout kernels/tiles.json" in str(raised.value)


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.bfloat16, 2), (torch.float32, 4)], ids=str)
def test_the_tile_on_a_tensor_is_that_of_its_chip_width_and_dtype(dtype, itemsize, monkeypatch):
    monkeypatch.setattr(tiles, "chip_of", lambda device: "sm_90")
    x, pattern = torch.empty(1, 20, 2, 128, dtype=dtype), Pattern("row", 48, 8)
    for which in PASSES:
        assert tile_on(x, pattern, which) == tile_for("sm_90", 128, itemsize, pattern, which)


def test_a_device_without_kernels_is_named():
    with pytest.raises(ValueError, match="the tensors are on meta and Triton kernels need") as info:
        tile_on(torch.empty(1, 20, 2, 64, device="meta"), Pattern("row", 4, 4), "dq")
    assert SUPPORTED in str(info.value)


def test_what_is_supported_is_what_has_a_chip(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    for major in range(5, 15):
        for minor in range(10):
            capability = (major, minor)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
            said = f"{major}.x" in SUPPORTED or f"{major}.{minor}" in SUPPORTED
            assert (chip_of(torch.device("cuda", 0)) is not None) == said, capability
