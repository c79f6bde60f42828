"""AdamW as the paper runs it: a bounded variance, 16-bit moments, an average of the weights.

ZeRO-3 calls ``step`` once for each flat shard of a parameter group, so whatever is elementwise is
sharded by itself. One group never shares a shard with another: a group that is skipped stays as it
is to the last bit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import config

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """Decoupled weight decay, and ``state["ema"]``: the iterate average (appendices A.2, B.2).

    The average starts from the weights after the first update; ``ema_is_due`` is set by the engine
    for each one. A group with ``skip`` set keeps its weights, moments and count of updates.
    """

    def __init__(self, groups: list[dict[str, Any]], recipe: config.Optimizer) -> None:
        # the fused kind is 7 to 10 times faster on a CPU than the others, and compiles nothing
        super().__init__(
            groups, lr=0.0, betas=recipe.betas, eps=recipe.eps, weight_decay=0.0, fused=True
        )
        self.ema_decay = recipe.ema_decay
        self.ema_is_due = True
        self._bound = recipe.max_exp_avg_sq
        self._moment_dtype: torch.dtype = getattr(torch, recipe.moment_dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of the parameters that have gradients, and of their average."""
        chosen = [(group, p) for group in self.param_groups for p in group["params"]]
        for group, parameter in chosen:
            if group.get("skip"):
                parameter.grad = None
            self._begin(group, parameter)
        super().step(closure)
        for _, parameter in chosen:
            self._end(parameter)

    def _begin(self, group: dict[str, Any], parameter: Tensor) -> None:
        """Moments in float32, and a variance that will not leave its bound."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {key: torch.zeros_like(parameter) for key in MOMENTS}
            self.state[parameter] = state
        for key in MOMENTS:
            state[key] = state[key].float()
        gradient = parameter.grad
        if gradient is None or not self._bound:
            return
        # appendix D clips the variance before it is used: with at most this much of it before the
        # update, (bound - (1 - b2) g^2) / b2, the update makes no more than the bound of it
        decay = group["betas"][1]
        room = gradient.float().square()  # in place from here: a shard may take gigabytes
        room.mul_(-(1 - decay) / decay).add_(self._bound / decay)
        torch.minimum(state["exp_avg_sq"], room, out=state["exp_avg_sq"])

    def _end(self, parameter: Tensor) -> None:
        """Moments in the type they are kept in, and the average."""
        state = self.state[parameter]
        for key in MOMENTS:
            state[key] = state[key].to(self._moment_dtype)
        if "ema" not in state:
            state["ema"] = parameter.detach().clone()
        elif self.ema_is_due:
            state["ema"].lerp_(parameter, 1 - self.ema_decay)

    def skip(self, blocks: dict[str, bool]) -> None:
        """Which blocks the next update leaves as they are."""
        for group in self.param_groups:
            group["skip"] = blocks[group["block"]]

    def set_lr(self, lr: float) -> None:
        """The step size of the next update."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]


def parameter_groups(
    model: nn.Module, recipe: config.Optimizer, *, by_block: bool = False
) -> list[dict[str, Any]]:
    """Weights, which decay, and all else, which does not (the paper is silent; CLIP does so).

    Args:
        model: may have ``block_of(name)``, which names the residual block of a parameter,
            ``lr_scale(name)``, of its step size (1 without), and ``decays(name)``, where the names
            of its weights are not ours.
        recipe: of the weight decay.
        by_block: a group for each block of them, so that a block's update can be skipped.

    Returns:
        Groups with ``params``, ``weight_decay``, ``lr_scale`` and ``block`` ("" for all).
    """
    any_model: Any = model
    lr_scale: Callable[[str], float] = getattr(any_model, "lr_scale", lambda name: 1.0)
    decays: Callable[[str], bool] = getattr(any_model, "decays", _is_weight)
    block_of: Callable[[str], str] = any_model.block_of if by_block else lambda name: ""
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decay = recipe.weight_decay if decays(name) else 0.0
        groups.setdefault((block_of(name), decay, lr_scale(name)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale, "block": block}
        for (block, decay, scale), parameters in groups.items()
    ]


def _is_weight(name: str) -> bool:
    return name.rpartition(".")[2] in ("weight", "w", "token")
