"""What to do with a batch whose loss has run away: leave it out, or go back and around it.

A loss far above those before, or one that is no number, comes of single batches at large scale;
leaving these out is what PaLM did (arXiv 2204.02311, section 5.1): some hundred updates back to a
checkpoint, and on with other batches, for the same ones give the same spike.
"""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Spike
from pipeline.console import InputError, logger

GO, SKIP, BACK = "go", "skip", "back"
FLOOR = 0.01  # of the mean: a loss that hardly moves has no deviation to speak of

log = logger("train")


class Guard:
    """Judges the loss of every update, the same on all ranks.

    Args:
        spike: what a spike is; None takes every loss.
    """

    def __init__(self, spike: Spike | None) -> None:
        self.spike = spike
        self._losses: deque[float] = deque(maxlen=spike.window if spike else 1)
        self._in_a_row = 0
        self.skips = 0
        self.returns = 0

    def judge(self, loss: float) -> str:
        """What to do with the update: GO, SKIP it, or go BACK to the last checkpoint."""
        if self.spike is None:
            return GO
        if not self._is_spike(loss, self.spike):
            self._losses.append(loss)
            self._in_a_row = 0
            return GO
        return self._leave_out(self.spike)

    def judge_norm(self, norm: float) -> str:
        """The same, for an update that was left out if its gradient's norm is no number."""
        if self.spike is None or math.isfinite(norm):
            return GO
        return self._leave_out(self.spike)

    def _leave_out(self, spike: Spike) -> str:
        self.skips += 1
        self._in_a_row += 1
        return SKIP if self._in_a_row < spike.skips else BACK

    def _is_spike(self, loss: float, spike: Spike) -> bool:
        if not math.isfinite(loss):
            return True
        if 2 * len(self._losses) < spike.window:
            return False
        mean = sum(self._losses) / len(self._losses)
        spread = math.sqrt(sum((x - mean) ** 2 for x in self._losses) / len(self._losses))
        return loss > mean + spike.deviations * max(spread, FLOOR * abs(mean))

    def went_back(self) -> None:
        """The run is at its last checkpoint again.

        Raises:
            InputError: for the last time that it may.
        """
        assert self.spike is not None
        self.returns += 1
        self._in_a_row = 0
        if self.returns > self.spike.returns:
            raise InputError(
                f"the loss has run away {self.returns} times, {self.spike.skips} updates in a row "
                "each time; the last checkpoint is kept: go on from it with a smaller step size or "
                "a longer warm-up in the preset"
            )

    def state(self) -> dict[str, Any]:
        """JSON values from which ``restore`` goes on."""
        return {"losses": list(self._losses), "in_a_row": self._in_a_row, "skips": self.skips}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``."""
        self._losses = deque(map(float, state.get("losses", ())), maxlen=self._losses.maxlen)
        self._in_a_row, self.skips = int(state.get("in_a_row", 0)), int(state.get("skips", 0))


@contextmanager
def looking_for_bad_numbers(module: nn.Module) -> Iterator[list[str]]:
    """What of ``module`` first gives numbers that are not finite, in a pass made meanwhile.

    The list has at most one entry: "the output of NAME", or "the gradient of the output of NAME"
    where all outputs are finite; the layer behind that one made it.
    """
    found: list[str] = []

    def look(what: str, values: Any) -> None:
        tensors = values if isinstance(values, tuple) else (values,)
        if not found and any(_is_bad(x) for x in tensors if isinstance(x, Tensor)):
            found.append(what)

    handles = []
    for name, part in module.named_modules():
        if any(True for _ in part.children()) or not any(True for _ in part.parameters()):
            continue

        def forward(part: Any, inputs: Any, output: Any, name: str = name) -> None:
            look(f"the output of {name}", output)
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(partial(look, f"the gradient of the output of {name}"))

        handles.append(part.register_forward_hook(forward))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_bad(value: Tensor) -> bool:
    return value.is_floating_point() and not bool(torch.isfinite(value).all())
