"""What each kernel of the table costs on each chip, with no GPU: ``python -m kernels.budget``.

Compiles all lines of ``tiles.json`` ahead of time, reads the machine code (SASS) and holds it
against ``budget.json``. Registers decide how many programs share a processor, a spill sends them
through memory, and the instructions of the loops are most of a kernel's time: a change that
makes a kernel slower shows here before anyone measures it.
"""

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.attention.backward import dkdv_kernel, dq_kernel
from kernels.attention.forward import forward_kernel
from kernels.attention.launch import constants
from kernels.patterns import Kind, Pattern
from kernels.tiles import CHIPS, PASSES, WIDTHS, Pass, Tile, key, tile_for

RECORD = Path(__file__).with_name("budget.json")
WAY_OUT = "python -m kernels.budget --write"

KERNELS: dict[Pass, Any] = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}

# how far a figure may pass the recorded one
MORE_REGISTERS = 8
MORE_PER_LOOP = 0.03
# columns of a Blackwell processor's tensor memory
TENSOR_MEMORY = 512

# text tokens, grid: the paper's sequence, whose figures are recorded
PAPER = (256, 32)
# text, grid, convolution, width: the small presets, whose kernels must fit and not spill; on a GPU
# they compute in 16 bits
SMALL = ((32, 8, 5, 32), (48, 8, 5, 64))
SMALL_KINDS: tuple[Kind, ...] = ("row", "column", "conv")

# the 12B preset's kernels on sm_90, and one of each other chip
FAST = (
    *(key("sm_90", 64, 2, kind, which) for kind in ("row", "column", "conv") for which in PASSES),
    *(key(chip, 64, 2, "row", "dkdv") for chip in ("sm_80", "sm_86", "sm_100")),
)

# an address and what stands there; the machine code that follows is in a comment of its own
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
BRANCH = re.compile(r"^(@\S+\s+)?(BRA|CALL)(?:\.\S+)?\s+(!?U?P\w+,\s*)?0x([0-9a-f]+)")
# HFMA2.MMA, a move, is none of these
TENSOR_PRODUCT = re.compile(r"(HMMA|HGMMA|UTC\w*MMA)\b")
# products of float32 are FFMA; the loops that go query by query have fewer in one round
FFMA_OF_A_PRODUCT = 128


@dataclass(frozen=True)
class Job:
    """One kernel to compile: a line of the table at one shape."""

    name: str
    chip: str
    width: int
    itemsize: int
    which: Pass
    pattern: Pattern
    tile: Tile

    @property
    def is_paper(self) -> bool:
        """Whether its figures are recorded."""
        return (self.pattern.n_text, self.pattern.grid) == PAPER


@dataclass(frozen=True)
class Figures:
    """What the compiler made of a kernel.

    Args:
        registers: of one thread.
        spills: instructions that read or write registers kept in memory.
        shared: bytes of one program.
        loops: instructions of each main loop, as ``main_loops`` finds them.
        columns: of tensor memory, of one program.
        wgmma: tensor products that the four warps of a Hopper warp group issue together.
        mma: tensor products of single warps.
        tcgen05: tensor products of Blackwell.
    """

    registers: int
    spills: int
    shared: int
    loops: tuple[int, ...]
    columns: int = 0
    wgmma: int = 0
    mma: int = 0
    tcgen05: int = 0


def opcode(text: str) -> str:
    """The operation of an instruction, without the predicate in front of it."""
    return PREDICATE.sub("", text).split()[0]


def instructions(sass: str) -> list[tuple[int, str]]:
    """Address and text of each instruction that cuobjdump lists."""
    return [(int(address, 16), text) for address, text in LINE.findall(sass)]


def successors(code: list[tuple[int, str]]) -> list[list[int]]:
    """Where each instruction may lead, as places in ``code``.

    A call leads on to what follows it too: ptxas also leaves a loop by a call without a return.
    """
    place = {address: i for i, (address, _) in enumerate(code)}
    leads = []
    for i, (_, text) in enumerate(code):
        branch = BRANCH.match(text)
        after = [i + 1] if i + 1 < len(code) else []
        if branch:
            is_jump = branch[2] == "BRA" and not (branch[1] or branch[3])
            after = [place[int(branch[4], 16)], *([] if is_jump else after)]
        elif text.startswith(("EXIT", "RET")):
            after = []
        leads.append(after)
    return leads


def main_loops(code: list[tuple[int, str]]) -> tuple[int, ...]:
    """How many instructions each loop with a matrix product has, in the order of the code.

    A loop is a set of instructions from each of which all others of the set can be reached. What
    the compiler puts out of line (places where a program waits for data) counts where it belongs.
    """
    leads = successors(code)
    # Tarjan's algorithm without recursion: a component is complete when its first one is left
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    open_ones: list[int] = []
    loops = []
    done: set[int] = set()
    path = [(0, iter(leads[0]))]
    while path:
        i, ways = path[-1]
        if i not in number:
            number[i] = low[i] = len(number)
            open_ones.append(i)
        ahead = next((j for j in ways if j not in done), None)
        if ahead is not None and ahead not in number:
            path.append((ahead, iter(leads[ahead])))
        elif ahead is not None:
            low[i] = min(low[i], number[ahead])
        else:
            path.pop()
            if path:
                low[path[-1][0]] = min(low[path[-1][0]], low[i])
            if low[i] == number[i]:
                cut = open_ones.index(i)
                loops.append(sorted(open_ones[cut:]))
                done.update(open_ones[cut:])
                del open_ones[cut:]
    return tuple(len(loop) for loop in sorted(loops) if len(loop) > 1 and _multiplies(code, loop))


