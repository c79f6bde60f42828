"""Backward pass of attention under a pattern, in Triton: dq, then dk and dv.

The weights are computed again from lse (Dao et al. 2205.14135, section 3.1). Two launches, seven
products and no atomics: every number is summed by one program in one order, so gradients are the
same bits in every run. The first also makes delta = sum(o * do) of its rows, which the second
reads; neither copies or transposes anything. Names are those of ``geometry``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.geometry import (
    job_of_program,
    keys_before,
    load_each,
    load_rows,
    of_head,
    sees,
    store_rows,
    tokens_of,
    window_end,
    window_start,
)
from kernels.attention.launch import LOG2_E, constants, is_too_long, n_programs, strides
from kernels.patterns import Pattern
from kernels.tiles import Tile, tile_on


@triton.jit
def dq_step(b_dq, b_q, b_k, b_v, b_do, b_lse, b_delta, scale_log2, b_seen, TEST: tl.constexpr):
    """Adds what keys and values [keys, D] give to dq [rows, D]."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    if TEST:
        b_p = tl.where(b_seen, b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit
def dq_of_tile(
    p_q, p_k, p_v, p_o, p_do, p_lse, p_delta, p_dq,
    s_q, s_k, s_v, s_o, s_do, s_dq, scale_log2, scale, i_tile,
    FIRST: tl.constexpr, COUNT: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    REACH: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Gradient of the ``ROWS`` queries of a tile; visits the keys of ``attend_tile``."""
    EVEN: tl.constexpr = COUNT % ROWS == 0
    EVEN_STEPS: tl.constexpr = FIRST % STEP == 0 and (KIND != "dense" or ROWS % STEP == 0)
    o_d = tl.arange(0, D)
    o_first = i_tile * ROWS
    o_q = o_first + tl.arange(0, ROWS)
    m_q = o_q < COUNT
    t_q = tokens_of(o_q, FIRST, W, KIND)
    b_do = load_rows(p_do, t_q, s_do, o_d, m_q, EVEN)
    b_o = load_rows(p_o, t_q, s_o, o_d, m_q, EVEN)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_delta + t_q, b_delta, mask=m_q)
    b_q = load_rows(p_q, t_q, s_q, o_d, m_q, EVEN)
    b_lse = load_each(p_lse, t_q, m_q, float("inf"), EVEN)
    b_dq = tl.zeros([ROWS, D], tl.float32)

    n_full = keys_before(o_first, FIRST, KIND)
    for t_first in tl.range(0, n_full, STEP):
        t_k = t_first + tl.arange(0, STEP)
        b_k = load_rows(p_k, t_k, s_k, o_d, t_k < n_full, EVEN_STEPS)
        b_v = load_rows(p_v, t_k, s_v, o_d, t_k < n_full, EVEN_STEPS)
        b_dq = dq_step(
            b_dq, b_q, b_k, b_v, b_do, b_lse, b_delta, scale_log2,
            (t_k < n_full)[None, :], not EVEN_STEPS,
        )  # fmt: skip

    o_start = window_start(o_first, W, REACH, KIND) // LOCAL * LOCAL
    o_end = o_first + ROWS
    for o_step in tl.range(o_start, o_end, LOCAL):
        o_k = o_step + tl.arange(0, LOCAL)
        t_k = tokens_of(o_k, FIRST, W, KIND)
        b_k = load_rows(p_k, t_k, s_k, o_d, o_k < COUNT, EVEN)
        b_v = load_rows(p_v, t_k, s_v, o_d, o_k < COUNT, EVEN)
        b_seen = sees(o_q[:, None], o_k[None, :], W, R, REACH, KIND)
        b_dq = dq_step(
            b_dq, b_q, b_k, b_v, b_do, b_lse, b_delta, scale_log2, b_seen, True
        )  # fmt: skip
    store_rows(p_dq, t_q, s_dq, o_d, b_dq * scale, m_q, EVEN)


@triton.jit
def dkdv_step(
    b_dk, b_dv, b_k, b_v, b_q, b_do, b_lse, b_delta, scale_log2, b_seen, TEST: tl.constexpr
):  # fmt: skip
    """Adds what queries [queries, D] give to dk and dv [rows, D]; keys are the rows here."""
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
    if TEST:
        b_p = tl.where(b_seen, b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def dkdv_of_tile(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv,
    s_q, s_k, s_v, s_do, s_dkdv, scale_log2, scale, i_tile,
    FIRST: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    REACH: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Gradients of the ``ROWS`` keys of a tile and of their values."""
    EVEN: tl.constexpr = COUNT % ROWS == 0
    o_d = tl.arange(0, D)
    o_first = i_tile * ROWS
    o_k = o_first + tl.arange(0, ROWS)
    m_k = o_k < COUNT
    t_k = tokens_of(o_k, FIRST, W, KIND)
    b_k = load_rows(p_k, t_k, s_k, o_d, m_k, EVEN)
    b_v = load_rows(p_v, t_k, s_v, o_d, m_k, EVEN)
    b_dk = tl.zeros([ROWS, D], tl.float32)
    b_dv = tl.zeros([ROWS, D], tl.float32)

    # 1. queries that may or may not see a key of the tile
    EVEN_LOCAL: tl.constexpr = COUNT % LOCAL == 0
    o_end = window_end(o_first + ROWS - 1, COUNT, W, REACH, KIND)
    for o_step in tl.range(o_first // LOCAL * LOCAL, o_end, LOCAL):
        o_q = o_step + tl.arange(0, LOCAL)
        m_q = o_q < COUNT
        t_q = tokens_of(o_q, FIRST, W, KIND)
        b_q = load_rows(p_q, t_q, s_q, o_d, m_q, EVEN_LOCAL)
        b_do = load_rows(p_do, t_q, s_do, o_d, m_q, EVEN_LOCAL)
        # a query that is not there has no weight: 2 ** -inf
        b_lse = load_each(p_lse, t_q, m_q, float("inf"), EVEN_LOCAL)
        b_delta = load_each(p_delta, t_q, m_q, 0.0, EVEN_LOCAL)
        b_seen = sees(o_q[None, :], o_k[:, None], W, R, REACH, KIND)
        b_dk, b_dv = dkdv_step(
            b_dk, b_dv, b_k, b_v, b_q, b_do, b_lse, b_delta, scale_log2, b_seen, True
        )  # fmt: skip

    # 2. queries that see all keys of the tile: of a text tile the text behind it and the image
    if KIND == "dense":
        t_start = FIRST + tl.minimum(o_first + ROWS, COUNT)
        EVEN_STEPS: tl.constexpr = EVEN and ROWS % STEP == 0 and (N - FIRST) % STEP == 0
        for t_first in tl.range(t_start, N, STEP):
            t_q = t_first + tl.arange(0, STEP)
            b_q = load_rows(p_q, t_q, s_q, o_d, t_q < N, EVEN_STEPS)
            b_do = load_rows(p_do, t_q, s_do, o_d, t_q < N, EVEN_STEPS)
            b_lse = load_each(p_lse, t_q, t_q < N, float("inf"), EVEN_STEPS)
            b_delta = load_each(p_delta, t_q, t_q < N, 0.0, EVEN_STEPS)
            # without the test no b_seen is read: anything may stand there
            b_dk, b_dv = dkdv_step(
                b_dk, b_dv, b_k, b_v, b_q, b_do, b_lse, b_delta, scale_log2, b_lse, False
            )  # fmt: skip
    store_rows(p_dk, t_k, s_dkdv, o_d, b_dk * scale, m_k, EVEN)
    store_rows(p_dv, t_k, s_dkdv, o_d, b_dv, m_k, EVEN)


@triton.jit
def dq_kernel(
    p_q, p_k, p_v, p_o, p_do, p_lse, p_delta, p_dq,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_dob, s_don, s_doh, s_gb, s_gn, s_gh,
    n_head, n_z, scale_log2, scale,
    T: tl.constexpr, W: tl.constexpr, R: tl.constexpr, REACH: tl.constexpr, KIND: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Grid [programs]. Writes dq, strided, and delta [B, H, N]."""
    I: tl.constexpr = W * W
    i_z, i_tile, is_image = job_of_program(T, I, ROWS, n_z, True)
    p_q = of_head(p_q, i_z, n_head, s_qb, s_qh)
    p_k = of_head(p_k, i_z, n_head, s_kb, s_kh)
    p_v = of_head(p_v, i_z, n_head, s_vb, s_vh)
    p_o = of_head(p_o, i_z, n_head, (T + I) * n_head * D, D)
    p_do = of_head(p_do, i_z, n_head, s_dob, s_doh)
    p_dq = of_head(p_dq, i_z, n_head, s_gb, s_gh)
    p_lse += i_z.to(tl.int64) * (T + I)
    p_delta += i_z.to(tl.int64) * (T + I)
    if is_image:
        dq_of_tile(
            p_q, p_k, p_v, p_o, p_do, p_lse, p_delta, p_dq,
            s_qn, s_kn, s_vn, n_head * D, s_don, s_gn, scale_log2, scale, i_tile,
            T, I, W, R, REACH, KIND, D, ROWS, STEP, LOCAL,
        )  # fmt: skip
    else:
        dq_of_tile(
            p_q, p_k, p_v, p_o, p_do, p_lse, p_delta, p_dq,
            s_qn, s_kn, s_vn, n_head * D, s_don, s_gn, scale_log2, scale, i_tile,
            0, T, W, R, REACH, "dense", D, ROWS, LOCAL, LOCAL,
        )  # fmt: skip


@triton.jit
def dkdv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_dob, s_don, s_doh, s_gb, s_gn, s_gh,
    n_head, n_z, scale_log2, scale,
    T: tl.constexpr, W: tl.constexpr, R: tl.constexpr, REACH: tl.constexpr, KIND: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Grid [programs], text first: its keys are seen by the whole image. Writes dk and dv."""
    I: tl.constexpr = W * W
    i_z, i_tile, is_image = job_of_program(T, I, ROWS, n_z, False)
    p_q = of_head(p_q, i_z, n_head, s_qb, s_qh)
    p_k = of_head(p_k, i_z, n_head, s_kb, s_kh)
    p_v = of_head(p_v, i_z, n_head, s_vb, s_vh)
    p_do = of_head(p_do, i_z, n_head, s_dob, s_doh)
    p_dk = of_head(p_dk, i_z, n_head, s_gb, s_gh)
    p_dv = of_head(p_dv, i_z, n_head, s_gb, s_gh)
    p_lse += i_z.to(tl.int64) * (T + I)
    p_delta += i_z.to(tl.int64) * (T + I)
    if is_image:
        dkdv_of_tile(
            p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv,
            s_qn, s_kn, s_vn, s_don, s_gn, scale_log2, scale, i_tile,
            T, I, T + I, W, R, REACH, KIND, D, ROWS, STEP, LOCAL,
        )  # fmt: skip
    else:
        dkdv_of_tile(
            p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv,
            s_qn, s_kn, s_vn, s_don, s_gn, scale_log2, scale, i_tile,
            0, T, T + I, W, R, REACH, "dense", D, ROWS, STEP, LOCAL,
        )  # fmt: skip


def backward(
    do_BNHD: Tensor,
    q_BNHD: Tensor,
    k_BNHD: Tensor,
    v_BNHD: Tensor,
    o_BNHD: Tensor,
    lse_BHN: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    pattern: Pattern,
    scale: float,
    tiles: tuple[Tile, Tile] | None = None,
) -> None:
    """Writes the gradients of ``forward``, the same bits in every run.

    Args:
        do_BNHD: gradient of o, in the dtype of q, any strides.
        q_BNHD: as in ``forward``.
        k_BNHD: as in ``forward``.
        v_BNHD: as in ``forward``.
        o_BNHD: what ``forward`` returned, contiguous.
        lse_BHN: what ``forward`` returned, float32, contiguous.
        grads: dq, dk, dv to be written, [B, N, H, D] of the same strides: three tensors, or three
            slices of the gradient of a packed projection.
        pattern: as in ``forward``.
        scale: as in ``forward``.
        tiles: (of dq, of dk and dv); those of the table for this chip when None.
    """
    B, _, H, D = q_BNHD.shape
    dq_BNHD, dk_BNHD, dv_BNHD = grads
    assert dq_BNHD.stride() == dk_BNHD.stride() == dv_BNHD.stride()
    if tiles is None:
        tiles = tile_on(q_BNHD, pattern, "dq"), tile_on(q_BNHD, pattern, "dkdv")
    # autograd chooses these strides: 0 for a sum, which is one number
    if do_BNHD.stride(-1) != 1 or is_too_long(do_BNHD):
        do_BNHD = do_BNHD.contiguous()
    delta_BHN = torch.empty_like(lse_BHN)
    common = (
        *strides(q_BNHD), *strides(k_BNHD), *strides(v_BNHD), *strides(do_BNHD), *strides(dq_BNHD),
        H, B * H, scale * LOG2_E, scale,
    )  # fmt: skip
    dq_tile, dkdv_tile = tiles
    with torch.cuda.device_of(q_BNHD):
        dq_kernel[(n_programs(pattern, dq_tile, B * H),)](
            q_BNHD, k_BNHD, v_BNHD, o_BNHD, do_BNHD, lse_BHN, delta_BHN, dq_BNHD, *common,
            **constants(pattern, D, dq_tile),
            num_warps=dq_tile.warps, num_stages=dq_tile.stages,
        )  # fmt: skip
        dkdv_kernel[(n_programs(pattern, dkdv_tile, B * H),)](
            q_BNHD, k_BNHD, v_BNHD, do_BNHD, lse_BHN, delta_BHN, dk_BNHD, dv_BNHD, *common,
            **constants(pattern, D, dkdv_tile),
            num_warps=dkdv_tile.warps, num_stages=dkdv_tile.stages,
        )  # fmt: skip
