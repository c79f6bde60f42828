"""Measures tiles on the GPU at hand, rewrites its lines of tiles.json: ``python -m kernels.tune``.

A layer of the 12B model (``kernels.speed.shapes``), by pattern and pass. Candidates are compiled
and run once in processes of their own, so that one that does not compile, needs too much shared
memory or crashes costs little else; their results are held to that of the tile in the table, and
those that pass are timed in turns with it. A line changes only where the gain in the median is
larger than the spread of the runs. The times of dq and dkdv are those of the whole backward pass.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, get_args

import torch
from torch import Tensor

from kernels import tiles
from kernels.attention.backward import backward
from kernels.attention.forward import forward
from kernels.patterns import Kind
from kernels.speed import compiled
from kernels.speed.clock import DTYPES, WARM_UP, Clock, first_line, say
from kernels.speed.shapes import BATCH, LAYER
from kernels.tiles import PASSES, SUPPORTED, WIDTHS, Pass, Tile

# counted turns: enough for quartiles, and for a budget of time that 170 candidates share
RUNS = 30
# of the time, for compiling; the rest is for timing
COMPILING = 0.6
# each takes seconds to start, which its share of some 170 candidates must repay
MOST_PROCESSES = 12
# an illegal access spoils what its process tries after it: then these at most
TRIALS_OF_A_PROCESS = 8
# GPU memory of a process: 1 GB of tensors, which are drawn in float32, 0.5 GB of CUDA, twice
PROCESS_BYTES = 3e9
# float16 reads the lines of bfloat16
TUNED = ("bfloat16", "float32")

# choices of rows, step, local, warps and stages, each of which is multiplied out
ROWS_OF_QUERIES = [
    ((64,), (64, 128), (32, 64), (4,), (1, 2, 3)),
    ((128,), (64, 128), (32, 64), (8,), (2,)),
    ((128,), (64,), (32,), (4,), (2,)),
]
ROWS_OF_KEYS = [
    ((64,), (32, 64), (32, 64), (4,), (1, 2)),
    ((64,), (64,), (64,), (8,), (2,)),
    ((128,), (32, 64), (32, 64), (8,), (2,)),
]
IN_32_BITS = [
    ((16, 32), (16, 32), (16,), (4,), (1, 2)),
    ((64,), (16, 32), (16,), (4, 8), (1,)),
]


def candidates(which: Pass, itemsize: int) -> list[Tile]:
    """Tiles that are worth a measurement, 12 to 17 a pass."""
    lists = IN_32_BITS if itemsize == 4 else ROWS_OF_KEYS if which == "dkdv" else ROWS_OF_QUERIES
    return [Tile(*sizes) for choices in lists for sizes in itertools.product(*choices)]


class Layer:
    """The tensors of one layer, and its passes with any tile."""

    def __init__(self, width: int, dtype: torch.dtype, device: str = "cuda") -> None:
        # float32 products are sixteen times as slow
        batch = BATCH if dtype.itemsize == 2 else BATCH // 4
        n_tokens, d_model = LAYER.pattern("dense").n_tokens, LAYER.heads * LAYER.width
        shape = (batch, n_tokens, 3, d_model // width, width)
        generator = torch.Generator(device).manual_seed(0)
        self.qkv_BN3HD = torch.randn(shape, generator=generator, device=device).to(dtype)
        self.do_BNHD = torch.randn_like(self.qkv_BN3HD[:, :, 0])
        self.width, self.itemsize = width, dtype.itemsize
        self._forward: dict[Kind, tuple[Tensor, Tensor]] = {}

    def tile(self, kind: Kind, which: Pass) -> Tile:
        """That of the table."""
        return tiles.tile_on(self.qkv_BN3HD, LAYER.pattern(kind), which)

    def run(self, kind: Kind, which: Pass, tile: Tile) -> tuple[Tensor, ...]:
        """The results of a pass; a backward pass takes its other tile from the table."""
        q_BNHD, k_BNHD, v_BNHD = self.qkv_BN3HD.unbind(2)
        pattern, scale = LAYER.pattern(kind), self.width**-0.5
        if which == "forward":
            return forward(q_BNHD, k_BNHD, v_BNHD, pattern, scale, tile)[:1]
        if kind not in self._forward:
            self._forward = {kind: forward(q_BNHD, k_BNHD, v_BNHD, pattern, scale)}
        used = {"dq": self.tile(kind, "dq"), "dkdv": self.tile(kind, "dkdv"), which: tile}
        grads = torch.empty_like(self.qkv_BN3HD)
        dq_BNHD, dk_BNHD, dv_BNHD = grads.unbind(2)
        backward(
            self.do_BNHD, q_BNHD, k_BNHD, v_BNHD, *self._forward[kind], (dq_BNHD, dk_BNHD, dv_BNHD),
            pattern, scale, (used["dq"], used["dkdv"]),
        )  # fmt: skip
        return dq_BNHD, dk_BNHD, dv_BNHD


def distance(got: Tensor, expected: Tensor) -> float:
    """How far the row of a head that differs most is from the expected one.

    Over the larger of its norm and the mean norm, for a row that is nearly zero is all rounding.
    """
    expected = expected.float()
    norm = expected.norm(dim=-1)
    away = (got.float() - expected).norm(dim=-1) / norm.clamp_min(norm.mean())
    return away.max().item()


def tolerance(dtype: torch.dtype) -> float:
    """The distance that another order of sums may make; a block left out makes far more."""
    return max(4 * torch.finfo(dtype).eps, 1e-4)


def spread(runs: Sequence[float]) -> float:
    """Between the quartiles."""
    lower, _, upper = statistics.quantiles(runs, n=4)
    return upper - lower


def choose(runs: dict[Tile, list[float]], present: Tile) -> Tile:
    """The tile with the lowest median, if it gains more than either spread; else ``present``."""
    fastest = min(runs, key=lambda tile: statistics.median(runs[tile]))
    gain = statistics.median(runs[present]) - statistics.median(runs[fastest])
    return fastest if gain > max(spread(runs[fastest]), spread(runs[present])) else present


# what is tried
Trial = tuple[Kind, Pass, Tile]


@lru_cache(maxsize=1)
def _layer(width: int, dtype: torch.dtype) -> Layer:
    """Each process has tensors of its own."""
    return Layer(width, dtype)


def _try(width: int, dtype: torch.dtype, trial: Trial) -> tuple[Trial, str | None]:
    """Compile, which fills Triton's cache on the disk for all, and run once."""
    try:
        _layer(width, dtype).run(*trial)
        torch.cuda.synchronize()
    except Exception as error:
        return trial, first_line(error)
    return trial, None


