"""The doors to attention under a pattern: checks, and one choice of backend, said once.

Axes: B batch, N token (text, then image), H head, D head width; 3: q, k, v.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels.attention.block_sparse import (
    block_sparse_attention,
    packed_block_sparse_attention,
    why_not_triton,
)
from kernels.attention.launch import is_too_long
from kernels.attention.naive import naive_attention
from kernels.attention.windowed import windowed_attention
from kernels.patterns import Pattern
from kernels.tiles import WIDTHS

logger = logging.getLogger("daikon.kernels")

LEAST_SCALE = 1e-30
BACKENDS = {
    "triton": block_sparse_attention,
    "windowed": windowed_attention,
    "naive": naive_attention,
}


def sparse_attention(
    q_BNHD: Tensor,
    k_BNHD: Tensor,
    v_BNHD: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention over the keys that ``pattern`` lets each query see.

    Equal to ``naive_attention`` up to rounding; the patterns are those of Ramesh et al. 2021,
    appendix B.1 and figure 11. Differentiable once in q, k and v, in
    reverse mode. A NaN or Inf in q or k shows in
    the outputs that may see it and in no other; in v too with "triton", while in the other paths
    it may show in any output of its head, as it may in gradients of any path.

    Args:
        q_BNHD: float16, bfloat16, float32 or float64; D with stride 1, else any strides: views
            of a packed projection will do, though ``packed_attention`` is faster for them.
        k_BNHD: of q's shape, dtype and device.
        v_BNHD: of q's shape, dtype and device.
        pattern: built for this N: text tokens, then the image grid in raster order.
        scale: multiplies the scores, 1e-30 to 1e30; ``D ** -0.5`` when None.
        backend: "triton" (block-sparse kernels; float16, bfloat16 or float32, D 32, 64 or 128 on
            an NVIDIA GPU), "windowed" (plain PyTorch, no N x N scores) or "naive" (the dense
            definition, float32). When None: triton on a GPU where it can run, else windowed.

    Returns:
        o_BNHD, in the dtype of q.

    Raises:
        ValueError: tensors that do not fit each other or the pattern, a backend that is unknown
            or cannot run on them.
    """
    _check(q_BNHD, k_BNHD, v_BNHD, pattern)
    scale = _scale(scale, q_BNHD)
    attend = BACKENDS[_choose(backend, q_BNHD, k_BNHD, v_BNHD)]
    with _without_autocast(q_BNHD.device):
        return attend(q_BNHD, k_BNHD, v_BNHD, pattern, scale)


