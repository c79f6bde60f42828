import pytest

from kernels.speed.compiled import DecodeJob, PassJob, unfit
from kernels.speed.sass import MachineCode
from kernels.speed.shapes import LAYER
from kernels.tiles import CHIPS, Tile

GOOD = MachineCode(128, 0, shared=49152, instructions=1210, loops=(271, 226), wgmma=42)


def job(chip="sm_90", itemsize=2):
    return PassJob(chip, 64, itemsize, LAYER.pattern("row"), "dq", Tile(64, 64, 32, 4, 2))


@pytest.mark.parametrize(
    ("chip", "change", "words"),
    [
        ("sm_90", {"spills": 2}, "2 spills, at most 0"),
        ("sm_86", {"shared": 101_377}, "101377 bytes of shared memory, at most 101376"),
        ("sm_100", {"tcgen05": 4, "columns": 640}, "640 columns of tensor memory, at most 512"),
        ("sm_90", {"wgmma": 0}, "0 wgmma and 0 mma products"),
        ("sm_90", {"mma": 1}, "42 wgmma and 1 mma products"),
        ("sm_100", {}, "0 tcgen05 products, at least 1"),
        ("sm_80", {"loops": ()}, "0 loops with a product, at least 1"),
    ],
)
def test_kernel_that_does_not_fit_its_chip_is_named(chip, change, words):
    (wrong,) = unfit(job(chip), MachineCode(**vars(GOOD) | change))
    assert words in wrong


@pytest.mark.parametrize("chip", CHIPS)
def test_good_kernel_fits(chip):
    assert unfit(job(chip), MachineCode(**vars(GOOD) | {"tcgen05": 8})) == []
    assert unfit(job(chip, itemsize=4), MachineCode(**vars(GOOD) | {"wgmma": 0})) == []


@pytest.mark.parametrize("chip", CHIPS)
def test_decoding_takes_any_tensor_product_of_its_chip(chip):
    step = DecodeJob(chip, 64, 2, LAYER.pattern("row"))
    assert step.name == f"{chip} D64 16-bit row decode"
    without = MachineCode(**vars(GOOD) | {"wgmma": 0})
    for one in ({"wgmma": 1}, {"mma": 1}, {"tcgen05": 1}):
        assert unfit(step, MachineCode(**vars(without) | one)) == []
    assert unfit(step, without) == ["0 tensor products, at least 1"]
    assert unfit(DecodeJob(chip, 64, 4, LAYER.pattern("row")), without) == []
