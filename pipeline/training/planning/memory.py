"""What training the transformer holds on a GPU and on its host, counted before it is started.

Model states and buffers are counted from DeepSpeed 0.19.8's source, and tests hold them against
real shards; what autograd keeps is in ``activations``.

Memory peaks at one of four moments. ``loss``: all that the backward pass needs is kept, and the
logits are there. ``mlp``, ``attention``: the backward pass is in the last block. ``step``:
activations are gone, the optimizer works.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from kernels.tiles import WIDTHS
from pipeline.config import DalleRun
from pipeline.console import InputError
from pipeline.models.dalle import layer_patterns
from pipeline.training.engines import ds_config
from pipeline.training.planning.activations import FLOAT32, block_bytes, heads_bytes, kept_bytes
from pipeline.training.planning.sharding import Shards, count_shards, zero_section

Moment = Literal["loss", "mlp", "attention", "step"]
MOMENTS: tuple[Moment, ...] = ("loss", "mlp", "attention", "step")
ACTIVE: tuple[Moment, ...] = ("loss", "mlp", "attention")
ATTENTION = ("triton", "windowed")

GIB = 2**30
# the libraries' own on a GPU: NCCL takes 1 to 2 GiB, CUDA's context half a one (an assumption)
RESERVE = 2 * GIB
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Part:
    """Bytes with one purpose.

    Args:
        name: of the purpose.
        n_bytes: on each GPU, or on the host for each GPU.
        moments: at which of them it is there.
        is_certain: counted exactly, and there as soon as the first update is under way.
        on_host: in the host's memory.
    """

    name: str
    n_bytes: int
    moments: tuple[Moment, ...] = MOMENTS
    is_certain: bool = False
    on_host: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a run holds on each of its GPUs."""

    world: int
    ranks: int  # among which parameters are sharded
    micro_batch: int
    accumulation: int
    attention: str
    recompute: bool
    shards: Shards
    parts: tuple[Part, ...]

    def at(self, moment: Moment) -> int:
        """Bytes on a GPU at one of the moments."""
        return sum(p.n_bytes for p in self.parts if not p.on_host and moment in p.moments)

    @property
    def worst(self) -> Moment:
        """The moment at which most is held."""
        return max(MOMENTS, key=self.at)

    @property
    def peak(self) -> int:
        """The most bytes on a GPU."""
        return self.at(self.worst)

    @property
    def certain(self) -> int:
        """Bytes on a GPU that are counted exactly: states, buffers, kept activations."""
        return sum(p.n_bytes for p in self.parts if p.is_certain and not p.on_host)

    @property
    def host(self) -> int:
        """Bytes on the host for each GPU while training."""
        return sum(p.n_bytes for p in self.parts if p.on_host)

    def of(self, name: str) -> int:
        """Bytes of the part called ``name``; 0 where there is none."""
        return sum(p.n_bytes for p in self.parts if p.name == name)