def _multiplies(code: list[tuple[int, str]], loop: list[int]) -> bool:
    ops = [opcode(code[i][1]) for i in loop]
    # FFMA2 of Blackwell is two in one
    n_ffma = sum(op.startswith("FFMA") + op.startswith("FFMA2") for op in ops)
    return n_ffma >= FFMA_OF_A_PRODUCT or any(TENSOR_PRODUCT.match(op) for op in ops)


def read_sass(dump: str, shared: int, columns: int = 0) -> Figures:
    """The figures in what ``cuobjdump -res-usage -sass`` says of one kernel.

    Args:
        dump: its output.
        shared: bytes, from the compiler: the dump has only what is known at compile time.
        columns: of tensor memory, likewise.
    """
    registers = re.search(r"REG:(\d+)", dump)
    code = instructions(dump)
    assert registers is not None, f"cuobjdump lists no kernel:\n{dump[:300]}"
    ops = [opcode(text) for _, text in code]
    return Figures(
        registers=int(registers[1]),
        spills=sum(op.startswith(("LDL", "STL")) for op in ops),
        shared=shared,
        loops=main_loops(code),
        columns=columns,
        wgmma=sum(op.startswith("HGMMA") for op in ops),
        mma=sum(op.startswith("HMMA") for op in ops),
        tcgen05=sum(bool(re.match(r"UTC\w*MMA", op)) for op in ops),
    )


def compiled(job: Job) -> Any:
    """The kernel of a job, as a launch on that chip would compile it."""
    kernel = KERNELS[job.which]
    fixed = constants(job.pattern, job.width, job.tile)
    element = {2: "bf16", 4: "fp32"}[job.itemsize]
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
        elif name.startswith("scale"):
            signature[name] = "fp32"
        else:
            is_sum = name in ("p_lse", "p_delta")
            number = "*fp32" if is_sum else f"*{element}" if name.startswith("p_") else "i32"
            signature[name] = number
            # what a launch finds out: addresses and strides are multiples of 16, 62 heads are not
            if name != "n_head":
                attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes),
        target=GPUTarget("cuda", int(job.chip.removeprefix("sm_")), 32),
        options={"num_warps": job.tile.warps, "num_stages": job.tile.stages},
    )


def measure(job: Job) -> Figures:
    """Compile one kernel and read what came out."""
    kernel = compiled(job)
    reader = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(reader), "-res-usage", "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    return read_sass(dump, kernel.metadata.shared, columns)


def unfit(job: Job, figures: Figures) -> list[str]:
    """What keeps a kernel from running well, or at all, on its chip, whatever is recorded."""
    most = CHIPS[job.chip]
    wrong = []
    if figures.spills:
        wrong.append(f"{figures.spills} spills, at most 0")
    if figures.shared > most:
        wrong.append(f"{figures.shared} bytes of shared memory, at most {most}")
    if figures.columns > TENSOR_MEMORY:
        wrong.append(f"{figures.columns} columns of tensor memory, at most {TENSOR_MEMORY}")
    if job.chip == "sm_90" and job.itemsize == 2 and not (figures.wgmma and not figures.mma):
        wrong.append(
            f"{figures.wgmma} wgmma and {figures.mma} mma products, at least 1 and at most 0"
        )
    if job.chip == "sm_100" and job.itemsize == 2 and not figures.tcgen05:
        wrong.append("0 tcgen05 products, at least 1")
    if job.is_paper and not figures.loops:
        wrong.append("0 loops with a product, at least 1")
    return wrong


def grown(figures: Figures, recorded: dict[str, Any]) -> list[str]:
    """Which figures pass the recorded ones by more than they may."""
    wrong = []
    most = recorded["registers"] + MORE_REGISTERS
    if figures.registers > most:
        wrong.append(f"{figures.registers} registers, at most {most}")
    if figures.shared > recorded["shared"]:
        wrong.append(f"{figures.shared} bytes of shared memory, at most {recorded['shared']}")
    loops = recorded["loops"]
    if len(figures.loops) != len(loops):
        wrong.append(f"{len(figures.loops)} loops, recorded are {len(loops)}")
        return wrong
    for i, (length, before) in enumerate(zip(figures.loops, loops, strict=True), 1):
        most = int(before * (1 + MORE_PER_LOOP))
        if length > most:
            wrong.append(f"{length} instructions in loop {i}, at most {most}")
    return wrong


