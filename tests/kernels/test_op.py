import logging

import pytest
import torch

import kernels
from kernels import Pattern, packed_attention, sparse_attention
from kernels.attention import block_sparse, op
from kernels.attention.block_sparse import why_not_triton
from kernels.attention.naive import naive_attention
from kernels.attention.windowed import windowed_attention
from tests.kernels.helpers import packed_qkv

PATTERN = Pattern("row", 5, 4)


@pytest.fixture
def qkv():
    return packed_qkv(PATTERN)[0].unbind(2)


@pytest.fixture
def said(caplog):
    op._say_once.cache_clear()
    op.choose_backend.cache_clear()
    caplog.set_level(logging.INFO, logger="daikon.kernels")
    return lambda: [r.message for r in caplog.records if r.name == "daikon.kernels"]


def test_package_exports_its_doors():
    assert sorted(kernels.__all__) == ["Pattern", "packed_attention", "sparse_attention"]


@pytest.mark.parametrize(
    ("backend", "function"), [("windowed", windowed_attention), ("naive", naive_attention)]
)
def test_named_backend_runs(qkv, said, backend, function):
    o = sparse_attention(*qkv, PATTERN, backend=backend)
    assert torch.equal(o, function(*qkv, PATTERN, 8**-0.5))
    assert said() == [f"attention backend {backend}: the caller asked for it"]


def test_default_backend_is_windowed_and_said_once(qkv, said):
    for _ in range(3):
        o = sparse_attention(*qkv, PATTERN)
    assert torch.equal(o, windowed_attention(*qkv, PATTERN, 8**-0.5))
    assert said() == ["attention backend windowed: the fastest on a CPU"]


def test_scale_multiplies_the_scores(qkv):
    q, k, v = qkv
    default = sparse_attention(q, k, v, PATTERN)
    torch.testing.assert_close(sparse_attention(q, k, v, PATTERN, scale=8**-0.5), default)
    torch.testing.assert_close(sparse_attention(q * 8**-0.5, k, v, PATTERN, scale=1.0), default)
    assert not torch.allclose(sparse_attention(q, k, v, PATTERN, scale=1.0), default)


@pytest.mark.parametrize("backend", [None, "windowed", "naive"])
def test_packed_door_gives_the_bits_of_the_other(backend):
    packed, do = packed_qkv(PATTERN)
    leaf = packed.requires_grad_()
    want = sparse_attention(*leaf.unbind(2), PATTERN, backend=backend)
    got = packed_attention(leaf, PATTERN, backend=backend)
    assert torch.equal(got, want)
    grads = (torch.autograd.grad(o, leaf, do)[0] for o in (want, got))
    assert torch.equal(*grads)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Reports of a machine whose kernels are compiled, with a GPU of the given capability."""

    def pretend(capability):
        monkeypatch.setattr(block_sparse, "INTERPRETED", False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        op.choose_backend.cache_clear()

    yield pretend
    op.choose_backend.cache_clear()


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "name", "reason"),
    [
        ((9, 0), torch.bfloat16, 64, "triton", "the fastest on this GPU"),
        ((8, 6), torch.float32, 32, "triton", "the fastest on this GPU"),
        (
            (7, 5),
            torch.float16,
            64,
            "windowed",
            "the tensors are on cuda:0 and Triton",
        ),
        ((9, 0), torch.float64, 64, "windowed", "the tensors are torch.float64"),
        ((9, 0), torch.bfloat16, 80, "windowed", "the head width is 80 and Triton kernels take 32"),
    ],
)
def test_a_gpu_takes_triton_where_it_can(on_a_gpu, said, capability, dtype, width, name, reason):
    on_a_gpu(capability)
    for _ in range(2):
        assert op.choose_backend(None, dtype, GPU, width) == name
    (line,) = said()
    assert line.startswith(f"attention backend {name}: {reason}")


def test_triton_is_refused_where_it_cannot_run(on_a_gpu):
    on_a_gpu((9, 0))
    with pytest.raises(
        ValueError,
        match=r"'triton' was asked for, but the tensors are on the CPU and .* use 'windowed', or",
    ):
        sparse_attention(*packed_qkv(PATTERN, width=32)[0].unbind(2), PATTERN, backend="triton")
    assert "spans 2147483648 elements or more" in why_not_triton(torch.float16, GPU, 64, True)


@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_tokens_too_far_apart_for_32_bits_are_refused(which):
    packed = torch.empty(1, PATTERN.n_tokens, 3, 2, 32, device="meta")
    tensors = list(packed.unbind(2))
    far = 2**27
    tensors[which] = packed.new_empty_strided(tensors[0].shape, (1, far, 32, 1))
    with pytest.raises(ValueError, match="a head spans 2147483648 elements or more"):
        sparse_attention(*tensors, PATTERN, backend="triton")


@pytest.mark.skipif(not block_sparse.INTERPRETED, reason="the kernels are compiled here")
def test_interpreter_refuses_bfloat16():
    packed = packed_qkv(PATTERN, torch.bfloat16, width=32)[0]
    with pytest.raises(ValueError, match=r"interpreter .* multiplies bfloat16 wrongly"):
        packed_attention(packed, PATTERN, backend="triton")


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1e-40, 1e39, float("inf"), float("nan")])
def test_scale_without_a_meaning_is_refused(qkv, scale):
    with pytest.raises(ValueError, match=r"scale is \S+; it must be 1e-30 to 1e\+30"):
        sparse_attention(*qkv, PATTERN, scale=scale)


@pytest.mark.parametrize("backend", ["windowed", "naive"])
def test_autocast_does_not_lower_the_precision(qkv, backend):
    expected = sparse_attention(*qkv, PATTERN, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse_attention(*qkv, PATTERN, backend=backend), expected)


def test_wrong_tensors_are_named_before_any_work(qkv, monkeypatch):
    q, k, v = qkv
    monkeypatch.setattr(op, "BACKENDS", {})
    cases = [
        ((q[0], k, v), r"q has shape \(21, 3, 8\); attention takes \[B, N, H, D\]"),
        ((q[:0], k, v), r"q has shape \(0, 21, 3, 8\).*none of them 0"),
        ((q, k[:, :20], v), r"k has shape \(2, 20, 3, 8\) and q \(2, 21, 3, 8\)"),
        ((q, k, v[..., :4]), r"v has shape \(2, 21, 3, 4\) and q \(2, 21, 3, 8\)"),
        ((q, k.double(), v), r"k is torch.float64 and q torch.float32; cast them to one dtype"),
        ((q, k, v.to("meta")), r"v is on meta and q on cpu; move them to one device"),
        ((q.int(), k.int(), v.int()), r"q is torch.int32; use float16, bfloat16, float32"),
        (
            (q, k.transpose(2, 3).contiguous().transpose(2, 3), v),
            r"the head width of k has stride 3; it must be 1, call k.contiguous\(\)",
        ),
        (
            (q[:, :20], k[:, :20], v[:, :20]),
            r"q has N = 20 tokens; the pattern is for 21 \(5 text and 4 x 4 image\)",
        ),
    ]
    for tensors, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            sparse_attention(*tensors, PATTERN)
    with pytest.raises(ValueError, match=r"qkv has shape \(2, 21, 3, 8\); packed attention takes"):
        packed_attention(q, PATTERN)


def test_unknown_backend_is_named_with_those_that_exist(qkv):
    with pytest.raises(
        ValueError, match=r"'flash' does not exist; choose one of triton, windowed, n"
    ):
        sparse_attention(*qkv, PATTERN, backend="flash")
