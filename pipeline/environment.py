"""What a process computes with: the versions of its libraries, and a hash of the code."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
# what changes numbers, the order of samples or the pieces of a caption
LIBRARIES = ("torch", "deepspeed", "numpy", "sentencepiece")


def environment() -> dict[str, str]:
    """``{"code": 16 hexadecimal digits, "python": "3.12.3", "torch": ...}``, versions all."""
    code = hashlib.sha256()
    for folder in ("kernels", "pipeline"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            code.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    versions = {name: _version(name) for name in LIBRARIES}
    return {"code": code.hexdigest()[:16], "python": platform.python_version(), **versions}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # DeepSpeed, where one process trains and samples
        return "not installed"
