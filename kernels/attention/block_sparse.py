"""The Triton kernels as operators of torch, so that autograd, checkpointing and compile know them.

Two forms of one operator. From q, k and v it gives gradients of each; from a packed projection it
gives one packed gradient, which the kernels write in place: put together from three it would be
copied once more, 15 % of the time of both passes at 12B (by bytes). Each form has a backward
operator and, for compile and meta tensors, a statement of its output shapes.

Axes: B batch, N token (text, then image), H head, D head width; 3: q, k, v.
"""

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from kernels.attention.backward import backward
from kernels.attention.forward import forward, forward_kernel, outputs_of
from kernels.attention.launch import LONGEST
from kernels.patterns import Pattern
from kernels.tiles import SUPPORTED, WIDTHS, chip_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# TRITON_INTERPRET=1 at import: the kernels run as numpy on the CPU, for tests
INTERPRETED = not isinstance(forward_kernel, JITFunction)


def why_not_triton(
    dtype: torch.dtype, device: torch.device, width: int, is_long: bool = False
) -> str | None:
    """Why the kernels cannot run on such tensors, as half a sentence; None where they can.

    Args:
        dtype: of q, k and v.
        device: likewise.
        width: of a head.
        is_long: whether ``launch.is_too_long`` says so of one of them.
    """
    if dtype not in DTYPES:
        return f"the tensors are {dtype} and Triton kernels take float16, bfloat16 or float32"
    if width not in WIDTHS:
        return f"the head width is {width} and Triton kernels take {', '.join(map(str, WIDTHS))}"
    if is_long:
        return f"a head spans {LONGEST} elements or more and Triton kernels count in 32 bits"
    if device.type == "cpu" and not INTERPRETED:
        return "the tensors are on the CPU and Triton kernels need an NVIDIA GPU"
    if INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter (TRITON_INTERPRET=1) multiplies bfloat16 wrongly"
    if chip_of(device) is None:
        return f"the tensors are on {device} and Triton kernels need {SUPPORTED}"
    return None


def block_sparse_attention(
    q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, pattern: Pattern, scale: float
) -> Tensor:
    """Softmax attention under ``pattern``, equal to ``naive_attention`` up to rounding.

    Scores, softmax and sums are float32; products take the dtype of q, float32 in full ("ieee").
    Nothing is copied. Gradients are the same bits in every run. A NaN or Inf reaches the
    outputs that may see it and no other, which may then differ in their last bits; in gradients it
    may reach any row of its head. In float16 the gradients of scores are float16 too, and can
    overflow where the gradients that they make would not. Differentiable once, in reverse mode.

    Args:
        q_BNHD: a dtype of ``DTYPES``, D of ``WIDTHS`` with stride 1, else any strides.
        k_BNHD: like q, strides of its own.
        v_BNHD: like q, strides of its own.
        pattern: N must be ``pattern.n_tokens``.
        scale: multiplies the scores, 1e-30 to 1e30.

    Returns:
        o_BNHD, contiguous, in the dtype of q.
    """
    o_BNHD, _ = _attend(q_BNHD, k_BNHD, v_BNHD, pattern.spelled, scale)
    return o_BNHD


def packed_block_sparse_attention(qkv_BN3HD: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """``block_sparse_attention`` of a packed projection, whose gradient is one tensor like it."""
    o_BNHD, _ = _attend_packed(qkv_BN3HD, pattern.spelled, scale)
    return o_BNHD


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
    return forward(q_BNHD, k_BNHD, v_BNHD, Pattern.read(spelled), scale)


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
    backward(do_BNHD, q_BNHD, k_BNHD, v_BNHD, o_BNHD, lse_BHN, grads, Pattern.read(spelled), scale)
    return grads


@_attend_backward.register_fake
def _(do_BNHD: Tensor, q_BNHD: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q_BNHD), _empty(q_BNHD), _empty(q_BNHD)


@torch.library.custom_op("daikon::attend_packed", mutates_args=())
def _attend_packed(qkv_BN3HD: Tensor, spelled: str, scale: float) -> tuple[Tensor, Tensor]:
    q_BNHD, k_BNHD, v_BNHD = qkv_BN3HD.unbind(2)
    return forward(q_BNHD, k_BNHD, v_BNHD, Pattern.read(spelled), scale)


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
    backward(do_BNHD, q_BNHD, k_BNHD, v_BNHD, o_BNHD, lse_BHN, grads, Pattern.read(spelled), scale)
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
