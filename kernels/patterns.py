"""Which token may look at which: the attention patterns of DALL-E, from one rule.

Ramesh et al. 2021 (arXiv 2102.12092), appendix B.1 and figure 11. A sequence is ``n_text``
text tokens followed by a ``grid`` x ``grid`` image in raster order. A text query sees the text
up to itself. An image query sees all text and, of the image, itself and the earlier tokens that
its pattern names; with ``m = q - k`` the distance between two image tokens and ``W = grid``:

    row     m <= W: the W tokens before it, across the border of grid rows
    column  m mod W == 0: the tokens above it
    conv    m = dr * W + ((-dc) mod W), 0 <= dr <= R, -R <= dc <= R, R = kernel // 2
    dense   every m

Everything below (dense mask, pair count, key lists, cache slots) is derived from ``sees``.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor

Kind = Literal["row", "column", "conv", "dense"]
Edge = Literal["wrap", "clamp"]


@dataclass(frozen=True)
class Pattern:
    """An attention pattern over ``n_text`` text tokens and a ``grid`` x ``grid`` image.

    Args:
        kind: "row", "column", "conv" or "dense".
        n_text: text tokens in front of the image, 0 or more.
        grid: side W of the square image grid, 1 or more.
        kernel: side of the convolution window, odd; only "conv" reads it. 11: appendix B.1.
        edge: "wrap" is figure 11(d): the window continues across the left and right border.
            "clamp" cuts it there, as the v3 masks of ru-dalle do; only for "conv".

    Raises:
        ValueError: an argument outside these bounds.
    """

    kind: Kind
    n_text: int
    grid: int
    kernel: int = 11
    edge: Edge = "wrap"
    # all of it in one string, for operators of torch, which take no objects
    spelled: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; choose one of {', '.join(get_args(Kind))}")
        for name, least in (("n_text", 0), ("grid", 1), ("kernel", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be an int of at least {least}")
        if self.kernel % 2 == 0:
            raise ValueError(
                f"kernel is {self.kernel}; it must be odd to have a centre, "
                f"take {self.kernel - 1} or {self.kernel + 1}"
            )
        if self.edge not in get_args(Edge):
            raise ValueError(f"edge is {self.edge!r}; choose one of {', '.join(get_args(Edge))}")
        if self.edge == "clamp" and self.kind != "conv":
            raise ValueError(
                f"edge 'clamp' is for kind 'conv', not {self.kind!r}; leave edge at 'wrap'"
            )
        spelled = f"{self.kind} {self.n_text} {self.grid} {self.kernel} {self.edge}"
        object.__setattr__(self, "spelled", spelled)

    @staticmethod
    @lru_cache(maxsize=64)
    def read(spelled: str) -> "Pattern":
        """The pattern whose ``spelled`` this is."""
        kind, n_text, grid, kernel, edge = spelled.split()
        return Pattern(cast(Kind, kind), int(n_text), int(grid), int(kernel), cast(Edge, edge))

    @property
    def n_image(self) -> int:
        """Image tokens, ``grid ** 2``."""
        return self.grid**2

    @property
    def n_tokens(self) -> int:
        """Text and image tokens: the N of ``mask`` and of ``sparse_attention``."""
        return self.n_text + self.n_image

    @property
    def radius(self) -> int:
        """Grid cells that a convolution window reaches from its centre."""
        return self.kernel // 2

    @property
    def reach(self) -> int:
        """The largest distance ``q - k`` at which an image query can see an image token."""
        last = self.n_image - 1
        if self.kind == "row":
            return min(self.grid, last)
        if self.kind == "column":
            return last - self.grid + 1
        if self.kind == "dense":
            return last
        if self.radius == 0:
            return 0
        # figure 11(d): the cell right of the centre is one short of a grid row further back
        across = self.grid - 1 if self.edge == "wrap" else min(self.radius, self.grid - 1)
        return min(self.radius * self.grid + across, last)

    def sees(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether image query ``q`` sees image token ``k``: the rule of the module docstring.

        Args:
            q: image-token indices, 0 to n_image - 1, integer.
            k: likewise, of a shape that broadcasts with q's.

        Returns:
            bool, of the broadcast shape.
        """
        m = q - k
        causal = m >= 0
        if self.kind == "dense":
            return causal
        if self.kind == "row":
            return causal & (m <= self.grid)
        if self.kind == "column":
            return causal & (m % self.grid == 0)
        if self.edge == "wrap":
            # -R <= dc <= R, with dc known only modulo W
            near = (m + self.radius) % self.grid <= 2 * self.radius
            return causal & near & (m // self.grid <= self.radius)
        down = q // self.grid - k // self.grid
        across = q % self.grid - k % self.grid
        return causal & (down <= self.radius) & (across.abs() <= self.radius)

    def mask(self) -> Tensor:
        """The dense mask, bool [N, N] on the CPU: True where query (row) sees key (column)."""
        token = torch.arange(self.n_tokens, device="cpu")
        mask = token[:, None] >= token[None, :]
        mask[self.n_text :, self.n_text :] = self._image_mask()
        return mask

    def pairs(self) -> int:
        """How many (query, key) pairs are attended, ``mask().sum()``, counted in closed form."""
        text = self.n_text * (self.n_text + 1) // 2 + self.n_text * self.n_image
        W, n, R = self.grid, self.n_image, self.radius
        if self.kind == "dense":
            return text + n * (n + 1) // 2
        if self.kind == "row":
            return text + sum(min(W, i) + 1 for i in range(n))
        if self.kind == "column":
            return text + W * (W * (W + 1) // 2)
        if self.edge == "wrap":
            distances = {dr * W + -dc % W for dr in range(R + 1) for dc in range(-R, R + 1)}
            return text + sum(max(0, n - m) for m in distances)
        left = sum(min(R, c) for c in range(W))
        rows_above = sum(min(R, r) for r in range(W))
        # own grid row: the cell and its left; each row above: left, cell and right
        return text + W * (left + W) + rows_above * (2 * left + W)

    def image_keys(self, i: int) -> Tensor:
        """The image tokens that image query ``i`` sees, itself included.

        Returns:
            int64 [keys] on the CPU, ascending, counted from the first image token.

        Raises:
            ValueError: ``i`` is not an image token.
        """
        if not 0 <= i < self.n_image:
            raise ValueError(f"image query {i} is outside the image; use 0 to {self.n_image - 1}")
        keys = torch.arange(max(0, i - self.reach), i + 1, device="cpu")
        return keys[self.sees(torch.tensor(i, device="cpu"), keys)]

    @property
    def n_slots(self) -> int:
        """Slots of image keys and values that a layer must keep while it decodes."""
        return self.reach + 1

    def slot_of(self, j: Tensor) -> Tensor:
        """The slot that image tokens ``j`` live in, from step j until no later query sees them.

        A ring, ``j % n_slots``; for "column" the grid column by column, so that the keys of a query
        are neighbours: W - 1 slots a column and one more, the last, which the tokens of the last
        grid row have by turns, for only they see themselves.
        """
        if self.kind != "column":
            return j % self.n_slots
        row, column = j // self.grid, j % self.grid
        last = self.grid - 1
        return torch.where(row < last, column * last + row, self.grid * last)

    def key_slots(self, i: int) -> Tensor:
        """The slots that hold ``image_keys(i)`` at decoding step ``i``, in the same order.

        Token i must be written before it is read: its own slot is among them.

        Returns:
            int64 [keys] on the CPU, all different.

        Raises:
            ValueError: ``i`` is not an image token.
        """
        return self.slot_of(self.image_keys(i))

    def slot_table(self) -> tuple[Tensor, Tensor]:
        """``key_slots`` of every step, padded to one width so that a tensor can index it.

        Returns:
            slots: int64 [n_image, K_max] on the CPU; row i starts with ``key_slots(i)``, then 0.
            is_key: bool [n_image, K_max]; False where a slot is padding and must get no weight.
        """
        sees = self._image_mask()
        counts = sees.sum(1)
        is_key = torch.arange(int(counts.max()), device="cpu") < counts[:, None]
        slots = torch.zeros(is_key.shape, dtype=torch.int64, device="cpu")
        # nonzero lists the pairs row by row with ascending keys, the order in which is_key fills
        slots[is_key] = self.slot_of(sees.nonzero()[:, 1])
        return slots, is_key

    def _image_mask(self) -> Tensor:
        token = torch.arange(self.n_image, device="cpu")
        return self.sees(token[:, None], token[None, :])


@lru_cache(maxsize=64)
def mask_on(pattern: Pattern, device: torch.device) -> Tensor:
    """``pattern.mask()`` on ``device``, built once and shared: the caller must not write to it."""
    # a tensor born in inference mode could never be saved for a backward pass later
    with torch.inference_mode(False):
        return pattern.mask().to(device)
