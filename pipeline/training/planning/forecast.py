"""What a run of the transformer will take: traffic, hours and disk beside its memory.

Every number that is assumed and not counted is a constant of this file, with its source.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config import DalleRun
from pipeline.console import InputError
from pipeline.models.dalle import layer_patterns
from pipeline.training import checkpoint
from pipeline.training.engines import ds_config
from pipeline.training.planning.memory import (
    BYTES,
    GIB,
    Estimate,
    estimate,
    largest_micro_batch,
    micro_batches,
)
from pipeline.training.planning.peaks import H100_SXM

# assumptions, until they are measured on the machine at hand
TFLOPS = 400.0  # that a GPU sustains in matrix products: an H100 or H200 here, dense bfloat16
PEAK_TFLOPS = H100_SXM  # which an H200 has too, dense bfloat16
MFU = 0.4  # share of that peak which the paper's sanity numbers take, without recomputation
FABRIC_GBPS = 45.0  # GB/s a GPU in collectives between nodes: InfiniBand of 400 Gb/s a GPU
NODE_GBPS = 370.0  # GB/s a GPU in collectives inside a node: NVLink of an H100
MOST_GPUS = 16384  # that are looked at for one that fits


@dataclass(frozen=True)
class Machine:
    """GPUs and what joins them."""

    gpus: int
    gpu_gib: float = 80.0
    gpus_per_node: int = 8
    fabric: float = FABRIC_GBPS
    tflops: float = TFLOPS

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise InputError(f"--{_flag(name)} is {getattr(self, name)}; take 1 or more")
        for name in ("gpu_gib", "fabric", "tflops"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(
                    f"--{_flag(name)} is {getattr(self, name):g}; take a number above 0"
                )

    @property
    def gpu_bytes(self) -> int:
        """Memory of one GPU."""
        return int(self.gpu_gib * GIB)


def _flag(name: str) -> str:
    return name.replace("_", "-")


@dataclass(frozen=True)
class Traffic:
    """Bytes of the collectives that a GPU takes part in for one update, and their seconds."""

    gathered: int
    scattered: int
    in_node: int  # of what is gathered, the part that stays in the node while the rest leaves it
    seconds: float
    summed: int = 0  # over the nodes, once an update, of hybrid sharding

    @property
    def sent(self) -> int:
        """All of it."""
        return self.gathered + self.scattered + self.summed


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one update, of all GPUs."""

    model: float  # forward and backward
    hardware: float  # with what is computed again
    seconds: float  # on each GPU


def traffic(run: DalleRun, ds: dict[str, Any], found: Estimate, machine: Machine) -> Traffic:
    """What ZeRO-3 sends: a gather forward, one backward, a reduce-scatter a micro-step.

    Counted on DeepSpeed 0.19.8: computing a block again gathers nothing more, for its parameters
    stay until its backward pass. With hpZ only the first gather of an update leaves the node; with
    hybrid sharding none does, but gradients are summed over the nodes. Stage 2 sums the gradients
    on every rank a micro-step, which takes twice the time of a reduce-scatter, and gathers once.
    """
    stored = next((k for k in ("bf16", "fp16") if ds.get(k, {}).get("enabled")), "fp32")
    sent = ds.get("communication_data_type") or stored
    if ds["zero_optimization"]["stage"] == 2:
        return _traffic_of_stage_2(found, machine, stored, sent)
    if found.ranks < found.world:
        return _traffic_of_nodes(found, machine, stored, sent)
    world, steps = machine.gpus, found.accumulation
    sharded = found.shards.total - found.shards.persistent
    one_gather = sharded * BYTES[ds_config.NAMES[stored]]
    scattered = found.shards.total * BYTES[ds_config.NAMES[sent]]
    in_node = ds["zero_optimization"].get("zero_hpz_partition_size", 1)
    gathers = 2 * steps
    shared = gathers - 1 if 1 < in_node <= machine.gpus_per_node else 0
    # a rank has its own share already
    inside = shared * one_gather * (in_node - 1) // in_node
    between = ((gathers - shared) * one_gather + steps * scattered) * (world - 1) // world
    link = NODE_GBPS if world <= machine.gpus_per_node else machine.fabric
    is_alone = world == 1
    return Traffic(
        gathered=0 if is_alone else gathers * one_gather,
        scattered=0 if is_alone else steps * scattered,
        in_node=shared * one_gather,
        seconds=between / (link * 1e9) + inside / (NODE_GBPS * 1e9),
    )


