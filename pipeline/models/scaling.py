"""Where a residual block's gradient takes its scale and gives it back (section 2.4, figure 4).

    x -> enter -> LayerNorm (float32) -> f (16 bits) -> leave -> + x

Forward, both do nothing but change the type. Backward, ``leave`` drops what is not finite,
multiplies by the block's scale and goes to 16 bits; ``enter`` divides by it and drops what is not
finite, so that a block that overflowed does not spoil those before it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Scale:
    """The gradient scale of one block; training sets it between updates."""

    value: float = 1.0


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Scale) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _finite(gradient.float() / ctx.scale.value), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Scale) -> Tensor:
        ctx.scale, ctx.dtype = scale, y.dtype
        return y.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (_finite(gradient) * ctx.scale.value).to(ctx.dtype), None


def _finite(gradient: Tensor) -> Tensor:
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def enter(x: Tensor, scale: Scale | None) -> Tensor:
    """The stream where a block begins, float32; ``scale`` None for none."""
    return x if scale is None else _Enter.apply(x, scale)


def leave(y: Tensor, scale: Scale | None) -> Tensor:
    """What a block adds to the stream: any type to float32."""
    return y.float() if scale is None else _Leave.apply(y, scale)
