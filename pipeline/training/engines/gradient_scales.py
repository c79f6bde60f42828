"""One gradient scale a residual block: what keeps 16-bit floats alive at 12 billion (2.4, app. D).

Gradients of blocks differ by orders of magnitude, more so the deeper the model: one scale for all
of them loses those of some blocks below the smallest 16-bit number, or others above the largest.
The paper gives each block its own. A gradient is multiplied by it where it enters the block from
behind and divided where it leaves; a block whose gradients overflow does not update, and its scale
shrinks; else it grows, slowly.

The scales that the paper names belong to a loss divided by the batch of all M GPUs: they begin at
M * 2^13. The loss of a rank carries the factor M here, for DeepSpeed averages over ranks, so the
same 16-bit gradients come with 2^13.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.console import InputError
from pipeline.models.scaling import Scale

START = 2.0**13
LOWEST, HIGHEST = 2.0**7, 2.0**24
GROWTH = 2.0 ** (1 / 1000)  # after an update of the block
SHRINKAGE = 1 / math.sqrt(2)  # after one that overflowed
PAUSE = 125  # updates between two times that a scale shrinks


@dataclass
class _Block:
    """A scale and what became of it."""

    scale: Scale
    shrunk: int = -PAUSE  # the update after which it last shrank
    skips: int = 0


class GradientScales:
    """The scales of a model's blocks, and whether each of them updates.

    Args:
        scales: block -> its scale, which is set to ``START``; the order is that of the flags.

    Attributes:
        updates: seen so far.
        looks: whether the next update counts zeros.
        zeros: of the last one that did, elements that were zero and all elements of this rank's
            gradients of each block, [blocks, 2].
    """

    def __init__(self, scales: dict[str, Scale]) -> None:
        self._blocks = {name: _Block(scale) for name, scale in scales.items()}
        for scale in scales.values():
            scale.value = START
        self.updates = 0
        self.looks = False
        self.zeros = torch.zeros(len(scales), 2)

    @property
    def names(self) -> list[str]:
        """The blocks, in the order of their flags."""
        return list(self._blocks)

    @torch.no_grad()
    def unscale(
        self,
        gradients: dict[str, list[Tensor]],
        all_reduce_max: Callable[[Tensor], Tensor],
    ) -> dict[str, bool]:
        """Bring gradients back to their size, in place; those of a block that overflowed become 0.

        Args:
            gradients: of each block, float32: of a shard, all that this rank has of them.
            all_reduce_max: the largest over the ranks, for a block is skipped on all or on none.

        Returns:
            Block -> whether its update is to be skipped. The scales are those of the next update.
        """
        device = next((g.device for parts in gradients.values() for g in parts), None)
        if self.looks:
            self.zeros = torch.tensor([_zeros(gradients.get(name, [])) for name in self._blocks])
        flags = [_overflows(gradients.get(name, [])) for name in self._blocks]
        found = all_reduce_max(torch.stack([flag.to(device) for flag in flags])).tolist()
        skipped = {}
        for (name, block), is_bad in zip(self._blocks.items(), map(bool, found), strict=True):
            for gradient in gradients.get(name, []):
                if is_bad:
                    gradient.zero_()
                else:
                    gradient.div_(block.scale.value)
            self._adapt(block, is_bad)
            skipped[name] = is_bad
        self.updates += 1
        return skipped

    def _adapt(self, block: _Block, is_bad: bool) -> None:
        if not is_bad:
            block.scale.value = min(HIGHEST, block.scale.value * GROWTH)
            return
        block.skips += 1
        if self.updates - block.shrunk >= PAUSE:
            block.scale.value = max(LOWEST, block.scale.value * SHRINKAGE)
            block.shrunk = self.updates

    def figures(self) -> dict[str, float]:
        """Of all blocks: the share of skipped updates so far, the smallest and largest scale."""
        scales = [block.scale.value for block in self._blocks.values()]
        made = max(1, self.updates * len(self._blocks))
        return {
            "skipped_share": sum(block.skips for block in self._blocks.values()) / made,
            "scale_log2_min": math.log2(min(scales)),
            "scale_log2_max": math.log2(max(scales)),
        }

    def by_block(self, zeros: Tensor) -> dict[str, float]:
        """Scale, share of skipped updates and of zeros of each block, as BLOCK/NAME.

        ``zeros``: of all ranks, added up.
        """
        found = {}
        for (name, block), (n_zero, n) in zip(self._blocks.items(), zeros.tolist(), strict=True):
            found[f"{name}/scale_log2"] = math.log2(block.scale.value)
            found[f"{name}/skipped_share"] = block.skips / max(1, self.updates)
            found[f"{name}/zero_share"] = n_zero / max(1, n)
        return found

    def state(self) -> dict[str, Any]:
        """JSON values from which ``restore`` goes on."""
        return {
            "updates": self.updates,
            "blocks": {
                name: [block.scale.value, block.shrunk, block.skips]
                for name, block in self._blocks.items()
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``.

        Raises:
            InputError: it is none, or that of other blocks.
        """
        try:
            blocks = {name: tuple(values) for name, values in state["blocks"].items()}
            if blocks.keys() != self._blocks.keys():
                raise KeyError(f"the blocks {sorted(blocks.keys() ^ self._blocks.keys())[:3]}")
            for name, (scale, shrunk, skips) in blocks.items():
                block = self._blocks[name]
                block.scale.value, block.shrunk, block.skips = float(scale), int(shrunk), int(skips)
            self.updates = int(state["updates"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"the checkpoint's gradient scales lack or garble {error}: delete that checkpoint "
                "to go on from the one before"
            ) from error


def _overflows(gradients: Sequence[Tensor]) -> Tensor:
    """1 when anything is not finite, else 0; without waiting for the device."""
    if not gradients:
        return torch.zeros(())
    # a norm is not finite when an element is not, and overflows in float32 only beyond 1e19
    norms = torch._foreach_norm(list(gradients), float("inf"))
    return (~torch.isfinite(torch.stack(norms)).all()).float()


def _zeros(gradients: Sequence[Tensor]) -> tuple[float, float]:
    """Elements that are exactly zero, those that 16 bits could not hold among them; and all."""
    n = sum(gradient.numel() for gradient in gradients)
    return float(sum(int((gradient == 0).sum()) for gradient in gradients)), float(n)
