"""The loss of CLIP over ranks: every caption against the pictures of all of them (2103.00020, 2.3).

Each rank computes its own rows of the two tables of cosines, so that no rank holds a whole one;
features of the other ranks come by a gather that gradients go back through.

Letters: B pictures of this rank, A of all ranks, E features.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Rows of all ranks, one rank behind the other; a gradient is summed and cut again."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.rank, ctx.n = dist.get_rank(), len(own)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # each rank's share of the loss hangs on the features of all ranks
        summed = gradients[0].contiguous()
        dist.all_reduce(summed)
        return summed[ctx.rank * ctx.n : (ctx.rank + 1) * ctx.n]


def contrastive_share(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's share of the loss: those of all ranks add up to it, and their gradients too.

    Args:
        image_BE: features of pictures, of unit length, as many on each rank.
        text_BE: of their captions.
        scale: of the cosines.

    Returns:
        The share, and how many of this rank's pictures are nearest to their own caption among all.
    """
    images_AE, texts_AE, first = image_BE, text_BE, 0
    if dist.is_initialized() and dist.get_world_size() > 1:
        images_AE, texts_AE = _Gather.apply(image_BE), _Gather.apply(text_BE)
        first = dist.get_rank() * len(image_BE)
    own_B = torch.arange(first, first + len(image_BE), device=image_BE.device)
    to_texts_BA = scale * image_BE.float() @ texts_AE.float().T
    to_images_BA = scale * text_BE.float() @ images_AE.float().T
    both = F.cross_entropy(to_texts_BA, own_B, reduction="sum")
    both = both + F.cross_entropy(to_images_BA, own_B, reduction="sum")
    n_right = (to_texts_BA.argmax(-1) == own_B).sum()
    return both / (2 * len(images_AE)), n_right
