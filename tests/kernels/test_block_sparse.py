"""The Triton kernels: compiled where there is a GPU, else in Triton's interpreter on the CPU."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import Pattern, packed_attention, sparse_attention
from kernels.attention import launch
from kernels.attention.backward import backward
from kernels.attention.block_sparse import block_sparse_attention, packed_block_sparse_attention
from kernels.attention.forward import forward
from kernels.attention.naive import naive_attention
from kernels.tiles import Tile
from tests.kernels.helpers import (
    SMALL,
    assert_as_good_as_torch,
    masked_sdpa,
    name_of,
    outputs,
    packed_qkv,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
on_a_gpu = pytest.mark.skipif(
    DEVICE.type == "cpu", reason="Triton's interpreter has no bfloat16 and takes long"
)

SCALE = 0.2
# the demo's and the own presets' shapes; a grid and a text that no tile divides; both edges
PATTERNS = [
    Pattern("row", 32, 8),
    Pattern("column", 32, 8),
    Pattern("conv", 32, 8, kernel=5),
    Pattern("dense", 32, 8),
    Pattern("row", 19, 9),
    Pattern("column", 19, 9),
    Pattern("conv", 19, 9, kernel=5),
    Pattern("conv", 19, 9, kernel=5, edge="clamp"),
    Pattern("dense", 19, 9),
]
PAPER = [Pattern(kind, 256, 32) for kind in ("row", "column", "conv", "dense")]


def guarded(x):
    """``x`` in the middle of NaN, so that a read beside it shows."""
    room = 64 * x[0].numel() // len(x[0])
    buffer = torch.full((x.numel() + 2 * room,), float("nan"), dtype=x.dtype, device=DEVICE)
    inside = buffer[room:-room].view(x.shape)
    return inside.copy_(x)


@contextmanager
def full_of_nan():
    """Fresh tensors are full of NaN, so that a number that was not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3, device=DEVICE).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_errors(pattern, dtype, tile=None, **shape):
    """How far o, dq, dk and dv are from float64, as Frobenius norms; NaN around and in tensors."""
    packed, do = (guarded(x) for x in packed_qkv(pattern, dtype, **shape))
    q, k, v = packed.unbind(2)
    with full_of_nan():
        o, lse = forward(q, k, v, pattern, SCALE, tile)
        grad = torch.empty(packed.shape, dtype=dtype, device=DEVICE)
        tiles = None if tile is None else (tile, tile)
        backward(do, q, k, v, o, lse, grad.unbind(2), pattern, SCALE, tiles)
    got = {"o": o, **dict(zip(("dq", "dk", "dv"), grad.unbind(2), strict=True))}
    ref = outputs(lambda *x: naive_attention(*x, pattern, SCALE), packed.double(), do.double())
    return {
        name: ((got[name].double() - ref[name]).norm() / ref[name].norm()).item() for name in ref
    }


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3)], ids=str
)
@pytest.mark.parametrize(
    ("pattern", "heads", "width"),
    [(p, 3, 32) for p in PATTERNS]
    + [pytest.param(p, 1, 64, marks=pytest.mark.slow) for p in PAPER],
    ids=lambda x: name_of(x) or str(x),
)
def test_forward_and_gradients_are_those_of_float64(pattern, heads, width, dtype, bound):
    errors = relative_errors(pattern, dtype, batch=1, heads=heads, width=width)
    assert max(errors.values()) <= bound, errors


@pytest.mark.parametrize(
    "tile",
    [Tile(64, 32, 32, 4, 2), Tile(32, 64, 16, 4, 2), Tile(16, 16, 16, 4, 1)],
    ids=lambda t: f"{t.rows}x{t.step}x{t.local}",
)
@pytest.mark.parametrize("pattern", [PATTERNS[i] for i in (0, 5, 6, 8)], ids=name_of)
def test_any_tile_gives_the_same(pattern, tile):
    errors = relative_errors(pattern, torch.float32, tile, batch=1, heads=1, width=32)
    assert max(errors.values()) <= 1e-6, errors


# a reach one more than the steps; windows of which some queries of a tile see nothing, and no text
@pytest.mark.parametrize(
    "pattern", [Pattern("row", 0, 17), Pattern("conv", 3, 17, kernel=3)], ids=name_of
)
def test_windows_longer_than_their_steps(pattern):
    tile = Tile(32, 32, 16, 4, 2)
    assert pattern.reach % tile.local == 1
    errors = relative_errors(pattern, torch.float32, tile, batch=1, heads=1, width=32)
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize("pattern", SMALL, ids=name_of)
def test_tiny_shapes(pattern):
    errors = relative_errors(pattern, torch.float32, batch=1, heads=1, width=32)
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize(
    ("batch", "heads", "width"), [(3, 1, 32), (1, 5, 32), (1, 1, 64), (2, 1, 128)]
)
def test_odd_counts_and_all_widths(batch, heads, width):
    pattern = Pattern("conv", 7, 5, kernel=3)
    errors = relative_errors(pattern, torch.float32, batch=batch, heads=heads, width=width)
    assert max(errors.values()) <= 1e-6, errors


