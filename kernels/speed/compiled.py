"""Kernels compiled ahead of time for any chip of the table, with no GPU, and what came out."""

import subprocess
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.attention import decode
from kernels.attention.backward import dkdv_kernel, dq_kernel
from kernels.attention.forward import forward_kernel
from kernels.attention.launch import constants
from kernels.patterns import Pattern
from kernels.speed.sass import FFMA_OF_A_PRODUCT, MachineCode, read_sass
from kernels.speed.shapes import LAYER
from kernels.tiles import CHIPS, Pass, Tile, key

KERNELS: dict[Pass, Any] = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}
# pointers that are not to elements; numbers of which nothing is known
POINTED_AT = {"p_lse": "fp32", "p_delta": "fp32", "p_step": "i64"} | dict.fromkeys(
    ("p_row", "p_caption", "p_own", "p_slots"), "i32"
)
COUNTS = ("n_head", "n_captions", "n_rows")
# in the loop over gathered keys, which is no matrix product
FFMA_OF_A_GATHER = 32
# columns of a Blackwell processor's tensor memory
TENSOR_MEMORY = 512
# triton brings its own
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Job(ABC):
    """One kernel to compile at one shape.

    Args:
        chip: one of ``CHIPS``.
        width: of a head.
        itemsize: bytes of an element, 2 or 4.
        pattern: with its size.
    """

    chip: str
    width: int
    itemsize: int
    pattern: Pattern

    way_out: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str:
        """That of its line in the record."""

    @abstractmethod
    def kernel(self) -> tuple[Any, dict[str, Any], dict[str, int]]:
        """The kernel, its compile-time arguments, and how it is launched."""

    @property
    def is_paper(self) -> bool:
        """Whether it has the paper's sequence, whose figures are recorded."""
        return self.pattern == LAYER.pattern(self.pattern.kind)


@dataclass(frozen=True)
class PassJob(Job):
    """A pass over whole sequences.

    Args:
        which: the pass.
        tile: that of the table, or another one.
    """

    which: Pass
    tile: Tile

    way_out = "give it another tile in tiles.json"

    @property
    def name(self) -> str:
        """That of its line in the table too."""
        return key(self.chip, self.width, self.itemsize, self.pattern.kind, self.which)

    def kernel(self) -> tuple[Any, dict[str, Any], dict[str, int]]:
        """``Job.kernel``."""
        options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
        return KERNELS[self.which], constants(self.pattern, self.width, self.tile), options


@dataclass(frozen=True)
class DecodeJob(Job):
    """A step of decoding, whose sizes are constants of its module."""

    way_out = "mend its sizes in kernels/attention/decode.py"

    @property
    def name(self) -> str:
        """As those of the passes."""
        return f"{self.chip} D{self.width} {8 * self.itemsize}-bit {self.pattern.kind} decode"

    def kernel(self) -> tuple[Any, dict[str, Any], dict[str, int]]:
        """``Job.kernel``."""
        fixed = decode.constants(self.pattern, self.width, self.itemsize)
        return decode.decode_kernel, fixed, decode.LAUNCH


def compile_for_chip(job: Job) -> Any:
    """The kernel of a job, as a launch on that chip would compile it."""
    kernel, fixed, options = job.kernel()
    element = {2: "bf16", 4: "fp32"}[job.itemsize]
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
        elif name.startswith("scale"):
            signature[name] = "fp32"
        else:
            pointer = f"*{POINTED_AT.get(name, element)}"
            signature[name] = pointer if name.startswith("p_") else "i32"
            # what a launch finds out: addresses and strides are multiples of 16, 62 heads are not
            if name not in COUNTS:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes),
        target=GPUTarget("cuda", int(job.chip.removeprefix("sm_")), 32),
        options=options,
    )


def measure(job: Job) -> MachineCode:
    """Compile one kernel and read what came out."""
    kernel = compile_for_chip(job)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    least = FFMA_OF_A_GATHER if isinstance(job, DecodeJob) else FFMA_OF_A_PRODUCT
    return read_sass(dump, kernel.metadata.shared, columns, least)


def unfit(job: Job, code: MachineCode) -> list[str]:
    """What keeps a kernel from running well, or at all, on its chip, whatever is recorded."""
    most = CHIPS[job.chip]
    wrong = []
    if code.spills:
        wrong.append(f"{code.spills} spills, at most 0")
    if code.shared > most:
        wrong.append(f"{code.shared} bytes of shared memory, at most {most}")
    if code.columns > TENSOR_MEMORY:
        wrong.append(f"{code.columns} columns of tensor memory, at most {TENSOR_MEMORY}")
    if job.itemsize == 2:
        wrong += _wrong_products(job, code)
    if job.is_paper and not code.loops:
        wrong.append("0 loops with a product, at least 1")
    return wrong


def _wrong_products(job: Job, code: MachineCode) -> list[str]:
    """What is wrong with the tensor products of elements of 16 bits."""
    if isinstance(job, DecodeJob):
        # its 16 rows are too few for wgmma and tcgen05
        return [] if code.mma or code.wgmma or code.tcgen05 else ["0 tensor products, at least 1"]
    if job.chip == "sm_90" and not (code.wgmma and not code.mma):
        return [f"{code.wgmma} wgmma and {code.mma} mma products, at least 1 and at most 0"]
    if job.chip == "sm_100" and not code.tcgen05:
        return ["0 tcgen05 products, at least 1"]
    return []
