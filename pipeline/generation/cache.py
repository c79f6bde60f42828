"""Keys and values of one layer while a picture is decoded, bounded by the layer's pattern.

A row layer never looks further back than one grid row and one token, so it keeps a ring of
grid + 1 image tokens; conv keeps as far as its window reaches; column keeps the image. In front
of the ring lies the whole caption, which every image token sees (figure 11). All shapes are the
same at every step: what a step must not see gets a score of minus infinity.

Letters: Z keys (0) and values (1), B batch, H heads, N positions of this call, D head width, S
positions that are attended to: T text positions, then the K image keys of a step; I steps.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Pattern


class BoundedCache:
    """The ``KeyValueCache`` of one layer: the caption first, then one image token a call.

    Equal to the training forward under ``pattern`` up to rounding. ``restart`` makes it fit for
    the next pictures.

    Args:
        pattern: the layer's.
        batch: B of every call.
        n_head: H.
        d_head: D.
        dtype: of q, k and v.
        device: likewise.
    """

    def __init__(
        self,
        pattern: Pattern,
        batch: int,
        n_head: int,
        d_head: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.n_text, self.n_slots = pattern.n_text, pattern.n_slots
        slots_IK, hidden_IS, self.moves = _tables(pattern)
        n_keys = slots_IK.shape[1]
        self.slots_IK = slots_IK.to(device)
        # [I, 1, S]: one query a step
        self.hidden_I1S = hidden_IS[:, None].to(device, dtype)
        # zeros: a slot without weight must still be a number
        shape_ZBH = (2, batch, n_head)
        self.seen_ZBHSD = torch.zeros(
            *shape_ZBH, pattern.n_text + n_keys, d_head, dtype=dtype, device=device
        )
        self.ring_ZBHSD = self.seen_ZBHSD[:, :, :, pattern.n_text :]
        if self.moves:
            self.ring_ZBHSD = self.seen_ZBHSD.new_zeros(*shape_ZBH, pattern.n_slots, d_head)
        self.step = -1

    def restart(self) -> None:
        """Expect a caption next."""
        self.step = -1

    def attend(self, q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor) -> Tensor:
        """Keep these keys and values and attend to all that the pattern shows these queries.

        The first call brings all T text positions, the others one image position each, in order.

        Returns:
            o_BNHD, in the dtype of q.
        """
        q_BHND = q_BNHD.transpose(1, 2)
        if self.step < 0:
            assert q_BNHD.shape[1] == self.n_text, "the first call brings the caption"
            o_BHND = self._read_caption(q_BHND, k_BNHD.transpose(1, 2), v_BNHD.transpose(1, 2))
        else:
            assert q_BNHD.shape[1] == 1, "after the caption each call brings one image token"
            self._keep(k_BNHD, v_BNHD)
            k_BHSD, v_BHSD = self.seen_ZBHSD.unbind(0)
            o_BHND = F.scaled_dot_product_attention(
                q_BHND, k_BHSD, v_BHSD, attn_mask=self.hidden_I1S[self.step]
            )
        self.step += 1
        return o_BHND.transpose(1, 2)

    def _read_caption(self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        self.seen_ZBHSD[0, :, :, : self.n_text] = k_BHTD
        self.seen_ZBHSD[1, :, :, : self.n_text] = v_BHTD
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)

    def _keep(self, k_BNHD: Tensor, v_BNHD: Tensor) -> None:
        """Put this image token into its slot, and what this step sees behind the caption."""
        slot = self.step % self.n_slots
        self.ring_ZBHSD[0, :, :, slot] = k_BNHD[:, 0]
        self.ring_ZBHSD[1, :, :, slot] = v_BNHD[:, 0]
        if self.moves:
            keys_ZBHSD = self.ring_ZBHSD.index_select(3, self.slots_IK[self.step])
            self.seen_ZBHSD[:, :, :, self.n_text :] = keys_ZBHSD


@lru_cache(maxsize=8)
def _tables(pattern: Pattern) -> tuple[Tensor, Tensor, bool]:
    """What each step sees, shared by layers of one pattern: never write to it.

    Returns:
        The slots whose keys a step needs, [I, K]; 0 or minus infinity for each position it
        attends to, [I, S]; and whether the keys must be moved to stand behind the caption: where
        a step can see the whole ring, the ring itself stands there.
    """
    slots_IK, is_key_IK = pattern.slot_table()
    n_keys = slots_IK.shape[1]
    moves = n_keys < pattern.n_slots
    place_IK = torch.arange(n_keys).expand_as(slots_IK) if moves else slots_IK
    hidden_IS = torch.full((pattern.n_image, pattern.n_text + n_keys), float("-inf"))
    hidden_IS[:, : pattern.n_text] = 0
    step_IK = torch.arange(pattern.n_image)[:, None].expand_as(slots_IK)
    hidden_IS[step_IK[is_key_IK], pattern.n_text + place_IK[is_key_IK]] = 0
    return slots_IK, hidden_IS, moves
