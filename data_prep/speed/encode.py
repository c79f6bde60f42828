"""Images a second that the frozen dVAE encodes: the job as users start it, and the dVAE alone.

The job's rate is read off the times at which its shards are committed, from the first on: so it
holds the decoding of the pictures and the writing of the tokens, and not the start of the process.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_prep.speed.clock import Times, rate, timed, timed_command
from data_prep.speed.inputs import captions, pictures, write_pairs
from pipeline.config import DvaeConfig
from pipeline.console import InputError
from pipeline.data.schema import shard_name
from pipeline.machine import ceilings
from pipeline.models.dvae import Conv2d, DiscreteVAE, save_dvae

SHARDS = 5  # the first is not counted
DISTINCT = 256  # pictures, at most; they come again under other keys
WIDER = 2  # sides of a picture over those of a crop
# as data_prep.encode computes where nothing else is asked for
DTYPES = {"cuda": ("float16", torch.float16), "cpu": ("float32", torch.float32)}
# batches of one run of the dVAE alone
ALONE = {"cuda": 16, "cpu": 1}


@dataclass(frozen=True)
class Setting:
    """What is encoded, and by what.

    Args:
        config: of the dVAE, whose weights are random.
        n: pictures of each shard.
        batch: pictures at once.
        device: "cuda" or "cpu"; on a CPU one process with one thread.
        runs: of the dVAE alone.
    """

    config: DvaeConfig
    n: int
    batch: int
    device: str
    runs: int


def measure(folder: Path, setting: Setting) -> dict[str, Any]:
    """Images a second of job and dVAE, beside what the device's matrix products would allow.

    Raises:
        InputError: the job fails.
    """
    name, dtype = DTYPES[setting.device]
    torch.manual_seed(0)
    dvae = DiscreteVAE(setting.config).eval().requires_grad_(False)
    job = _job(folder, dvae, setting)
    dvae.set_compute_dtype(dtype)
    alone = _alone(dvae.to(setting.device), setting)
    flop, wide_flop = flop_of(setting.config), _float32_flop(dvae)
    # of products of matrices, in flop/s: of the dtype, and of the convolution that stays float32
    peak, wide_peak = (
        1e12 * ceilings(torch.device(setting.device), kind)["matmul_tflop_s"]
        for kind in (dtype, torch.float32)
    )
    bound_s = (flop - wide_flop) / peak + wide_flop / wide_peak
    return {
        "device": setting.device,
        "dtype": name,
        "batch": setting.batch,
        "image_size": setting.config.image_size,
        "gflop_per_image": flop / 1e9,
        "float32_gflop_per_image": wide_flop / 1e9,
        "job": job,
        "dvae": alone | {"gflop_s": rate(alone["images_per_s"] * flop, 1e9)},
        "bound": {
            "matmul_gflop_s": rate(peak, 1e9),
            "matmul_float32_gflop_s": rate(wide_peak, 1e9),
            "images_per_s": rate(peak, flop),
            "images_per_s_with_float32": rate(1, bound_s),
        },
    }


def flop_of(config: DvaeConfig) -> int:
    """Operations of the encoder on one picture, two for a product and its sum: 272e9 (paper)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        side = config.image_size
        DiscreteVAE(config).encode(torch.empty(1, 3, side, side))
    return int(counter.get_total_flops())


def _float32_flop(dvae: DiscreteVAE) -> int:
    """Of them, those that are float32 whatever the others are: the last convolution's."""
    last = [m for m in dvae.encoder.modules() if isinstance(m, Conv2d) and m.full_precision]
    return sum(2 * m.w.numel() for m in last) * dvae.config.grid**2


def _job(folder: Path, dvae: DiscreteVAE, setting: Setting) -> dict[str, Any]:
    n, side = SHARDS * setting.n, WIDER * setting.config.image_size
    save_dvae(folder / "dvae", dvae)
    images = list(pictures(min(n, DISTINCT), side))
    write_pairs(folder / "pairs", images, captions(n), side, setting.n)
    words = ["--data", str(folder / "pairs"), "--dvae", str(folder / "dvae")]
    words += ["--out", str(folder / "tokens"), "--batch", str(setting.batch), "--workers", "1"]
    begun_s, times = time.time(), Times()
    said = timed_command(["data_prep.encode", *words], times)
    records = [(folder / "tokens" / shard_name(k)).with_suffix(".json") for k in range(SHARDS)]
    ends_s = [record.stat().st_mtime for record in records]
    busy = re.findall(r"dVAE busy (\d+)%", said)
    if not busy:
        raise InputError(f"data_prep.encode does not say how busy the dVAE was: {said[-300:]!r}")
    return {
        "images": n,
        "images_per_s": rate(n - setting.n, ends_s[-1] - ends_s[0]),
        ("gpu" if setting.device == "cuda" else "dvae") + "_busy": int(busy[-1]) / 100,
        "first_shard_s": round(ends_s[0] - begun_s, 2),
        "command_s": round(times.wall_s[0], 2),
        "command_cpu_s": round(times.cpu_s[0], 2),
    }


def _alone(dvae: DiscreteVAE, setting: Setting) -> dict[str, Any]:
    """The encoder again and again on a batch that is there already."""
    side, n_batches = setting.config.image_size, ALONE[setting.device]
    # as the job sets it
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (setting.batch, side, side, 3), dtype=np.uint8)
    image_BYXC = torch.from_numpy(pixels).to(setting.device)

    @torch.no_grad()
    def work() -> None:
        for _ in range(n_batches):
            dvae.encode(image_BYXC.permute(0, 3, 1, 2).float() / 255)
        if setting.device == "cuda":
            torch.cuda.synchronize()

    times = Times()
    work()
    for _ in range(setting.runs):
        timed(work, times)
    return times.of(n_batches * setting.batch, "images")