def that_run(
    trials: list[Trial], attempt: Callable, until_s: float, start: str = "spawn"
) -> tuple[list[Trial], dict[Trial, str]]:
    """The trials that run, and why the others do not.

    Args:
        trials: what to try.
        attempt: gives each trial and what is wrong with it, None when it runs.
        until_s: of ``time.monotonic``, when the processes are ended.
        start: how processes begin; one that inherits CUDA by a fork cannot use it.
    """
    free_bytes = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else PROCESS_BYTES
    n = min(MOST_PROCESSES, os.cpu_count() or 1, int(free_bytes / PROCESS_BYTES), len(trials))
    running, failed = set(), dict.fromkeys(trials, "not compiled in time")
    with multiprocessing.get_context(start).Pool(
        max(n, 1), maxtasksperchild=TRIALS_OF_A_PROCESS
    ) as pool:
        results = pool.imap_unordered(attempt, trials)
        for _ in trials:
            try:
                trial, error = results.next(timeout=max(until_s - time.monotonic(), 0.1))
            except multiprocessing.TimeoutError:
                break
            if error is None:
                del failed[trial]
                running.add(trial)
            else:
                failed[trial] = error
    # in the order in which they came, whoever finished first
    return [trial for trial in trials if trial in running], failed


def measured(
    layer: Any, kind: Kind, which: Pass, ready: Iterable[Tile], clock: Callable[..., float]
) -> tuple[dict[Tile, list[float]], int]:
    """Seconds of the present tile and of all whose results agree with it; how many do not."""
    present = layer.tile(kind, which)
    expected = layer.run(kind, which, present)
    agreeing, wrong = [present], 0
    for tile in ready:
        if tile == present:
            continue
        got = layer.run(kind, which, tile)
        bound = tolerance(expected[0].dtype)
        # not <=: a NaN must not pass
        if all(distance(a, b) <= bound for a, b in zip(got, expected, strict=True)):
            agreeing.append(tile)
        else:
            wrong += 1
    runs: dict[Tile, list[float]] = {tile: [] for tile in agreeing}
    for turn in range(-WARM_UP, RUNS):
        for tile in agreeing:
            took_s = clock(partial(layer.run, kind, which, tile))
            if turn >= 0:
                runs[tile].append(took_s)
    return runs, wrong


