"""DeepSpeed's ZeRO under the loop: stage 3 shards all, stage 2 all but the parameters.

Both keep float32 masters of the weights in flat tensors, a part of each parameter on each rank.
What differs is how the parts are cut and how weights come back from them; ``_Shards`` hides that.
"""

import math
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
from pipeline.slices import Slices
from pipeline.training import processes
from pipeline.training.engines import ds_config
from pipeline.training.engines.engine import STATE_KEYS, Engine, PlainEngine, Slice, by_block
from pipeline.training.engines.nodes import Exchange, Nodes
from pipeline.training.engines.powersgd import PowerSGD, compressible
from pipeline.training.optimizer import AdamW, parameter_groups
from pipeline.training.planning import memory

log = logger("train")


@dataclass(frozen=True)
class _Part:
    """This rank's part of one parameter.

    Elements [start, start + length) of it are ``flat[offset : offset + length]``, in float32.
    """

    start: int
    length: int
    flat: Tensor
    offset: int

    @property
    def here(self) -> slice:
        """Where it lies in ``flat``."""
        return slice(self.offset, self.offset + self.length)


class _Shards(ABC):
    """What the two stages do each in its own way; internals of DeepSpeed 0.19.8.

    Args:
        zero: DeepSpeed's optimizer.
    """

    def __init__(self, zero: Any) -> None:
        self.zero = zero

    @abstractmethod
    def flats(self) -> list[Tensor]:
        """The float32 masters of this rank, each a key of the optimizer's state."""

    @abstractmethod
    def part(self, p: Any) -> _Part | None:
        """This rank's part of a parameter, without padding; None where it has none."""

    @abstractmethod
    def gradient(self, p: Any) -> Tensor:
        """Of this rank's part, which there is, between the backward pass and the update."""

    @abstractmethod
    def set_gradient(self, p: Any, gradient: Tensor) -> None:
        """Put back what ``gradient`` gave, changed."""

    @abstractmethod
    def publish(self) -> None:
        """Compute with what the masters hold."""

    @abstractmethod
    def shape(self, p: Any) -> list[int]:
        """Of a parameter, whole."""


class _Stage3(_Shards):
    """Parameters are cut into ceil(numel / ranks), so no rank holds a model."""

    def __init__(self, zero: Any, rank: int, ranks: int) -> None:
        super().__init__(zero)
        self.rank, self.ranks = rank, ranks

    def flats(self) -> list[Tensor]:
        flats: list[Tensor] = self.zero.fp32_partitioned_groups_flat
        return flats

    def part(self, p: Any) -> _Part | None:
        start, length = chunk(p.ds_numel, self.rank, self.ranks)
        if length == 0:
            return None
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(p)]
        return _Part(start, length, self.zero.fp32_partitioned_groups_flat[group], offset)

    def gradient(self, p: Any) -> Tensor:
        from deepspeed.utils import safe_get_local_grad

        gradient: Tensor = safe_get_local_grad(p)
        return gradient

    def set_gradient(self, p: Any, gradient: Tensor) -> None:
        from deepspeed.utils import safe_set_local_grad

        safe_set_local_grad(p, gradient)

    def publish(self) -> None:
        for group in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if kept_whole := self.zero.persistent_parameters:
            kept_whole[0].partition(kept_whole)
            kept_whole[0].all_gather(kept_whole)

    def shape(self, p: Any) -> list[int]:
        return list(p.ds_shape)


class _Stage2(_Shards):
    """Every rank holds the model; a group's parameters, one behind the other, are cut as one."""

    def flats(self) -> list[Tensor]:
        flats: list[Tensor] = self.zero.single_partition_of_fp32_groups
        return flats

    def part(self, p: Any) -> _Part | None:
        found = p._hp_mapping
        if found is None:
            return None
        whole, flat = found.lp_fragment_address, found.hp_fragment_address
        return _Part(whole.start, whole.numel, self.flats()[found.param_group_index], flat.start)

    def gradient(self, p: Any) -> Tensor:
        gradient: Tensor = p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)
        return gradient

    def set_gradient(self, p: Any, gradient: Tensor) -> None:
        self.gradient(p).copy_(gradient)

    def publish(self) -> None:
        self.zero.update_lp_params()

    def shape(self, p: Any) -> list[int]:
        return list(p.shape)


