"""The machine: its names and speeds, for benches, and the memory that it has left."""

from pathlib import Path

import torch

from kernels.speed.clock import ceilings
from kernels.speed.machine import ROOT, commit, device_name, versions

__all__ = ["ROOT", "ceilings", "commit", "device_name", "free_bytes", "versions"]


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken: of a GPU, else of this machine."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, kib = line.split()[:2]
        if name == "MemAvailable:":
            return int(kib) * 1024
    raise AssertionError("Linux since 3.14 has MemAvailable")
