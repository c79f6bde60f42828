"""Forward pass of attention under a pattern, in Triton: one program a tile of queries and head.

Online softmax (Milakov and Gimelshein 1805.02867; Dao et al. 2205.14135) over two runs of keys:
first those that all queries of the tile see, without any test (the text: 83 to 95 % of the pairs of
the sparse patterns at the paper's size), then the window of its pattern, tested by
``geometry.sees``. Nothing is N x N, and no list of blocks is read: the patterns are arithmetic.
Names are those of ``geometry``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.geometry import (
    job_of_program,
    keys_before,
    load_rows,
    of_head,
    sees,
    store_rows,
    tokens_of,
    window_start,
)
from kernels.attention.launch import LOG2_E, constants, n_programs, strides
from kernels.patterns import Pattern
from kernels.tiles import Tile, tile_on

# below any score, and finite: the largest score of a row that has met no key yet; with -inf its
# weights would be NaN
NOTHING = tl.constexpr(-3e38)
# keys at a time where a tile is done once more, query by query
CHUNK = tl.constexpr(16)


@triton.jit
def softmax_step(b_acc, b_max, b_sum, b_s, b_v, scale_log2):
    """One step of the online softmax: scores ``b_s`` [rows, keys] and values [keys, D] join."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
    b_fade = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_fade + tl.sum(b_p, 1)
    b_acc = b_acc * b_fade[:, None]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    return b_acc, b_new, b_sum


