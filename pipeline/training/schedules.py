"""Step sizes, KL weights and temperatures as functions of the update."""

import math
from typing import Any

from pipeline.config import Plateau, Ramp, StepSize
from pipeline.console import InputError

BUCKETS = 50  # of a plateau's window: so often it is looked at, and so many sums are kept


def at(ramp: Ramp, step: int) -> float:
    """The value of ``ramp`` at update ``step`` (from 0): half a cosine, then ``ramp.end``.

    The paper says "cosine" and writes no formula (appendix A.2); half a cosine is the usual
    reading.
    """
    share = min(1.0, step / ramp.steps)
    return ramp.start + (ramp.end - ramp.start) * 0.5 * (1 - math.cos(math.pi * share))


class LearningRate:
    """The step size of every update: a linear warm-up (appendix B.2), then what ``kind`` says.

    A ``Plateau`` depends on the training loss of the updates before, so it is told of each; what it
    remembers is ``state``, some ``2 * BUCKETS`` numbers that go into a checkpoint.

    Args:
        kind: a ramp, a plateau, or warm-up, stable, decay.
        warmup: updates over which the step size grows linearly.
    """

    def __init__(self, kind: StepSize, warmup: int) -> None:
        self.kind, self.warmup = kind, warmup
        self.halvings = 0
        # update of the last halving; the first may come two windows after the warm-up
        self._last = warmup - (kind.patience if isinstance(kind, Plateau) else 0)
        self._sums: list[float] = []  # training losses of whole buckets, oldest first
        self._sum, self._n = 0.0, 0  # of the bucket that fills

    def at(self, step: int) -> float:
        """The step size of update ``step``, from 0."""
        return self._after_warmup(step) * min(1.0, (step + 1) / max(1, self.warmup))

    def _after_warmup(self, step: int) -> float:
        kind = self.kind
        if isinstance(kind, Ramp):
            return at(kind, step)
        if isinstance(kind, Plateau):
            return kind.start * 0.5**self.halvings
        share = min(1.0, max(0.0, (step - (kind.steps - kind.decay)) / kind.decay))
        return kind.start + (kind.end - kind.start) * share

    @property
    def wants_losses(self) -> bool:
        """Whether ``observe`` changes anything."""
        return isinstance(self.kind, Plateau) and self.halvings < self.kind.halvings

    def observe(self, step: int, loss: float) -> bool:
        """The training loss of update ``step``; True when the step size was halved for it.

        Halved when the mean of the last ``window`` updates is not ``gain`` below that of the
        ``window`` before, and the last halving is ``patience`` updates ago. The
        same losses give the same halvings, so all ranks must be told the same.
        """
        kind = self.kind
        if not isinstance(kind, Plateau) or not self.wants_losses or step < self.warmup:
            return False
        size = kind.window // BUCKETS
        self._sum, self._n = self._sum + loss, self._n + 1
        if self._n < size:
            return False
        self._sums = [*self._sums, self._sum][-2 * BUCKETS :]
        self._sum, self._n = 0.0, 0
        if len(self._sums) < 2 * BUCKETS or step + 1 - self._last < kind.patience:
            return False
        before, now = sum(self._sums[:BUCKETS]), sum(self._sums[BUCKETS:])
        if now < before - kind.gain * abs(before):
            return False
        self.halvings += 1
        self._last, self._sums = step + 1, []
        return True

    def state(self) -> dict[str, Any]:
        """JSON values from which ``restore`` goes on."""
        return {
            "halvings": self.halvings,
            "last": self._last,
            "sums": list(self._sums),
            "sum": self._sum,
            "n": self._n,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``.

        Raises:
            InputError: it is none.
        """
        try:
            self.halvings, self._last = int(state["halvings"]), int(state["last"])
            self._sums = [float(value) for value in state["sums"]]
            self._sum, self._n = float(state["sum"]), int(state["n"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"the checkpoint's state of the step size lacks or garbles {error}: delete that "
                "checkpoint to go on from the one before"
            ) from error
