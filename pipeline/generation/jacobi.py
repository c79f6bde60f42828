"""Several image tokens a pass: drafts that a model confirms, and the very picture of one a step.

A sampler's token is a function of its logits and of the noise of its position (``draw.noise``). So
a picture is the one solution of I equations, and Jacobi's iteration finds it: draw a window of
tokens at once, each as if the drafts before it were right, and again from what was drawn. What
stands behind nothing but confirmed tokens is right, and at least one more is after each pass. Song
et al. (arXiv 2002.03629) solve networks so, Wiggers and Hoogeboom (2002.09928) with the noise held.
Speculative Jacobi decoding (2410.01699) draws fresh noise in each pass and accepts or rejects: the
same distribution, but other pictures, and no fewer passes.

One picture at a time: rows of a batch would wait for the slowest of them at every pass, and with
16 of them nothing was left of what is gained (measured).

Letters: B rows (the picture, and once more without its caption for guidance), T text positions, I
image positions, N positions of a window, R = B * N, K keys (T + I), H heads, D head width, Z keys
(0) and values (1), V image vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Pattern
from pipeline.generation.draw import guide, require_numbers
from pipeline.generation.step import block_step
from pipeline.models.dalle import NO_TOKEN, Block, Dalle, layer_patterns

WINDOW = 16  # positions of a pass, confirmed token included


class Window:
    """Where a pass is: image positions ``first`` to ``end`` - 1."""

    first = 0
    end = 0


class WindowCache:
    """Keys and values of one layer at all positions, those of drafts overwritten by later passes.

    Args:
        mask_IK: added to the scores of image queries and all T + I keys, in the dtype of q, k and v
            and on their device.
        window: shared by the layers.
        n_rows: B.
        n_head: H.
        d_head: D.
    """

    def __init__(
        self, mask_IK: Tensor, window: Window, n_rows: int, n_head: int, d_head: int
    ) -> None:
        self.mask_IK, self.window = mask_IK, window
        n_image, n_tokens = mask_IK.shape
        self.n_text = n_tokens - n_image
        self.kept_ZBHKD = mask_IK.new_empty(2, n_rows, n_head, n_tokens, d_head)
        self.row = 0  # whose caption is read

    def attend(self, q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor) -> Tensor:
        """Of the caption of ``row``, [1, T, H, D]: keep its keys and values."""
        q_BHND, k_BHND, v_BHND = (x.transpose(1, 2) for x in (q_BNHD, k_BNHD, v_BNHD))
        self.kept_ZBHKD[0, self.row, :, : self.n_text] = k_BHND[0]
        self.kept_ZBHKD[1, self.row, :, : self.n_text] = v_BHND[0]
        o_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, is_causal=True)
        return o_BHND.transpose(1, 2)

    def attend_window(self, q_RHD: Tensor, kv_ZRHD: Tensor) -> Tensor:
        """Of the positions of the window, row by row: o_RHD, contiguous."""
        _, B, H, _, D = self.kept_ZBHKD.shape
        first, end = self.window.first, self.window.end
        kv_ZBHND = kv_ZRHD.view(2, B, -1, H, D).transpose(2, 3)
        self.kept_ZBHKD[:, :, :, self.n_text + first : self.n_text + end] = kv_ZBHND
        k_BHKD, v_BHKD = self.kept_ZBHKD[:, :, :, : self.n_text + end]
        mask_NK = self.mask_IK[first:end, : self.n_text + end]
        q_BHND = q_RHD.view(B, -1, H, D).transpose(1, 2)
        o_BHND = F.scaled_dot_product_attention(q_BHND, k_BHKD, v_BHKD, attn_mask=mask_NK)
        return o_BHND.transpose(1, 2).reshape(-1, H, D)


class JacobiDecoder:
    """Image tokens of one picture, a window of them a pass.

    The picture is that of ``Decoder`` with the same noise, up to rounding.

    Args:
        model: to sample from.
        guidance: see ``Settings``; None for none.
        draw: tokens int64 [N, 1] from logits float32 [N, V] and noise float64 [N, 1].
        window: positions of a pass.
    """

    n_captions = 1

    def __init__(
        self,
        model: Dalle,
        guidance: float | None,
        draw: Callable[[Tensor, Tensor], Tensor],
        window: int = WINDOW,
    ) -> None:
        self.model, self.guidance, self.draw = model, guidance, draw
        self.size, self.window = window, Window()
        self.n_rows = 1 if guidance is None else 2
        self.n_passes = 0  # of the last picture
        self.caches = _caches_of(model, self.window, self.n_rows)
        self.steps = [
            block_step(block, cache.attend_window)
            for block, cache in zip(model.blocks, self.caches, strict=True)
            if isinstance(block, Block)
        ]
        self._captions: list[tuple[int, ...]] = []
        self._place_I = torch.arange(model.config.n_image, device=model.image_head.weight.device)

    def decode(
        self,
        text_1T: Tensor,
        noise_1I: Tensor,
        given_1I: Tensor,
        after: Callable[[int, Tensor], None],
    ) -> Tensor:
        """``Decoder.decode``; ``after`` is called once for every token that is certain."""
        self._read(text_1T)
        n_image, n_given = self.model.config.n_image, given_1I.shape[1]
        device = self._place_I.device
        # a start, then the tokens
        read_1I = torch.full((1, 1 + n_image), NO_TOKEN, device=device)
        codes_1I = read_1I[:, 1:]
        codes_1I[:, :n_given] = given_1I
        codes_I, noise_I1 = codes_1I[0], noise_1I.to(device).t()
        self.n_passes, first, drafted = 0, 0, n_given
        while first < n_image:
            end = min(first + self.size, n_image)
            _draft(codes_I, drafted, end, self.model.config.grid)
            logits_NV = self._pass(read_1I, first, end)
            if self.n_passes == 0:
                require_numbers(logits_NV)
            drawn_N = self.draw(logits_NV, noise_I1[first:end])[:, 0]
            fixed = min(max(n_given - first, 0), end - first)
            drawn_N[:fixed] = codes_I[first : first + fixed]
            is_same_N = drawn_N == codes_I[first:end]
            codes_I[first:end] = drawn_N
            # the first that differs was drawn behind right ones
            n_right = min(int(is_same_N.long().cumprod(0).sum()) + 1, end - first)
            for i in range(first, first + n_right):
                after(i + 1, codes_1I)
            first, drafted = first + n_right, max(end, n_given)
            self.n_passes += 1
        return codes_1I

    def _read(self, text_1T: Tensor) -> None:
        """Read the caption, and that of no words, unless they are those of the last picture."""
        captions = [tuple(text_1T[0].tolist()), (NO_TOKEN,) * text_1T.shape[1]][: self.n_rows]
        for row, caption in enumerate(captions):
            if self._captions[row : row + 1] == [caption]:
                continue
            for cache in self.caches:
                cache.row = row
            x_1TC = self.model.text_embedding(torch.tensor([caption], device=self._place_I.device))
            for block, cache in zip(self.model.blocks, self.caches, strict=True):
                x_1TC = block(x_1TC, cache)
        self._captions = captions

    def _pass(self, read_1I: Tensor, first: int, end: int) -> Tensor:
        """Logits of the tokens ``first`` to ``end`` - 1, float32 [N, V]."""
        self.window.first, self.window.end = first, end
        read_BN = read_1I[:, first:end].expand(self.n_rows, -1)
        x_RC = self.model.image_embedding(read_BN, self._place_I[first:end]).flatten(0, 1)
        for step in self.steps:
            x_RC = step(x_RC)
        return guide(self.model.image_head(self.model.norm(x_RC)), self.guidance)


def _draft(codes_I: Tensor, first: int, end: int, grid: int) -> None:
    """Guess tokens that no pass has drawn: the one above, in the first grid row the one before."""
    for i in range(first, end):
        source = i - grid if i >= grid else i - 1
        codes_I[i] = codes_I[source] if source >= 0 else 0


def _caches_of(model: Dalle, window: Window, n_rows: int) -> list[WindowCache]:
    config = model.config
    block = model.blocks[0]
    assert isinstance(block, Block)
    dtype, device = block.attention.qkv.compute_dtype, model.image_head.weight.device
    patterns = layer_patterns(config)
    # layers of one pattern share it
    masks = {pattern: _mask(pattern).to(device, dtype) for pattern in set(patterns)}
    d_head = config.d_model // config.n_head
    return [
        WindowCache(masks[pattern], window, n_rows, config.n_head, d_head) for pattern in patterns
    ]


def _mask(pattern: Pattern) -> Tensor:
    """0 where an image query sees a key, else minus infinity, float32 [I, T + I]."""
    sees_IK = pattern.mask()[pattern.n_text :]
    return torch.zeros(sees_IK.shape).masked_fill(~sees_IK, float("-inf"))
