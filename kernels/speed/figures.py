"""What a run of ``kernels.bench`` says: rates, shares of the roofline, ratios, targets, Markdown.

Counts are those of the algorithm and not of an implementation. A pair of a query and a key that it
sees costs 4 D operations forward (two products) and 10 D backward (five, though a backward pass
without atomics makes seven). Every tensor moves once: forward q, k, v, o and lse; backward q, k,
v, o, do, dq, dk, dv and lse. The roofline is the longer of these two over the measured ceilings.
"""

import math
import statistics
from typing import Any, Literal, get_args

from kernels.patterns import Kind

# what is timed as one; the passes of ``kernels.tiles`` are the kernels
Span = Literal["forward", "backward", "both"]
SPANS: tuple[Span, ...] = get_args(Span)
PRODUCTS = {"forward": 2, "backward": 5, "both": 7}
TENSORS = {"forward": 4, "backward": 8, "both": 12}
LSES = {"forward": 1, "backward": 1, "both": 2}
OUTPUTS = ("o", "dq", "dk", "dv")
NAMES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}

OURS = "triton"
CAUSAL = "sdpa causal"
FLEX = "flex"
# the same products in the same dtype, by PyTorch
YARDSTICK = "sdpa mask"

# a layer of the 12B model on one chip: the targets of speed hold here and are no claim elsewhere
AIM = {
    "device": "NVIDIA H200",
    "batch": 8,
    "heads": 62,
    "n_text": 256,
    "grid": 32,
    "width": 64,
    "dtype": "bfloat16",
}
# how many times longer the fastest rival of a family takes, at least; chosen before any run, from
# counts of pairs and published rates of dense kernels. Of causal attention the patterns leave a
# part of the pairs that allows 2.50 x row, 2.63 x column, 2.30 x conv, and tiles visit more pairs
# than that part. FlexAttention skips empty blocks too, 128 or 64 wide
FASTER: dict[str, dict[tuple[str, Span], float]] = {
    CAUSAL: {
        ("row", "forward"): 2.0,
        ("column", "forward"): 2.1,
        ("conv", "forward"): 1.5,
        ("row", "both"): 1.7,
        ("column", "both"): 1.7,
        ("conv", "both"): 1.3,
    },
    FLEX: {
        (kind, span): 1.15
        for span in ("forward", "both")
        for kind in ("row", "column", "conv")
    },
}  # fmt: skip
# 1.8 times what moving every tensor once takes at 4.3 TB/s
MOST_ROW_FORWARD_MS = 0.140
# what the tests hold every path to, in any dtype: this target holds everywhere
MOST_ERROR = 2.0
# an error of 0 divides nothing
TINY = 1e-30


def operations(shape: dict[str, Any], pairs: int, span: Span) -> float:
    """Floating-point operations of a pass over all heads and samples."""
    return 2.0 * PRODUCTS[span] * pairs * shape["width"] * shape["batch"] * shape["heads"]


def traffic_bytes(shape: dict[str, Any], span: Span) -> float:
    """Bytes that a pass must move: every tensor once, the float32 lse with them."""
    rows = shape["batch"] * shape["heads"] * (shape["n_text"] + shape["grid"] ** 2)
    return float(rows * (TENSORS[span] * shape["width"] * shape["itemsize"] + 4 * LSES[span]))


def floor_ms(
    shape: dict[str, Any], pairs: int, span: Span, ceilings: dict[str, float]
) -> dict[str, float]:
    """The least time of a pass by memory and by arithmetic; the longer is the roofline."""
    return {
        "memory_ms": traffic_bytes(shape, span) / ceilings["copy_gb_s"] / 1e6,
        "tensor_ms": operations(shape, pairs, span) / ceilings["matmul_tflop_s"] / 1e9,
    }


