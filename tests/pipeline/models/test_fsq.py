import itertools
import math

import pytest
import torch

from pipeline.models.fsq import Fsq

PAPER = (8, 8, 8, 6, 5)
LEVELS = [PAPER, (5, 3), (2, 2, 2), (4,), (7, 8, 2)]


def papers_quantize(z, n_levels):
    """One number by the listing of appendix A.1 (arXiv 2309.15505), in Python's floats."""
    half_l = (n_levels - 1) * (1 - 1e-3) / 2
    offset = 0.0 if n_levels % 2 == 1 else 0.5
    shift = math.tan(offset / half_l)
    return round(math.tanh(z + shift) * half_l - offset) / (n_levels // 2)


def papers_index(values, levels):
    """The same listing's number of a code."""
    index, place = 0, 1
    for value, n_levels in zip(values, levels, strict=True):
        index += round(value * (n_levels // 2) + n_levels // 2) * place
        place *= n_levels
    return index


def positions(levels, n=4, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, len(levels), n, n, generator=generator)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_values_and_codes_are_the_papers(levels):
    fsq, z = Fsq(levels), positions(levels)
    values, codes = fsq(z), fsq.codes(z)
    assert codes.dtype == torch.int64
    for b, y, x in itertools.product(range(2), range(4), range(4)):
        wanted = [
            papers_quantize(v, n) for v, n in zip(z[b, :, y, x].tolist(), levels, strict=True)
        ]
        assert values[b, :, y, x].tolist() == pytest.approx(wanted, abs=1e-6)
        assert codes[b, y, x] == papers_index(wanted, levels)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_every_code_comes_back(levels):
    fsq = Fsq(levels)
    codes = torch.arange(fsq.n_vocab).view(1, -1, 1)
    values = fsq.values(codes)
    assert values.shape == (1, len(levels), fsq.n_vocab, 1)
    assert (values.min(), values.max() <= 1) == (-1, True)
    # all combinations of levels, each once
    assert len({tuple(v) for v in values[0, :, :, 0].t().tolist()}) == math.prod(levels)
    assert [
        papers_index(v, levels) for v in values[0, :, :, 0].t().tolist()
    ] == codes.flatten().tolist()
    # numbers that are bounded to these values have these codes
    half_l = (fsq.levels - 1) * (1 - 1e-3) / 2
    offset = (fsq.levels % 2 == 0) / 2
    inside = ((values * (fsq.levels // 2) + offset) / half_l).double().clamp(-1 + 1e-7, 1 - 1e-7)
    z = torch.atanh(inside) - torch.tan(offset / half_l)
    assert torch.equal(fsq.codes(z), codes)
    torch.testing.assert_close(fsq(z), values)


def test_the_papers_levels_are_15360_codes():
    assert Fsq(PAPER).n_vocab == 15_360
    assert Fsq(PAPER).n_channels == 5


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_numbers_of_any_size_have_codes(levels):
    fsq = Fsq(levels)
    low, high = (fsq.codes(torch.full((1, len(levels), 1, 1), z)).item() for z in (-1e4, 1e4))
    assert (low, high) == (0, fsq.n_vocab - 1)


@pytest.mark.parametrize("n_levels", [3, 5, 8, 6])
def test_the_gradient_is_that_of_the_bound_alone(n_levels):
    fsq = Fsq([n_levels])
    z = torch.linspace(-3, 3, 101).view(1, 1, 1, -1).requires_grad_()
    fsq(z).sum().backward()
    half_l = (n_levels - 1) * (1 - 1e-3) / 2
    shift = math.tan((0.5 if n_levels % 2 == 0 else 0.0) / half_l)
    wanted = (1 - torch.tanh(z.detach() + shift) ** 2) * half_l / (n_levels // 2)
    torch.testing.assert_close(z.grad, wanted, rtol=1e-4, atol=1e-6)


def test_sixteen_bits_do_not_round_the_levels():
    fsq, z = Fsq(PAPER), positions(PAPER)
    wanted = fsq.codes(z)
    assert torch.equal(fsq.bfloat16().codes(z), wanted)
    assert fsq(z.bfloat16()).dtype == torch.float32
    assert not fsq.state_dict()