def _traffic_of_stage_2(found: Estimate, machine: Machine, stored: str, sent: str) -> Traffic:
    world, steps = machine.gpus, found.accumulation
    if world == 1:
        return Traffic(0, 0, 0, 0.0)
    gathered = found.shards.stored * BYTES[ds_config.NAMES[stored]]
    summed = steps * found.shards.total * BYTES[ds_config.NAMES[sent]]
    link = NODE_GBPS if world <= machine.gpus_per_node else machine.fabric
    seconds = (gathered + 2 * summed) * (world - 1) / world / (link * 1e9)
    return Traffic(gathered, summed, 0, seconds)


def _traffic_of_nodes(found: Estimate, machine: Machine, stored: str, sent: str) -> Traffic:
    ranks, nodes, steps = found.ranks, found.world // found.ranks, found.accumulation
    shards = found.shards
    sharded = shards.total - shards.persistent
    gathered = 2 * steps * sharded * BYTES[ds_config.NAMES[stored]] if ranks > 1 else 0
    scattered = steps * shards.total * BYTES[ds_config.NAMES[sent]] if ranks > 1 else 0
    # float32, in a ring of the nodes, there and back
    summed = 4 * (shards.own - shards.compressed + shards.factors)
    inside = NODE_GBPS if ranks <= machine.gpus_per_node else machine.fabric
    seconds = (gathered + scattered) * (ranks - 1) / ranks / (inside * 1e9)
    seconds += 2 * summed * (nodes - 1) / nodes / (machine.fabric * 1e9)
    return Traffic(gathered, scattered, 0, seconds, summed)


def model_flops(run: DalleRun) -> float:
    """Floating-point operations of an update: forward, and twice that backward."""
    model = run.model
    heads = model.n_text * model.n_text_vocab + model.n_image * model.n_image_vocab
    return float(run.batch * 3 * (_flops_of_blocks(run) + 2 * heads * model.d_model))


def _flops_of_blocks(run: DalleRun) -> int:
    """Of all layers, forward, a picture."""
    model = run.model
    pairs = sum(pattern.pairs() for pattern in layer_patterns(model))
    # a multiplication and an addition an element; scores and weighted sums of visible pairs
    return 2 * model.matrix_parameters * model.n_ctx + 4 * pairs * model.d_model


def work(run: DalleRun, found: Estimate, machine: Machine) -> Work:
    """Matrix products of an update, with the layers once more where they are computed again."""
    again = _flops_of_blocks(run) if found.recompute else 0
    hardware = model_flops(run) + run.batch * again
    return Work(model_flops(run), hardware, hardware / machine.gpus / (machine.tflops * 1e12))