def rates(
    median_ms: float,
    min_ms: float,
    shape: dict[str, Any],
    pairs: int,
    span: Span,
    ceilings: dict[str, float],
) -> dict[str, float]:
    """One row of figures; a difference of two times can be 0 or less, and then has no rates."""
    row = {"median_ms": median_ms, "min_ms": min_ms}
    if median_ms > 0:
        row |= {
            "tflop_s": operations(shape, pairs, span) / median_ms / 1e9,
            "gb_s": traffic_bytes(shape, span) / median_ms / 1e6,
            "roofline": max(floor_ms(shape, pairs, span, ceilings).values()) / median_ms,
        }
    return row


def summary(
    forward_s: list[float],
    both_s: list[float],
    shape: dict[str, Any],
    pairs: int,
    ceilings: dict[str, float],
) -> dict[str, dict[str, float]]:
    """Median and minimum of each span, and its rates."""
    forward_ms, both_ms = (
        [1e3 * statistics.median(runs), 1e3 * min(runs)] for runs in (forward_s, both_s)
    )
    backward_ms = [b - f for b, f in zip(both_ms, forward_ms, strict=True)]
    times = zip(SPANS, (forward_ms, backward_ms, both_ms), strict=True)
    return {span: rates(ms[0], ms[1], shape, pairs, span, ceilings) for span, ms in times}


def best(pattern: dict[str, Any], family: str, span: Span) -> tuple[str, float] | None:
    """The fastest rival whose name starts with ``family`` and its median, None without one."""
    times = {
        name: row[span]["median_ms"]
        for name, row in pattern["rivals"].items()
        if name.startswith(family) and span in row
    }
    return min(times.items(), key=lambda item: item[1]) if times else None


def error_ratio(pattern: dict[str, Any]) -> float | None:
    """How many times as wrong as PyTorch in the same dtype, in the worst of o, dq, dk and dv."""
    ours, torchs = (pattern["rivals"].get(name, {}).get("error") for name in (OURS, YARDSTICK))
    if not ours or not torchs:
        return None
    found = [ours[name] / max(torchs[name], TINY) for name in OUTPUTS]
    # max passes over a NaN
    return math.inf if any(map(math.isnan, found)) else max(found)


