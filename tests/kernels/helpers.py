"""What the attention tests share: inputs, outputs with gradients, and the tolerance rule."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels import Pattern
from kernels.patterns import mask_on

# every kind and both edges; odd sizes, W = 1, no text, windows wider than the grid
SMALL = [
    Pattern("row", 5, 3),
    Pattern("row", 0, 4),
    Pattern("row", 3, 1),
    Pattern("column", 7, 5),
    Pattern("conv", 6, 4, kernel=3),
    Pattern("conv", 2, 5, kernel=11),
    Pattern("conv", 6, 5, kernel=3, edge="clamp"),
    Pattern("conv", 0, 5, kernel=7, edge="clamp"),
    Pattern("dense", 4, 3),
]
LARGE = [
    Pattern("row", 31, 17),
    Pattern("row", 0, 17),
    Pattern("column", 31, 17),
    Pattern("column", 0, 19),
    Pattern("conv", 31, 17, kernel=5),
    Pattern("conv", 1, 17, kernel=1),
    Pattern("conv", 3, 17, kernel=35),
    Pattern("conv", 31, 17, kernel=7, edge="clamp"),
    Pattern("dense", 31, 17),
]


def name_of(pattern):
    if not isinstance(pattern, Pattern):
        return None
    conv = f"-k{pattern.kernel}-{pattern.edge}" if pattern.kind == "conv" else ""
    return f"{pattern.kind}-{pattern.n_text}+{pattern.grid}x{pattern.grid}{conv}"


def packed_qkv(pattern, dtype=torch.float32, batch=2, heads=3, width=8, seed=0):
    """Views of one packed projection [B, N, 3, H, D], as a model makes them, and do."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, pattern.n_tokens, 3, heads, width)
    packed = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    do = torch.randn(shape[:2] + shape[3:], generator=generator, dtype=torch.float64).to(dtype)
    return packed, do


def outputs(attention, packed, do):
    """O, dq, dk, dv by name."""
    leaf = packed.detach().clone().requires_grad_()
    o = attention(*leaf.unbind(2))
    (grad,) = torch.autograd.grad(o, leaf, do)
    assert o.dtype == packed.dtype
    return {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), grad.unbind(2), strict=True))}


def masked_sdpa(pattern, scale):
    def attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = mask_on(pattern, q.device)
        o = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return o.transpose(1, 2)

    return attention


def assert_as_good_as_torch(name, got, torch_same_dtype, ref, factor=2.0):
    """The path may be at most ``factor`` times as wrong as PyTorch in the same dtype."""
    ref = ref.double()
    floor = torch.finfo(got.dtype).eps * ref.abs().max().item()
    bound = factor * (torch_same_dtype.double() - ref).abs().max().item() + floor
    error = (got.double() - ref).abs().max().item()
    assert error <= bound, f"{name}: error {error:.3e} > bound {bound:.3e}"
