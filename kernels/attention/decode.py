"""Attention of one new image token a row, over what the rows of a batch have kept.

While a picture is decoded each of its tokens sees the caption and the few image tokens that its
pattern shows it. Rows that draw the same caption share its keys and values: they are kept, and on a
GPU read, once. What a row has of its own lies in the slots of ``Pattern.slot_of``.

Two paths, equal up to rounding: a Triton kernel, whose program takes up to ``TILE`` rows of one
caption and one head (the gathered keys of each row, then the text as one matrix product, joined by
the online softmax), and plain PyTorch. In both a row's bits do not depend on the other rows, nor on
how many share its caption.

Letters: Z keys (0) and values (1), B rows, C captions, M tiles, R rows of a tile, H heads, T text
positions, S slots, K image keys of a step, D head width, I steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_sparse import why_not_triton
from kernels.attention.forward import softmax_step
from kernels.attention.launch import LOG2_E
from kernels.patterns import Pattern

TILE = 16  # rows of a program: the least of a tensor core's product
# text keys, and image keys of each row, that it meets at a time, by width and bytes of an element:
# what executes the fewest instructions and spills on no chip (kernels.budget)
STEPS = {
    (32, 2): (128, 8), (64, 2): (128, 8), (128, 2): (32, 4),
    (32, 4): (128, 8), (64, 4): (64, 4), (128, 4): (16, 2),
}  # fmt: skip
MOST_IMAGE = 8
LAUNCH = {"num_warps": 4, "num_stages": 2}


@dataclass
class Place:
    """Where a batch is: which rows draw which caption, and the image token that comes next.

    Args:
        n_rows: B.
        n_captions: C, the most that a batch can have.
        device: of what the rows have kept.
    """

    n_rows: int
    n_captions: int
    device: torch.device
    i: int = 0  # the step, as Python knows it
    captions: Sequence[int] = ()  # a row's

    def __post_init__(self) -> None:
        # the step as the device knows it: what a CUDA graph replays reads it there
        self.i_1 = torch.zeros(1, dtype=torch.int64, device=self.device)
        # every caption can end in a tile that is not full
        n_tiles = self.n_rows // TILE + self.n_captions
        self.row_MR = torch.full((n_tiles, TILE), -1, dtype=torch.int32, device=self.device)
        self.caption_M = torch.zeros(n_tiles, dtype=torch.int32, device=self.device)

    def restart(self, captions: Sequence[int], at: int = 0) -> None:
        """Begin pictures of these captions, one a row, each in 0 to C - 1, at an image token."""
        self.i = at
        self.i_1.fill_(at)
        self.captions = tuple(captions)
        rows_of: dict[int, list[int]] = {}
        for row, caption in enumerate(captions):
            rows_of.setdefault(caption, []).append(row)
        tiles = [
            (caption, rows[k : k + TILE])
            for caption, rows in rows_of.items()
            for k in range(0, len(rows), TILE)
        ]
        row_MR, caption_M = torch.full(self.row_MR.shape, -1), torch.zeros(self.caption_M.shape)
        for m, (caption, rows) in enumerate(tiles):
            row_MR[m, : len(rows)] = torch.tensor(rows)
            caption_M[m] = caption
        self.row_MR.copy_(row_MR)
        self.caption_M.copy_(caption_M)

    def runs(self) -> list[tuple[slice, int, int]]:
        """Captions, and the first row and the end of those that draw them.

        Neighbours of one caption, or all rows where each has a caption of its own.
        """
        if self.captions == tuple(range(self.n_rows)):
            return [(slice(0, self.n_rows), 0, self.n_rows)]
        firsts = [
            row
            for row, caption in enumerate(self.captions)
            if row == 0 or caption != self.captions[row - 1]
        ]
        ends = [*firsts[1:], self.n_rows]
        return [
            (slice(self.captions[first], self.captions[first] + 1), first, end)
            for first, end in zip(firsts, ends, strict=True)
        ]

    def advance(self) -> None:
        """On to the next image token."""
        self.i += 1
        self.i_1.add_(1)


class Kept:
    """Keys and values of one layer, of captions and of rows; the step's own are put in first.

    Args:
        pattern: the layer's.
        place: of the batch, shared by its layers.
        n_head: H.
        d_head: D.
        dtype: of q, k and v; they are on the device of ``place``.
    """

    def __init__(
        self, pattern: Pattern, place: Place, n_head: int, d_head: int, dtype: torch.dtype
    ) -> None:
        device = place.device
        self.pattern, self.place = pattern, place
        shape_HTD = n_head, pattern.n_text, d_head
        self.text_ZCHTD = torch.empty(2, place.n_captions, *shape_HTD, dtype=dtype, device=device)
        shape_HSD = n_head, pattern.n_slots, d_head
        self.image_ZBHSD = torch.empty(2, place.n_rows, *shape_HSD, dtype=dtype, device=device)
        is_cuda = device.type == "cuda"
        self._texts: tuple[Any, list[tuple[int, int, Tensor, Tensor]]] = None, []
        self.is_triton = is_cuda and why_not_triton(dtype, device, d_head) is None

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """See ``_tables``; held here, for a recorded step reads them where they are."""
        return _tables(self.pattern, self.place.device)

    @cached_property
    def constants(self) -> dict[str, int]:
        """The compile-time arguments of the kernel."""
        itemsize, d_head = self.image_ZBHSD.element_size(), self.image_ZBHSD.shape[-1]
        return constants(self.pattern, d_head, itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.text_ZCHTD.nbytes + self.image_ZBHSD.nbytes

    def attend(self, q_BHD: Tensor, kv_ZBHD: Tensor) -> Tensor:
        """Keep the keys and values of the image token at ``place``, and attend with its queries.

        Returns:
            o_BHD, contiguous, in the dtype of q.
        """
        attend = decode_triton if self.is_triton else decode_plain
        return attend(q_BHD, kv_ZBHD, self)

    def texts(self) -> list[tuple[int, int, Tensor, Tensor]]:
        """Neighbouring rows that one call serves, and the captions' keys and values for them.

        Rows of one caption share its memory.
        """
        captions_B = self.place.captions
        if self._texts[0] is not captions_B:
            self._texts = (
                captions_B,
                [
                    (first, end, *self.text_ZCHTD[:, captions].expand(-1, end - first, -1, -1, -1))
                    for captions, first, end in self.place.runs()
                ],
            )
        return self._texts[1]


def decode_plain(q_BHD: Tensor, kv_ZBHD: Tensor, kept: Kept) -> Tensor:
    """``Kept.attend`` in plain PyTorch."""
    own, keys = _slots(kept.pattern)[kept.place.i]
    kept.image_ZBHSD.select(3, own).copy_(kv_ZBHD)
    if isinstance(keys, slice):
        image_ZBHKD = kept.image_ZBHSD[:, :, :, keys]
    else:
        image_ZBHKD = kept.image_ZBHSD.index_select(3, keys.to(q_BHD.device))
    q_BH1D = q_BHD[:, :, None]
    image_BH1D, image_BH1 = _attend(q_BH1D, *image_ZBHKD)
    parts = [
        _attend(q_BH1D[first:end], k_RHTD, v_RHTD) for first, end, k_RHTD, v_RHTD in kept.texts()
    ]
    text_BH1D, text_BH1 = parts[0]
    if len(parts) > 1:
        text_BH1D, text_BH1 = map(torch.cat, zip(*parts, strict=True))
    # both are averages of values: weigh them by their sums of exp(score)
    share_BH11 = torch.sigmoid(text_BH1 - image_BH1)[..., None].to(q_BHD.dtype)
    return torch.lerp(image_BH1D, text_BH1D, share_BH11)[:, :, 0]


def _attend(q_BH1D: Tensor, k_BHKD: Tensor, v_BHKD: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys, and the logarithm of the sum of exp(score), [B, H, 1]."""
    if q_BH1D.device.type == "cpu":
        # row by row, whatever the strides: a caption that rows share is not copied
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        o_BH1D, lse_BH1 = flash(q_BH1D, k_BHKD, v_BHKD)
        return o_BH1D, lse_BH1
    s_BHK1 = (q_BH1D.float() * k_BHKD.float()).sum(-1, keepdim=True) * q_BH1D.shape[-1] ** -0.5
    o_BHD = (s_BHK1.softmax(2) * v_BHKD.float()).sum(2)
    return o_BHD[:, :, None].to(q_BH1D.dtype), s_BHK1[..., 0].logsumexp(2, keepdim=True)


