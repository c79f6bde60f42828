"""What each kernel of the table costs on each chip, with no GPU: ``python -m kernels.budget``.

Compiles all lines of ``tiles.json`` and the decoding kernel ahead of time, reads the machine code
(SASS) and holds it against ``budget.json``: a change that makes a kernel slower shows here before
anyone measures it.

What is recorded, and how far a kernel may pass it:

    registers     8 more: they decide how many programs share a processor
    shared        0 more bytes: likewise
    loops         as many of them, each with 3 % more instructions: most of a kernel's time
    instructions  5 % more, of the whole kernel: sm_100 unrolls short loops until none is left

Whatever is recorded, a kernel has no spills, which go through memory; shared memory within what
its chip has and at most 512 columns of tensor memory; for elements of 16 bits the tensor products
of its chip, on sm_90 ``wgmma`` and no ``mma``, on sm_100 ``tcgen05`` (for decoding, whose 16 rows
are too few for these, any); and at the paper's size a loop with a product. The kernels of the small
presets are held to that alone.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, get_args

import triton

from kernels.patterns import Kind, Pattern
from kernels.speed.compiled import KERNELS, DecodeJob, Job, PassJob, measure, unfit
from kernels.speed.sass import MachineCode
from kernels.speed.shapes import DEMO, LAYER, OWN
from kernels.tiles import CHIPS, ITEMSIZES, PASSES, WIDTHS, Pass, key, tile_for

RECORD = Path(__file__).with_name("budget.json")
WAY_OUT = "python -m kernels.budget --write"

# of ``MachineCode``, what is recorded of a kernel
RECORDED = ("registers", "shared", "instructions", "loops")
# how far a figure may pass the recorded one
MORE_REGISTERS = 8
MORE_PER_LOOP = 0.03
MORE_INSTRUCTIONS = 0.05

# the small presets: their kernels must fit and not spill; on a GPU they compute in 16 bits
SMALL = (DEMO, OWN)
SMALL_KINDS: tuple[Kind, ...] = ("row", "column", "conv")

# the 12B preset's kernels on sm_90, and one of each other chip
FAST = (
    *(key("sm_90", 64, 2, kind, which) for kind in ("row", "column", "conv") for which in PASSES),
    *(key(chip, 64, 2, "row", "dkdv") for chip in ("sm_80", "sm_86", "sm_100")),
    *(f"{chip} D64 16-bit row decode" for chip in ("sm_80", "sm_90")),
)


def grown(code: MachineCode, recorded: dict[str, Any]) -> list[str]:
    """Which figures pass the recorded ones by more than they may."""
    wrong = []
    most = recorded["registers"] + MORE_REGISTERS
    if code.registers > most:
        wrong.append(f"{code.registers} registers, at most {most}")
    if code.shared > recorded["shared"]:
        wrong.append(f"{code.shared} bytes of shared memory, at most {recorded['shared']}")
    most = int(recorded["instructions"] * (1 + MORE_INSTRUCTIONS))
    if code.instructions > most:
        wrong.append(f"{code.instructions} instructions, at most {most}")
    loops = recorded["loops"]
    if len(code.loops) != len(loops):
        wrong.append(f"{len(code.loops)} loops, recorded are {len(loops)}")
        return wrong
    for i, (length, before) in enumerate(zip(code.loops, loops, strict=True), 1):
        most = int(before * (1 + MORE_PER_LOOP))
        if length > most:
            wrong.append(f"{length} instructions in loop {i}, at most {most}")
    return wrong


def paper_jobs(chips: Iterable[str]) -> list[Job]:
    """All lines of the table for these chips, in its order, at the paper's size; then decoding."""
    passes = [
        _job(chip, width, itemsize, LAYER.pattern(kind), which)
        for chip, width, itemsize, kind, which in product(
            chips, WIDTHS, ITEMSIZES, get_args(Kind), PASSES
        )
    ]
    steps = [
        DecodeJob(chip, width, itemsize, LAYER.pattern(kind))
        for chip, width, itemsize, kind in product(chips, WIDTHS, ITEMSIZES, get_args(Kind))
    ]
    return [*passes, *steps]


def small_jobs(chips: Iterable[str]) -> list[Job]:
    """The kernels of the small presets, at their shapes."""
    shapes = list(product(chips, SMALL, SMALL_KINDS))
    return [
        *(_job(c, s.width, 2, s.pattern(kind), which) for c, s, kind in shapes for which in PASSES),
        *(DecodeJob(c, s.width, 2, s.pattern(kind)) for c, s, kind in shapes),
    ]


def _job(chip: str, width: int, itemsize: int, pattern: Pattern, which: Pass) -> PassJob:
    tile = tile_for(chip, width, itemsize, pattern, which)
    return PassJob(chip, width, itemsize, pattern, which, tile)


def measure_all(jobs: list[Job], n_processes: int) -> Iterator[tuple[Job, MachineCode]]:
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
    if not isinstance(KERNELS["forward"], triton.JITFunction):
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
    try:
        of_table = paper_jobs(CHIPS)
        jobs = [job for job in of_table if job.chip in args.chips] + small_jobs(args.chips)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if args.fast:
        jobs = [job for job in jobs if job.is_paper and job.name in FAST]

    wrong = []
    measured: dict[str, dict[str, Any]] = {}
    for n_done, (job, code) in enumerate(measure_all(jobs, args.jobs), 1):
        text, grid = job.pattern.n_text, job.pattern.grid
        name = job.name if job.is_paper else f"{job.name} at {text} + {grid} x {grid}"
        if too_much := unfit(job, code):
            wrong.append(f"{name}: {', '.join(too_much)}; {job.way_out}")
        elif job.is_paper and not args.write and job.name not in recorded:
            wrong.append(f"{name} is not in budget.json; record it: {WAY_OUT}")
        elif job.is_paper and is_comparable and (more := grown(code, recorded[job.name])):
            wrong.append(f"{name}: {', '.join(more)}; if that is meant, record it: {WAY_OUT}")
        if job.is_paper:
            measured[job.name] = {field: getattr(code, field) for field in RECORDED}
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{n_done} of {len(jobs)} ")
    names = [job.name for job in of_table]
    if not args.write:
        wrong += [
            f"{name} is in budget.json and no kernel's; take it out: {WAY_OUT}"
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
