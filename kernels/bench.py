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
and forward. On a GPU a time is that of one call between CUDA events; before it a buffer larger
than the cache is zeroed, which empties the cache and lets the host queue the call before the device
gets there. All rivals run in turns, so that they meet the same clocks and neighbours.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention.naive import naive_attention
from kernels.attention.op import BACKENDS, packed_attention
from kernels.figures import (
    CAUSAL,
    FLEX,
    OUTPUTS,
    PASSES,
    YARDSTICK,
    floor_ms,
    rates,
    ratio_lines,
    ratios,
    table,
)
from kernels.patterns import Kind, Pattern, mask_on
from kernels.speed.clock import DTYPES, Clock, first_line, say

ROOT = Path(__file__).resolve().parent.parent
# a layer of the 12B model on a GPU; what two cores do in seconds on a CPU
GPU = {"batch": 8, "heads": 62, "dtype": "bfloat16", "repeats": 100, "seconds": 150.0}
CPU = {"batch": 1, "heads": 2, "dtype": "float32", "repeats": 10, "seconds": 30.0}
# score matrices that the naive path holds at its worst, and the memory they may take
SCORES = 5
MOST_SCORE_BYTES = 8e9
# calls of each rival that are not counted, and turns that are made whatever the clock says
WARM_UP = 3
LEAST_TURNS = {"cuda": 50, "cpu": 3}
# heads of the last sample that are compared with float64
COMPARED = 2


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device reaches: a copy, counting bytes read and written, and a matrix product."""
    side, copied_bytes, runs = (8192, 2**30, 20) if device.type == "cuda" else (1024, 2**26, 5)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randint(256, (copied_bytes,), dtype=torch.uint8, device=device)
    target, clock = torch.empty_like(source), Clock(device)

    def median_s(work: Callable[[], object]) -> float:
        return statistics.median([clock(work) for _ in range(WARM_UP + runs)][WARM_UP:])

    return {
        "copy_gb_s": 2 * copied_bytes / median_s(lambda: target.copy_(source)) / 1e9,
        "matmul_tflop_s": 2 * side**3 / median_s(lambda: torch.matmul(a, b)) / 1e12,
    }


@dataclass(frozen=True)
class Rival:
    """A way to attend.

    Args:
        attend: from its tensors to o.
        form: the tensors, see ``Inputs``: "packed", "apart" or "columns".
        pattern: under which it attends.
    """

    attend: Callable[..., Tensor]
    form: str
    pattern: Pattern


def by_columns(x_BHND: Tensor, pattern: Pattern) -> Tensor:
    """The text, then the grid column by column; applied twice, the grid in raster order again."""
    text_BHTD, image_BHID = x_BHND.split([pattern.n_text, pattern.n_image], dim=2)
    image_BHYXD = image_BHID.unflatten(2, (pattern.grid, pattern.grid))
    return torch.cat([text_BHTD, image_BHYXD.transpose(2, 3).flatten(2, 3)], dim=2)


class Inputs:
    """The same q, k, v and do as each rival wants them.

    Forms: "packed" is qkv [B, N, 3, H, D] with o [B, N, H, D]; "apart" is q, k, v and o
    [B, H, N, D], contiguous; "columns" is that with N in the order of grid columns.
    """

    def __init__(self, args: argparse.Namespace, pattern: Pattern) -> None:
        device, dtype = torch.device(args.device), DTYPES[args.dtype]
        shape = (args.batch, pattern.n_tokens, 3, args.heads, args.width)
        generator = torch.Generator(device).manual_seed(0)
        self.qkv_BN3HD = torch.randn(shape, generator=generator, device=device).to(dtype)
        do_shape = shape[:2] + shape[3:]
        self.do_BNHD = torch.randn(do_shape, generator=generator, device=device).to(dtype)
        self.pattern = pattern
        self._made: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}

    def of(self, form: str) -> tuple[tuple[Tensor, ...], Tensor]:
        """Leaves with gradients, and do."""
        if form not in self._made:
            leaves: tuple[Tensor, ...] = (self.qkv_BN3HD,)
            do = self.do_BNHD
            if form != "packed":
                leaves = tuple(self._apart(x, form) for x in self.qkv_BN3HD.unbind(2))
                do = self._apart(do, form)
            self._made[form] = tuple(x.detach().requires_grad_() for x in leaves), do
        return self._made[form]

    def _apart(self, x_BNHD: Tensor, form: str) -> Tensor:
        x_BHND = x_BNHD.transpose(1, 2)
        if form == "columns":
            x_BHND = by_columns(x_BHND, self.pattern)
        return x_BHND.contiguous()

    def outputs(self, rival: Rival) -> dict[str, Tensor]:
        """O, dq, dk, dv of one run, the compared heads of the last sample, [1, N, H, D]."""
        leaves, do = self.of(rival.form)
        # what an earlier run left in freed memory must not pass for a result
        poison = [torch.full_like(self.qkv_BN3HD, math.nan) for _ in range(3)]
        del poison
        o = rival.attend(*leaves)
        grads = torch.autograd.grad(o, leaves, do)
        if rival.form == "packed":
            grads = grads[0].unbind(2)
        found = dict(zip(OUTPUTS, (o.detach(), *grads), strict=True))
        return {name: self._compared(x, rival.form) for name, x in found.items()}

    def _compared(self, x: Tensor, form: str) -> Tensor:
        if form == "columns":
            x = by_columns(x, self.pattern)
        x_BNHD = x if form == "packed" else x.transpose(1, 2)
        return x_BNHD[-1:, :, -COMPARED:]

    def truth(self, pattern: Pattern) -> dict[str, Tensor]:
        """What ``outputs`` should be, in float64 from the same numbers."""
        qkv_BN3HD = self.qkv_BN3HD[-1:, :, :, -COMPARED:].double().requires_grad_()
        q_BNHD, k_BNHD, v_BNHD = qkv_BN3HD.unbind(2)
        o_BNHD = naive_attention(q_BNHD, k_BNHD, v_BNHD, pattern, q_BNHD.shape[-1] ** -0.5)
        do_BNHD = self.do_BNHD[-1:, :, -COMPARED:].double()
        (grad,) = torch.autograd.grad(o_BNHD, qkv_BN3HD, do_BNHD)
        return dict(zip(OUTPUTS, (o_BNHD.detach(), *grad.unbind(2)), strict=True))


def sdpa(
    q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, by: SDPBackend | None = None, **choice: Any
) -> Tensor:
    """PyTorch's attention, by one of its backends or by its own choice."""
    with nullcontext() if by is None else sdpa_kernel(by):
        return scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, **choice)