def estimate(
    run: DalleRun,
    ds: dict[str, Any],
    world: int,
    *,
    micro_batch: int | None = None,
    attention: str | None = None,
) -> Estimate:
    """Count what ``run`` holds under ``ds`` on ``world`` GPUs.

    Args:
        run: a preset of the transformer.
        ds: the content of a ds_config.
        world: ranks.
        micro_batch: instead of the file's.
        attention: "triton" or "windowed", the path that attention takes; None for "triton" where
            the heads have a width that it takes.

    Raises:
        InputError: what ``ds_config.resolve`` refuses, or what cannot be planned.
    """
    if micro_batch is not None:
        ds = ds | {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": "auto",
        }
    clip = run.optimizer.gradient_clipping
    resolved = ds_config.resolve(ds, batch=run.batch, gradient_clipping=clip, world=world)
    micro = resolved["train_micro_batch_size_per_gpu"]
    model = run.model
    path = attention or ("triton" if model.d_model // model.n_head in WIDTHS else "windowed")
    if path not in ATTENTION:
        raise InputError(f"attention is {path!r}; it is planned for {' and '.join(ATTENTION)}")
    recompute = ds_config.uses_activation_checkpointing(ds)
    numbers = _Numbers.of(ds)
    shards = count_shards(run, ds, world)
    return Estimate(
        world=world,
        ranks=ds_config.shard_ranks(ds, world),
        micro_batch=micro,
        accumulation=resolved["gradient_accumulation_steps"],
        attention=path,
        recompute=recompute,
        shards=shards,
        parts=(
            *_states(run, ds, shards, numbers),
            *_buffers(ds, world, shards, numbers),
            *_activations(run, micro, path, recompute, numbers),
            *_step(run, ds, shards),
            Part("reserve of the libraries", RESERVE),
        ),
    )


@dataclass(frozen=True)
class _Numbers:
    """Bytes of a number of: parameters, matrices computed, gradients kept, gradients sent."""

    parameter: int
    compute: int
    gradient: int
    sent: int

    @classmethod
    def of(cls, ds: dict[str, Any]) -> "_Numbers":
        stored = next((k for k in ("bf16", "fp16") if ds.get(k, {}).get("enabled")), "fp32")
        parameter = BYTES[ds_config.NAMES[stored]]
        # gradients are accumulated in the type of the parameters unless told otherwise
        # (engine.get_data_types), and sent so (engine.communication_data_type)
        kept = ds.get("data_types", {}).get("grad_accum_dtype") or stored
        sent = ds.get("communication_data_type") or stored
        return cls(
            parameter,
            BYTES[ds_config.compute_dtype_name(ds)],
            BYTES[ds_config.NAMES[kept]],
            BYTES[ds_config.NAMES[sent]],
        )


def _offloads(ds: dict[str, Any], what: str) -> bool:
    """Whether ``what`` ("optimizer", "param") lies on the host."""
    section = getattr(zero_section(ds), f"offload_{what}")
    device = "none" if section is None else section.device
    return bool(device == "cpu")


def _states(run: DalleRun, ds: dict[str, Any], shards: Shards, numbers: _Numbers) -> Iterator[Part]:
    """Parameters, masters, gradients, moments, average: each rank's share."""
    own = shards.own
    moment = BYTES[run.optimizer.moment_dtype]
    offloads = _offloads(ds, "optimizer")
    yield Part(
        "parameters",
        numbers.parameter * shards.stored,
        is_certain=True,
        on_host=_offloads(ds, "param"),
    )
    for name, size in (
        # with float32 parameters too: stage3.py compares a device with a string, and copies
        ("float32 masters", FLOAT32),
        ("gradient buffer", numbers.gradient),
        ("moments", 2 * moment),
        ("average of the weights", FLOAT32),
    ):
        yield Part(name, size * own, is_certain=True, on_host=offloads)
    if offloads:
        # initialize_optimizer_states: each sub-group keeps a float32 .grad for good
        yield Part("gradients of the masters", FLOAT32 * own, is_certain=True, on_host=True)
    if shards.compressed:
        yield Part("errors of PowerSGD", FLOAT32 * shards.compressed, is_certain=True)
        yield Part("projections of PowerSGD", FLOAT32 * shards.projections, is_certain=True)


def _buffers(ds: dict[str, Any], world: int, shards: Shards, numbers: _Numbers) -> Iterator[Part]:
    """What ZeRO gathers, sends and keeps whole."""
    size, zero = numbers.parameter, zero_section(ds)
    if ds["zero_optimization"]["stage"] == 2:
        # two, which are filled by turns, where sending overlaps computing
        buckets = 2 if zero.overlap_comm else 1
        if zero.contiguous_gradients:
            n_bytes = buckets * numbers.parameter * zero.reduce_bucket_size
            yield Part("reduce bucket", n_bytes, ("mlp", "attention"), is_certain=True)
        yield Part("gradients of a block's weights", size * shards.largest, ("mlp", "attention"))
        return
    yield Part("small parameters, kept whole", size * shards.persistent, is_certain=True)
    if shards.secondary:
        yield Part("copy shared in the node", size * shards.secondary, is_certain=True)
    bucket = zero.reduce_bucket_size
    if zero.contiguous_gradients:
        yield Part("reduce bucket", numbers.sent * bucket, is_certain=True)
    if ds_config.shard_ranks(ds, world) > 1:  # one rank has all of them in its shard
        live = max(zero.max_live_parameters, shards.block)
        yield Part("gathered parameters", size * min(live, shards.total), ACTIVE)
        # AllGatherCoalescedHandle.wait copies a message's parameters out of it
        yield Part("message of a gather", size * shards.block, ACTIVE)
    # ZeRO-3 reduces a leaf module's gradients when all of them are there
    yield Part("gradients of a block's weights", size * shards.block, ("mlp", "attention"))
    # reduce_scatter_coalesced puts the shares of a bucket in the order of the ranks
    copied = max(min(bucket, shards.block), shards.largest)
    yield Part("copy for the reduction", numbers.sent * copied, ("mlp", "attention"))


def _activations(
    run: DalleRun, micro: int, path: str, recompute: bool, numbers: _Numbers
) -> Iterator[Part]:
    model, c = run.model, numbers.compute
    N, C = model.n_ctx, model.d_model
    copies = c != numbers.parameter
    kept, once = kept_bytes(model, c, path, recompute, copies_weights=copies)
    yield Part("activations kept", micro * kept + once, ACTIVE, is_certain=True)
    blocks = [block_bytes(model, pattern, c, path) for pattern in set(layer_patterns(model))]
    attention, besides, mlp, gradients = (max(sizes) for sizes in zip(*blocks, strict=True))
    if recompute:
        # the block's input is among what is kept
        again = attention - N * C * FLOAT32
        yield Part("attention computed again", micro * again, ("mlp", "attention"))
        weights = model.matrix_parameters // model.n_layer * c if copies else 0
        yield Part("MLP computed again", micro * mlp + weights, ("mlp",))
    yield Part("gradients of activations", micro * gradients, ("mlp",))
    yield Part("attention's workspace", micro * besides, ("attention",))
    text = model.n_text * model.n_text_vocab * FLOAT32
    image = model.n_image * model.n_image_vocab * FLOAT32
    # log-probabilities, with z-loss the logits too; of the larger, the gradients of both
    logits = (2 if run.z_loss else 1) * (text + image) + 2 * max(text, image)
    yield Part("logits", micro * logits, ("loss",))
    # weights of 16 bits are kept as float32 until the backward pass, whose gradients are too
    heads = heads_bytes(model) if numbers.parameter < FLOAT32 else 0
    larger = max(model.n_text_vocab, model.n_image_vocab) * C * FLOAT32
    yield Part("heads in float32", heads + larger, ("loss",))


def _step(run: DalleRun, ds: dict[str, Any], shards: Shards) -> Iterator[Part]:
    """What an update needs for the sub-group at hand."""
    if _offloads(ds, "optimizer"):
        return
    # _prepare_fp32_grad_for_sub_group joins the gradients of a sub-group
    size = FLOAT32
    if run.optimizer.moment_dtype != "float32":
        size += 2 * (FLOAT32 - BYTES[run.optimizer.moment_dtype])
    if run.optimizer.max_exp_avg_sq:
        size += FLOAT32  # the room that is left below the bound
    yield Part("an update's copies", size * shards.sub_group, ("step",))
    if "hybrid_sharding" in ds:
        # the sums of the nodes' gradients, before DeepSpeed has them back
        yield Part("sums over the nodes", FLOAT32 * shards.own, ("step",))


def micro_batches(run: DalleRun, world: int) -> list[int]:
    """The micro-batches that share the preset's batch evenly, the largest first."""
    share = max(1, run.batch // world)
    return [n for n in range(share, 0, -1) if share % n == 0]


def largest_micro_batch(
    run: DalleRun,
    ds: dict[str, Any],
    world: int,
    n_bytes: int,
    *,
    attention: str | None = None,
    only_certain: bool = False,
) -> int | None:
    """The largest micro-batch that fits into ``n_bytes`` of a GPU; None where none does."""
    for micro in micro_batches(run, world):
        found = estimate(run, ds, world, micro_batch=micro, attention=attention)
        if (found.certain if only_certain else found.peak) <= n_bytes:
            return micro
    return None


def preflight(
    run: DalleRun,
    ds: dict[str, Any],
    world: int,
    free_bytes: int,
    *,
    attention: str | None = None,
) -> str | None:
    """Why a run cannot fit into what a GPU has free, as a sentence; None where it may.

    Only what is certain is counted (model states, buffers, kept activations), so a run that passes
    can still run out of memory, and one that does not pass would have.
    """
    found = estimate(run, ds, world, attention=attention)
    if found.certain <= free_bytes:
        return None
    kept = found.of("activations kept")
    said = (
        f"a GPU has {_gib(free_bytes)} free, and this run holds at least {_gib(found.certain)}: "
        f"{_gib(kept)} of activations at micro-batch {found.micro_batch}, and "
        f"{_gib(found.certain - kept)} of model states and buffers on {world} GPUs"
    )
    micro = largest_micro_batch(run, ds, world, free_bytes, attention=attention, only_certain=True)
    if micro is not None:
        return f'{said}; set "train_micro_batch_size_per_gpu" to {micro} or less'
    return (
        f"{said}; no micro-batch fits: take more GPUs, activation_checkpointing or "
        "offload_optimizer (python -m pipeline.plan counts each)"
    )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.2f} GiB"