def ratios(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure that has a target somewhere, of the patterns that were measured.

    Returns:
        name, value (None where a side of it is missing), target, ``least`` (the target is a lower
        bound, else an upper one) and met. Where a target does not hold (see ``AIM``), it and met
        are None.
    """
    here = {**result["shape"], "device": result["machine"]["device"]}
    at_aim = all(here[name] == value for name, value in AIM.items())
    patterns, found = result["patterns"], []
    for family, targets in FASTER.items():
        for (kind, span), target in targets.items():
            if kind in patterns:
                ours, rival = (best(patterns[kind], name, span) for name in (OURS, family))
                value = rival[1] / ours[1] if ours and rival else None
                name = f"{kind} {NAMES[span]}: {rival[0] if rival else family} / {OURS}"
                found.append(_held(name, value, target if at_aim else None, least=True))
    if "row" in patterns:
        ours = best(patterns["row"], OURS, "forward")
        target_ms = MOST_ROW_FORWARD_MS if at_aim else None
        found.append(_held("row forward, ms", ours[1] if ours else None, target_ms, least=False))
    for kind, pattern in patterns.items():
        name = f"{kind} error: {OURS} / {YARDSTICK}"
        found.append(_held(name, error_ratio(pattern), MOST_ERROR, least=False))
    return found


def _held(name: str, value: float | None, target: float | None, *, least: bool) -> dict[str, Any]:
    met = None
    if target is not None:
        met = value is not None and (value >= target if least else value <= target)
    return {"name": name, "value": value, "target": target, "least": least, "met": met}


def ratio_lines(result: dict[str, Any]) -> list[str]:
    """The ratios as text, a line each, with what is missing said; verdicts where targets hold."""
    lines = []
    for ratio in result["ratios"]:
        verdict = bound = ""
        value = "not measured" if ratio["value"] is None else f"{ratio['value']:.3f}"
        if ratio["met"] is not None:
            bound = f"{'at least' if ratio['least'] else 'at most'} {ratio['target']:g}"
            verdict = "met" if ratio["met"] else "MISSED" if ratio["value"] is not None else "open"
        lines.append(f"{verdict:<7} {value:>12}  {bound:<13}  {ratio['name']}")
    return lines


def pattern_lines(kind: str, pattern: dict[str, Any]) -> list[str]:
    """The figures of one pattern as text, a line for each rival, then who is not among them."""
    lines = []
    for name, row in pattern["rivals"].items():
        cells = [
            f"{row[span]['median_ms']:9.3f} {row[span]['min_ms']:9.3f}"
            for span in ("forward", "both")
        ]
        cells += [
            f"{row[span].get('tflop_s', 0):8.3f} {row[span].get('gb_s', 0):8.1f} "
            f"{row[span].get('roofline', 0):6.1%}"
            for span in ("forward", "backward")
        ]
        error = row["error"]
        cells.append(" ".join(f"{error[x]:.1e}" for x in OUTPUTS) if error else "-")
        lines.append(f"{kind:<7} {name:<18} " + " | ".join(cells))
    left_out = pattern["left_out"].items()
    return lines + [f"{kind:<7} {name:<18} left out: {reason}" for name, reason in left_out]


def markdown(saved: dict[str, Any]) -> str:
    """A Markdown table of a saved run, with a sentence on what it was measured with.

    Args:
        saved: what ``kernels.bench --out`` wrote, or what ``pipeline.gpu_check`` did.

    Raises:
        ValueError: there are no attention times in it.
    """
    result = saved.get("attention", saved)
    if not isinstance(result, dict) or not result.get("patterns"):
        raise ValueError(
            "the file holds no attention times; name one that kernels.bench --out or "
            "pipeline.gpu_check wrote"
        )
    shape, machine, ceilings = result["shape"], result["machine"], result["ceilings"]
    head = ("pattern", "pass", "here", "TFLOP/s", "of the roofline", "best causal SDPA", "ratio",
            "best FlexAttention", "ratio", "error / PyTorch's")  # fmt: skip
    rows = [head, ("---",) * len(head)]
    rows += [
        (kind, NAMES[span], *_cells(result["patterns"][kind], span))
        for kind in get_args(Kind)
        if kind in result["patterns"]
        for span in ("forward", "both")
    ]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, commit "
            f"{machine['commit']}: batch {shape['batch']}, {shape['heads']} heads of "
            f"{shape['width']}, {shape['n_text']} text tokens and a {shape['grid']} x "
            f"{shape['grid']} image, {shape['dtype']}; medians. Ceilings measured in the same "
            f"run: {ceilings['copy_gb_s']:.0f} GB/s, "
            f"{ceilings['matmul_tflop_s']:.3g} TFLOP/s.",
        ]
    )


def _cells(pattern: dict[str, Any], span: Span) -> tuple[str, ...]:
    row = pattern["rivals"].get(OURS, {}).get(span)
    ours = ("-",) * 3
    if row:
        ours = (_time(row["median_ms"]), f"{row['tflop_s']:.0f}", f"{row['roofline']:.0%}")
    cells: list[str] = []
    for family in (CAUSAL, FLEX):
        rival = best(pattern, family, span)
        label = rival[0].removeprefix(family).strip() if rival else ""
        cells.append(_time(rival[1]) + (f" ({label})" if label else "") if rival else "-")
        cells.append(f"**{rival[1] / row['median_ms']:.2f} x**" if rival and row else "-")
    error = error_ratio(pattern)
    return (*ours, *cells, "-" if error is None else f"{error:.2f}")


def _time(ms: float) -> str:
    return f"{1e3 * ms:.0f} µs" if ms < 10 else f"{ms:.1f} ms"
