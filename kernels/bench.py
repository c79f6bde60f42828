"""Times of attention under each pattern, side by side: ``python -m kernels.bench``.

Ours, through the door that the model uses (q, k and v in one packed projection), beside what
PyTorch has: scaled_dot_product_attention with the dense mask (the same result) and causal without
the pattern (what a model without sparse attention would pay; PyTorch's own choice, cuDNN and
flash), and FlexAttention, compiled, under the same mask. The rivals are measured kindly: q, k and v
lie apart and contiguous as [B, H, N, D], nothing is split or packed, and for "column" FlexAttention
gets a sequence that is in the order of grid columns already; "permuting" is the one that gets it in
raster order, as a model has it. FlexAttention, cuDNN and flash need a GPU and are left out on a
CPU. A rival that fails is named with the first line of its error.

Forward is that of training: it keeps what the backward needs. Backward is the difference of both
and forward. All rivals run in turns, so that they meet the same clocks and neighbours.
"""

import argparse
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch

from kernels.patterns import Kind, Pattern
from kernels.speed.clock import DTYPES, ceilings, say
from kernels.speed.contest import LEAST_TURNS, Contest
from kernels.speed.figures import (
    SPANS,
    floor_ms,
    markdown,
    pattern_lines,
    ratio_lines,
    ratios,
    summary,
)
from kernels.speed.machine import commit, device_name, versions
from kernels.speed.shapes import BATCH, LAYER

# a whole layer on a GPU; what two cores do in seconds on a CPU
GPU = {"batch": BATCH, "heads": LAYER.heads, "dtype": "bfloat16", "repeats": 100, "seconds": 150.0}
CPU = {"batch": 1, "heads": 2, "dtype": "float32", "repeats": 10, "seconds": 30.0}


