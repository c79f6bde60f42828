"""Times of attention under each pattern, side by side: ``python -m kernels.bench``.

Compares the backends of ``sparse_attention`` with torch's scaled_dot_product_attention, given
the dense mask (the same result) and causal without the pattern (what a model without sparse
attention would pay). Default shape: the paper's sequence, 256 text tokens and a 32 x 32 image.
Each time is the smallest of ``--repeats`` runs, taken in turns so that all columns meet the
same neighbours on the machine.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention.op import BACKENDS, sparse_attention
from kernels.patterns import Kind, Pattern, mask_on

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def rivals(pattern: Pattern, device: torch.device) -> dict[str, Attention]:
    """Every way to attend under ``pattern``, by name, each from q, k, v [B, N, H, D] to o."""

    def sdpa(q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, **choice: Any) -> Tensor:
        q_BHND, k_BHND, v_BHND = (x.transpose(1, 2) for x in (q_BNHD, k_BNHD, v_BNHD))
        return scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, **choice).transpose(1, 2)

    ours: dict[str, Attention] = {
        name: partial(sparse_attention, pattern=pattern, backend=name) for name in BACKENDS
    }
    return {
        **ours,
        "sdpa mask": partial(sdpa, attn_mask=mask_on(pattern, device)),
        "sdpa causal": partial(sdpa, is_causal=True),
    }


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long one call of ``work`` takes, by CUDA events on a GPU, by the clock elsewhere."""
    if device.type != "cuda":
        start_s = time.perf_counter()
        work()
        return time.perf_counter() - start_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(pattern: Pattern, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of forward (without gradients) and forward plus backward, by rival."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    shape = (args.batch, pattern.n_tokens, 3, args.heads, args.width)
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
    do_BNHD = torch.randn_like(packed[:, :, 0])

    def forward(attention: Attention) -> None:
        with torch.no_grad():
            attention(*packed.unbind(2))

    def both(attention: Attention) -> None:
        torch.autograd.grad(attention(*packed.unbind(2)), packed, do_BNHD)

    times: dict[str, dict[str, list[float]]] = {}
    for turn in range(args.repeats + 1):
        for name, attention in rivals(pattern, device).items():
            for what, work in (("forward_ms", forward), ("forward_backward_ms", both)):
                took_s = seconds(partial(work, attention), device)
                # the first turn builds masks and warms up
                if turn > 0:
                    times.setdefault(name, {}).setdefault(what, []).append(took_s)
    return {
        name: {what: 1e3 * min(runs) for what, runs in row.items()} for name, row in times.items()
    }


def machine(args: argparse.Namespace) -> dict[str, str | int]:
    """What the times depend on besides the code."""
    if torch.device(args.device).type == "cuda":
        chip = torch.cuda.get_device_name(args.device)
    else:
        chip = platform.processor() or platform.machine()
    return {
        "device": chip,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; bounds of the shape are checked by ``Pattern``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=get_args(Kind))
    parser.add_argument("--n-text", type=int, default=256, help="text tokens")
    parser.add_argument("--grid", type=int, default=32, help="side of the image grid")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="of one head")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10, help="runs of each, at least 1")
    parser.add_argument("--out", type=Path, help="also save the times as JSON")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; it must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and, with ``--out``, save it."""
    args = parse(argv)
    where = machine(args)
    shape = {name: getattr(args, name) for name in ("n_text", "grid", "batch", "heads", "width")}
    result: dict[str, Any] = {
        "machine": where,
        "shape": {**shape, "dtype": args.dtype},
        "repeats": args.repeats,
        "times": {},
    }
    sys.stdout.write(" ".join(f"{k}={v}" for k, v in (where | result["shape"]).items()) + "\n")
    sys.stdout.write(f"{'pattern':<8} {'path':<12} {'forward ms':>11} {'fwd + bwd ms':>13}\n")
    for kind in args.kinds:
        times = measure(Pattern(kind, args.n_text, args.grid), args)
        result["times"][kind] = times
        for name, row in times.items():
            forward_ms, both_ms = row["forward_ms"], row["forward_backward_ms"]
            sys.stdout.write(f"{kind:<8} {name:<12} {forward_ms:11.2f} {both_ms:13.2f}\n")
        sys.stdout.flush()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
