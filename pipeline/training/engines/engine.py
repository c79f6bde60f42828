"""What the loop knows of an engine, and the simpler of the two: plain PyTorch on one device.

An engine owns the model, its optimizer and the processes. ``backward`` takes this micro-batch's
*share* of the loss of the whole batch: the shares of all micro-batches of all ranks add up to the
loss, so a loss normalised over the whole batch stays what it is under accumulation and data
parallelism.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import config
from pipeline.console import InputError
from pipeline.models.dalle import Dalle
from pipeline.slices import Slices
from pipeline.training.engines.gradient_scales import GradientScales
from pipeline.training.optimizer import AdamW, parameter_groups

STATE_KEYS = ("exp_avg", "exp_avg_sq", "ema")  # of the optimizer, beside the float32 weights


@dataclass
class Slice:
    """This rank's part of one parameter, flat: its elements from ``start`` on.

    ``values`` holds "weight" and, after the first applied update, STATE_KEYS: float32, moments in
    the type that the recipe keeps them in. ``step`` counts the updates of this parameter, of which
    AdamW's corrections depend: one whose block was skipped has had fewer than others.
    """

    start: int
    values: dict[str, Tensor]
    step: int = 0


class Engine(ABC):
    """What the loop knows of an engine."""

    rank = 0
    world = 1
    micro_batch: int
    accumulation: int
    device: torch.device
    compute_dtype: torch.dtype
    model: nn.Module  # call it for the forward pass
    module: nn.Module  # the same without DeepSpeed around it
    updates = 0  # made so far
    applied = 0  # of these: all whose gradient norm was finite
    scales: GradientScales | None = None  # of the residual blocks, where they compute in float16

    @abstractmethod
    def backward(self, share: Tensor) -> None:
        """Add the gradients of this micro-batch's share of the loss."""

    @abstractmethod
    def update(self, lr: float) -> float:
        """Clip, update, count; returns the global gradient norm before clipping."""

    @abstractmethod
    def discard(self) -> None:
        """Drop the gradients; nothing else changes."""

    @abstractmethod
    def slices(self) -> Iterator[tuple[str, Slice]]:
        """This rank's parts of all parameters, for a checkpoint."""

    @abstractmethod
    def restore(self, saved: Slices, updates: int, applied: int) -> None:
        """Set weights and optimizer state.

        Args:
            saved: a checkpoint.
            updates: made so far.
            applied: of these.
        """

    @abstractmethod
    def shapes(self) -> dict[str, list[int]]:
        """Of all parameters, by name."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over the ranks."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def check(self) -> None:  # noqa: B027 - most have nothing to check
        """All ranks call it before a checkpoint.

        Raises:
            InputError: copies of the model have become different ones.
        """

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def state(self) -> dict[str, Any]:
        """JSON values beside the tensors that a checkpoint keeps."""
        return {} if self.scales is None else {"scales": self.scales.state()}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``."""
        if self.scales is not None:
            self.scales.restore(state.get("scales", {}))

    def _take_scales(self, module: nn.Module) -> None:
        """Scale the gradients of the residual blocks, where float16 needs it."""
        if self.compute_dtype != torch.float16:
            return
        if not isinstance(module, Dalle):
            raise InputError(
                "float16 needs gradient scales, which only the transformer has: take bf16 or fp32 "
                "for stage 1 and CLIP"
            )
        self.scales = GradientScales(module.take_gradient_scales())

    def _largest(self, value: Tensor) -> Tensor:
        value = value.to(self.device)  # gradients may lie on the CPU, which NCCL does not reach
        if self.world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value


def by_block(module: nn.Module) -> dict[str, list[Any]]:
    """Parameters of each residual block, in their order."""
    blocks: dict[str, list[Any]] = {}
    assert isinstance(module, Dalle)
    for name, parameter in module.named_parameters():
        blocks.setdefault(module.block_of(name), []).append(parameter)
    return blocks


class PlainEngine(Engine):
    """One process, one device, no DeepSpeed.

    Args:
        build: makes the model.
        run: the preset.
        dtype: of the matrices; None for bfloat16 on a GPU and float32 elsewhere.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        run: config.Run,
        dtype: torch.dtype | None = None,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                f"started as one of {os.environ['WORLD_SIZE']} processes without "
                "--deepspeed_config: plain PyTorch trains in one process; "
                "add --deepspeed_config ds_configs/zero3_cpu.json"
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        usual = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.compute_dtype = dtype or usual
        self.micro_batch, self.accumulation = run.batch, 1
        torch.manual_seed(run.seed)
        self.model = self.module = build().to(self.device)
        self._clip = run.optimizer.gradient_clipping
        self._ema_every = run.optimizer.ema_every
        self._take_scales(self.module)
        groups = parameter_groups(self.model, run.optimizer, by_block=self.scales is not None)
        self._optimizer = AdamW(groups, run.optimizer)

    def backward(self, share: Tensor) -> None:
        """Add the gradients of a share of the loss."""
        share.backward()

    def update(self, lr: float) -> float:
        """Clip, update, count; a norm that is not finite updates nothing."""
        if self.scales is not None:
            parameters = by_block(self.module)
            gradients = {
                name: [p.grad for p in part if p.grad is not None]
                for name, part in parameters.items()
            }
            self._optimizer.skip(self.scales.unscale(gradients, self._largest))
        bound = self._clip if self._clip > 0 else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), bound))
        self.updates += 1
        if math.isfinite(norm):
            self.applied += 1
            self._optimizer.set_lr(lr)
            self._optimizer.ema_is_due = self.updates % self._ema_every == 0
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def discard(self) -> None:
        """Drop the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """Whole parameters."""
        for name, parameter in self.model.named_parameters():
            values = {"weight": parameter.detach().float().flatten()}
            state = self._optimizer.state.get(parameter, {})
            values |= {key: state[key].flatten() for key in STATE_KEYS if key in state}
            yield name, Slice(0, values, int(state.get("step", 0)))

    @torch.no_grad()
    def restore(self, saved: Slices, updates: int, applied: int) -> None:
        """Set weights, moments and average."""
        self.updates, self.applied = updates, applied
        for name, p in self.model.named_parameters():
            p.copy_(saved.read(name, "weight", 0, p.numel()).view_as(p))
            if not applied:
                continue
            state = self._optimizer.state[p]
            state["step"] = torch.tensor(float(saved.steps[name]), device=p.device)
            for key in STATE_KEYS:
                state[key] = saved.read(name, key, 0, p.numel()).view_as(p).to(p.device)

    def shapes(self) -> dict[str, list[int]]:
        """Of all parameters."""
        return {name: list(p.shape) for name, p in self.model.named_parameters()}
