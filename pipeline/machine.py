"""What times depend on, and what a device reaches, for benches of the rooms above this one."""

from kernels.speed.clock import ceilings
from kernels.speed.machine import ROOT, commit, device_name, versions

__all__ = ["ROOT", "ceilings", "commit", "device_name", "versions"]
