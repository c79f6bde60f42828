"""The check on machine code. Kernels are compiled in other processes: in this one they may be
the interpreter's."""

import json
import os
import subprocess
import sys
from itertools import product

import pytest

from kernels import budget
from kernels.budget import grown
from kernels.speed.sass import MachineCode
from kernels.tiles import CHIPS, key, table

# of decoding, which has no line in the table
STEPS = [
    f"{chip} D{width} {bits}-bit {kind} decode"
    for chip, width, bits, kind in product(
        CHIPS, (32, 64, 128), (16, 32), ("row", "column", "conv", "dense")
    )
]
ROW_DKDV = key("sm_90", 64, 2, "row", "dkdv")

GOOD = MachineCode(128, 0, shared=49152, instructions=1210, loops=(271, 226), wgmma=42)
RECORDED = {"registers": 128, "shared": 49152, "instructions": 1210, "loops": [271, 226]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": 137}, "137 registers, at most 136"),
        ({"shared": 49153}, "49153 bytes of shared memory, at most 49152"),
        ({"instructions": 1271}, "1271 instructions, at most 1270"),
        ({"loops": (280, 226)}, "280 instructions in loop 1, at most 279"),
        ({"loops": (271, 233)}, "233 instructions in loop 2, at most 232"),
        ({"loops": (271,)}, "1 loops, recorded are 2"),
    ],
)
def test_figure_over_the_recorded_one_is_named(change, words):
    assert grown(MachineCode(**vars(GOOD) | change), RECORDED) == [words]


def test_little_more_or_anything_less_is_no_complaint():
    more = {"registers": 136, "instructions": 1270, "loops": (279, 232)}
    less = {"registers": 90, "shared": 0, "instructions": 40, "loops": (10, 10)}
    for change in ({}, more, less):
        assert grown(MachineCode(**vars(GOOD) | change), RECORDED) == []


def test_record_is_of_the_table():
    recorded = json.loads(budget.RECORD.read_text())
    assert list(recorded["kernels"]) == [*table(), *STEPS]
    assert {tuple(figures) for figures in recorded["kernels"].values()} == {budget.RECORDED}
    assert set(budget.FAST) <= {*table(), *STEPS}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--jobs", "0"], "--jobs is 0; it must be at least 1"),
        (["--write", "--fast"], "--write records whole chips; leave out --fast"),
        (["--chips", "sm_70"], "invalid choice: 'sm_70'"),
    ],
)
def test_wrong_usage_is_exit_code_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        budget.main(words)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def run(*words, interpret="0"):
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": interpret},
    )


def test_interpreter_is_exit_code_2():
    result = run("-m", "kernels.budget", "--fast", interpret="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr


def test_fast_check_passes():
    result = run("-m", "kernels.budget", "--fast")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(budget.FAST)} kernels" in result.stdout


# one process for all: importing torch and triton takes longer than a kernel
WORSE = f"""
import json, pathlib, sys
from kernels import budget, tiles
name, folder = {ROW_DKDV!r}, pathlib.Path(sys.argv[1])
budget.FAST = (name,)
command = ["--fast", "--jobs", "1"]

recorded = budget.RECORD
record = json.loads(recorded.read_text())
loops = record["kernels"][name]["loops"]
record["kernels"][name]["loops"] = [int(0.9 * n) for n in loops]
record["kernels"][name]["instructions"] //= 2
budget.RECORD = folder / "budget.json"
budget.RECORD.write_text(json.dumps(record))
print("loops", budget.main(command))

budget.RECORD = recorded
tiles.table()[name] = tiles.Tile(128, 128, 32, 4, 2)
tiles.tile_for.cache_clear()
print("tile", budget.main(command))

del tiles.table()[name]
tiles.tile_for.cache_clear()
print("line", budget.main(command))
"""


def test_worse_kernel_is_exit_code_1_and_none_is_2(tmp_path):
    result = run("-c", WORSE, str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    loops, tile = result.stdout.split("loops 1\n")
    assert f"{ROW_DKDV}: " in loops
    assert "instructions in loop 1, at most" in loops
    assert " instructions, at most" in loops
    assert f"{ROW_DKDV}: " in tile
    assert "spills, at most 0" in tile
    assert tile.endswith("tile 1\nline 2\n")
    assert f'tiles.json has no line "{ROW_DKDV}"; restore it' in result.stderr


@pytest.mark.slow
def test_whole_table_passes():
    result = run("-m", "kernels.budget", "--jobs", str(os.cpu_count() or 1))
    assert result.returncode == 0, result.stdout + result.stderr