def flex_mask(pattern: Pattern) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule of ``pattern`` as FlexAttention's mask_mod; that of "column" is ``by_columns``."""
    T, W, R = pattern.n_text, pattern.grid, pattern.radius

    def in_row(q: Tensor, k: Tensor) -> Tensor:
        return q - k <= W

    def in_column(q: Tensor, k: Tensor) -> Tensor:
        return q // W == k // W

    def in_window(q: Tensor, k: Tensor) -> Tensor:
        m = q - k
        return ((m + R) % W <= 2 * R) & (m // W <= R)

    def in_clamped_window(q: Tensor, k: Tensor) -> Tensor:
        return (q // W - k // W <= R) & ((q % W - k % W).abs() <= R)

    near = {"column": in_column, "conv": in_window}.get(pattern.kind, in_row)
    if pattern.edge == "clamp":
        near = in_clamped_window

    def causal(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    def sparse(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((k < T) | near(q - T, k - T))

    return causal if pattern.kind == "dense" else sparse


def flex_rivals(pattern: Pattern, device: torch.device) -> dict[str, Rival]:
    """FlexAttention with blocks of 64 and of 128, compiled at the first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    N, form = pattern.n_tokens, "columns" if pattern.kind == "column" else "apart"
    found = {}
    for block in (64, 128):
        mask = create_block_mask(flex_mask(pattern), None, None, N, N, device, BLOCK_SIZE=block)
        # the tiles that it takes unasked on Hopper are larger than 64, and it then refuses
        options: Any = {"max_autotune": True} if block == 64 else {}
        attend = torch.compile(flex_attention, dynamic=False, options=options)
        found[f"{FLEX} {block}"] = Rival(partial(attend, block_mask=mask), form, pattern)
    if pattern.kind == "column":
        inside = found[f"{FLEX} 64"].attend

        def permuting(*qkv_BHND: Tensor) -> Tensor:
            return by_columns(inside(*(by_columns(x, pattern) for x in qkv_BHND)), pattern)

        found[f"{FLEX} 64 permuting"] = Rival(permuting, "apart", pattern)
    return found


def rivals(pattern: Pattern, device: torch.device) -> dict[str, Rival]:
    """Every way to attend under ``pattern`` on a device, by name; FlexAttention comes apart."""
    causal = Pattern("dense", pattern.n_text, pattern.grid)
    found = {
        name: Rival(partial(packed_attention, pattern=pattern, backend=name), "packed", pattern)
        for name in BACKENDS
    }
    masked = partial(sdpa, attn_mask=mask_on(pattern, device))
    found[YARDSTICK] = Rival(masked, "apart", pattern)
    found[CAUSAL] = Rival(partial(sdpa, is_causal=True), "apart", causal)
    if device.type == "cuda":
        for by in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            name = f"{CAUSAL} {by.name.split('_')[0].lower()}"
            found[name] = Rival(partial(sdpa, is_causal=True, by=by), "apart", causal)
    return found


def too_large(name: str, args: argparse.Namespace, pattern: Pattern) -> str | None:
    """Why a rival is not tried on this shape, None if it is."""
    if name != "naive":
        return None
    scores_bytes = 4 * SCORES * args.batch * args.heads * pattern.n_tokens**2
    if scores_bytes <= MOST_SCORE_BYTES:
        return None
    return (
        f"its scores would take about {scores_bytes / 1e9:.0f} GB; "
        f"it is measured up to {MOST_SCORE_BYTES / 1e9:.0f}"
    )


def measure(
    pattern: Pattern, args: argparse.Namespace, limits: dict[str, float], until_s: float
) -> dict[str, Any]:
    """Times and errors of all rivals under one pattern.

    Args:
        pattern: the pattern.
        args: the command line.
        limits: what ``ceilings`` gave.
        until_s: of ``time.monotonic``, when nothing more is compiled and turns end.
    """
    device = torch.device(args.device)
    inputs, clock = Inputs(args, pattern), Clock(device)
    truth = inputs.truth(pattern)
    taking_part: dict[str, Rival] = {}
    left_out: dict[str, str] = {}
    errors: dict[str, dict[str, float]] = {}
    times: dict[str, tuple[list[float], list[float]]] = {}

    def forward(rival: Rival) -> None:
        rival.attend(*inputs.of(rival.form)[0])

    def both(rival: Rival) -> None:
        leaves, do = inputs.of(rival.form)
        torch.autograd.grad(rival.attend(*leaves), leaves, do)

    def enter(name: str, rival: Rival) -> None:
        """Compile, compare and warm up."""
        if rival.pattern == pattern:
            errors[name] = distances(inputs.outputs(rival), truth)
        for _ in range(WARM_UP):
            both(rival)
        clock(partial(both, rival))
        taking_part[name], times[name] = rival, ([], [])

    def attempt(name: str, work: Callable[[], None]) -> None:
        """Whatever happens to a rival, the others are still to be measured."""
        try:
            work()
        except Exception as error:
            left_out[name] = first_line(error)
            taking_part.pop(name, None)
            if device.type == "cuda":
                torch.cuda.empty_cache()

    for name, rival in rivals(pattern, device).items():
        reason = too_large(name, args, pattern)
        if reason:
            left_out[name] = reason
        else:
            attempt(name, partial(enter, name, rival))
    if device.type == "cuda":
        # each pattern and block is one more compilation of one function, and eight are allowed
        torch.compiler.reset()
        flex: dict[str, Rival] = {}
        attempt(FLEX, lambda: flex.update(flex_rivals(pattern, device)))
        for name, rival in flex.items():
            if time.monotonic() < until_s:
                attempt(name, partial(enter, name, rival))
            else:
                left_out[name] = "no time was left to compile it; give more --seconds"

    def turn(name: str, rival: Rival) -> None:
        forward_s, both_s = clock(partial(forward, rival)), clock(partial(both, rival))
        times[name][0].append(forward_s)
        times[name][1].append(both_s)

    for i in range(args.repeats):
        if i >= LEAST_TURNS.get(device.type, 3) and time.monotonic() > until_s:
            break
        for name, rival in list(taking_part.items()):
            attempt(name, partial(turn, name, rival))
    shape, pairs = shape_of(args), pattern.pairs()
    return {
        "pairs": pairs,
        "floor": {which: floor_ms(shape, pairs, which, limits) for which in PASSES},
        "rivals": {
            name: {
                "runs": len(times[name][0]),
                "error": errors.get(name),
                **summary(*times[name], shape, rival.pattern.pairs(), limits),
            }
            for name, rival in taking_part.items()
        },
        "left_out": left_out,
    }


def distances(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative Frobenius distance of each output from float64."""
    return {name: ((got[name].double() - x).norm() / x.norm()).item() for name, x in truth.items()}


def summary(
    forward_s: list[float],
    both_s: list[float],
    shape: dict[str, Any],
    pairs: int,
    limits: dict[str, float],
) -> dict[str, dict[str, float]]:
    """Median and minimum of each pass, and its rates."""
    forward_ms, both_ms = (
        [1e3 * statistics.median(runs), 1e3 * min(runs)] for runs in (forward_s, both_s)
    )
    backward_ms = [b - f for b, f in zip(both_ms, forward_ms, strict=True)]
    times = zip(PASSES, (forward_ms, backward_ms, both_ms), strict=True)
    return {which: rates(ms[0], ms[1], shape, pairs, which, limits) for which, ms in times}


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    """The shape of the tensors, by name."""
    names = ("n_text", "grid", "batch", "heads", "width", "dtype")
    itemsize = DTYPES[args.dtype].itemsize
    return {**{name: getattr(args, name) for name in names}, "itemsize": itemsize}


def machine(args: argparse.Namespace) -> dict[str, str | int]:
    """What the times depend on besides the code."""
    on_gpu = torch.device(args.device).type == "cuda"
    if on_gpu:
        chip = torch.cuda.get_device_name(args.device)
    else:
        chip = platform.processor() or platform.machine()
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": chip,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "none",
        "driver": said_by(driver) if on_gpu else "none",
        "python": platform.python_version(),
        "commit": args.commit or said_by(["git", "describe", "--always", "--dirty"]),
    }


def said_by(words: list[str]) -> str:
    """The first line of a command's output; "unknown" where it does not run."""
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; bounds of the shape are checked by ``Pattern``."""
    parser = argparse.ArgumentParser(
        prog="kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    on = "{} on a GPU, {} on a CPU".format
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=get_args(Kind))
    parser.add_argument("--n-text", type=int, default=256, help="text tokens")
    parser.add_argument("--grid", type=int, default=32, help="side of the image grid")
    parser.add_argument("--batch", type=int, help=on(GPU["batch"], CPU["batch"]))
    parser.add_argument("--heads", type=int, help=on(GPU["heads"], CPU["heads"]))
    parser.add_argument("--width", type=int, default=64, help="of one head")
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
    for name, value in (GPU if torch.device(args.device).type == "cuda" else CPU).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("repeats", "batch", "heads", "width"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    return args


def saved_table(path: Path) -> str:
    """``figures.table`` of a saved run.

    Raises:
        ValueError: the file is not there or holds no run.
    """
    try:
        return table(json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name a saved run") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no saved run of kernels.bench or pipeline.gpu_check "
            f"({type(error).__name__}: {error}); make one with --out"
        ) from error


def say_pattern(kind: str, pattern: dict[str, Any]) -> None:
    """The rows of one pattern, and who is not among them."""
    for name, row in pattern["rivals"].items():
        cells = [
            f"{row[which]['median_ms']:9.3f} {row[which]['min_ms']:9.3f}"
            for which in ("forward", "both")
        ]
        cells += [
            f"{row[which].get('tflop_s', 0):8.3f} {row[which].get('gb_s', 0):8.1f} "
            f"{row[which].get('roofline', 0):6.1%}"
            for which in ("forward", "backward")
        ]
        error = row["error"]
        cells.append(" ".join(f"{error[x]:.1e}" for x in OUTPUTS) if error else "-")
        say(f"{kind:<7} {name:<18} " + " | ".join(cells))
    for name, reason in pattern["left_out"].items():
        say(f"{kind:<7} {name:<18} left out: {reason}")


def save(path: Path, result: dict[str, Any]) -> None:
    """Write JSON; whoever ends this run finds it whole, with the patterns that are done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(path)


def main(argv: list[str] | None = None) -> None:
    """Measure, print and, with ``--out``, save."""
    args = parse(argv)
    if args.table:
        try:
            say(saved_table(args.table))
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)
        return
    device, where, shape = torch.device(args.device), machine(args), shape_of(args)
    start_s = time.monotonic()
    result: dict[str, Any] = {
        "machine": where,
        "shape": shape,
        "repeats": args.repeats,
        "ceilings": ceilings(device, DTYPES[args.dtype]),
        "patterns": {},
        "ratios": [],
    }
    say(" ".join(f"{k}={v}" for k, v in (where | shape).items()))
    say("ceilings: {copy_gb_s:.1f} GB/s, {matmul_tflop_s:.2f} TFLOP/s".format(**result["ceilings"]))
    if device.type != "cuda":
        say("These are figures of a CPU; FlexAttention, cuDNN, flash and Triton need a GPU.")
    say(
        f"{'pattern':<7} {'path':<18} {'forward ms: median, min':>19} | fwd + bwd: median, min |"
        " forward TFLOP/s, GB/s, of roofline | backward, likewise | error of o dq dk dv"
    )
    for i, kind in enumerate(args.kinds):
        until_s = start_s + args.seconds * (i + 1) / len(args.kinds)
        pattern = Pattern(kind, args.n_text, args.grid)
        result["patterns"][kind] = measure(pattern, args, result["ceilings"], until_s)
        result["ratios"] = ratios(result)
        say_pattern(kind, result["patterns"][kind])
        if args.out:
            save(args.out, result)
    if device.type == "cuda":
        for line in ratio_lines(result):
            say(line)


if __name__ == "__main__":
    main()
