"""Two engines under one loop: DeepSpeed's ZeRO-3, and plain PyTorch on one device.

An engine owns the model, its optimizer and the processes. ``backward`` takes this micro-batch's
*share* of the loss of the whole batch: the shares of all micro-batches of all ranks add up to the
loss, so a loss normalised over the whole batch stays what it is under accumulation and data
parallelism.
"""

import datetime
import logging
import math
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import config
from pipeline.console import InputError, logger
from pipeline.models.dalle import Dalle
from pipeline.training import ds_config, memory
from pipeline.training.gradient_scales import GradientScales
from pipeline.training.optimizer import AdamW, parameter_groups

log = logger("train")

STATE_KEYS = ("exp_avg", "exp_avg_sq", "ema")  # of the optimizer, beside the float32 weights
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


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
    def restore(
        self,
        read: Callable[[str, str, int, int], Tensor],
        steps: dict[str, int],
        updates: int,
        applied: int,
    ) -> None:
        """Set weights and optimizer state.

        Args:
            read: (name, key, start, stop) -> flat part of a parameter or of its state.
            steps: name -> ``Slice.step``.
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
                "for stage 1"
            )
        self.scales = GradientScales(module.take_gradient_scales())

    def _largest(self, value: Tensor) -> Tensor:
        value = value.to(self.device)  # gradients may lie on the CPU, which NCCL does not reach
        if self.world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value


def _by_block(module: nn.Module) -> dict[str, list[Any]]:
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
        run: config.DvaeRun | config.DalleRun,
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
            parameters = _by_block(self.module)
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
    def restore(
        self,
        read: Callable[[str, str, int, int], Tensor],
        steps: dict[str, int],
        updates: int,
        applied: int,
    ) -> None:
        """Set weights, moments and average."""
        self.updates, self.applied = updates, applied
        for name, p in self.model.named_parameters():
            p.copy_(read(name, "weight", 0, p.numel()).view_as(p))
            if not applied:
                continue
            state = self._optimizer.state[p]
            state["step"] = torch.tensor(float(steps[name]), device=p.device)
            for key in STATE_KEYS:
                state[key] = read(name, key, 0, p.numel()).view_as(p).to(p.device)

    def shapes(self) -> dict[str, list[int]]:
        """Of all parameters."""
        return {name: list(p.shape) for name, p in self.model.named_parameters()}


class ZeroEngine(Engine):
    """DeepSpeed with ZeRO stage 3, under its launcher."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        run: config.DvaeRun | config.DalleRun,
        ds: dict[str, Any],
    ) -> None:
        deepspeed = _start_deepspeed()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        resolved = ds_config.resolve(
            ds,
            batch=run.batch,
            gradient_clipping=run.optimizer.gradient_clipping,
            world=self.world,
        )
        self.micro_batch = resolved["train_micro_batch_size_per_gpu"]
        self.accumulation = resolved["gradient_accumulation_steps"]
        self.compute_dtype = getattr(torch, ds_config.compute_dtype_name(ds))
        from deepspeed.utils import set_z3_leaf_modules

        self._refuse_what_cannot_fit(run, ds)
        torch.manual_seed(run.seed)
        with deepspeed.zero.Init(config_dict_or_path=resolved):
            model = build()
        if leaves := getattr(model, "ZERO_LEAVES", ()):
            set_z3_leaf_modules(model, list(leaves))
        self._take_scales(model)
        groups = parameter_groups(model, run.optimizer, by_block=self.scales is not None)
        self._optimizer = AdamW(groups, run.optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._optimizer, config=resolved, dist_init_required=False
        )
        self.model, self.module = self._engine, model
        self.device = torch.device(self._engine.device)
        self._ema_every = run.optimizer.ema_every

    def _refuse_what_cannot_fit(
        self, run: config.DvaeRun | config.DalleRun, ds: dict[str, Any]
    ) -> None:
        """Stop before anything is allocated when a GPU of the run is too small for it."""
        if not torch.cuda.is_available() or not isinstance(run, config.DalleRun):
            return
        free = torch.tensor(float(torch.cuda.mem_get_info()[0]), device="cuda")
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
        if sentence := memory.preflight(run, ds, self.world, int(free)):
            raise InputError(sentence)

    def backward(self, share: Tensor) -> None:
        """Add the gradients of a share of the loss."""
        # DeepSpeed averages over ranks and over the accumulation
        self._engine.backward(share * (self.world * self.accumulation))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def update(self, lr: float) -> float:
        """Clip, update, count; DeepSpeed skips an update whose norm is not finite."""
        self.updates += 1
        self._optimizer.set_lr(lr)
        self._optimizer.ema_is_due = self.updates % self._ema_every == 0
        if self.scales is not None:
            self._unscale(self.scales)
        self._engine.step()
        # infinite where DeepSpeed skipped the update
        norm = float(self._engine.get_global_grad_norm())
        self.applied += math.isfinite(norm)
        return norm

    def discard(self) -> None:
        """Have DeepSpeed skip the update, as it does when the norm is no number."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        _, parameter = next(self._named_parameters())
        gradient = safe_get_local_grad(parameter)
        safe_set_local_grad(parameter, torch.full_like(gradient, math.nan))
        self._engine.step()

    def _unscale(self, scales: GradientScales) -> None:
        """Before DeepSpeed looks for what is not finite: it would skip the update of all blocks."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        parameters = _by_block(self.module)
        gradients = {n: [safe_get_local_grad(p) for p in part] for n, part in parameters.items()}
        self._optimizer.skip(scales.unscale(gradients, self._largest))
        for name, part in parameters.items():
            for parameter, gradient in zip(part, gradients[name], strict=True):
                safe_set_local_grad(parameter, gradient)

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """This rank's chunk of each parameter, without DeepSpeed's padding."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for name, p in self._named_parameters():
            start, length = self._chunk(p.ds_numel)
            if length == 0:
                continue
            values, step = {"weight": safe_get_local_fp32_param(p).detach()[:length]}, 0
            if self.applied:
                for key in STATE_KEYS:
                    values[key] = safe_get_local_optimizer_state(p, key).detach()[:length]
                step = int(self._optimizer.state[self._place(p)[0]]["step"])
            yield name, Slice(start, values, step)

    def _place(self, p: Any) -> tuple[Any, int]:
        """The flat tensor that this rank's part of a parameter lies in, and where it begins."""
        zero = self._engine.optimizer
        group, offset, _ = zero.grad_position[zero.get_param_id(p)]
        return zero.fp32_partitioned_groups_flat[group], offset

    def _named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Parameters with what ``zero.Init`` hangs on them: ds_numel, ds_shape."""
        return self.module.named_parameters()

    def _chunk(self, numel: int) -> tuple[int, int]:
        """(start, length) of this rank's part: ZeRO-3 cuts a parameter into ceil(numel / world)."""
        size = -(-numel // self.world)
        return self.rank * size, max(0, min(size, numel - self.rank * size))

    @torch.no_grad()
    def restore(
        self,
        read: Callable[[str, str, int, int], Tensor],
        steps: dict[str, int],
        updates: int,
        applied: int,
    ) -> None:
        """Set the shards of weights, moments and average; internals of DeepSpeed 0.19.8."""
        self.updates, self.applied = updates, applied
        keys = STATE_KEYS if applied else ()
        zero = self._engine.optimizer
        for flat in zero.fp32_partitioned_groups_flat if applied else ():
            state = self._optimizer.state[flat]
            for key in keys:
                state[key] = torch.zeros_like(flat)
        for name, p in self._named_parameters():
            flat, offset = self._place(p)
            if applied:
                step = torch.tensor(float(steps[name]), device=flat.device)
                self._optimizer.state[flat]["step"] = step
            start, length = self._chunk(p.ds_numel)
            if length == 0:
                continue
            here = slice(offset, offset + length)
            flat.data[here] = read(name, "weight", start, start + length)
            for key in keys:
                self._optimizer.state[flat][key][here] = read(name, key, start, start + length)
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if kept_whole := zero.persistent_parameters:
            kept_whole[0].partition(kept_whole)
            kept_whole[0].all_gather(kept_whole)

    def shapes(self) -> dict[str, list[int]]:
        """Of all parameters, whole."""
        return {name: list(p.ds_shape) for name, p in self._named_parameters()}


def _start_deepspeed() -> Any:
    """Import DeepSpeed and join its launcher's process group."""
    try:
        import deepspeed
        import deepspeed.ops
        from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise InputError(
            f"--deepspeed_config needs DeepSpeed, which does not import here ({error}); install "
            "requirements.txt, or leave the flag out to train with plain PyTorch"
        ) from error
    if "RANK" not in os.environ:
        raise InputError(
            "--deepspeed_config is for the deepspeed launcher: start this as "
            "`deepspeed --module pipeline.train_...`, or leave the flag out for plain PyTorch"
        )
    _quieten()
    if get_accelerator().device_name() == "cpu":
        # a C++ extension that only inference uses; building it takes a minute and a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    deepspeed.init_distributed(timeout=COLLECTIVE_TIMEOUT)
    return deepspeed


def _quieten() -> None:
    """Leave out what DeepSpeed says of itself, and two warnings that no user can do a thing about.

    All other warnings are shown.
    """
    deepspeed_log = logging.getLogger("DeepSpeed")
    deepspeed_log.setLevel(logging.WARNING)
    # our AdamW, which zero_allow_untested_optimizer allows
    deepspeed_log.addFilter(lambda record: "with an untested optimizer" not in record.getMessage())
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 is about to rename
    warnings.filterwarnings(
        "ignore",
        message=r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",
        category=FutureWarning,
    )


def make(
    build: Callable[[], nn.Module],
    run: config.DvaeRun | config.DalleRun,
    ds_config_path: str | None,
) -> Engine:
    """The engine for a run: ZeRO-3 with a ds_config, plain PyTorch without."""
    if ds_config_path is not None:
        return ZeroEngine(build, run, ds_config.read(ds_config_path))
    engine = PlainEngine(build, run)
    log.info("no --deepspeed_config: training with plain PyTorch on one %s", engine.device.type)
    return engine


def leave(engine: Engine, code: int = 0) -> None:
    """Leave the process group and end the process with ``code``."""
    if not (dist.is_available() and dist.is_initialized()):
        if code:
            sys.exit(code)
        return
    engine.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # threads of gloo abort about one exit in six in the interpreter's teardown (pytorch #179291)
    os._exit(code)
