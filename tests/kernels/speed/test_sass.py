import pytest

from kernels.speed.sass import MachineCode, instructions, main_loops, opcode, read_sass

# a text loop left in its middle by a call, a wait out of line, a loop without products
SASS = """
 Function kernel:
  REG:104 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:632 TEXTURE:0 SURFACE:0 SAMPLER:0
        code for sm_90a
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000e700000000800 */
        /*0010*/              @!P0 BRA 0x90 ;                        /* 0x0000000000007947 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x0 */
        /*0030*/              @!P1 BRA 0xd0 ;                        /* 0x0000000000007947 */
        /*0040*/                   MUFU.EX2 R8, R8 ;                 /* 0x0000000000007308 */
        /*0050*/               @P2 CALL.REL.NOINC 0x70 ;             /* 0x0000000000007944 */
        /*0060*/                   BRA 0x20 ;                        /* 0x0000000000007947 */
        /*0070*/                   FADD R8, R8, R9 ;                 /* 0x0000000908087221 */
        /*0080*/                   BRA.U !UP0, 0x70 ;                /* 0x0000000000007947 */
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x0 */
        /*00a0*/                   STL [R1+0x4], R8 ;                /* 0x0000000000007387 */
        /*00b0*/              @!UP1 BRA 0x90 ;                       /* 0x0000000000007947 */
        /*00c0*/                   EXIT ;                            /* 0x000000000000794d */
        /*00d0*/                   SYNCS.PHASECHK.TRYWAIT P1, [UR4] ; /* 0x0000000000007947 */
        /*00e0*/              @!P1 BRA 0xd0 ;                        /* 0x0000000000007947 */
        /*00f0*/                   BRA 0x40 ;                        /* 0x0000000000007947 */
        /*0100*/                   BRA 0x100;                        /* 0x0000000000007947 */
"""


def test_instructions_are_read_without_the_machine_code():
    code = instructions(SASS)
    assert code[:2] == [(0, "LDC R1, c[0x0][0x28]"), (16, "@!P0 BRA 0x90")]
    assert len(code) == 17


@pytest.mark.parametrize("text", ["@!P0 BRA 0x90", "@UP1 BRA 0x90", "@!PT BRA 0x90", "BRA 0x90"])
def test_opcode_is_what_follows_the_predicate(text):
    assert opcode(text) == "BRA"


def test_main_loops_have_products_and_their_waits():
    # 0x20 to 0x60 and the wait from 0xd0 on; 0x90 to 0xb0; not 0x70, not the end
    assert main_loops(instructions(SASS)) == (8, 3)


def test_nested_loops_are_one():
    nested = [
        (0x00, "HMMA.16816.F32.BF16 R4, R8, R12, R4"),
        (0x10, "@P0 BRA 0x0"),
        (0x20, "@P1 BRA 0x0"),
        (0x30, "EXIT"),
    ]
    assert main_loops(nested) == (3,)


@pytest.mark.parametrize(("op", "n", "loops"), [("FFMA", 127, ()), ("FFMA", 128, (129,))])
def test_loop_of_float32_products_is_known_by_their_number(op, n, loops):
    code = [(16 * i, f"{op} R1, R2, R3, R1") for i in range(n)] + [(16 * n, "@P0 BRA 0x0")]
    assert main_loops(code) == loops


def test_figures_of_a_dump():
    assert read_sass(SASS, shared=49152) == MachineCode(
        registers=104, spills=1, shared=49152, instructions=17, loops=(8, 3), wgmma=2
    )