@triton.jit
def attend_row(
    p_q, p_k, p_v, p_o, s_q, s_k, s_v, s_o, scale_log2, o_row, n_full, o_start,
    FIRST: tl.constexpr, W: tl.constexpr, R: tl.constexpr, REACH: tl.constexpr,
    KIND: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Attention of one query that never multiplies a value which it must not see."""
    o_d = tl.arange(0, D)
    o_q = o_row + tl.zeros([CHUNK], tl.int32)
    t_q = tokens_of(o_row, FIRST, W, KIND)
    b_q = tl.load(p_q + t_q * s_q + o_d).to(tl.float32)
    b_max = NOTHING
    b_sum = 0.0
    b_acc = tl.zeros([D], tl.float32)
    for i in tl.range(0, n_full + o_row + 1 - o_start, CHUNK, num_stages=1):
        i_k = i + tl.arange(0, CHUNK)
        o_k = i_k - n_full + o_start
        m_k = (i_k < n_full) | sees(o_q, o_k, W, R, REACH, KIND)
        t_k = tl.where(i_k < n_full, i_k, tokens_of(o_k, FIRST, W, KIND))
        b_k = load_rows(p_k, t_k, s_k, o_d, m_k, False).to(tl.float32)
        b_v = load_rows(p_v, t_k, s_v, o_d, m_k, False).to(tl.float32)
        b_s = tl.sum(b_q[None, :] * b_k, 1) * scale_log2
        b_s = tl.where(m_k, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 0))
        b_p = tl.exp2(b_s - b_new)
        b_fade = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_fade + tl.sum(b_p, 0)
        b_acc = b_acc * b_fade + tl.sum(b_p[:, None] * b_v, 0)
        b_max = b_new
    tl.store(p_o + t_q * s_o + o_d, (b_acc / b_sum).to(p_o.dtype.element_ty))


@triton.jit
def attend_tile(
    p_q, p_k, p_v, p_o, p_lse, s_q, s_k, s_v, s_o, scale_log2, i_tile,
    FIRST: tl.constexpr, COUNT: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    REACH: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Attention of the ``ROWS`` queries of tile ``i_tile`` of one segment of one head."""
    EVEN: tl.constexpr = COUNT % ROWS == 0
    EVEN_STEPS: tl.constexpr = FIRST % STEP == 0 and (KIND != "dense" or ROWS % STEP == 0)
    o_d = tl.arange(0, D)
    o_first = i_tile * ROWS
    o_q = o_first + tl.arange(0, ROWS)
    t_q = tokens_of(o_q, FIRST, W, KIND)
    b_q = load_rows(p_q, t_q, s_q, o_d, o_q < COUNT, EVEN)
    b_max = tl.full([ROWS], NOTHING, tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, D], tl.float32)

    # 1. keys that every query of the tile sees: all tokens before the segment, or before the tile
    n_full = keys_before(o_first, FIRST, KIND)
    for t_first in tl.range(0, n_full, STEP):
        t_k = t_first + tl.arange(0, STEP)
        b_k = load_rows(p_k, t_k, s_k, o_d, t_k < n_full, EVEN_STEPS)
        b_v = load_rows(p_v, t_k, s_v, o_d, t_k < n_full, EVEN_STEPS)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if not EVEN_STEPS:
            b_s = tl.where((t_k < n_full)[None, :], b_s, float("-inf"))
        b_acc, b_max, b_sum = softmax_step(b_acc, b_max, b_sum, b_s, b_v, scale_log2)

    # 2. the window of the pattern
    o_start = window_start(o_first, W, REACH, KIND) // LOCAL * LOCAL
    for o_step in tl.range(o_start, o_first + ROWS, LOCAL):
        o_k = o_step + tl.arange(0, LOCAL)
        t_k = tokens_of(o_k, FIRST, W, KIND)
        b_k = load_rows(p_k, t_k, s_k, o_d, o_k < COUNT, EVEN)
        b_v = load_rows(p_v, t_k, s_v, o_d, o_k < COUNT, EVEN)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_seen = sees(o_q[:, None], o_k[None, :], W, R, REACH, KIND)
        b_s = tl.where(b_seen, b_s, float("-inf"))
        b_acc, b_max, b_sum = softmax_step(b_acc, b_max, b_sum, b_s, b_v, scale_log2)

    b_o = b_acc * (1.0 / b_sum)[:, None]
    store_rows(p_o, t_q, s_o, o_d, b_o, o_q < COUNT, EVEN)
    tl.store(p_lse + t_q, b_max + tl.log2(b_sum), mask=o_q < COUNT)
    # 3. a value that is not finite makes NaN of the zero weights of those that must not see it
    if tl.sum(tl.sum(b_acc * 0.0, 1)) != 0.0:
        # the rows are written once more, over what other threads wrote
        tl.debug_barrier()
        for o_row in tl.range(o_first, tl.minimum(o_first + ROWS, COUNT), num_stages=1):
            attend_row(
                p_q, p_k, p_v, p_o, s_q, s_k, s_v, s_o, scale_log2, o_row, n_full, o_start,
                FIRST, W, R, REACH, KIND, D,
            )  # fmt: skip


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_o, p_lse,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, n_head, n_z, scale_log2,
    T: tl.constexpr, W: tl.constexpr, R: tl.constexpr, REACH: tl.constexpr, KIND: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Grid [programs]. q, k, v strided; o [B, N, H, D] contiguous; lse [B, H, N], base 2."""
    I: tl.constexpr = W * W
    i_z, i_tile, is_image = job_of_program(T, I, ROWS, n_z, True)
    p_q = of_head(p_q, i_z, n_head, s_qb, s_qh)
    p_k = of_head(p_k, i_z, n_head, s_kb, s_kh)
    p_v = of_head(p_v, i_z, n_head, s_vb, s_vh)
    p_o = of_head(p_o, i_z, n_head, (T + I) * n_head * D, D)
    p_lse += i_z.to(tl.int64) * (T + I)
    if is_image:
        attend_tile(
            p_q, p_k, p_v, p_o, p_lse, s_qn, s_kn, s_vn, n_head * D, scale_log2, i_tile,
            T, I, W, R, REACH, KIND, D, ROWS, STEP, LOCAL,
        )  # fmt: skip
    else:
        attend_tile(
            p_q, p_k, p_v, p_o, p_lse, s_qn, s_kn, s_vn, n_head * D, scale_log2, i_tile,
            0, T, W, R, REACH, "dense", D, ROWS, LOCAL, LOCAL,
        )  # fmt: skip


def forward(
    q_BNHD: Tensor,
    k_BNHD: Tensor,
    v_BNHD: Tensor,
    pattern: Pattern,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention under ``pattern``, and what the backward pass needs of it.

    What ``op.sparse_attention`` checks is not checked again.

    Args:
        q_BNHD: float16, bfloat16 or float32, D 32, 64 or 128 with stride 1, else any strides; on a
            GPU, or on the CPU under Triton's interpreter.
        k_BNHD: like q, strides of its own.
        v_BNHD: like q, strides of its own.
        pattern: N must be ``pattern.n_tokens``.
        scale: multiplies the scores, 1e-30 to 1e30.
        tile: that of the table for this chip when None.

    Returns:
        o_BNHD: contiguous, in the dtype of q.
        lse_BHN: float32, base 2 logarithm of the sum of ``exp(score)`` over the visible keys.
    """
    B, _, H, D = q_BNHD.shape
    if tile is None:
        tile = tile_on(q_BNHD, pattern, "forward")
    o_BNHD, lse_BHN = outputs_of(q_BNHD)
    with torch.cuda.device_of(q_BNHD):
        forward_kernel[(n_programs(pattern, tile, B * H),)](
            q_BNHD, k_BNHD, v_BNHD, o_BNHD, lse_BHN,
            *strides(q_BNHD), *strides(k_BNHD), *strides(v_BNHD), H, B * H, scale * LOG2_E,
            **constants(pattern, D, tile), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return o_BNHD, lse_BHN


def outputs_of(q_BNHD: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors for o_BNHD, contiguous, and lse_BHN, with nothing in them yet."""
    B, N, H, _ = q_BNHD.shape
    lse_BHN = q_BNHD.new_empty((B, H, N), dtype=torch.float32)
    # not empty_like: that would keep the strides of a view
    return q_BNHD.new_empty(q_BNHD.shape), lse_BHN