def packed_attention(
    qkv_BN3HD: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """``sparse_attention`` of one packed projection: q, k, v along its third axis.

    The kernels read it where it lies and write its gradient as one tensor.

    Args:
        qkv_BN3HD: what ``sparse_attention`` takes, in one tensor; D with stride 1.
        pattern: as in ``sparse_attention``.
        scale: as in ``sparse_attention``.
        backend: as in ``sparse_attention``.

    Returns:
        o_BNHD, in the dtype of qkv.

    Raises:
        ValueError: as ``sparse_attention``, or a tensor that is not [B, N, 3, H, D].
    """
    if qkv_BN3HD.ndim != 5 or qkv_BN3HD.shape[2] != 3:
        raise ValueError(
            f"qkv has shape {tuple(qkv_BN3HD.shape)}; packed attention takes [B, N, 3, H, D]"
        )
    q_BNHD, k_BNHD, v_BNHD = qkv_BN3HD.unbind(2)
    _check(q_BNHD, k_BNHD, v_BNHD, pattern)
    scale = _scale(scale, q_BNHD)
    name = _choose(backend, q_BNHD, k_BNHD, v_BNHD)
    with _without_autocast(qkv_BN3HD.device):
        if name == "triton":
            return packed_block_sparse_attention(qkv_BN3HD, pattern, scale)
        return BACKENDS[name](q_BNHD, k_BNHD, v_BNHD, pattern, scale)


def _check(q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, pattern: Pattern) -> None:
    if q_BNHD.ndim != 4 or 0 in q_BNHD.shape:
        raise ValueError(
            f"q has shape {tuple(q_BNHD.shape)}; attention takes [B, N, H, D], none of them 0"
        )
    for name, x_BNHD in (("k", k_BNHD), ("v", v_BNHD)):
        if x_BNHD.shape != q_BNHD.shape:
            raise ValueError(
                f"{name} has shape {tuple(x_BNHD.shape)} and q {tuple(q_BNHD.shape)}; "
                "q, k and v must have one shape [B, N, H, D]"
            )
        if x_BNHD.dtype != q_BNHD.dtype:
            raise ValueError(
                f"{name} is {x_BNHD.dtype} and q {q_BNHD.dtype}; cast them to one dtype"
            )
        if x_BNHD.device != q_BNHD.device:
            raise ValueError(
                f"{name} is on {x_BNHD.device} and q on {q_BNHD.device}; move them to one device"
            )
    if not q_BNHD.dtype.is_floating_point or q_BNHD.dtype.itemsize < 2:
        raise ValueError(f"q is {q_BNHD.dtype}; use float16, bfloat16, float32 or float64")
    for name, x_BNHD in (("q", q_BNHD), ("k", k_BNHD), ("v", v_BNHD)):
        if x_BNHD.stride(-1) != 1 and x_BNHD.shape[-1] > 1:
            raise ValueError(
                f"the head width of {name} has stride {x_BNHD.stride(-1)}; it must be 1, "
                f"call {name}.contiguous()"
            )
    if q_BNHD.shape[1] != pattern.n_tokens:
        raise ValueError(
            f"q has N = {q_BNHD.shape[1]} tokens; the pattern is for {pattern.n_tokens} "
            f"({pattern.n_text} text and {pattern.grid} x {pattern.grid} image), "
            "build it for this N"
        )


def _scale(scale: float | None, q_BNHD: Tensor) -> float:
    if scale is None:
        return q_BNHD.shape[-1] ** -0.5
    # the largest score must stay the largest, and a hidden one minus infinity, in float32
    if not LEAST_SCALE <= scale <= 1 / LEAST_SCALE:
        raise ValueError(
            f"scale is {scale}; it must be {LEAST_SCALE:g} to {1 / LEAST_SCALE:g}, all above 0"
        )
    return float(scale)


@lru_cache(maxsize=128)
def choose_backend(
    backend: str | None,
    dtype: torch.dtype,
    device: torch.device,
    width: int,
    is_long: bool = False,
) -> str:
    """The path that attention over such tensors takes, and in the log why: once for each.

    Args:
        backend: that of ``sparse_attention``.
        dtype: of q, k and v.
        device: likewise.
        width: of a head, D.
        is_long: whether the tokens of a head lie too far apart for 32-bit offsets.

    Returns:
        A name of ``BACKENDS``.

    Raises:
        ValueError: the backend is unknown, or was asked for and cannot run.
    """
    if backend not in (*BACKENDS, None):
        raise ValueError(
            f"backend {backend!r} does not exist; choose one of {', '.join(BACKENDS)}, "
            "or None for the fastest"
        )
    obstacle = why_not_triton(dtype, device, width, is_long)
    if backend == "triton" and obstacle:
        raise ValueError(
            f"backend 'triton' was asked for, but {obstacle}; use 'windowed', or None for the "
            "fastest that can run"
        )
    if backend is not None:
        name, reason = backend, "the caller asked for it"
    elif device.type == "cpu":
        name, reason = "windowed", "the fastest on a CPU"
    elif obstacle:
        name, reason = "windowed", obstacle
    else:
        name, reason = "triton", "the fastest on this GPU"
    _say_once(name, reason)
    return name


# torch.compile calls this once, while it traces, and does not look inside
@torch.compiler.assume_constant_result
def _chosen(*what: Any) -> str:
    return choose_backend(*what)


def _choose(backend: str | None, q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor) -> str:
    width = q_BNHD.shape[-1]
    if torch.compiler.is_compiling():
        # a size that is only a symbol becomes a number by comparison
        width = next((w for w in WIDTHS if w == width), 0)
    is_long = False
    # and so does a comparison become a truth
    if is_too_long(q_BNHD) or is_too_long(k_BNHD) or is_too_long(v_BNHD):
        is_long = True
    return _chosen(backend, q_BNHD.dtype, q_BNHD.device, width, is_long)


@lru_cache(maxsize=32)
def _say_once(name: str, reason: str) -> None:
    # two shapes may have one reason
    logger.info("attention backend %s: %s", name, reason)


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A backend chooses its own precisions: float32 scores must stay float32."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
