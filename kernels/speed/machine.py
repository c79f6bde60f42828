"""What times depend on besides the measured code: the device, the versions, the commit."""

import platform
import subprocess
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
CPUINFO = Path("/proc/cpuinfo")
UNKNOWN = "unknown"


def device_name(device: torch.device | str) -> str:
    """The name of the GPU, or of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if CPUINFO.is_file():
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit(root: Path = ROOT) -> str:
    """What git says that the code is; "unknown" where git or its history is missing."""
    return first_line_of(["git", "describe", "--always", "--dirty"], root)


def versions() -> dict[str, str]:
    """Of the software that the times depend on; "none" for that of a GPU where there is none."""
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "none",
        "driver": first_line_of(driver) if torch.cuda.is_available() else "none",
    }


def first_line_of(words: list[str], folder: Path = ROOT) -> str:
    """The first line that a command prints in ``folder``; "unknown" where it does not run."""
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return (done.stdout.splitlines() or [UNKNOWN])[0].strip()
