"""How many elements of the parameters each rank holds, as DeepSpeed 0.19.8 cuts them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from pipeline.config import DalleConfig, DalleRun
from pipeline.models.dalle import Dalle
from pipeline.training.engines import ds_config
from pipeline.training.engines.powersgd import compressible
from pipeline.training.optimizer import parameter_groups


@dataclass(frozen=True)
class Shards:
    """One rank's part of the parameters, in elements.

    Args:
        total: parameters of the model.
        own: of this rank, with padding: ZeRO-3 gives each rank ceil(numel / W) of every parameter.
        stored: that it computes with: ``own`` in stage 3, all of them in stage 2.
        persistent: of parameters so small that every rank keeps all of them.
        secondary: of the copy that is shared inside a node (ZeRO++ hpZ).
        block: parameters of the largest block, which is gathered in one message.
        largest: of the largest parameter.
        sub_group: the most that the optimizer takes at once.
        compressed: of the own, what PowerSGD sends as factors.
        factors: numbers of those factors.
        projections: numbers that PowerSGD projects with.
    """

    total: int
    own: int
    stored: int
    persistent: int
    secondary: int
    block: int
    largest: int
    sub_group: int
    compressed: int = 0
    factors: int = 0
    projections: int = 0


def zero_section(ds: dict[str, Any]) -> Any:
    """The section of ZeRO with DeepSpeed's names and defaults."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig(**ds["zero_optimization"])


@lru_cache(maxsize=8)
def _model(config: DalleConfig) -> Dalle:
    """The model without its memory."""
    with torch.device("meta"):
        return Dalle(config)


def count_shards(run: DalleRun, ds: dict[str, Any], world: int) -> Shards:
    """What ``world`` ranks share, as DeepSpeed 0.19.8 cuts it."""
    if ds["zero_optimization"]["stage"] == 2:
        return _shards_of_stage_2(run, ds, world)
    ranks = ds_config.shard_ranks(ds, world)
    # one node has nobody to exchange with
    return _shards_of_stage_3(run, ds, ranks, ds_config.powersgd_rank(ds) if ranks < world else 0)


def _shards_of_stage_2(run: DalleRun, ds: dict[str, Any], world: int) -> Shards:
    """stage_1_and_2.py: a group's parameters, one behind the other, in ``world`` equal parts."""
    model = _model(run.model)
    sizes = [p.numel() for p in model.parameters()]
    groups = parameter_groups(model, run.optimizer, by_block=_has_scales(ds))
    # nccl_start_alignment_factor: parts begin at even elements
    parts = [2 * -(-sum(p.numel() for p in g["params"]) // (2 * world)) for g in groups]
    return Shards(
        total=sum(sizes),
        own=sum(parts),
        stored=world * sum(parts),
        persistent=0,
        secondary=0,
        block=max(sum(p.numel() for p in block.parameters()) for block in model.blocks),
        largest=max(sizes),
        sub_group=max(parts),
    )


def _has_scales(ds: dict[str, Any]) -> bool:
    """Whether residual blocks have gradient scales, and so parameter groups of their own."""
    return ds_config.compute_dtype_name(ds) == "float16"


def _shards_of_stage_3(run: DalleRun, ds: dict[str, Any], world: int, rank: int) -> Shards:
    """``zero.Init`` and stage3.py."""
    model = _model(run.model)
    sizes = [p.numel() for p in model.parameters()]
    zero = zero_section(ds)
    in_node = zero.zero_hpz_partition_size
    threshold = zero.param_persistence_threshold
    groups = parameter_groups(model, run.optimizer, by_block=_has_scales(ds))
    own = sum(-(-n // world) for n in sizes)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    factored = compressible(shapes, world, rank).values() if rank else ()
    return Shards(
        total=sum(sizes),
        own=own,
        stored=own,
        persistent=sum(n for n in sizes if n <= threshold),
        # partition_parameters.py: tensor_size // num_ranks_in_param_group, of the padded size
        secondary=sum(-(-n // world) * world // in_node for n in sizes) if in_node > 1 else 0,
        block=max(sum(p.numel() for p in block.parameters()) for block in model.blocks),
        largest=max(sizes),
        sub_group=max(
            _largest_sub_group(
                [-(-p.numel() // world) for p in group["params"]], zero.sub_group_size
            )
            for group in groups
        ),
        compressed=sum(rows * columns for rows, columns in factored),
        factors=sum(rank * (rows + columns) for rows, columns in factored),
        projections=sum(rank * max(part) for part in factored),
    )


def _largest_sub_group(sizes: list[int], bound: int) -> int:
    """A sub-group is closed by the parameter that fills it (stage3._create_fp16_sub_groups)."""
    largest = current = 0
    for n in sizes:
        current += n
        largest = max(largest, current)
        if current >= bound:
            current = 0
    return largest