@on_a_gpu
@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [(p, dtype) for p in PAPER for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    + [(p, torch.bfloat16) for p in PATTERNS],
    ids=lambda x: name_of(x) or str(x),
)
def test_is_as_good_as_torch_in_the_same_dtype(pattern, dtype):
    packed, do = (x.to(DEVICE) for x in packed_qkv(pattern, dtype, heads=2, width=64))
    naive = outputs(lambda *x: naive_attention(*x, pattern, SCALE), packed.double(), do.double())
    same = outputs(masked_sdpa(pattern, SCALE), packed, do)
    got = outputs(lambda *x: block_sparse_attention(*x, pattern, SCALE), packed, do)
    for name in naive:
        assert_as_good_as_torch(name, got[name], same[name], naive[name])


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_no_bit_leaks_from_a_hidden_key(pattern):
    packed, _ = packed_qkv(pattern, batch=1, heads=1, width=32)
    q, k, v = packed.to(DEVICE).unbind(2)
    o = block_sparse_attention(q, k, v, pattern, SCALE)
    mask = pattern.mask().to(DEVICE)
    W, n_text = pattern.grid, pattern.n_text
    for key in (n_text - 1, n_text, n_text + 5 * W + 3, pattern.n_tokens - 1):
        k2, v2 = k.clone(), v.clone()
        k2[:, key] += 1e3
        v2[:, key] -= 1e3
        changed = (block_sparse_attention(q, k2, v2, pattern, SCALE) != o).any(-1)[0, :, 0]
        assert torch.equal(changed, mask[:, key]), f"key {key}"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("pattern", [*SMALL[3:], Pattern("row", 3, 8)], ids=name_of)
def test_nan_and_inf_stay_in_the_rows_that_see_them(pattern, bad):
    packed, _ = packed_qkv(pattern, batch=1, heads=3, width=32)
    packed = packed.to(DEVICE)
    clean = packed_block_sparse_attention(packed, pattern, SCALE)
    of_key = pattern.n_text + pattern.n_image // 2
    of_value = pattern.n_text + 1
    assert not pattern.mask()[:, of_key].all()
    packed[0, of_key, 1, 1] = bad
    packed[0, of_value, 2, 2] = bad
    got = packed_block_sparse_attention(packed, pattern, SCALE)
    mask = pattern.mask().to(DEVICE)
    is_bad = (~got.isfinite()).any(-1)[0]
    assert not is_bad[:, 0].any()
    assert torch.equal(is_bad[:, 1], mask[:, of_key])
    assert torch.equal(is_bad[:, 2], mask[:, of_value])
    torch.testing.assert_close(got[0][~is_bad], clean[0][~is_bad], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS[4:8], ids=name_of)
def test_two_runs_give_the_same_bits(pattern):
    packed, do = (x.to(DEVICE) for x in packed_qkv(pattern, batch=1, heads=2, width=32))
    first, second = (
        outputs(lambda *x: block_sparse_attention(*x, pattern, SCALE), packed, do) for _ in "12"
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("pattern", PATTERNS[5:7], ids=name_of)
def test_packed_form_gives_the_bits_of_the_other(pattern):
    packed, do = (x.to(DEVICE) for x in packed_qkv(pattern, batch=2, heads=1, width=32))
    one = outputs(lambda *x: block_sparse_attention(*x, pattern, SCALE), packed, do)
    leaf = packed.clone().requires_grad_()
    o = packed_block_sparse_attention(leaf, pattern, SCALE)
    assert torch.equal(o, one["o"])
    assert o.is_contiguous()
    (grad,) = torch.autograd.grad(o, leaf, do)
    for name, x in zip(("dq", "dk", "dv"), grad.unbind(2), strict=True):
        assert torch.equal(x, one[name]), name


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "three"])
def test_nothing_but_inputs_and_outputs_is_kept_or_copied(packed):
    pattern = Pattern("column", 7, 5)
    leaf = packed_qkv(pattern, width=32)[0].to(DEVICE).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        if packed:
            packed_attention(leaf, pattern, backend="triton")
        else:
            sparse_attention(*leaf.unbind(2), pattern, backend="triton")
    places = {x.untyped_storage().data_ptr() for x in kept}
    # the projection itself, o and lse
    assert len(places) == 3
    assert leaf.untyped_storage().data_ptr() in places


