"""How fast a run goes: seconds, throughput, share of the device's peak, memory, time left."""

import resource
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.config import DalleRun, Run
from pipeline.training.planning import peaks
from pipeline.training.planning.forecast import model_flops


class Pace:
    """The clock of one process.

    Args:
        run: the preset.
        world: ranks that share an update.
        device: of this rank.
        dtype: that the matrices are computed in.
        updates: made before.
    """

    def __init__(
        self,
        run: Run,
        world: int,
        device: torch.device,
        dtype: torch.dtype,
        updates: int,
    ) -> None:
        self._run, self._device = run, device
        self._steps = run.steps
        # as long as it takes until validations and saves have had their part in it
        self._window = max(run.val_every, run.save_every)
        self._peak_s = _seconds_at_peak(run, world, device, dtype)
        self.restart(updates)

    def restart(self, updates: int) -> None:
        """Count anew, from so many updates."""
        now = time.monotonic()
        self._marks = deque([(now, updates)])
        self._away_s = 0.0

    @contextmanager
    def away(self) -> Iterator[None]:
        """What happens in here is no update: validations and saves."""
        start = time.monotonic()
        yield
        self._away_s += time.monotonic() - start

    def lap(self, updates: int) -> dict[str, float]:
        """Figures of the updates since the last lap, which are at least one.

        ``seconds_an_update`` is a mean, waiting for samples included; ``tokens_per_s`` (stage 2)
        and ``pictures_per_s`` (stage 1, CLIP) are those of all ranks. ``mfu`` is the share of the
        peak of all devices that the products of forward and backward pass take, without those that
        are computed again; left out where the peak is not known. ``peak_gib`` is the most memory of
        this rank's device, without one of this process.
        """
        now = time.monotonic()
        before, updates_before = self._marks[-1]
        seconds = max(now - before - self._away_s, 1e-9) / (updates - updates_before)
        self._marks.append((now, updates))
        self._away_s = 0.0
        while updates - self._marks[1][1] >= self._window:
            self._marks.popleft()
        name, n = _amount(self._run)
        figures = {"seconds_an_update": seconds, name: n / seconds}
        if self._peak_s is not None:
            figures["mfu"] = self._peak_s / seconds
        return figures | {"peak_gib": peak_gib(self._device)}

    @property
    def left_s(self) -> float | None:
        """Seconds to the last update at the recent speed, validations and saves included."""
        (start, first), (stop, last) = self._marks[0], self._marks[-1]
        return (stop - start) / (last - first) * (self._steps - last) if last > first else None


def _amount(run: Run) -> tuple[str, int]:
    """(figure, how many an update)."""
    if isinstance(run, DalleRun):
        return "tokens_per_s", run.batch * run.model.n_ctx
    return "pictures_per_s", run.batch


def _seconds_at_peak(
    run: Run, world: int, device: torch.device, dtype: torch.dtype
) -> float | None:
    """Of an update, if its products were all; None where that is not known."""
    if not isinstance(run, DalleRun) or device.type != "cuda" or dtype == torch.float32:
        return None
    peak = peaks.tflops(torch.cuda.get_device_name(device))
    return None if peak is None else model_flops(run) / world / (peak * 1e12)


def peak_gib(device: torch.device) -> float:
    """The most memory of a GPU that this process held so far; of its host on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def said(values: dict[str, float], speed: dict[str, float]) -> str:
    """The figures that fit beside a bar: losses, step size, throughput, share of peak, memory."""
    losses = [n for n in ("loss", "text", "image", "nll", "kl", "top_1") if n in values]
    parts = [f"{name} {values[name]:.3f}" for name in losses]
    if "lr" in values:
        parts.append(f"lr {values['lr']:.1e}".replace("e-0", "e-"))
    for name, unit in (("tokens_per_s", "tok/s"), ("pictures_per_s", "pictures/s")):
        if name in speed:
            parts.append(f"{_short(speed[name])} {unit}")
    if "mfu" in speed:
        parts.append(f"MFU {100 * speed['mfu']:.0f}%")
    if "peak_gib" in speed:
        parts.append(f"{speed['peak_gib']:.1f} GiB")
    return " ".join(parts)


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
