"""Attention under a pattern in plain PyTorch: fast on a CPU, without N x N scores.

The image is put in the order in which its pattern is local (grid columns for "column", raster
order otherwise) and cut into blocks of queries. A block sees all text, as one matrix product,
and a window of the image, as another: its own block and the ``back`` blocks before it. One
softmax joins the two. Text queries see only text. A convolution whose windows are most of the
image, and a short dense sequence, are one block, text and all, under the dense mask.

Axes: B batch, N token, H head, D head width; Z = B * H, T text token, I image token in the
order of the plan, G block, Y = Z * G, Q query in a block, L key in a block's window, S = T + L.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from kernels.patterns import Pattern

Pair = Sequence[Tensor]

# up to this many tokens one block beats torch's causal attention (bfloat16: 2.6 times)
SHORT_DENSE_TOKENS = 256


def windowed_attention(
    q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, pattern: Pattern, scale: float
) -> Tensor:
    """Softmax attention under ``pattern.mask()``, equal to ``naive_attention`` up to rounding.

    Scores and softmax are float32 (float64 for float64); the other products run in the dtype of
    q. Differentiable once in q, k and v; the weights are kept for the backward pass,
    B * H * (n_image * (n_text + L) + n_text ** 2) of them, L the keys in a block's window.

    Args:
        q_BNHD: float16, bfloat16, float32 or float64, any strides, any device.
        k_BNHD: like q.
        v_BNHD: like q.
        pattern: N must be ``pattern.n_tokens``.
        scale: multiplies the scores.

    Returns:
        o_BNHD, in the dtype of q.
    """
    plan = plan_for(pattern)
    if plan is None:
        # text is in front of the image, so the dense pattern is plain causal attention
        q_BHND, k_BHND, v_BHND = (x.transpose(1, 2) for x in (q_BNHD, k_BNHD, v_BNHD))
        o_BHND = scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, is_causal=True, scale=scale)
        return o_BHND.transpose(1, 2)
    o_BNHD: Tensor = _Windowed.apply(q_BNHD, k_BNHD, v_BNHD, plan, scale)
    return o_BNHD


@dataclass(frozen=True)
class Plan:
    """How the tokens of ``pattern`` are ordered and cut into blocks.

    Args:
        pattern: whose mask the blocks reproduce.
        n_text: tokens in front of the first block, attended by all: the text, or 0.
        block: queries in a block.
        n_blocks: blocks behind ``n_text``.
        back: blocks before its own that the window of a block holds.
        by_column: the image goes column by column of the grid.
    """

    pattern: Pattern
    n_text: int
    block: int
    n_blocks: int
    back: int = 0
    by_column: bool = False

    @property
    def window(self) -> int:
        """Keys in the window of a block: the blocks before it, then its own."""
        return (self.back + 1) * self.block

    def hidden(self) -> Tensor:
        """Bool [G, Q, L] on the CPU: True where the window holds a key that the query must not see.

        The windows of the first blocks start before the image; those keys are hidden too.
        """
        if self.block == self.pattern.n_tokens:
            return ~self.pattern.mask()[None]
        W = self.pattern.grid
        place = torch.arange(self.pattern.n_image, device="cpu")
        token = place % W * W + place // W if self.by_column else place
        start = torch.arange(self.n_blocks, device="cpu")[:, None] * self.block
        q_GQ = start + torch.arange(self.block, device="cpu")
        k_GL = start - self.back * self.block + torch.arange(self.window, device="cpu")
        sees = self.pattern.sees(token[q_GQ][:, :, None], token[k_GL.clamp(min=0)][:, None, :])
        return ~(sees & (k_GL >= 0)[:, None, :])


@lru_cache(maxsize=64)
def plan_for(pattern: Pattern) -> Plan | None:
    """The fastest plan for ``pattern``; None where causal attention is the pattern and faster."""
    n_text, N, W = pattern.n_text, pattern.n_tokens, pattern.grid
    one_block = Plan(pattern, n_text=0, block=N, n_blocks=1)
    if pattern.kind == "dense":
        return one_block if N <= SHORT_DENSE_TOKENS else None
    if pattern.kind == "column":
        return Plan(pattern, n_text, block=W, n_blocks=W, by_column=True)
    blocks = Plan(pattern, n_text, block=W, n_blocks=W, back=min(-(-pattern.reach // W), W - 1))
    # conv: its windows are copies of many blocks, which half of the scores or more do not repay
    n_scores = pattern.n_image * (n_text + blocks.window) + n_text**2
    return blocks if pattern.kind == "row" or 2 * n_scores < N**2 else one_block


@lru_cache(maxsize=64)
def _hidden_on(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden keys of the text [T, T] and of the blocks [G, Q, L], shared: never write to them."""
    text_TT = torch.ones(plan.n_text, plan.n_text, dtype=torch.bool, device=device).triu(1)
    return text_TT, plan.hidden().to(device)


