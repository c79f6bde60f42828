"""The gate that a ds_config passes: nothing unknown, and every number with one owner.

DeepSpeed 0.19.8 ignores an unknown key at the top level and takes a missing ``gradient_clipping``
for 1.0 (both measured), so a file is checked here before DeepSpeed sees it.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.console import InputError

# the preset's: "auto" in the file, or absent
OWNED_BY_PRESET = ("train_batch_size", "gradient_clipping")
# the file's
KNOWN = (
    *OWNED_BY_PRESET,
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "zero_optimization",
    "bf16",
    "fp16",
    "compute_dtype",
    "data_types",
    "activation_checkpointing",
    "hybrid_sharding",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
    "comms_logger",
)
DTYPES = (None, "fp32", "bf16", "fp16")
STAGES = (2, 3)
OFFLOADS = ("offload_optimizer", "offload_param")
# and offloading, whose way through stage 2 is another one
ONLY_STAGE_3 = ("stage3_", "zero_hpz_", "zero_quantized_", "offload_")
# of ZeRO, what DeepSpeed 0.19.8 takes here and then fails on, or what has another owner
NOT_HERE = (
    "compute_grad_norm", "cpu_offload", "cpu_offload_params", "cpu_offload_param",
    "cpu_offload_use_pin_memory", "elastic_checkpoint", "legacy_stage1",
    "module_granularity_threshold", "stage3_module_granularity_threshold",
    "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights",
    "zenflow",
)  # fmt: skip
IN_OFFLOAD = ("device", "pin_memory", "buffer_count", "fast_init", "buffer_size", "max_in_cpu")
NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# keys of our own, which DeepSpeed does not get to see
OWN = ("activation_checkpointing", "compute_dtype", "hybrid_sharding")
KNOWN_INSIDE = {
    "bf16": ("enabled",),
    "fp16": ("enabled",),
    "data_types": ("grad_accum_dtype",),
    "activation_checkpointing": ("enabled",),
    "hybrid_sharding": ("gpus_per_node", "powersgd_rank"),
}


def read(path: str | Path) -> dict[str, Any]:
    """The JSON of a ds_config.

    Raises:
        InputError: no such file, or no JSON object in it.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(
            f"no ds_config at {path} ({error.strerror}); ds_configs/ has some"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; a ds_config is a JSON object")
    return content


def resolve(
    ds: dict[str, Any], *, batch: int, gradient_clipping: float, world: int
) -> dict[str, Any]:
    """What DeepSpeed is given: ``ds`` with the preset's numbers and the accumulation that follows.

    Args:
        ds: the file's content.
        batch: samples an update over all ranks (the preset's).
        gradient_clipping: bound of the global norm, 0 for none (the preset's).
        world: ranks.

    Raises:
        InputError: unknown keys, two owners of one number, another stage than 2 and 3,
            what means nothing in the stage, a batch that the ranks cannot share.
    """
    _refuse_unknown(ds)
    _check_values(ds)
    for key in OWNED_BY_PRESET:
        if ds.get(key, "auto") != "auto":
            raise InputError(
                f'{key} is {ds[key]!r} in the ds_config, but the preset owns it: write "auto" there'
            )
    zero = ds.get("zero_optimization", {})
    _check_stage(zero, world)
    _check_hybrid(ds, world)
    micro, accumulation = _micro_batches(ds, batch, world)
    resolved = {
        "steps_per_print": 10**9,
        # our AdamW is a client optimizer
        "zero_allow_untested_optimizer": True,
        # nor, with its states on the CPU, one of DeepSpeed's own, which would be compiled
        "zero_force_ds_cpu_optimizer": False,
        **{key: value for key, value in ds.items() if key not in OWN},
        # DeepSpeed knows of one node alone
        "train_batch_size": batch // world * shard_ranks(ds, world),
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clipping,
    }
    if ds.get("fp16", {}).get("enabled", False):
        # the residual blocks have scales of their own (gradient_scales.py)
        resolved["fp16"] = {"enabled": True, "loss_scale": 1.0}
    inside = {f"zero_optimization.{key}": value for key, value in zero.items()}
    if left := [key for key, value in (resolved | inside).items() if value == "auto"]:
        raise InputError(f'"auto" is not understood for {", ".join(left)}; write a value')
    return resolved


def _check_stage(zero: dict[str, Any], world: int) -> None:
    for key in NOT_HERE:
        if key in zero:
            raise InputError(f"zero_optimization.{key} is not supported here: leave it out")
    for key in OFFLOADS:
        section = zero.get(key) or {}
        if not isinstance(section, dict) or section.get("device") == "nvme":
            raise InputError(
                f"zero_optimization.{key} is {section!r}; write "
                '{"device": "cpu"}, or leave it out'
            )
        if unknown := sorted(set(section) - set(IN_OFFLOAD)):
            raise InputError(
                f"zero_optimization.{key}.{unknown[0]} is not supported here: leave it out"
            )
    stage = zero.get("stage")
    if stage not in STAGES or isinstance(stage, bool):
        raise InputError(
            f"zero_optimization.stage is {stage!r}; write 3 to shard parameters, gradients and "
            "moments, or 2 to shard all but the parameters"
        )
    useless = sorted(key for key in zero if key.startswith(ONLY_STAGE_3))
    if stage == 2 and useless:  # DeepSpeed takes them, and does nothing with them
        raise InputError(
            f"zero_optimization.{useless[0]} means nothing in stage 2: leave it out, or take "
            "stage 3"
        )
    in_node = zero.get("zero_hpz_partition_size", 1)
    if type(in_node) is not int or in_node < 1 or world % in_node:
        raise InputError(
            f"zero_optimization.zero_hpz_partition_size is {in_node!r}, which does not divide "
            f"{world} ranks; take a number that does, the GPUs of a node"
        )


def _check_hybrid(ds: dict[str, Any], world: int) -> None:
    if "hybrid_sharding" not in ds:
        return
    section, zero = ds["hybrid_sharding"], ds["zero_optimization"]
    per_node, rank = section.get("gpus_per_node"), section.get("powersgd_rank", 0)
    if not (type(per_node) is int and per_node >= 1) or world % per_node:
        raise InputError(
            f"hybrid_sharding.gpus_per_node is {per_node!r}; write how many ranks a node has, a "
            f"whole number that divides the {world} ranks"
        )
    if not (type(rank) is int and rank >= 0) or rank % per_node:
        raise InputError(
            f"hybrid_sharding.powersgd_rank is {rank!r}; write a whole number that the {per_node} "
            "GPUs of a node can share, or 0 to send gradients as they are"
        )
    if zero["stage"] != 3 or zero.get("zero_hpz_partition_size", 1) != 1:
        raise InputError(
            "hybrid_sharding shards parameters inside a node already: take stage 3 without "
            "zero_hpz_partition_size"
        )
    if any((zero.get(key) or {}).get("device", "none") != "none" for key in OFFLOADS):
        raise InputError(
            "hybrid_sharding sums gradients on the GPUs: leave out offload_optimizer and "
            "offload_param"
        )


def shard_ranks(ds: dict[str, Any], world: int) -> int:
    """Among how many of the ranks ZeRO shards: those of a node with ``hybrid_sharding``."""
    per_node: int = ds.get("hybrid_sharding", {}).get("gpus_per_node", world)
    return per_node


def powersgd_rank(ds: dict[str, Any]) -> int:
    """Of each GPU's factors: its share of what the shards of a node have in all; 0 for none."""
    section = ds.get("hybrid_sharding", {})
    rank: int = section.get("powersgd_rank", 0)
    return rank // section["gpus_per_node"] if rank else 0


def _refuse_unknown(ds: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = set()
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        zero |= {name} | ({field.alias} if field.alias else set())
    inside = {**{k: set(v) for k, v in KNOWN_INSIDE.items()}, "zero_optimization": zero}
    for where, keys, known in [("", ds, set(KNOWN))] + [
        (f"{name}.", ds[name], inside[name]) for name in inside if name in ds
    ]:
        if not isinstance(keys, dict):
            raise InputError(f"{where[:-1]} is {keys!r} in the ds_config; it must be an object")
        if unknown := sorted(set(keys) - known):
            raise InputError(
                f"the ds_config has {where}{unknown[0]}, which is unknown here; "
                f"known are {', '.join(sorted(known))}"
            )


def _check_values(ds: dict[str, Any]) -> None:
    """Counts are counts, switches are switches, and DeepSpeed takes the values of ZeRO."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = ds.get(key, "auto")
        if value != "auto" and not (type(value) is int and value >= 1):
            raise InputError(f'{key} is {value!r}; write a whole number from 1 on, or "auto"')
    steps = ds.get("steps_per_print", 1)
    if steps != "auto" and not (type(steps) is int and steps >= 1):
        raise InputError(f"steps_per_print is {steps!r}; write a whole number from 1 on")
    if not isinstance(value := ds.get("wall_clock_breakdown", False), bool):
        raise InputError(f"wall_clock_breakdown is {value!r}; write true or false")
    _check_comms_logger(ds.get("comms_logger", {}))
    accumulated = ds.get("data_types", {}).get("grad_accum_dtype")
    for key, value in (
        ("data_types.grad_accum_dtype", accumulated),
        ("communication_data_type", ds.get("communication_data_type")),
        ("compute_dtype", ds.get("compute_dtype")),
    ):
        if value not in DTYPES:
            raise InputError(f"{key} is {value!r}; write fp32, bf16 or fp16")
    for key in ("bf16", "fp16", "activation_checkpointing"):
        enabled = ds.get(key, {}).get("enabled", False)
        if not isinstance(enabled, bool):
            raise InputError(f"{key}.enabled is {enabled!r}; write true or false")
    _check_owner_of_dtype(ds)
    try:
        DeepSpeedZeroConfig(**ds.get("zero_optimization", {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise InputError(f"{where} is {first['input']!r}: {first['msg']}") from error


def _check_comms_logger(section: Any) -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from pydantic import ValidationError

    if not isinstance(section, dict):
        raise InputError(f"comms_logger is {section!r}; it must be an object")
    try:
        CommsLoggerConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("comms_logger", *first["loc"])))
        raise InputError(f"{where} is {first['input']!r}: {first['msg']}") from error


def _check_owner_of_dtype(ds: dict[str, Any]) -> None:
    """One of three says in which numbers the matrices are computed."""
    owners = [key for key in ("bf16", "fp16") if ds.get(key, {}).get("enabled", False)]
    owners += ["compute_dtype"] if ds.get("compute_dtype") is not None else []
    if len(owners) > 1:
        raise InputError(
            f"{' and '.join(owners)} of the ds_config both say in which numbers the matrices are "
            "computed: leave one. bf16 and fp16 store parameters so too, compute_dtype does not"
        )


def _micro_batches(ds: dict[str, Any], batch: int, world: int) -> tuple[int, int]:
    """(samples a rank takes at once, how many times it does so an update)."""
    micro = ds.get("train_micro_batch_size_per_gpu", "auto")
    accumulation = ds.get("gradient_accumulation_steps", "auto")
    if batch % world:
        raise InputError(
            f"a batch of {batch} cannot be shared by {world} ranks; start a number that divides it"
        )
    if micro == "auto":
        micro = max(1, batch // world // (1 if accumulation == "auto" else accumulation))
    if accumulation == "auto":
        accumulation = max(1, batch // world // micro)
    if micro * accumulation * world != batch:
        raise InputError(
            f"micro-batch {micro} x accumulation {accumulation} x {world} ranks is "
            f"{micro * accumulation * world}, and the preset's batch is {batch}: leave one of them "
            f'"auto", or take two whose product is {batch // world}'
        )
    return micro, accumulation


def uses_activation_checkpointing(ds: dict[str, Any]) -> bool:
    """Whether blocks are computed again in the backward pass."""
    section = ds.get("activation_checkpointing", {})
    # what else it may hold is refused by ``resolve``
    return isinstance(section, dict) and section.get("enabled", False) is True


def compute_dtype_name(ds: dict[str, Any]) -> str:
    """In which numbers the file has the matrices computed: bfloat16, float16 or float32.

    ``bf16`` and ``fp16`` are DeepSpeed's, and store and send the parameters so as well;
    ``compute_dtype`` is ours, for parameters that stay float32.
    """
    for key in ("bf16", "fp16"):
        if ds.get(key, {}).get("enabled", False):
            return NAMES[key]
    return NAMES[ds.get("compute_dtype") or "fp32"]