@lru_cache(maxsize=16)
def _slots(pattern: Pattern) -> list[tuple[int, slice | Tensor]]:
    """Of each step its own slot and those of its keys, its own among them."""
    found: list[tuple[int, slice | Tensor]] = []
    for i in range(pattern.n_image):
        slots = pattern.key_slots(i).sort().values
        own = int(pattern.slot_of(torch.tensor(i)))
        first, end = int(slots[0]), int(slots[-1]) + 1
        found.append((own, slice(first, end) if end - first == len(slots) else slots))
    return found


@lru_cache(maxsize=64)
def _tables(pattern: Pattern, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each step its own slot, int32 [I], and those of the earlier keys, int32 [I, K], else -1.

    K is a multiple of ``MOST_IMAGE``.
    """
    slots_IK, is_key_IK = pattern.slot_table()
    own_I = pattern.slot_of(torch.arange(pattern.n_image))
    # the keys come in ascending order, so that the last of a step is its own
    n_earlier_I = is_key_IK.sum(1) - 1
    is_earlier_IK = torch.arange(slots_IK.shape[1]) < n_earlier_I[:, None]
    slots_IK = slots_IK.masked_fill(~is_earlier_IK, -1)[:, : int(n_earlier_I.max())]
    slots_IK = F.pad(slots_IK, (0, -slots_IK.shape[1] % MOST_IMAGE), value=-1)
    return own_I.to(device, torch.int32), slots_IK.contiguous().to(device, torch.int32)


def constants(pattern: Pattern, width: int, itemsize: int) -> dict[str, int]:
    """The compile-time arguments of the kernel, by name.

    Args:
        pattern: the layer's.
        width: of a head.
        itemsize: bytes of an element.
    """
    text, image = STEPS[width, itemsize]
    _, slots_IK = _tables(pattern, torch.device("cpu"))
    return {
        "T": pattern.n_text,
        "S": pattern.n_slots,
        "K": slots_IK.shape[1],
        "D": width,
        "ROWS": TILE,
        # a product has at least 16 on each side
        "TEXT": min(text, max(16, triton.next_power_of_2(pattern.n_text))),
        "IMAGE": image,
    }


# not specialised: one kernel for all batches, whatever their rows and captions
@triton.jit(do_not_specialize=["n_captions", "n_rows"])
def decode_kernel(
    p_q, p_k, p_v, p_o, p_text, p_image, p_row, p_caption, p_step, p_own, p_slots,
    s_qb, s_qh, s_kb, s_kh, s_vb, s_vh, n_head, n_captions, n_rows, scale_log2,
    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, TEXT: tl.constexpr, IMAGE: tl.constexpr,
):  # fmt: skip
    """Grid [tiles, heads]. q, k, v strided; o [B, H, D], text, image, row, slots contiguous."""
    i_m = tl.program_id(0)
    i_h = tl.program_id(1)
    o_d = tl.arange(0, D)
    if tl.load(p_row + i_m * ROWS) < 0:
        return  # a tile that this batch does not need
    o_row = tl.load(p_row + i_m * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    m_row = o_row >= 0
    i_step = tl.load(p_step)
    # 1. the token's own key and value: kept, and the first that it sees
    i_own = tl.load(p_own + i_step)
    b_q = tl.load(p_q + (o_row * s_qb + i_h * s_qh)[:, None] + o_d, mask=m_row[:, None], other=0.0)
    b_k = tl.load(p_k + (o_row * s_kb + i_h * s_kh)[:, None] + o_d, mask=m_row[:, None], other=0.0)
    b_v = tl.load(p_v + (o_row * s_vb + i_h * s_vh)[:, None] + o_d, mask=m_row[:, None], other=0.0)
    # keys and values of one row and head; what a tensor of either holds is above 2 ** 31
    s_z = n_rows.to(tl.int64) * n_head * S * D
    o_image = (o_row * n_head + i_h) * S * D
    p_kept = p_image + (o_image + i_own * D)[:, None] + o_d
    tl.store(p_kept, b_k, mask=m_row[:, None])
    tl.store(p_kept + s_z, b_v, mask=m_row[:, None])
    f_q = b_q.to(tl.float32)
    b_max = tl.sum(f_q * b_k.to(tl.float32), 1) * scale_log2
    b_sum = tl.full([ROWS], 1.0, tl.float32)
    b_acc = b_v.to(tl.float32)
    # 2. the earlier image tokens, those of each row; rows stand between keys and width, so that a
    # thread has all keys of its row: sums over keys then need no other thread
    p_row_image = p_image + o_image[:, None] + o_d
    p_slots += i_step * K + tl.arange(0, IMAGE)
    for i_first in tl.range(0, K, IMAGE):
        o_slot = tl.load(p_slots + i_first)
        m_k = (o_slot >= 0)[:, None] & m_row[None, :]
        p_ik = p_row_image[None, :, :] + (o_slot * D)[:, None, None]
        b_ik = tl.load(p_ik, mask=m_k[:, :, None], other=0.0).to(tl.float32)
        b_iv = tl.load(p_ik + s_z, mask=m_k[:, :, None], other=0.0).to(tl.float32)
        b_s = tl.sum(f_q[None, :, :] * b_ik, 2) * scale_log2
        b_s = tl.where(m_k, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 0))
        b_p = tl.exp2(b_s - b_new[None, :])
        b_fade = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_fade + tl.sum(b_p, 0)
        b_acc = b_acc * b_fade[:, None] + tl.sum(b_p[:, :, None] * b_iv, 0)
        b_max = b_new
    # 3. the caption, one product for all rows
    i_c = tl.load(p_caption + i_m).to(tl.int64)
    p_text += (i_c * n_head + i_h) * T * D
    s_z_text = n_captions.to(tl.int64) * n_head * T * D
    EVEN: tl.constexpr = T % TEXT == 0
    for t_first in tl.range(0, T, TEXT):
        t_k = t_first + tl.arange(0, TEXT)
        p_t = p_text + t_k[:, None] * D + o_d
        if EVEN:
            b_tk = tl.load(p_t)
            b_tv = tl.load(p_t + s_z_text)
        else:
            b_tk = tl.load(p_t, mask=(t_k < T)[:, None], other=0.0)
            b_tv = tl.load(p_t + s_z_text, mask=(t_k < T)[:, None], other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_tk), input_precision="ieee")
        if not EVEN:
            b_s = tl.where((t_k < T)[None, :], b_s, float("-inf"))
        b_acc, b_max, b_sum = softmax_step(b_acc, b_max, b_sum, b_s, b_tv, scale_log2)
    b_o = (b_acc / b_sum[:, None]).to(p_o.dtype.element_ty)
    tl.store(p_o + ((o_row * n_head + i_h) * D)[:, None] + o_d, b_o, mask=m_row[:, None])


def decode_triton(q_BHD: Tensor, kv_ZBHD: Tensor, kept: Kept) -> Tensor:
    """``Kept.attend`` by the kernel."""
    place = kept.place
    B, H, D = q_BHD.shape
    own_I, slots_IK = kept.tables
    o_BHD = q_BHD.new_empty(B, H, D)
    k_BHD, v_BHD = kv_ZBHD
    strides = [n for x_BHD in (q_BHD, k_BHD, v_BHD) for n in x_BHD.stride()[:2]]
    with torch.cuda.device_of(q_BHD):
        decode_kernel[(len(place.caption_M), H)](
            q_BHD, k_BHD, v_BHD, o_BHD, kept.text_ZCHTD, kept.image_ZBHSD,
            place.row_MR, place.caption_M, place.i_1, own_I, slots_IK,
            *strides, H, place.n_captions, place.n_rows, D**-0.5 * LOG2_E,
            **kept.constants, **LAUNCH,
        )  # fmt: skip
    return o_BHD
