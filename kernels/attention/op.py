"""The door to attention under a pattern: checks, and one choice of backend, said once.

Axes: B batch, N token (text, then image), H head, D head width.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from kernels.attention.naive import naive_attention
from kernels.attention.windowed import windowed_attention
from kernels.patterns import Pattern

logger = logging.getLogger("daikon.kernels")

# fastest first: the first is the default
BACKENDS = {"windowed": windowed_attention, "naive": naive_attention}


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
    appendix B.1 and figure 11. Differentiable once in q, k and v.

    Args:
        q_BNHD: float16, bfloat16, float32 or float64, any strides: views of a packed
            projection [B, N, 3, H, D] will do.
        k_BNHD: of q's shape, dtype and device.
        v_BNHD: of q's shape, dtype and device.
        pattern: built for this N: text tokens, then the image grid in raster order.
        scale: multiplies the scores; ``D ** -0.5`` when None.
        backend: "windowed" (plain PyTorch, no N x N scores) or "naive" (the dense definition,
            float32); the fastest when None.

    Returns:
        o_BNHD, in the dtype of q.

    Raises:
        ValueError: tensors that do not fit each other or the pattern, or an unknown backend.
    """
    _check(q_BNHD, k_BNHD, v_BNHD, pattern)
    name = _choose(backend)
    scale = q_BNHD.shape[-1] ** -0.5 if scale is None else scale
    with _without_autocast(q_BNHD.device):
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
    if q_BNHD.shape[1] != pattern.n_tokens:
        raise ValueError(
            f"q has N = {q_BNHD.shape[1]} tokens; the pattern is for {pattern.n_tokens} "
            f"({pattern.n_text} text and {pattern.grid} x {pattern.grid} image), "
            "build it for this N"
        )


def _choose(backend: str | None) -> str:
    if backend is None:
        fastest = next(iter(BACKENDS))
        _say_once(fastest, "none was asked for and it is the fastest")
        return fastest
    if backend not in BACKENDS:
        raise ValueError(
            f"backend {backend!r} does not exist; choose one of {', '.join(BACKENDS)}, "
            "or None for the fastest"
        )
    _say_once(backend, "the caller asked for it")
    return backend


@lru_cache(maxsize=32)
def _say_once(name: str, reason: str) -> None:
    logger.info("attention backend %s: %s", name, reason)


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A backend chooses its own precisions: float32 scores must stay float32."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
