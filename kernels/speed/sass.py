"""Machine code (SASS), as cuobjdump prints it, to the figures that tell what a kernel costs."""

import re
from dataclasses import dataclass

import networkx  # type: ignore[import-untyped]

# an address and what stands there; the machine code that follows is in a comment of its own
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
BRANCH = re.compile(r"^(@\S+\s+)?(BRA|CALL)(?:\.\S+)?\s+(!?U?P\w+,\s*)?0x([0-9a-f]+)")
# HFMA2.MMA, a move, is none of these
TENSOR_PRODUCT = re.compile(r"(HMMA|HGMMA|UTC\w*MMA)\b")
# products of float32 are FFMA; the loops that go query by query have fewer in one round
FFMA_OF_A_PRODUCT = 128


@dataclass(frozen=True)
class MachineCode:
    """What the compiler made of a kernel.

    Args:
        registers: of one thread.
        spills: instructions that read or write registers kept in memory.
        shared: bytes of one program.
        instructions: of the whole kernel.
        loops: instructions of each main loop, as ``main_loops`` finds them.
        columns: of tensor memory, of one program.
        wgmma: tensor products that the four warps of a Hopper warp group issue together.
        mma: tensor products of single warps.
        tcgen05: tensor products of Blackwell.
    """

    registers: int
    spills: int
    shared: int
    instructions: int
    loops: tuple[int, ...]
    columns: int = 0
    wgmma: int = 0
    mma: int = 0
    tcgen05: int = 0


def opcode(text: str) -> str:
    """The operation of an instruction, without the predicate in front of it."""
    return PREDICATE.sub("", text).split()[0]


def instructions(sass: str) -> list[tuple[int, str]]:
    """Address and text of each instruction that cuobjdump lists."""
    return [(int(address, 16), text) for address, text in LINE.findall(sass)]


def successors(code: list[tuple[int, str]]) -> list[list[int]]:
    """Where each instruction may lead, as places in ``code``.

    A call leads on to what follows it too: ptxas also leaves a loop by a call without a return.
    """
    place = {address: i for i, (address, _) in enumerate(code)}
    leads = []
    for i, (_, text) in enumerate(code):
        branch = BRANCH.match(text)
        after = [i + 1] if i + 1 < len(code) else []
        if branch:
            is_jump = branch[2] == "BRA" and not (branch[1] or branch[3])
            after = [place[int(branch[4], 16)], *([] if is_jump else after)]
        elif text.startswith(("EXIT", "RET")):
            after = []
        leads.append(after)
    return leads


def main_loops(code: list[tuple[int, str]], least_ffma: int = FFMA_OF_A_PRODUCT) -> tuple[int, ...]:
    """How many instructions each loop with a matrix product has, in the order of the code.

    A loop is a set of instructions from each of which all others of the set can be reached. What
    the compiler puts out of line (places where a program waits for data) counts where it belongs.
    """
    graph = networkx.DiGraph(dict(enumerate(successors(code))))
    parts = sorted(sorted(part) for part in networkx.strongly_connected_components(graph))
    return tuple(
        len(part) for part in parts if len(part) > 1 and _multiplies(code, part, least_ffma)
    )


def _multiplies(code: list[tuple[int, str]], loop: list[int], least_ffma: int) -> bool:
    ops = [opcode(code[i][1]) for i in loop]
    # FFMA2 of Blackwell is two in one
    n_ffma = sum(op.startswith("FFMA") + op.startswith("FFMA2") for op in ops)
    return n_ffma >= least_ffma or any(TENSOR_PRODUCT.match(op) for op in ops)


def read_sass(
    dump: str, shared: int, columns: int = 0, least_ffma: int = FFMA_OF_A_PRODUCT
) -> MachineCode:
    """The figures in what ``cuobjdump -res-usage -sass`` says of one kernel.

    Args:
        dump: its output.
        shared: bytes, from the compiler: the dump has only what is known at compile time.
        columns: of tensor memory, likewise.
        least_ffma: that make a loop without a tensor product a main one.
    """
    registers = re.search(r"REG:(\d+)", dump)
    code = instructions(dump)
    assert registers is not None, f"cuobjdump lists no kernel:\n{dump[:300]}"
    ops = [opcode(text) for _, text in code]
    return MachineCode(
        registers=int(registers[1]),
        spills=sum(op.startswith(("LDL", "STL")) for op in ops),
        shared=shared,
        instructions=len(code),
        loops=main_loops(code, least_ffma),
        columns=columns,
        wgmma=sum(op.startswith("HGMMA") for op in ops),
        mma=sum(op.startswith("HMMA") for op in ops),
        tcgen05=sum(bool(re.match(r"UTC\w*MMA", op)) for op in ops),
    )