def chunk(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """(start, length) of a rank's part: ZeRO-3 cuts a parameter into ceil(numel / ranks)."""
    size = -(-numel // ranks)
    return rank * size, max(0, min(size, numel - rank * size))


class ZeroEngine(Engine):
    """DeepSpeed with ZeRO stage 2 or 3, under its launcher.

    Args:
        build: makes the model.
        run: the preset.
        ds: the content of a ds_config.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        run: config.Run,
        ds: dict[str, Any],
    ) -> None:
        deepspeed = processes.join({"preset": config.as_dict(run), "ds_config": ds})
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
        if resolved.get("fp16") and not deepspeed.get_accelerator().is_fp16_supported():
            raise InputError(
                'fp16 of the ds_config is not there on this device: write "compute_dtype": "fp16" '
                "for float32 parameters and float16 matrices, or take bf16"
            )
        self._refuse_what_cannot_fit(run, ds)
        ranks = ds_config.shard_ranks(ds, self.world)
        nodes = Nodes(self.rank, self.world, ranks) if ranks < self.world else None
        self._copies = self.world // ranks  # of the model
        torch.manual_seed(run.seed)
        is_sharded = resolved["zero_optimization"]["stage"] == 3
        group = nodes.inside if nodes else None
        with deepspeed.zero.Init(
            config_dict_or_path=resolved, enabled=is_sharded, data_parallel_group=group, mpu=nodes
        ):
            model = build()
        if is_sharded and (leaves := getattr(model, "ZERO_LEAVES", ())):
            deepspeed.utils.set_z3_leaf_modules(model, list(leaves))
        self._take_scales(model)
        groups = parameter_groups(model, run.optimizer, by_block=self.scales is not None)
        self._optimizer = AdamW(groups, run.optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config=resolved,
            dist_init_required=False,
            mpu=nodes,
        )
        self.model, self.module = self._engine, model
        self.device = torch.device(self._engine.device)
        self._ema_every = run.optimizer.ema_every
        zero = self._engine.optimizer
        self._shards: _Shards = (
            _Stage3(zero, self.rank % ranks, ranks) if is_sharded else _Stage2(zero)
        )
        self._exchange: Exchange | None = None
        if nodes is not None:
            powersgd = self._powersgd(ds_config.powersgd_rank(ds), ranks, run.seed)
            self._exchange = Exchange(nodes, powersgd)

    def _powersgd(self, rank: int, ranks: int, seed: int) -> PowerSGD | None:
        """Of the matrices in residual blocks: of each, this GPU holds whole rows (section 2.5)."""
        if rank == 0:
            return None
        if not isinstance(self.module, Dalle):
            raise InputError(
                "hybrid_sharding.powersgd_rank is for matrices of the transformer: take 0 for "
                "stage 1 and CLIP"
            )
        return PowerSGD(compressible(self.shapes(), ranks, rank), rank, seed, self.device)

    def _refuse_what_cannot_fit(self, run: config.Run, ds: dict[str, Any]) -> None:
        """Stop before anything is allocated when a GPU of the run is too small for it."""
        if not torch.cuda.is_available() or not isinstance(run, config.DalleRun):
            return
        free = torch.tensor(float(torch.cuda.mem_get_info()[0]), device="cuda")
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
        if sentence := memory.preflight(run, ds, self.world, int(free)):
            raise InputError(sentence)

    def backward(self, share: Tensor) -> None:
        """Add the gradients of a share of the loss."""
        # DeepSpeed averages over the ranks that it knows of, and over the accumulation
        self._engine.backward(share * (self.world // self._copies * self.accumulation))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def update(self, lr: float) -> float:
        """Clip, update, count; DeepSpeed skips an update whose norm is not finite."""
        self.updates += 1
        self._optimizer.set_lr(lr)
        self._optimizer.ema_is_due = self.updates % self._ema_every == 0
        skipped = self._unscale()
        self._add_up_over_nodes(skipped)
        self._engine.step()
        # infinite where DeepSpeed skipped the update
        norm = float(self._engine.get_global_grad_norm())
        self.applied += math.isfinite(norm)
        return norm

    def discard(self) -> None:
        """Have DeepSpeed skip the update, as it does when the norm is no number."""
        own = next((p for p in self.module.parameters() if self._shards.part(p)), None)
        if own is not None:  # of 2 ranks and more at least one has a part
            gradient = self._shards.gradient(own)
            self._shards.set_gradient(own, torch.full_like(gradient, math.nan))
        self._engine.step()

    def _unscale(self) -> set[str]:
        """Before DeepSpeed looks for what is not finite: it would skip the update of all blocks.

        Returns:
            The blocks whose update is skipped.
        """
        if self.scales is None:
            return set()
        shards = self._shards
        blocks = by_block(self.module)
        parameters = {name: [p for p in block if shards.part(p)] for name, block in blocks.items()}
        gradients = {name: [shards.gradient(p) for p in part] for name, part in parameters.items()}
        skipped = self.scales.unscale(gradients, self._largest)
        self._optimizer.skip(skipped)
        for name, part in parameters.items():
            for parameter, gradient in zip(part, gradients[name], strict=True):
                shards.set_gradient(parameter, gradient)
        return {name for name, is_skipped in skipped.items() if is_skipped}

    def _add_up_over_nodes(self, skipped: set[str]) -> None:
        """DeepSpeed has summed the gradients inside each node."""
        if self._exchange is None:
            return
        own, sums = {}, {}
        for name, p in self.module.named_parameters():
            if part := self._shards.part(p):
                own[name] = p, self._shards.gradient(p)
                sums[name] = own[name][1].flatten()[: part.length].float()
        leave = {name for name in own if skipped and Dalle.block_of(name) in skipped}
        self._exchange.add_up(sums, leave)
        for name, (p, gradient) in own.items():
            gradient.flatten()[: sums[name].numel()] = sums[name]
            self._shards.set_gradient(p, gradient)

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """This rank's part of each parameter, without DeepSpeed's padding."""
        for name, p in self.module.named_parameters():
            part = self._shards.part(p)
            if part is None:
                continue
            error = self._exchange.error_of(name) if self._exchange else None
            if self.rank >= self.world // self._copies:  # the first node speaks for all
                continue
            values, step = {"weight": part.flat.detach()[part.here]}, 0
            if error is not None:
                values["error"] = error
            if self.applied:
                state = self._optimizer.state[part.flat]
                values |= {key: state[key][part.here] for key in STATE_KEYS}
                step = int(state["step"])
            yield name, Slice(part.start, values, step)

    @torch.no_grad()
    def restore(self, saved: Slices, updates: int, applied: int) -> None:
        """Set the shards of weights, moments and average."""
        self.updates, self.applied = updates, applied
        keys = STATE_KEYS if applied else ()
        for flat in self._shards.flats() if applied else ():
            state = self._optimizer.state[flat]
            # of a shard that is padding alone
            state["step"] = torch.tensor(float(applied), device=flat.device)
            state |= {key: torch.zeros_like(flat) for key in keys}
        for name, p in self.module.named_parameters():
            part = self._shards.part(p)
            if part is None:
                continue
            stop = part.start + part.length
            part.flat.data[part.here] = saved.read(name, "weight", part.start, stop)
            state = self._optimizer.state[part.flat]
            if applied:
                state["step"].fill_(saved.steps[name])
            for key in keys:
                state[key][part.here] = saved.read(name, key, part.start, stop)
            if self._exchange and self._exchange.compresses(name):
                # none where the checkpoint's run did not compress
                has_error = saved.numel(name, "error") > 0
                error = saved.read(name, "error", part.start, stop) if has_error else None
                self._exchange.set_error(name, error)
        self._shards.publish()

    def check(self) -> None:
        """All nodes hold the same weights."""
        if self._exchange is None:
            return
        flats = self._shards.flats()
        sums = [flat.detach().sum(dtype=torch.float64) for flat in flats]
        self._exchange.check(torch.stack(sums).sum())

    def shapes(self) -> dict[str, list[int]]:
        """Of all parameters, whole."""
        return {name: self._shards.shape(p) for name, p in self.module.named_parameters()}


def make_engine(
    build: Callable[[], nn.Module],
    run: config.Run,
    ds_config_path: str | None,
) -> Engine:
    """The engine for a run: ZeRO with a ds_config, plain PyTorch without."""
    if ds_config_path is not None:
        return ZeroEngine(build, run, ds_config.read(ds_config_path))
    engine = PlainEngine(build, run)
    log.info("no --deepspeed_config: training with plain PyTorch on one %s", engine.device.type)
    return engine