@dataclass(frozen=True)
class Plan:
    """All that the command tells."""

    run: DalleRun
    machine: Machine
    memory: Estimate
    traffic: Traffic
    work: Work
    largest_micro_batch: int | None
    changes: tuple[tuple[str, int, bool], ...]  # what to change, peak with it, whether that fits

    @property
    def fits(self) -> bool:
        """Whether a GPU holds the run at its worst moment."""
        return self.memory.peak <= self.machine.gpu_bytes

    @property
    def update_s(self) -> float:
        """Seconds an update, computing and sending at the same time."""
        return max(self.work.seconds, self.traffic.seconds)

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.run.steps * self.run.batch * self.run.model.n_ctx

    @property
    def bound(self) -> str:
        """What an update waits for."""
        return "computing" if self.work.seconds >= self.traffic.seconds else "sending"

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.run.steps * self.update_s / 3600

    @property
    def gpu_hours_at_mfu(self) -> float:
        """Of the whole run at ``MFU`` of ``PEAK_TFLOPS``, on any number of GPUs."""
        return self.run.steps * self.work.model / (MFU * PEAK_TFLOPS * 1e12) / 3600

    @property
    def mfu(self) -> float:
        """The share of ``PEAK_TFLOPS`` that ``update_s`` comes to."""
        return self.work.model / self.machine.gpus / self.update_s / (PEAK_TFLOPS * 1e12)

    @property
    def checkpoint_bytes(self) -> int:
        """Float32 weights, both moments, the average, and what PowerSGD has not sent."""
        moments = 2 * BYTES[self.run.optimizer.moment_dtype]
        errors = 4 * self.memory.shards.compressed * self.memory.ranks
        return self.memory.shards.total * (4 + moments + 4) + errors

    @property
    def disk_bytes(self) -> int:
        """Checkpoints kept, one being written, and the exported weights."""
        exported = self.memory.shards.total * 4
        return (checkpoint.KEEP + 1) * self.checkpoint_bytes + exported

    @property
    def host_bytes(self) -> int:
        """Of a node: what is offloaded, and a checkpoint's slices or rank 0's whole average."""
        gpus = min(self.machine.gpus, self.machine.gpus_per_node)
        share = -(-self.checkpoint_bytes // self.memory.ranks)
        return gpus * self.memory.host + max(gpus * share, 4 * self.memory.shards.total)


def make_plan(
    run: DalleRun,
    ds: dict[str, Any],
    machine: Machine,
    *,
    micro_batch: int | None = None,
    attention: str | None = None,
) -> Plan:
    """Plan ``run`` under ``ds``.

    Raises:
        InputError: what ``estimate`` refuses.
    """
    found = estimate(run, ds, machine.gpus, micro_batch=micro_batch, attention=attention)
    room = machine.gpu_bytes
    changes = () if found.peak <= room else tuple(_changes(run, ds, machine, found))
    return Plan(
        run=run,
        machine=machine,
        memory=found,
        traffic=traffic(run, ds, found, machine),
        work=work(run, found, machine),
        largest_micro_batch=largest_micro_batch(run, ds, machine.gpus, room, attention=attention),
        changes=changes,
    )


def _recomputing(ds: dict[str, Any]) -> dict[str, Any]:
    return ds | {"activation_checkpointing": {"enabled": True}}


def _in_stage_3(ds: dict[str, Any]) -> dict[str, Any]:
    zero = ds["zero_optimization"] | {"stage": 3}
    return {**ds, "zero_optimization": zero}


def _offloading(ds: dict[str, Any]) -> dict[str, Any]:
    """Which takes stage 3 over all ranks."""
    ds = {key: value for key, value in _in_stage_3(ds).items() if key != "hybrid_sharding"}
    zero = ds["zero_optimization"] | {"offload_optimizer": {"device": "cpu"}}
    return ds | {"zero_optimization": zero}


def _changes(
    run: DalleRun, ds: dict[str, Any], machine: Machine, found: Estimate
) -> Iterator[tuple[str, int, bool]]:
    """What would make it fit: each change alone, the most helpful first, then all together."""
    room, micro, path = machine.gpu_bytes, found.micro_batch, found.attention

    def peak(changed: dict[str, Any], micro: int, gpus: int = machine.gpus) -> int:
        return estimate(run, changed, gpus, micro_batch=micro, attention=path).peak

    singles: list[tuple[str, int]] = []
    if (smaller := largest_micro_batch(run, ds, machine.gpus, room, attention=path)) is None:
        smaller = 1
    if smaller < micro:
        singles.append((f"micro-batch {smaller}", peak(ds, smaller)))
    if not found.recompute:
        singles.append(
            ('"activation_checkpointing": {"enabled": true}', peak(_recomputing(ds), micro))
        )
    if ds["zero_optimization"]["stage"] == 2:
        singles.append(('"stage": 3 in zero_optimization', peak(_in_stage_3(ds), micro)))
    elif found.ranks < found.world:
        flat = {key: value for key, value in ds.items() if key != "hybrid_sharding"}
        singles.append(("no hybrid_sharding", peak(flat, micro)))
    elif not found.host:
        text = '"offload_optimizer": {"device": "cpu"} in zero_optimization'
        singles.append((text, peak(_offloading(ds), micro)))
    more = _gpus(machine, run, room, lambda gpus: peak(ds, micro, gpus), micro)
    if more is not None and found.ranks == found.world:
        singles.append((f"{more[0]} GPUs", more[1]))
    singles.sort(key=lambda change: change[1])
    for text, size in singles:
        yield text, size, size <= room
    if any(size <= room for _, size in singles):
        return
    all_of_it = _offloading(_recomputing(ds))
    together = peak(all_of_it, 1)
    text = "micro-batch 1, recomputation and offload"
    if ds["zero_optimization"]["stage"] == 2:
        text += " in stage 3"
    yield f"{text} together", together, together <= room
    if together > room:
        most = _gpus(machine, run, room, lambda gpus: peak(all_of_it, 1, gpus), 1)
        if most is not None:
            yield f"all of these on {most[0]} GPUs", most[1], most[1] <= room


def _gpus(
    machine: Machine, run: DalleRun, room: int, peak: Callable[[int], int], micro: int
) -> tuple[int, int] | None:
    """(GPUs, peak) of the fewest that hold it at this micro-batch, else of the most that share."""
    found = None
    gpus = 2 * machine.gpus
    while gpus <= MOST_GPUS and run.batch % gpus == 0 and micro in micro_batches(run, gpus):
        found = gpus, peak(gpus)
        if found[1] <= room:
            break
        gpus *= 2
    return found
