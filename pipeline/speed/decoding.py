"""Images a second against the batch, beside what the device's memory and products allow.

One step of ``Decoder`` is timed in the middle of the picture, over caches of noise, and stands for
all of them. The roofline is max(bytes of the weights / bandwidth, batch x operations / rate) and
then the bytes of keys and values / bandwidth, with the bandwidth of a copy and the rate of a
product measured in the same run.

The 12B model is measured in slices of its width. Layers come in eights, six of row and two of
column, and the last is conv: 64 layers are a slice of 8, which has the conv layer, and seven times
what a slice of 16 has more. So its step is t8 + 7 (t16 - t8), and no GPU needs to hold it.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels.attention.decode import Place
from pipeline import presets
from pipeline.config import DalleConfig
from pipeline.generation.decoding import Decoder, caches_of
from pipeline.generation.draw import Settings
from pipeline.generation.sampling import prepare
from pipeline.models.dalle import Dalle, Head, layer_patterns

BATCHES = (1, 8, 32, 64, 128, 256)
STEPS = 64
WARM_UP = 3  # steps that are not counted; the first records the graph
SLICES = (8, 16)

Models = dict[str, tuple[DalleConfig, tuple[int, ...]]]


@dataclass(frozen=True)
class Step:
    """One batch of decoding.

    Args:
        batch: pictures side by side.
        shared: whether all are of one caption; else each has its own.
    """

    batch: int
    shared: bool

    @property
    def n_captions(self) -> int:
        """Different ones."""
        return 1 if self.shared else self.batch


def models() -> Models:
    """What is measured on a GPU: a model, and the layers of the slices it is put together from."""
    whole = presets.dalle_12b().model
    small = presets.dalle_1b().model
    return {"dalle_1b": (small, (small.n_layer,)), "dalle_12b": (whole, SLICES)}


def measure(
    config: DalleConfig,
    layers: Sequence[int],
    batches: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    ceilings: dict[str, float],
) -> dict[str, Any]:
    """Every batch with one caption and with as many as pictures.

    Args:
        config: of the model.
        layers: of the slices that are timed: its own number alone, or ``SLICES``.
        batches: pictures side by side.
        dtype: of matrices, keys and values.
        device: where.
        ceilings: as ``pipeline.machine.ceilings`` gives them.

    Returns:
        "rows", one a batch and kind of captions; "left_out" those that did not fit.
    """
    wanted = [Step(batch, shared) for shared in (True, False) for batch in batches]
    times: dict[Step, list[float]] = {step: [] for step in wanted}
    left_out = []
    for n_layer in layers:
        model = _model(replace(config, n_layer=n_layer), dtype, device)
        for step in [step for step in wanted if step in times]:
            try:
                times[step].append(step_s(model, step))
            except torch.OutOfMemoryError:
                del times[step]
                left_out.append({**vars(step), "reason": f"{n_layer} layers do not fit"})
    rows = []
    for step, found in times.items():
        taken_s = found[0]
        if len(found) > 1:
            taken_s += (
                (config.n_layer - layers[0]) / (layers[1] - layers[0]) * (found[1] - found[0])
            )
        least_s = roofline_s(config, step, dtype, ceilings)
        row = {**vars(step), "step_ms": 1e3 * taken_s, "roofline_ms": 1e3 * least_s}
        row["images_per_s"] = step.batch / (config.n_image * taken_s)
        row["share"] = least_s / taken_s
        # of all layers, where slices were measured too
        rows.append({**row, "kept_gib": kept_bytes(config, step, dtype) / 2**30})
    return {
        "n_layer": config.n_layer,
        "d_model": config.d_model,
        "n_head": config.n_head,
        "measured_layers": list(layers),
        "rows": rows,
        "left_out": left_out,
    }


def _model(config: DalleConfig, dtype: torch.dtype, device: torch.device) -> Dalle:
    with device:
        model = Dalle(config).eval().requires_grad_(False)
    # a fresh head gives all tokens the same logits
    model.image_head.weight.normal_(std=0.02)
    prepare(model, dtype)
    return model


@torch.inference_mode()
def step_s(model: Dalle, step: Step) -> float:
    """Seconds of a step, the median of those in the middle of the picture."""
    decoder = Decoder(model, step.batch, step.n_captions, None, Settings().draw)
    for cache in decoder.caches:
        cache.kept.text_ZCHTD.normal_()
        cache.kept.image_ZBHSD.normal_()
    decoder.noise_WI.uniform_()
    decoder.token_B1.fill_(0)
    middle = middle_of(model.config)
    captions = [0] * step.batch if step.shared else list(range(step.batch))
    decoder.place.restart(captions, middle.start)
    times = [_timed(decoder) for _ in middle]
    return statistics.median(times[WARM_UP:])


def middle_of(config: DalleConfig) -> range:
    """The steps that are taken, those of the warm-up among them."""
    n = min(STEPS + WARM_UP, config.n_image)
    first = (config.n_image - n) // 2
    return range(first, first + n)


def _timed(decoder: Decoder) -> float:
    if decoder.place.device.type != "cuda":
        start_s = time.perf_counter()
        decoder.step(False)
        return time.perf_counter() - start_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    decoder.step(False)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def roofline_s(
    config: DalleConfig, step: Step, dtype: torch.dtype, ceilings: dict[str, float]
) -> float:
    """The least seconds that a step can take."""
    bandwidth = 1e9 * ceilings["copy_gb_s"]
    with torch.device("meta"):
        model = Dalle(config)
    matrices = [p.numel() for p in model.blocks.parameters() if p.ndim == 2]
    head = model.image_head
    assert isinstance(head, Head)
    weight_bytes = dtype.itemsize * sum(matrices) + head.weight.nbytes
    n_ops = 2 * (sum(matrices) + head.weight.numel())
    products_s = step.batch * n_ops / (1e12 * ceilings["matmul_tflop_s"])
    return max(weight_bytes / bandwidth, products_s) + read_bytes(config, step, dtype) / bandwidth


def kept_bytes(config: DalleConfig, step: Step, dtype: torch.dtype) -> int:
    """Bytes of keys and values that the batch keeps."""
    place = Place(step.batch, step.n_captions, torch.device("meta"))
    return sum(cache.kept.nbytes for cache in caches_of(config, place, dtype))


def read_bytes(config: DalleConfig, step: Step, dtype: torch.dtype) -> float:
    """Bytes of keys and values that a step in the middle reads, on average."""
    token_bytes = 2 * config.d_model * dtype.itemsize
    middle = middle_of(config)[WARM_UP:]
    n_tokens = 0.0
    for pattern in layer_patterns(config):
        # a token's own are at hand
        n_earlier = statistics.fmean(len(pattern.image_keys(i)) - 1 for i in middle)
        n_tokens += step.n_captions * config.n_text + step.batch * n_earlier
    return token_bytes * n_tokens
