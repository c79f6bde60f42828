"""The Triton kernels as operators of torch, so that autograd, checkpointing and compile know them.

Two forms of one operator. From q, k and v it gives gradients of each; from a packed projection it
gives one packed gradient, which the kernels write in place: put together from three it would be
copied once more, 15 % of the time of both passes at 12B (by bytes). Each form has a backward
operator and, for compile and meta tensors, a statement of its output shapes.

Axes: B batch, N token (text, then image), H head, D head width; 3: q, k, v.
"""

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from kernels.attention.backward import backward
from kernels.attention.forward import forward, forward_kernel, outputs_of
from kernels.patterns import Edge, Kind, Pattern
from kernels.tiles import WIDTHS, chip_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# TRITON_INTERPRET=1 at import: the kernels run as numpy on the CPU, for tests
INTERPRETED = not isinstance(forward_kernel, JITFunction)
# offsets inside a head are 32-bit
LONGEST = 2**31


def why_not_triton(dtype: torch.dtype, device: torch.device, width: int, span: int) -> str | None:
    """Why the kernels cannot run on such tensors, as half a sentence; None where they can.

    Args:
        dtype: of q, k and v.
        device: likewise.
        width: of a head.
        span: elements from the first token of a head to past its last, at most.
    """
    if dtype not in DTYPES:
        return f"the tensors are {dtype} and Triton kernels take float16, bfloat16 or float32"
    if width not in WIDTHS:
        return f"the head width is {width} and Triton kernels take {', '.join(map(str, WIDTHS))}"
    if span >= LONGEST:
        return f"a head spans {span} elements and Triton kernels count to {LONGEST}"
    if device.type == "cpu" and not INTERPRETED:
        return "the tensors are on the CPU and Triton kernels need an NVIDIA GPU"
    if INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter (TRITON_INTERPRET=1) multiplies bfloat16 wrongly"
    if chip_of(device) is None:
        return f"Triton kernels need compute capability 8.0 to 12.1, which {device} has not"
    return None


def block_sparse_attention(
    q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, pattern: Pattern, scale: float
) -> Tensor:
    """Softmax attention under ``pattern``, equal to ``naive_attention`` up to rounding.

    Scores, softmax and sums are float32; products take the dtype of q, float32 in full ("ieee").
    Nothing is copied. Gradients are the same bits in every run. A NaN or Inf reaches the
    outputs that may see it and no other; in gradients it may reach any row of its head.

    Args:
        q_BNHD: a dtype of ``DTYPES``, D of ``WIDTHS`` with stride 1, else any strides.
        k_BNHD: like q, strides of its own.
        v_BNHD: like q, strides of its own.
        pattern: N must be ``pattern.n_tokens``.
        scale: multiplies the scores, more than 0.

    Returns:
        o_BNHD, contiguous, in the dtype of q.
    """
    o_BNHD, _ = _attend(q_BNHD, k_BNHD, v_BNHD, _spelled(pattern), scale)
    return o_BNHD


def packed_block_sparse_attention(qkv_BN3HD: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """``block_sparse_attention`` of a packed projection, whose gradient is one tensor like it."""
    o_BNHD, _ = _attend_packed(qkv_BN3HD, _spelled(pattern), scale)
    return o_BNHD


def _spelled(pattern: Pattern) -> str:
    """A pattern as an operator of torch may take it."""
    return f"{pattern.kind} {pattern.n_text} {pattern.grid} {pattern.kernel} {pattern.edge}"


@lru_cache(maxsize=64)
def _pattern(spelled: str) -> Pattern:
    kind, n_text, grid, kernel, edge = spelled.split()
    return Pattern(
        cast(Kind, kind), int(n_text), int(grid), kernel=int(kernel), edge=cast(Edge, edge)
    )


def _empty(x_BNHD: Tensor) -> Tensor:
    # not empty_like: that would keep the strides of a view
    return x_BNHD.new_empty(x_BNHD.shape)


@torch.library.custom_op("daikon::attend", mutates_args=())
def _attend(
    q_BNHD: Tensor,
    k_BNHD: Tensor,
    v_BNHD: Tensor,
    spelled: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return forward(q_BNHD, k_BNHD, v_BNHD, _pattern(spelled), scale)


@_attend.register_fake
def _(q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return outputs_of(q_BNHD)


@torch.library.custom_op("daikon::attend_backward", mutates_args=())
def _attend_backward(
    do_BNHD: Tensor,
    q_BNHD: Tensor,
    k_BNHD: Tensor,
    v_BNHD: Tensor,
    o_BNHD: Tensor,
    lse_BHN: Tensor,
    spelled: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _empty(q_BNHD), _empty(q_BNHD), _empty(q_BNHD)
    with torch.cuda.device_of(q_BNHD):
        backward(
            do_BNHD,
            q_BNHD,
            k_BNHD,
            v_BNHD,
            o_BNHD,
            lse_BHN,
            grads,
            _pattern(spelled),
            scale,
        )
    return grads


@_attend_backward.register_fake
def _(do_BNHD: Tensor, q_BNHD: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q_BNHD), _empty(q_BNHD), _empty(q_BNHD)


@torch.library.custom_op("daikon::attend_packed", mutates_args=())
def _attend_packed(qkv_BN3HD: Tensor, spelled: str, scale: float) -> tuple[Tensor, Tensor]:
    q_BNHD, k_BNHD, v_BNHD = qkv_BN3HD.unbind(2)
    return forward(q_BNHD, k_BNHD, v_BNHD, _pattern(spelled), scale)


@_attend_packed.register_fake
def _(qkv_BN3HD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return outputs_of(qkv_BN3HD[:, :, 0])


@torch.library.custom_op("daikon::attend_packed_backward", mutates_args=())
def _attend_packed_backward(
    do_BNHD: Tensor,
    qkv_BN3HD: Tensor,
    o_BNHD: Tensor,
    lse_BHN: Tensor,
    spelled: str,
    scale: float,
) -> Tensor:
    grad_BN3HD = _empty(qkv_BN3HD)
    q_BNHD, k_BNHD, v_BNHD = qkv_BN3HD.unbind(2)
    grads = grad_BN3HD[:, :, 0], grad_BN3HD[:, :, 1], grad_BN3HD[:, :, 2]
    with torch.cuda.device_of(qkv_BN3HD):
        backward(
            do_BNHD,
            q_BNHD,
            k_BNHD,
            v_BNHD,
            o_BNHD,
            lse_BHN,
            grads,
            _pattern(spelled),
            scale,
        )
    return grad_BN3HD


@_attend_packed_backward.register_fake
def _(do_BNHD: Tensor, qkv_BN3HD: Tensor, *_: Any) -> Tensor:
    return _empty(qkv_BN3HD)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors, *output)
    ctx.rest = inputs[len(tensors) :]


def _attend_gradients(ctx: Any, do_BNHD: Tensor, _: Tensor) -> tuple:
    grads = _attend_backward(do_BNHD, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *[None] * len(ctx.rest))


def _attend_packed_gradient(ctx: Any, do_BNHD: Tensor, _: Tensor) -> tuple:
    grad_BN3HD = _attend_packed_backward(do_BNHD, *ctx.saved_tensors, *ctx.rest)
    return (grad_BN3HD, *[None] * len(ctx.rest))


_attend.register_autograd(_attend_gradients, setup_context=_save)
_attend_packed.register_autograd(_attend_packed_gradient, setup_context=_save)
