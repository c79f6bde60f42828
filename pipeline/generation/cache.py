"""Keys and values of all layers while pictures are decoded, bounded by the layers' patterns.

A row layer never looks further back than one grid row, so it keeps grid + 1 image tokens of each
picture; conv keeps as far as its window reaches; column keeps all rows of the grid but the last. A
caption, which every image token sees (figure 11), is kept once for all pictures that are drawn of
it (kernels.attention.decode).

Letters: B rows of a batch, C captions, T text positions, N positions of a call, H heads, D head
width, I image tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Pattern
from kernels.attention.decode import Kept, Place


class BoundedCache:
    """The ``KeyValueCache`` of one layer: captions one by one, then one image token a call.

    Equal to the training forward under ``pattern`` up to rounding.

    Args:
        pattern: the layer's.
        place: of the batch, shared by its layers.
        n_head: H.
        d_head: D.
        dtype: of q, k and v.
    """

    def __init__(
        self, pattern: Pattern, place: Place, n_head: int, d_head: int, dtype: torch.dtype
    ) -> None:
        self.kept = Kept(pattern, place, n_head, d_head, dtype)
        self.reading: int | None = None  # the caption whose keys and values come next

    def attend(self, q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor) -> Tensor:
        """Keep these keys and values and attend to all that the pattern shows these queries.

        While a caption is ``reading`` a call brings its T positions, [1, T, H, D], else the image
        token at ``place`` of every row, [B, 1, H, D].

        Returns:
            o_BNHD, in the dtype of q.
        """
        if self.reading is None:
            kv_ZBHD = torch.stack([k_BNHD[:, 0], v_BNHD[:, 0]])
            return self.kept.attend(q_BNHD[:, 0], kv_ZBHD)[:, None]
        q_BHTD, k_BHTD, v_BHTD = (x.transpose(1, 2) for x in (q_BNHD, k_BNHD, v_BNHD))
        self.kept.text_ZCHTD[0, self.reading] = k_BHTD[0]
        self.kept.text_ZCHTD[1, self.reading] = v_BHTD[0]
        o_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        return o_BHTD.transpose(1, 2)