def measure(
    pattern: Pattern, args: argparse.Namespace, ceilings: dict[str, float], until_s: float
) -> dict[str, Any]:
    """Times and errors of all rivals under one pattern.

    Args:
        pattern: the pattern.
        args: the command line.
        ceilings: of the device.
        until_s: of ``time.monotonic``, when nothing more is compiled and turns end.
    """
    shape, pairs = shape_of(args), pattern.pairs()
    contest = Contest(pattern, shape, torch.device(args.device))
    contest.invite(until_s)
    contest.take_turns(args.repeats, until_s)
    return {
        "pairs": pairs,
        "floor": {span: floor_ms(shape, pairs, span, ceilings) for span in SPANS},
        "rivals": {
            name: {
                "runs": len(contest.times[name][0]),
                "error": contest.errors.get(name),
                **summary(*contest.times[name], shape, rival.pattern.pairs(), ceilings),
            }
            for name, rival in contest.taking_part.items()
        },
        "left_out": contest.left_out,
    }


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    """The shape of the tensors, by name."""
    names = ("n_text", "grid", "batch", "heads", "width", "dtype")
    itemsize = DTYPES[args.dtype].itemsize
    return {**{name: getattr(args, name) for name in names}, "itemsize": itemsize}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with what fits the device where a flag is left out."""
    parser = argparse.ArgumentParser(
        prog="kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    on = "{} on a GPU, {} on a CPU".format
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=get_args(Kind))
    parser.add_argument("--n-text", type=int, default=LAYER.n_text, help="text tokens")
    parser.add_argument("--grid", type=int, default=LAYER.grid, help="side of the image grid")
    parser.add_argument("--batch", type=int, help=on(GPU["batch"], CPU["batch"]))
    parser.add_argument("--heads", type=int, help=on(GPU["heads"], CPU["heads"]))
    parser.add_argument("--width", type=int, default=LAYER.width, help="of one head")
    parser.add_argument("--dtype", choices=DTYPES, help=on(GPU["dtype"], CPU["dtype"]))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--repeats", type=int, help="runs of each, at most; " + on(GPU["repeats"], CPU["repeats"])
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="after which nothing is compiled and no turn begins, shared by the patterns; "
        + on(GPU["seconds"], CPU["seconds"]),
    )
    parser.add_argument("--commit", help="of the code; what git says when left out")
    parser.add_argument("--out", type=Path, help="also save as JSON, after every pattern")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print a saved run as Markdown, measure nothing"
    )
    args = parser.parse_args(argv)
    # not torch.device, which fails for "gpu0": ``check`` says that better
    is_gpu = args.device.partition(":")[0] == "cuda"
    for name, value in (GPU if is_gpu else CPU).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check(args: argparse.Namespace) -> list[Pattern]:
    """The patterns to measure; makes the folder of ``--out``.

    Raises:
        ValueError: a flag that cannot be measured or saved.
    """
    for name in ("repeats", "batch", "heads", "width"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in LEAST_TURNS:
        raise ValueError(f"--device is {args.device}; it must be cpu, cuda or cuda:0, cuda:1, ...")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {args.device}: torch sees no CUDA device here; use cpu")
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise ValueError(f"--device is {args.device}; the last one here is cuda:{count - 1}")
    patterns = [Pattern(kind, args.n_text, args.grid) for kind in args.kinds]
    if args.out:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            if args.out.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            part_of(args.out).touch()
            part_of(args.out).unlink()
        except OSError as error:
            raise ValueError(
                f"--out {args.out} cannot be written ({error.strerror}); name another file"
            ) from error
    return patterns


def saved_table(path: Path) -> str:
    """``figures.markdown`` of a saved run.

    Raises:
        ValueError: the file is not there or holds no run.
    """
    try:
        return markdown(json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name a saved run") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no saved run of kernels.bench or pipeline.gpu_check "
            f"({type(error).__name__}: {error}); make one with --out"
        ) from error


def part_of(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(path.name + ".part")


def save(path: Path, result: dict[str, Any]) -> None:
    """Write JSON; whoever ends this run finds it whole, with the patterns that are done."""
    part_of(path).write_text(json.dumps(result, indent=2) + "\n")
    part_of(path).replace(path)


def run(args: argparse.Namespace, patterns: list[Pattern]) -> None:
    """Measure, print and, with ``--out``, save after every pattern."""
    device, shape, start_s = torch.device(args.device), shape_of(args), time.monotonic()
    if device.index is not None and device.type == "cuda":
        # events are recorded on the current one
        torch.cuda.set_device(device)
    machine = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **versions(),
        "commit": args.commit or commit(),
    }
    result: dict[str, Any] = {
        "machine": machine,
        "shape": shape,
        "repeats": args.repeats,
        "ceilings": ceilings(device, DTYPES[args.dtype]),
        "patterns": {},
        "ratios": [],
    }
    say(" ".join(f"{k}={v}" for k, v in (machine | shape).items()))
    say("ceilings: {copy_gb_s:.1f} GB/s, {matmul_tflop_s:.2f} TFLOP/s".format(**result["ceilings"]))
    if device.type != "cuda":
        say("These are figures of a CPU; FlexAttention, cuDNN, flash and Triton need a GPU.")
    say(
        f"{'pattern':<7} {'path':<18} {'forward ms: median, min':>19} | fwd + bwd: median, min |"
        " forward TFLOP/s, GB/s, of roofline | backward, likewise | error of o dq dk dv"
    )
    for i, pattern in enumerate(patterns):
        until_s = start_s + args.seconds * (i + 1) / len(patterns)
        measured = measure(pattern, args, result["ceilings"], until_s)
        result["patterns"][pattern.kind] = measured
        result["ratios"] = ratios(result)
        for line in pattern_lines(pattern.kind, measured):
            say(line)
        if args.out:
            save(args.out, result)
    if device.type == "cuda":
        for line in ratio_lines(result):
            say(line)


def main(argv: list[str] | None = None) -> None:
    """Measure from the command line, or print what was measured."""
    args = parse(argv)
    try:
        if args.table:
            say(saved_table(args.table))
            return
        patterns = check(args)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    run(args, patterns)


if __name__ == "__main__":
    main()
