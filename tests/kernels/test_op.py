import logging

import pytest
import torch

import kernels
from kernels import Pattern, sparse_attention
from kernels.attention import op
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
    caplog.set_level(logging.INFO, logger="daikon.kernels")
    return lambda: [r.message for r in caplog.records if r.name == "daikon.kernels"]


def test_package_exports_its_two_doors():
    assert sorted(kernels.__all__) == ["Pattern", "sparse_attention"]


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
    assert said() == ["attention backend windowed: none was asked for and it is the fastest"]


def test_scale_multiplies_the_scores(qkv):
    q, k, v = qkv
    default = sparse_attention(q, k, v, PATTERN)
    torch.testing.assert_close(sparse_attention(q, k, v, PATTERN, scale=8**-0.5), default)
    torch.testing.assert_close(sparse_attention(q * 8**-0.5, k, v, PATTERN, scale=1.0), default)
    assert not torch.allclose(sparse_attention(q, k, v, PATTERN, scale=1.0), default)


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
            (q[:, :20], k[:, :20], v[:, :20]),
            r"q has N = 20 tokens; the pattern is for 21 \(5 text and 4 x 4 image\)",
        ),
    ]
    for tensors, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            sparse_attention(*tensors, PATTERN)


def test_unknown_backend_is_named_with_those_that_exist(qkv):
    with pytest.raises(ValueError, match=r"'triton' does not exist; choose one of windowed, naive"):
        sparse_attention(*qkv, PATTERN, backend="triton")