class _Windowed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, plan: Plan, scale: float
    ) -> Tensor:
        hidden_TT, hidden_GQL = _hidden_on(plan, q_BNHD.device)
        q, k, v = (_pack(x_BNHD, plan) for x_BNHD in (q_BNHD, k_BNHD, v_BNHD))
        dtype, wide = q_BNHD.dtype, torch.promote_types(q_BNHD.dtype, torch.float32)

        s_ZTT, s_YQL, s_ZIT = _scores([x.to(wide) for x in q], [x.to(wide) for x in k], plan, scale)
        p_ZTT = s_ZTT.masked_fill_(hidden_TT, float("-inf")).softmax(-1).to(dtype)
        s_YQL.view(-1, *hidden_GQL.shape).masked_fill_(hidden_GQL, float("-inf"))
        p_ZIS = _joined(s_ZIT, s_YQL).softmax(-1).to(dtype)

        ctx.save_for_backward(*q, *k, *v, p_ZTT, p_ZIS)
        ctx.plan, ctx.scale, ctx.shape = plan, scale, q_BNHD.shape
        return _unpack(_gathered(p_ZTT, p_ZIS, v, plan), plan, q_BNHD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BNHD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        *packed, p_ZTT, p_ZIS = ctx.saved_tensors
        q, k, v = packed[0:2], packed[2:4], packed[4:6]
        plan, scale, shape = ctx.plan, ctx.scale, ctx.shape
        do = _pack(do_BNHD, plan)

        dp_ZTT, dp_YQL, dp_ZIT = _scores(do, v, plan)
        ds_ZTT = torch._softmax_backward_data(dp_ZTT, p_ZTT, -1, p_ZTT.dtype)
        ds_ZIS = torch._softmax_backward_data(_joined(dp_ZIT, dp_YQL), p_ZIS, -1, p_ZIS.dtype)

        dq_BNHD = _unpack(_gathered(ds_ZTT, ds_ZIS, k, plan, scale), plan, shape)
        dk_BNHD = _unpack(_scattered(ds_ZTT, ds_ZIS, q, plan, scale), plan, shape)
        dv_BNHD = _unpack(_scattered(p_ZTT, p_ZIS, do, plan), plan, shape)
        return dq_BNHD, dk_BNHD, dv_BNHD, None, None


# Below, a pair is (text [Z, T, D], image [Z, I, D]). The three products of attention, each used
# twice: q k^T and do v^T; p v and ds k; p^T do and ds^T q.


def _scores(a: Pair, b: Pair, plan: Plan, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled dot products of text with text, blocks with their windows, image with text."""
    s_ZTT = _product(a[0], b[0].mT, scale)
    s_YQL = _product(_blocks(a[1], plan), _windows(b[1], plan).mT, scale)
    return s_ZTT, s_YQL, _product(a[1], b[0].mT, scale)


def _gathered(p_ZTT: Tensor, p_ZIS: Tensor, b: Pair, plan: Plan, scale: float = 1.0) -> Pair:
    """For every query, the weighted sum of ``b`` over its keys."""
    o_ZID = _product(_local(p_ZIS, plan), _windows(b[1], plan), scale).view_as(b[1])
    if plan.n_text:
        o_ZID.baddbmm_(p_ZIS[:, :, : plan.n_text], b[0], alpha=scale)
    return _product(p_ZTT, b[0], scale), o_ZID


def _scattered(p_ZTT: Tensor, p_ZIS: Tensor, a: Pair, plan: Plan, scale: float = 1.0) -> Pair:
    """For every key, the weighted sum of ``a`` over the queries that see it."""
    d_ZTD = _product(p_ZTT.mT, a[0], scale)
    if plan.n_text:
        d_ZTD.baddbmm_(p_ZIS[:, :, : plan.n_text].mT, a[1], alpha=scale)
    d_YLD = _product(_local(p_ZIS, plan).mT, _blocks(a[1], plan), scale)
    return d_ZTD, _overlap_add(d_YLD, plan)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * a @ b`` in one batched call, into fresh memory.

    Into a slice of a larger tensor torch would run a small parallel region for each of the batch.
    """
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _joined(s_ZIT: Tensor, s_YQL: Tensor) -> Tensor:
    """The scores of image queries with all their keys, [Z, I, T + L]: text, then window."""
    s_ZIL = s_YQL.view(*s_ZIT.shape[:2], s_YQL.shape[-1])
    return torch.cat([s_ZIT, s_ZIL], dim=-1) if s_ZIT.shape[-1] else s_ZIL


def _local(s_ZIS: Tensor, plan: Plan) -> Tensor:
    """The image columns of the scores, block by block: a view [Z * G, Q, L]."""
    return s_ZIS.view(-1, plan.block, s_ZIS.shape[-1])[:, :, -plan.window :]


def _blocks(x_ZID: Tensor, plan: Plan) -> Tensor:
    """The image cut into blocks: a view [Z * G, Q, D]."""
    return x_ZID.view(-1, plan.block, x_ZID.shape[-1])


def _windows(x_ZID: Tensor, plan: Plan) -> Tensor:
    """The window of every block, [Z * G, L, D], zeros before the image; a view if back is 0."""
    if plan.back == 0:
        return _blocks(x_ZID, plan)
    Z, n, D = x_ZID.shape
    pad = plan.back * plan.block
    padded_ZPD = torch.cat([x_ZID.new_zeros(Z, pad, D), x_ZID], dim=1)
    # each head has its own padding, so that no window reads another head or sample
    size, stride = (Z, plan.n_blocks, plan.window * D), ((n + pad) * D, plan.block * D, 1)
    view = padded_ZPD.as_strided(size, stride)
    return view.reshape(-1, plan.window, D)


def _overlap_add(dx_YLD: Tensor, plan: Plan) -> Tensor:
    """The transpose of ``_windows``: sums the windows back into the image, [Z, I, D]."""
    D, G = dx_YLD.shape[-1], plan.n_blocks
    dx_ZGJQD = dx_YLD.view(-1, G, plan.back + 1, plan.block, D)
    dx_ZGQD = dx_ZGJQD[:, :, plan.back].contiguous()
    for ahead in range(1, plan.back + 1):
        dx_ZGQD[:, : G - ahead] += dx_ZGJQD[:, ahead:, plan.back - ahead]
    return dx_ZGQD.view(-1, G * plan.block, D)


def _pack(x_BNHD: Tensor, plan: Plan) -> Pair:
    """Text [Z, T, D] and image [Z, I, D], contiguous, the image in the order of the plan."""
    B, N, H, D = x_BNHD.shape
    x_BHND = x_BNHD.transpose(1, 2)
    # where B or H is 1 reshape can return a view with gaps, hence contiguous
    text_ZTD = x_BHND[:, :, : plan.n_text].reshape(B * H, plan.n_text, D).contiguous()
    image_BHID = x_BHND[:, :, plan.n_text :]
    if plan.by_column:
        image_BHID = _transposed(image_BHID, plan)
    return text_ZTD, image_BHID.reshape(B * H, N - plan.n_text, D).contiguous()


def _unpack(x: Pair, plan: Plan, shape: torch.Size) -> Tensor:
    """The inverse of ``_pack``: [B, N, H, D], contiguous."""
    B, N, H, D = shape
    x_BNHD = x[1].new_empty(shape)
    x_BHND = x_BNHD.transpose(1, 2)
    x_BHND[:, :, : plan.n_text] = x[0].view(B, H, plan.n_text, D)
    image_BHID = x[1].view(B, H, N - plan.n_text, D)
    if plan.by_column:
        image_BHID = _transposed(image_BHID, plan)
    x_BHND[:, :, plan.n_text :] = image_BHID
    return x_BNHD


def _transposed(x_BHID: Tensor, plan: Plan) -> Tensor:
    """Raster order to columns of the grid, and back."""
    W = plan.pattern.grid
    return x_BHID.unflatten(2, (W, W)).transpose(2, 3).flatten(2, 3)
