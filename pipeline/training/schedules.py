"""Step sizes, KL weights and temperatures as functions of the update."""

import math

from pipeline.config import Ramp


def at(ramp: Ramp, step: int) -> float:
    """The value of ``ramp`` at update ``step`` (from 0): half a cosine, then ``ramp.end``.

    The paper says "cosine" and writes no formula (appendix A.2); half a cosine is the usual
    reading.
    """
    share = min(1.0, step / ramp.steps)
    return ramp.start + (ramp.end - ramp.start) * 0.5 * (1 - math.cos(math.pi * share))


def warmed_up(ramp: Ramp, warmup: int, step: int) -> float:
    """``at(ramp, step)``, reached linearly over the first ``warmup`` updates (appendix B.2)."""
    return at(ramp, step) * min(1.0, (step + 1) / max(1, warmup))
