"""The rule of ``kernels.patterns`` as Triton code: what a tile of queries or keys has to visit.

A sequence has two segments, text and image, and no tile lies in both. Inside a segment a token has
a *place*; the keys that a pattern shows a query are a window of places right before it:

    image   place = raster order; for "column" the grid column by column, so that the keys are near
    text    place = token; every text query sees the text up to itself, which is "dense"

Arguments of all kernels: ``FIRST`` token of the segment (0 or n_text), ``COUNT`` its tokens, ``W``
grid side, ``R`` convolution radius, ``REACH`` ``Pattern.reach``, ``KIND`` the pattern's kind, or
"clamp" for "conv" with edge "clamp"; ``ROWS``, ``STEP``, ``LOCAL`` as in ``kernels.tiles.Tile``.

Names in kernels: ``p_`` pointer, ``s_`` stride, ``i_`` index, ``n_`` count, ``o_`` places, ``t_``
tokens, ``m_`` mask, ``b_`` a block of values in registers; b, h, z: sample, head, head of all
samples; q, k, v, o, do, dq, dk, dv, lse, delta as in the backward pass of flash attention.
"""

import triton
import triton.language as tl


@triton.jit
def job_of_program(
    T: tl.constexpr, I: tl.constexpr, ROWS: tl.constexpr, n_z, IMAGE_FIRST: tl.constexpr
):
    """Head (of all samples), tile, and whether it is of the image, for this program.

    The tiles of the segment with the long jobs come first, those of one head side by side: they
    read the same keys while these are in the cache.
    """
    N_IMAGE: tl.constexpr = (I + ROWS - 1) // ROWS
    N_TEXT: tl.constexpr = (T + ROWS - 1) // ROWS
    N_FIRST: tl.constexpr = N_IMAGE if IMAGE_FIRST else N_TEXT
    N_LAST: tl.constexpr = N_TEXT if IMAGE_FIRST else N_IMAGE
    i = tl.program_id(0)
    is_first = i < n_z * N_FIRST
    i = tl.where(is_first, i, i - n_z * N_FIRST)
    n = tl.where(is_first, N_FIRST, N_LAST)
    return i // n, i % n, is_first == IMAGE_FIRST


@triton.jit
def tokens_of(o_place, FIRST: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr):
    """Token of each place: where its q, k, v and o lie in memory."""
    if KIND == "column":
        t = FIRST + o_place % W * W + o_place // W
    else:
        t = FIRST + o_place
    return t


@triton.jit
def keys_before(o_first, FIRST: tl.constexpr, KIND: tl.constexpr):
    """Tokens 0 up to this one are seen by every query from place ``o_first`` on."""
    n = FIRST
    if KIND == "dense":
        n = FIRST + o_first
    return n


@triton.jit
def window_start(o_first, W: tl.constexpr, REACH: tl.constexpr, KIND: tl.constexpr):
    """First place that must be tested against the rule for queries from ``o_first`` on."""
    if KIND == "column":
        start = o_first // W * W
    elif KIND == "dense":
        # all before it is among keys_before
        start = o_first
    else:
        start = tl.maximum(o_first - REACH, 0)
    return start


@triton.jit
def window_end(
    o_last, COUNT: tl.constexpr, W: tl.constexpr, REACH: tl.constexpr, KIND: tl.constexpr
):
    """One past the last query that must be tested against the rule for keys up to ``o_last``."""
    if KIND == "column":
        end = (o_last // W + 1) * W
    elif KIND == "dense":
        end = o_last + 1
    else:
        end = o_last + 1 + REACH
    return tl.minimum(end, COUNT)


@triton.jit
def sees(o_q, o_k, W: tl.constexpr, R: tl.constexpr, REACH: tl.constexpr, KIND: tl.constexpr):
    """Whether the query at a place sees the key at a place; shapes broadcast, bool."""
    back = o_q - o_k
    # as unsigned numbers keys after the query are far away: one comparison for both ends
    if KIND == "dense":
        seen = back >= 0
    elif KIND == "column":
        seen = back.to(tl.uint32) <= (o_q % W).to(tl.uint32)
    else:
        seen = back.to(tl.uint32) <= REACH
    if KIND == "conv":
        seen = seen & ((back + R).to(tl.uint32) % W <= 2 * R)
    if KIND == "clamp":
        # a window wider than the grid could pass REACH one row further up, at its left end
        seen = seen & (o_q // W - o_k // W <= R) & (tl.abs(o_q % W - o_k % W) <= R)
    return seen


@triton.jit
def of_head(p, i_z, n_head, s_b, s_h):
    """Where head ``i_z`` of all samples' heads starts, from the strides of sample and head."""
    return p + (i_z // n_head).to(tl.int64) * s_b + (i_z % n_head).to(tl.int64) * s_h


@triton.jit
def load_rows(p, o_row, s_row, o_d, m_row, EVEN: tl.constexpr):
    """Rows of a matrix, [rows, D]; zeros where ``m_row`` is False, unless ``EVEN`` says nowhere."""
    p_rows = p + o_row[:, None] * s_row + o_d[None, :]
    if EVEN:
        b = tl.load(p_rows)
    else:
        b = tl.load(p_rows, mask=m_row[:, None], other=0.0)
    return b


@triton.jit
def load_each(p, o_row, m_row, other: tl.constexpr, EVEN: tl.constexpr):
    """One number a row, [rows]; ``other`` where ``m_row`` is False."""
    if EVEN:
        b = tl.load(p + o_row)
    else:
        b = tl.load(p + o_row, mask=m_row, other=other)
    return b


@triton.jit
def store_rows(p, o_row, s_row, o_d, b, m_row, EVEN: tl.constexpr):
    """Write rows of a matrix in its dtype, those where ``m_row`` is True."""
    p_rows = p + o_row[:, None] * s_row + o_d[None, :]
    b = b.to(p.dtype.element_ty)
    if EVEN:
        tl.store(p_rows, b)
    else:
        tl.store(p_rows, b, mask=m_row[:, None])
