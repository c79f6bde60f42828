"""How long one call takes, what a device reaches, and what is said while that is measured.

On a GPU a time is that of one call between CUDA events; before it a buffer larger than the cache is
zeroed, which empties the cache and lets the host queue the call before the device gets there.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# calls that are not counted: they compile, and wake the device
WARM_UP = 3
# of ``ceilings``: side of the matrices, bytes copied, runs
CEILINGS_OF = {"cuda": (8192, 2**30, 20), "cpu": (1024, 2**26, 5)}
# several times the cache of any GPU: writing it takes longer than queueing a call
FLUSH_BYTES = 2**31


class Clock:
    """Seconds that one call takes."""

    def __init__(self, device: torch.device) -> None:
        self.flush: Tensor | None = None
        if device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(device)
            size = min(FLUSH_BYTES, free_bytes // 8)
            self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, work: Callable[[], object]) -> float:
        """Call ``work`` once."""
        if self.flush is None:
            start_s = time.perf_counter()
            work()
            return time.perf_counter() - start_s
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device reaches: a copy, counting bytes read and written, and a matrix product."""
    side, copied_bytes, runs = CEILINGS_OF[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randint(256, (copied_bytes,), dtype=torch.uint8, device=device)
    target, clock = torch.empty_like(source), Clock(device)

    def median_s(work: Callable[[], object]) -> float:
        return statistics.median([clock(work) for _ in range(WARM_UP + runs)][WARM_UP:])

    return {
        "copy_gb_s": 2 * copied_bytes / median_s(lambda: target.copy_(source)) / 1e9,
        "matmul_tflop_s": 2 * side**3 / median_s(lambda: torch.matmul(a, b)) / 1e12,
    }


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # "backend='inductor' raised:" says nothing yet
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {said}"[:300]


def say(line: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
