import math

import pytest
import torch

from kernels import Pattern
from kernels.attention.naive import naive_attention
from tests.kernels.helpers import LARGE, SMALL, masked_sdpa, name_of, outputs, packed_qkv


@pytest.mark.parametrize("pattern", SMALL + LARGE, ids=name_of)
def test_equals_torch_with_the_dense_mask(pattern):
    packed, do = packed_qkv(pattern, torch.float64)
    got = outputs(lambda q, k, v: naive_attention(q, k, v, pattern, 0.3), packed, do)
    ref = outputs(masked_sdpa(pattern, 0.3), packed, do)
    for name in ref:
        torch.testing.assert_close(got[name], ref[name], rtol=0, atol=1e-13, msg=name)


@pytest.mark.parametrize("pattern", SMALL[:5], ids=name_of)
def test_follows_the_definition_of_softmax_attention(pattern):
    packed, _ = packed_qkv(pattern, torch.float64, batch=1, heads=1, width=2)
    q, k, v = packed.unbind(2)
    o = naive_attention(q, k, v, pattern, 0.5)
    mask = pattern.mask()
    for t in range(pattern.n_tokens):
        seen = [s for s in range(pattern.n_tokens) if mask[t, s]]
        weight = [math.exp(0.5 * float(q[0, t, 0] @ k[0, s, 0])) for s in seen]
        o_D = sum(w * v[0, s, 0] for w, s in zip(weight, seen, strict=True)) / sum(weight)
        torch.testing.assert_close(o[0, t, 0], o_D, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype):
    pattern = Pattern("row", 5, 4)
    packed, _ = packed_qkv(pattern, dtype)
    q, k, v = packed.unbind(2)
    o = naive_attention(q, k, v, pattern, 0.3)
    o32 = naive_attention(q.float(), k.float(), v.float(), pattern, 0.3)
    assert o.dtype == dtype
    assert torch.equal(o, o32.to(dtype))
