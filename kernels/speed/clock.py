"""How long one call takes on a device, and what is said while it is measured.

On a GPU a time is that of one call between CUDA events; before it a buffer larger than the cache is
zeroed, which empties the cache and lets the host queue the call before the device gets there.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
