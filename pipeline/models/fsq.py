"""Finite scalar quantisation: a codebook that nobody learns, so that none of it falls out of use.

Mentzer et al. 2023 (arXiv 2309.15505): each position has L numbers, number i is bounded and rounded
to one of ``levels[i]`` values, and the L values together are the code. Letters: B batch, L numbers
of a position, Y X grid of codes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPS = 1e-3  # keeps the outermost values within the reach of tanh: appendix A.1


class Fsq(nn.Module):
    """Positions [B, L, Y, X] to values that codes [B, Y, X] stand for, and back; no weights."""

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.n_channels = len(levels)
        self.n_vocab = math.prod(levels)
        # whole numbers, for a model in 16 bit must not round them
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        for name, values in (("levels", levels), ("basis", basis)):
            column = torch.tensor(values, dtype=torch.int64).view(1, -1, 1, 1)
            self.register_buffer(name, column, persistent=False)

    levels: Tensor
    basis: Tensor  # of the mixed-radix number that is the code; the first value counts ones

    def bounded(self, z_BLYX: Tensor) -> Tensor:
        """``z`` in an interval with ``levels[i]`` whole numbers, float32 (section 3, appendix A.1).

        For an even number of levels it reaches half a step further down than up, and the shift
        keeps 0 near 0.
        """
        half = (self.levels - 1).float() * (1 - EPS) / 2
        offset = (self.levels % 2 == 0).float() / 2
        shift = torch.tan(offset / half)
        return torch.tanh(z_BLYX.float() + shift) * half - offset

    def forward(self, z_BLYX: Tensor) -> Tensor:
        """The values of ``z``'s codes, in [-1, 1]; gradients pass the rounding as they are."""
        bounded = self.bounded(z_BLYX)
        rounded = bounded + (torch.round(bounded) - bounded).detach()
        return rounded / (self.levels // 2)

    def codes(self, z_BLYX: Tensor) -> Tensor:
        """Codes int64 [B, Y, X] in [0, n_vocab) of positions."""
        digits = torch.round(self.bounded(z_BLYX)).long() + self.levels // 2
        return (digits * self.basis).sum(dim=1)

    def values(self, codes_BYX: Tensor) -> Tensor:
        """The values [B, L, Y, X] of codes, float32 in [-1, 1]."""
        digits = codes_BYX[:, None] // self.basis % self.levels
        half_width = self.levels // 2
        return (digits - half_width).float() / half_width
