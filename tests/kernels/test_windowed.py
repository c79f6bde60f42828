import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import Pattern
from kernels.attention.naive import naive_attention
from kernels.attention.windowed import plan_for, windowed_attention
from tests.kernels.helpers import (
    LARGE,
    SMALL,
    assert_as_good_as_torch,
    masked_sdpa,
    name_of,
    outputs,
    packed_qkv,
)

SCALE = 0.3


def windowed(pattern):
    return lambda q, k, v: windowed_attention(q, k, v, pattern, SCALE)


def naive(pattern):
    return lambda q, k, v: naive_attention(q, k, v, pattern, SCALE)


def test_every_plan_is_tested():
    cut = {
        (p.kind, plan and plan.n_blocks == p.grid)
        for p, plan in ((p, plan_for(p)) for p in SMALL + LARGE)
    }
    one_block, causal = False, None
    assert cut == {
        ("row", True),
        ("column", True),
        ("conv", True),
        ("conv", one_block),
        ("dense", one_block),
        ("dense", causal),
    }


@pytest.mark.parametrize(
    ("pattern", "back"),
    [(Pattern("row", 256, 32), 1), (Pattern("column", 256, 32), 0), (Pattern("conv", 256, 32), 6)],
    ids=name_of,
)
def test_paper_size_is_cut_into_blocks(pattern, back):
    assert (plan_for(pattern).n_blocks, plan_for(pattern).back) == (32, back)


@pytest.mark.parametrize("pattern", SMALL + LARGE, ids=name_of)
def test_float64_equals_naive(pattern):
    packed, do = packed_qkv(pattern, torch.float64)
    got, ref = (outputs(f(pattern), packed, do) for f in (windowed, naive))
    for name in ref:
        torch.testing.assert_close(got[name], ref[name], rtol=0, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", SMALL + LARGE, ids=name_of)
def test_is_as_good_as_torch_in_the_same_dtype(pattern, dtype):
    packed, do = packed_qkv(pattern, dtype)
    ref = outputs(naive(pattern), packed.double(), do.double())
    same = outputs(masked_sdpa(pattern, SCALE), packed, do)
    got = outputs(windowed(pattern), packed, do)
    for name in ref:
        assert_as_good_as_torch(name, got[name], same[name], ref[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", [SMALL[0], LARGE[0], LARGE[2], LARGE[4]], ids=name_of)
def test_large_scores_are_not_rounded(pattern, dtype):
    packed, _ = packed_qkv(pattern, dtype)
    # scores near 30: rounded to bfloat16 they would be off by 0.1, and weights by 10 %
    q, k, v = packed.unbind(2)
    o = windowed_attention(q, k, v, pattern, 4.0)
    ref = naive_attention(q.double(), k.double(), v.double(), pattern, 4.0)
    assert (o - ref).abs().max() <= torch.finfo(dtype).eps * v.abs().max()


@pytest.mark.parametrize("kind", ["row", "column", "conv", "dense"])
def test_paper_size_is_as_good_as_torch(kind):
    pattern = Pattern(kind, 256, 32)
    packed, do = packed_qkv(pattern, batch=1, heads=1, width=64)
    ref = outputs(naive(pattern), packed.double(), do.double())
    same = outputs(masked_sdpa(pattern, SCALE), packed, do)
    got = outputs(windowed(pattern), packed, do)
    for name in ref:
        assert_as_good_as_torch(name, got[name], same[name], ref[name])


@pytest.mark.parametrize("pattern", SMALL[:1] + SMALL[3:6] + LARGE, ids=name_of)
def test_gradcheck(pattern):
    # fast mode: one random direction through the whole Jacobian
    packed, _ = packed_qkv(pattern, torch.float64, batch=1, heads=2, width=3)
    inputs = [x.detach().clone().requires_grad_() for x in packed.unbind(2)]
    assert torch.autograd.gradcheck(windowed(pattern), inputs, fast_mode=True)


@pytest.mark.parametrize("pattern", SMALL + LARGE, ids=name_of)
def test_no_bit_leaks_from_a_hidden_key(pattern):
    packed, _ = packed_qkv(pattern, batch=1, heads=1)
    q, k, v = packed.unbind(2)
    o = windowed_attention(q, k, v, pattern, SCALE)
    mask = pattern.mask()
    for key in sorted({0, pattern.n_text // 2, pattern.n_text, pattern.n_tokens // 2}):
        k2, v2 = k.clone(), v.clone()
        k2[:, key] += 1
        v2[:, key] -= 1
        changed = (windowed_attention(q, k2, v2, pattern, SCALE) != o).any(-1)[0, :, 0]
        assert torch.equal(changed, mask[:, key]), f"key {key}"


@pytest.mark.parametrize("pattern", SMALL + LARGE, ids=name_of)
def test_nan_in_a_key_stays_in_the_rows_that_see_it(pattern):
    packed, _ = packed_qkv(pattern)
    q, k, v = packed.unbind(2)
    k = k.clone()
    key = pattern.n_text + pattern.n_image // 2
    k[0, key, 1] = float("nan")
    bad = windowed_attention(q, k, v, pattern, SCALE).isnan().any(-1)
    assert torch.equal(bad[0, :, 1], pattern.mask()[:, key])
    bad[0, :, 1] = False
    assert not bad.any()


@pytest.mark.parametrize("pattern", [SMALL[0], LARGE[0], LARGE[2], LARGE[4]], ids=name_of)
def test_nan_in_a_value_stays_in_its_head(pattern):
    packed, do = packed_qkv(pattern)
    packed[0, -1, 2, 1] = float("nan")
    for name, x in outputs(windowed(pattern), packed, do).items():
        x[0, :, 1] = 0
        assert not x.isnan().any(), name


@pytest.mark.parametrize("pattern", [SMALL[0], LARGE[0], LARGE[2]], ids=name_of)
def test_checkpoint_gives_the_same_bits(pattern):
    packed, do = packed_qkv(pattern)
    attention = windowed(pattern)
    plain = outputs(attention, packed, do)
    again = outputs(lambda *x: checkpoint(attention, *x, use_reentrant=False), packed, do)
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


@pytest.mark.parametrize(
    "pattern", [Pattern("row", 9, 4), Pattern("row", 9, 18), Pattern("column", 9, 18)], ids=name_of
)
def test_training_works_after_a_first_call_in_inference_mode(pattern):
    packed, do = packed_qkv(pattern)
    with torch.inference_mode():
        first = windowed_attention(*packed.unbind(2), pattern, SCALE)
    with torch.no_grad():
        assert torch.equal(first, windowed_attention(*packed.unbind(2), pattern, SCALE))
    assert torch.equal(first, outputs(windowed(pattern), packed, do)["o"])


@pytest.mark.parametrize("pattern", [Pattern("row", 256, 32), Pattern("column", 256, 32)])
def test_keeps_no_square_scores(pattern):
    packed, _ = packed_qkv(pattern, batch=1, heads=1)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, id):
        windowed_attention(*packed.requires_grad_().unbind(2), pattern, SCALE)
    n_keys = 256 + (64 if pattern.kind == "row" else 32)
    assert max(sizes) == pattern.n_image * n_keys
