"""Kernels compiled ahead of time for any chip of the table, with no GPU, and what came out."""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.attention.backward import dkdv_kernel, dq_kernel
from kernels.attention.forward import forward_kernel
from kernels.attention.launch import constants
from kernels.patterns import Pattern
from kernels.speed.sass import MachineCode, read_sass
from kernels.speed.shapes import LAYER
from kernels.tiles import CHIPS, Pass, Tile, key

KERNELS: dict[Pass, Any] = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}
# columns of a Blackwell processor's tensor memory
TENSOR_MEMORY = 512
# triton brings its own
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Job:
    """One kernel to compile: a tile at one shape.

    Args:
        chip: one of ``CHIPS``.
        width: of a head.
        itemsize: bytes of an element, 2 or 4.
        which: the pass.
        pattern: with its size.
        tile: that of the table, or another one.
    """

    chip: str
    width: int
    itemsize: int
    which: Pass
    pattern: Pattern
    tile: Tile

    @property
    def name(self) -> str:
        """That of its line in the table."""
        return key(self.chip, self.width, self.itemsize, self.pattern.kind, self.which)

    @property
    def is_paper(self) -> bool:
        """Whether it has the paper's sequence, whose figures are recorded."""
        return self.pattern == LAYER.pattern(self.pattern.kind)


def compile_for_chip(job: Job) -> Any:
    """The kernel of a job, as a launch on that chip would compile it."""
    kernel = KERNELS[job.which]
    fixed = constants(job.pattern, job.width, job.tile)
    element = {2: "bf16", 4: "fp32"}[job.itemsize]
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
        elif name.startswith("scale"):
            signature[name] = "fp32"
        else:
            is_sum = name in ("p_lse", "p_delta")
            number = "*fp32" if is_sum else f"*{element}" if name.startswith("p_") else "i32"
            signature[name] = number
            # what a launch finds out: addresses and strides are multiples of 16, 62 heads are not
            if name != "n_head":
                attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes),
        target=GPUTarget("cuda", int(job.chip.removeprefix("sm_")), 32),
        options={"num_warps": job.tile.warps, "num_stages": job.tile.stages},
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
    return read_sass(dump, kernel.metadata.shared, columns)


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
    if job.chip == "sm_90" and job.itemsize == 2 and not (code.wgmma and not code.mma):
        wrong.append(f"{code.wgmma} wgmma and {code.mma} mma products, at least 1 and at most 0")
    if job.chip == "sm_100" and job.itemsize == 2 and not code.tcgen05:
        wrong.append("0 tcgen05 products, at least 1")
    if job.is_paper and not code.loops:
        wrong.append("0 loops with a product, at least 1")
    return wrong