def paper_jobs(chips: Iterable[str]) -> list[Job]:
    """All lines of the table for these chips, in its order."""
    return [
        _job(chip, width, itemsize, Pattern(kind, *PAPER), which)
        for chip, width, itemsize, kind, which in product(
            chips, WIDTHS, (2, 4), get_args(Kind), PASSES
        )
    ]


def small_jobs(chips: Iterable[str]) -> list[Job]:
    """The lines that the small presets read, at their shapes."""
    return [
        _job(chip, width, 2, Pattern(kind, n_text, grid, kernel), which)
        for chip, (n_text, grid, kernel, width), kind, which in product(
            chips, SMALL, SMALL_KINDS, PASSES
        )
    ]


def _job(chip: str, width: int, itemsize: int, pattern: Pattern, which: Pass) -> Job:
    tile = tile_for(chip, width, itemsize, pattern, which)
    name = key(chip, width, itemsize, pattern.kind, which)
    return Job(name, chip, width, itemsize, which, pattern, tile)


def measure_all(jobs: list[Job], n_processes: int) -> Iterator[tuple[Job, Figures]]:
    """Each job with its figures, in order."""
    if n_processes == 1:
        yield from zip(jobs, map(measure, jobs), strict=True)
        return
    # no spawn: importing torch and triton again takes seconds, and nothing here computes with them
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(n_processes, mp_context=context) as pool:
        yield from zip(jobs, pool.map(measure, jobs), strict=True)


def read_record() -> dict[str, Any]:
    """What ``budget.json`` holds: the version of triton, and the figures of each kernel."""
    if not RECORD.exists():
        return {"triton": None, "kernels": {}}
    record: dict[str, Any] = json.loads(RECORD.read_text())
    return record


def write_record(kernels: dict[str, dict[str, Any]]) -> None:
    """Replace ``budget.json``: one line a kernel."""
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(k)}" for name, k in kernels.items())
    RECORD.write_text(
        f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "kernels": {{\n{lines}\n  }}\n}}\n'
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.budget", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--fast", action="store_true", help="only a few kernels of each chip")
    parser.add_argument("--write", action="store_true", help="record the figures in budget.json")
    parser.add_argument("--jobs", type=int, default=2, help="processes, at least 1")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), metavar="CHIP")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; it must be at least 1")
    if args.write and args.fast:
        parser.error("--write records whole chips; leave out --fast")
    if not isinstance(forward_kernel, triton.JITFunction):
        parser.error("TRITON_INTERPRET is set, and then nothing is compiled; unset it")
    if not RECORD.exists() and not args.write:
        parser.error(f"there is no {RECORD}; write it: {WAY_OUT}")
    version = read_record()["triton"]
    if args.write and version not in (None, triton.__version__) and set(args.chips) < set(CHIPS):
        parser.error(
            f"budget.json is of triton {version} and this is {triton.__version__}; "
            "record all chips, leave out --chips"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Compile, compare and say what is over; 0 when nothing is."""
    args = parse(argv)
    start_s = time.monotonic()
    old = read_record()
    recorded: dict[str, dict[str, Any]] = old["kernels"]
    is_comparable = old["triton"] == triton.__version__ and not args.write
    if not is_comparable and not args.write:
        sys.stdout.write(
            f"budget.json is of triton {old['triton']} and this is {triton.__version__}: registers "
            "and loops are not compared\n"
        )
    jobs = paper_jobs(args.chips) + small_jobs(args.chips)
    if args.fast:
        jobs = [job for job in jobs if job.is_paper and job.name in FAST]

    wrong = []
    measured: dict[str, dict[str, Any]] = {}
    for n_done, (job, figures) in enumerate(measure_all(jobs, args.jobs), 1):
        text, grid = job.pattern.n_text, job.pattern.grid
        name = job.name if job.is_paper else f"{job.name} at {text} + {grid} x {grid}"
        if too_much := unfit(job, figures):
            wrong.append(f"{name}: {', '.join(too_much)}; give it another tile in tiles.json")
        elif job.is_paper and not args.write and job.name not in recorded:
            wrong.append(f"{name} is not in budget.json; record it: {WAY_OUT}")
        elif job.is_paper and is_comparable and (more := grown(figures, recorded[job.name])):
            wrong.append(f"{name}: {', '.join(more)}; if that is meant, record it: {WAY_OUT}")
        if job.is_paper:
            measured[job.name] = {
                "registers": figures.registers, "shared": figures.shared, "loops": figures.loops
            }  # fmt: skip
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{n_done} of {len(jobs)} ")
    names = [job.name for job in paper_jobs(CHIPS)]
    if not args.write:
        wrong += [
            f"{name} is in budget.json and not in tiles.json; take it out: {WAY_OUT}"
            for name in recorded
            if name not in names
        ]
    elif not wrong:
        recorded = recorded | measured
        write_record({name: recorded[name] for name in names if name in recorded})
    else:
        sys.stdout.write("nothing is recorded\n")
    for sentence in wrong:
        sys.stdout.write(sentence + "\n")
    state = f"{len(wrong)} over" if wrong else "all within the budget"
    took_s = time.monotonic() - start_s
    sys.stdout.write(f"{len(jobs)} kernels compiled in {took_s:.0f} s: {state}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