def test_strides_of_all_inputs_are_free():
    pattern = Pattern("conv", 7, 5, kernel=3)
    packed, do = (x.to(DEVICE) for x in packed_qkv(pattern, heads=2, width=32))
    want = outputs(lambda *x: block_sparse_attention(*x, pattern, SCALE), packed, do)
    q, k, v = packed.unbind(2)
    # [B, H, N, D] underneath; gaps between tokens; the sum's gradient, which has no strides
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([k, k], dim=-1)[..., :32]
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = block_sparse_attention(q, k, v, pattern, SCALE)
    assert torch.equal(o, want["o"])
    for got, name in zip(torch.autograd.grad(o, (q, k, v), do), ("dq", "dk", "dv"), strict=True):
        assert torch.equal(got, want[name]), name
    ones = outputs(
        lambda *x: block_sparse_attention(*x, pattern, SCALE), packed, torch.ones_like(do)
    )
    (dv,) = torch.autograd.grad(block_sparse_attention(q, k, v, pattern, SCALE).sum(), (v,))
    assert torch.equal(dv, ones["dv"])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_bits(use_reentrant):
    pattern = Pattern("row", 7, 5)
    leaf = packed_qkv(pattern, width=32)[0].to(DEVICE).requires_grad_()

    def attend(x):
        return packed_attention(x, pattern, backend="triton").square()

    (plain,) = torch.autograd.grad(attend(leaf).sum(), leaf)
    checkpoint(attend, leaf, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(plain, leaf.grad)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "three"])
def test_compiles_into_one_graph(packed):
    pattern = Pattern("column", 7, 5)
    leaf = packed_qkv(pattern, width=32)[0].to(DEVICE).requires_grad_()

    def loss(x):
        if packed:
            o = packed_attention(x, pattern, backend="triton")
        else:
            o = sparse_attention(*x.unbind(2), pattern, backend="triton")
        return o.square().sum()

    (plain,) = torch.autograd.grad(loss(leaf), leaf)
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (compiled,) = torch.autograd.grad(graph(leaf), leaf)
    assert torch.equal(plain, compiled)


@pytest.mark.parametrize("operator", ["attend", "attend_packed"])
def test_operators_keep_the_rules_of_torch(operator):
    packed, _ = packed_qkv(Pattern("row", 7, 5), batch=1, heads=2, width=32)
    packed = packed.to(DEVICE)
    tensors = [packed] if operator == "attend_packed" else [x.clone() for x in packed.unbind(2)]
    tensors = [x.requires_grad_() for x in tensors]
    op = getattr(torch.ops.daikon, operator).default
    torch.library.opcheck(op, (*tensors, "row 7 5 11 wrap", SCALE))


def test_compiles_for_shapes_that_change():
    patterns = Pattern("row", 7, 5), Pattern("row", 3, 4)

    def loss(x, pattern):
        return packed_attention(x, pattern, backend="triton").square().sum()

    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for pattern, batch, heads in [(patterns[0], 1, 2), (patterns[0], 3, 3), (patterns[1], 1, 1)]:
        x = packed_qkv(pattern, batch=batch, heads=heads, width=32)[0].to(DEVICE)
        assert torch.equal(graph(x, pattern), loss(x, pattern))


def test_scores_below_all_that_float16_holds():
    pattern = Pattern("row", 1, 9)
    q = torch.full((1, pattern.n_tokens, 1, 32), 1e15, device=DEVICE)
    v = packed_qkv(pattern, batch=1, heads=1, width=32)[0][:, :, 2].to(DEVICE)
    # scores of -1.3e32, all equal: the mean of what is seen
    got = block_sparse_attention(q, -4 * q, v, pattern, 1.0)
    torch.testing.assert_close(got, naive_attention(q, -4 * q, v, pattern, 1.0))


def test_a_gradient_with_tokens_far_apart_is_copied(monkeypatch):
    pattern = Pattern("row", 7, 5)
    packed, do = (x.to(DEVICE) for x in packed_qkv(pattern, heads=2, width=32))
    want = outputs(lambda *x: block_sparse_attention(*x, pattern, SCALE), packed, do)
    leaf = packed.clone().requires_grad_()
    o = packed_block_sparse_attention(leaf, pattern, SCALE)
    far = torch.zeros(*do.shape[:2], 5, *do.shape[2:], device=DEVICE)[:, :, 0].copy_(do)
    monkeypatch.setattr(launch, "LONGEST", do.shape[1] * far.stride(1))
    strides = []
    monkeypatch.setattr(
        "kernels.attention.backward.strides", lambda x: strides.append(x.stride()) or x.stride()[:3]
    )
    (grad,) = torch.autograd.grad(o, leaf, far)
    assert do.stride() in strides
    assert far.stride() not in strides
    for name, x in zip(("dq", "dk", "dv"), grad.unbind(2), strict=True):
        assert torch.equal(x, want[name]), name


def test_second_derivatives_are_refused():
    leaf = packed_qkv(Pattern("row", 7, 5), width=32)[0].to(DEVICE).requires_grad_()
    o = packed_attention(leaf, Pattern("row", 7, 5), backend="triton")
    (grad,) = torch.autograd.grad(o.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


def test_meta_tensors_pass_through():
    packed = torch.empty(8, 1280, 3, 62, 64, dtype=torch.bfloat16, device="meta")
    o, lse = torch.ops.daikon.attend_packed(packed, "row 256 32 11 wrap", 0.125)
    assert (o.shape, o.dtype, o.is_contiguous()) == ((8, 1280, 62, 64), torch.bfloat16, True)
    assert (lse.shape, lse.dtype) == ((8, 62, 1280), torch.float32)
