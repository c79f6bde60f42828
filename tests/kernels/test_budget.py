"""The check on machine code. Kernels are compiled in other processes: in this one they may be
the interpreter's."""

import json
import os
import subprocess
import sys

import pytest

from kernels import budget
from kernels.budget import grown
from kernels.speed.compiled import Job, unfit
from kernels.speed.sass import MachineCode, instructions, main_loops, opcode, read_sass
from kernels.speed.shapes import LAYER
from kernels.tiles import CHIPS, Tile, key, table

ROW_DKDV = key("sm_90", 64, 2, "row", "dkdv")

# a text loop left in its middle by a call, a wait out of line, a loop without products
SASS = """
 Function kernel:
  REG:104 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:632 TEXTURE:0 SURFACE:0 SAMPLER:0
        code for sm_90a
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000e700000000800 */
        /*0010*/              @!P0 BRA 0x90 ;                        /* 0x0000000000007947 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x0 */
        /*0030*/              @!P1 BRA 0xd0 ;                        /* 0x0000000000007947 */
        /*0040*/                   MUFU.EX2 R8, R8 ;                 /* 0x0000000000007308 */
        /*0050*/               @P2 CALL.REL.NOINC 0x70 ;             /* 0x0000000000007944 */
        /*0060*/                   BRA 0x20 ;                        /* 0x0000000000007947 */
        /*0070*/                   FADD R8, R8, R9 ;                 /* 0x0000000908087221 */
        /*0080*/                   BRA.U !UP0, 0x70 ;                /* 0x0000000000007947 */
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x0 */
        /*00a0*/                   STL [R1+0x4], R8 ;                /* 0x0000000000007387 */
        /*00b0*/              @!UP1 BRA 0x90 ;                       /* 0x0000000000007947 */
        /*00c0*/                   EXIT ;                            /* 0x000000000000794d */
        /*00d0*/                   SYNCS.PHASECHK.TRYWAIT P1, [UR4] ; /* 0x0000000000007947 */
        /*00e0*/              @!P1 BRA 0xd0 ;                        /* 0x0000000000007947 */
        /*00f0*/                   BRA 0x40 ;                        /* 0x0000000000007947 */
        /*0100*/                   BRA 0x100;                        /* 0x0000000000007947 */
"""


def job(chip="sm_90", itemsize=2):
    return Job(chip, 64, itemsize, "dq", LAYER.pattern("row"), Tile(64, 64, 32, 4, 2))


GOOD = MachineCode(128, 0, shared=49152, instructions=1210, loops=(271, 226), wgmma=42)
RECORDED = {"registers": 128, "shared": 49152, "instructions": 1210, "loops": [271, 226]}


def test_instructions_are_read_without_the_machine_code():
    code = instructions(SASS)
    assert code[:2] == [(0, "LDC R1, c[0x0][0x28]"), (16, "@!P0 BRA 0x90")]
    assert len(code) == 17


@pytest.mark.parametrize("text", ["@!P0 BRA 0x90", "@UP1 BRA 0x90", "@!PT BRA 0x90", "BRA 0x90"])
def test_opcode_is_what_follows_the_predicate(text):
    assert opcode(text) == "BRA"


def test_main_loops_have_products_and_their_waits():
    # 0x20 to 0x60 and the wait from 0xd0 on; 0x90 to 0xb0; not 0x70, not the end
    assert main_loops(instructions(SASS)) == (8, 3)


def test_nested_loops_are_one():
    nested = [
        (0x00, "HMMA.16816.F32.BF16 R4, R8, R12, R4"),
        (0x10, "@P0 BRA 0x0"),
        (0x20, "@P1 BRA 0x0"),
        (0x30, "EXIT"),
    ]
    assert main_loops(nested) == (3,)


@pytest.mark.parametrize(("op", "n", "loops"), [("FFMA", 127, ()), ("FFMA", 128, (129,))])
def test_loop_of_float32_products_is_known_by_their_number(op, n, loops):
    code = [(16 * i, f"{op} R1, R2, R3, R1") for i in range(n)] + [(16 * n, "@P0 BRA 0x0")]
    assert main_loops(code) == loops


def test_figures_of_a_dump():
    assert read_sass(SASS, shared=49152) == MachineCode(
        registers=104, spills=1, shared=49152, instructions=17, loops=(8, 3), wgmma=2
    )


@pytest.mark.parametrize(
    ("chip", "change", "words"),
    [
        ("sm_90", {"spills": 2}, "2 spills, at most 0"),
        ("sm_86", {"shared": 101_377}, "101377 bytes of shared memory, at most 101376"),
        ("sm_100", {"tcgen05": 4, "columns": 640}, "640 columns of tensor memory, at most 512"),
        ("sm_90", {"wgmma": 0}, "0 wgmma and 0 mma products"),
        ("sm_90", {"mma": 1}, "42 wgmma and 1 mma products"),
        ("sm_100", {}, "0 tcgen05 products, at least 1"),
        ("sm_80", {"loops": ()}, "0 loops with a product, at least 1"),
    ],
)
def test_kernel_that_does_not_fit_its_chip_is_named(chip, change, words):
    (wrong,) = unfit(job(chip), MachineCode(**vars(GOOD) | change))
    assert words in wrong


@pytest.mark.parametrize("chip", CHIPS)
def test_good_kernel_fits(chip):
    assert unfit(job(chip), MachineCode(**vars(GOOD) | {"tcgen05": 8})) == []
    assert unfit(job(chip, itemsize=4), MachineCode(**vars(GOOD) | {"wgmma": 0})) == []


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
    assert list(recorded["kernels"]) == list(table())
    assert {tuple(figures) for figures in recorded["kernels"].values()} == {budget.RECORDED}
    assert set(budget.FAST) <= set(table())


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