def objections(layer: Any, chip: str, kind: Kind, which: Pass, tile: Tile) -> list[str]:
    """What the budget has against a tile, spills for one, however fast it is here."""
    pattern = LAYER.pattern(kind)
    job = compiled.PassJob(chip, layer.width, layer.itemsize, pattern, which, tile)
    return compiled.unfit(job, compiled.measure(job))


def tuned(
    layer: Any, chip: str, ready: list[Trial], clock: Callable[..., float]
) -> dict[str, Tile]:
    """The lines of the table that change, each with its tile; says what was found for all."""
    changes = {}
    for (kind, which), group in itertools.groupby(ready, key=lambda trial: trial[:2]):
        runs, wrong = measured(layer, kind, which, [tile for *_, tile in group], clock)
        present = layer.tile(kind, which)
        n_timed, name = len(runs), tiles.key(chip, layer.width, layer.itemsize, kind, which)
        while (chosen := choose(runs, present)) != present:
            against = objections(layer, chip, kind, which, chosen)
            if not against:
                break
            say(f"{name}: {chosen} is faster, and not taken: {', '.join(against)}")
            del runs[chosen]
        old_ms, new_ms = (1e3 * statistics.median(runs[tile]) for tile in (present, chosen))
        if chosen == present:
            fastest_ms = 1e3 * min(map(statistics.median, runs.values()))
            what = f"kept {present}: {old_ms:.4f} ms, the fastest {fastest_ms:.4f} ms"
        else:
            changes[name] = chosen
            what = f"{present} -> {chosen}: {old_ms:.4f} -> {new_ms:.4f} ms"
        say(f"{name}: {what}; {n_timed} timed, {wrong} gave another result")
    return changes


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=get_args(Kind))
    parser.add_argument("--widths", nargs="+", type=int, choices=WIDTHS, default=[64])
    parser.add_argument(
        "--dtypes", nargs="+", choices=TUNED, default=["bfloat16"],
        help="float16 shares the 16-bit lines, which bfloat16 measures",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=240, help="for everything, about")
    args = parser.parse_args(argv)
    if not args.seconds > 0:
        parser.error(f"--seconds is {args.seconds}; it must be more than 0")
    return args


def chip_at_hand(args: argparse.Namespace) -> str:
    """The chip of this machine.

    Raises:
        ValueError: there is none that has tiles, or its lines of the table cannot be read.
    """
    chip = tiles.chip_of(torch.device("cuda")) if torch.cuda.is_available() else None
    if chip is None:
        raise ValueError(
            f"torch does not see {SUPPORTED} here, and tiles are measured on the GPU that they "
            "are for; run this where there is one"
        )
    for width, name, kind in itertools.product(args.widths, args.dtypes, args.kinds):
        for which in PASSES:
            tiles.tile_for(chip, width, DTYPES[name].itemsize, LAYER.pattern(kind), which)
    return chip


def main(argv: list[str] | None = None) -> None:
    """Tune from the command line; the table is written after each width and dtype."""
    args = parse(argv)
    try:
        chip = chip_at_hand(args)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    start_s = time.monotonic()
    layers = list(itertools.product(args.widths, args.dtypes))
    any_change = False
    for i, (width, name) in enumerate(layers):
        dtype = DTYPES[name]
        trials: list[Trial] = [
            (kind, which, tile)
            for kind in args.kinds
            for which in PASSES
            for tile in candidates(which, dtype.itemsize)
        ]
        say(f"{chip}, width {width}, {name}: {len(trials)} candidates")
        until_s = start_s + args.seconds * (i + COMPILING) / len(layers)
        ready, failed = that_run(trials, partial(_try, width, dtype), until_s)
        for reason in sorted(set(failed.values())):
            say(f"{list(failed.values()).count(reason)} left out: {reason}")
        changes = tuned(Layer(width, dtype), chip, ready, Clock(torch.device("cuda")))
        if changes:
            tiles.write_table({**tiles.table(), **changes})
            any_change = True
    if any_change:
        say(f"wrote {tiles.TABLE}; now run `python -m kernels.budget --write` and `make test`")
    else:
        say("no line of the table changes")


if __name__ == "__main__":
    main()
