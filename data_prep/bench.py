"""Speed of the data path: ``python -m data_prep.bench [--only ingest loader encode]``.

    ingest   512-pixel JPEG files with captions, in archives, through the command with every filter
             on: images a second and core, of the job, of its passes and of what goes on inside
    loader   100,000 samples of 1,024 codes and a caption, in batches at random places: samples a
             second read, tokenised, and tokenised with BPE dropout, and resuming among 250 million
             rows; with --peer also beside mosaicml-streaming on the same samples
    encode   images a second of the paper-size encoder with random weights: the command, and the
             dVAE alone beside what the device's matrix products would allow

The data are made up, and one core works, and a GPU. Neighbours on the machine disturb times: so
seconds of the processors stand beside those of the wall, and the least of several runs is told.
Without --only ingest and loader are measured: on a CPU the encoder takes seconds an image.
"""

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_prep.speed import encode, ingest, loader
from pipeline.config import DvaeConfig, require
from pipeline.console import InputError, a_path, command, logger
from pipeline.files import write_bytes
from pipeline.machine import commit, device_name, versions

# what the times depend on besides python and torch
LIBRARIES = ("numpy", "Pillow", "py3langid", "pyarrow", "sentencepiece")
# of the encoder: pictures of each shard, and pictures at once
SIZES = {"cuda": (1024, 32), "cpu": (2, 2)}
# aimed at, on one core or one GPU: where the number stands, and how much it should be
TARGETS = {
    "ingest, images/s": ("ingest job images_per_cpu_s", 300),
    "reading, samples/s": ("loader reading samples_per_cpu_s", 100_000),
    "with BPE dropout, samples/s": ("loader bpe_dropout samples_per_cpu_s", 20_000),
    "random access, times the peer's": ("race ratio batches", 10),
    "resumes among 250 million rows, 1/s": ("loader resume resumes_per_cpu_s", 100),
    "share of time that the dVAE keeps a GPU busy": ("encode job gpu_busy", 0.85),
}

log = logger("bench")


def measure_ingest(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pairs into a set."""
    return {"ingest": ingest.measure(folder, args.images, args.side, args.runs)}


def measure_loader(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Samples out of a set, and beside the peer."""
    samples = loader.Samples(folder, args.samples, args.grid)
    found = {"loader": loader.measure(samples, args.runs)}
    if args.peer:
        found["race"] = loader.race(samples, args.peer, args.runs)
    return found


def measure_encode(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pictures into codes."""
    config = DvaeConfig(args.image_size, args.n_vocab, n_hid=args.n_hid)
    per_shard, batch = SIZES[args.device]
    setting = encode.Setting(
        config, args.per_shard or per_shard, args.batch or batch, args.device, args.runs
    )
    return {"encode": encode.measure(folder, setting)}


PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "ingest": measure_ingest,
    "loader": measure_loader,
    "encode": measure_encode,
}


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, and whether it was reached; without what was not measured."""
    found = []
    for name, (place, least) in TARGETS.items():
        value: Any = result
        for part in place.split():
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found.append({"name": name, "value": value, "least": least, "met": value >= least})
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="data_prep.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=["ingest", "loader"])
    parser.add_argument("--runs", type=int, default=5, help="of everything (default 5)")
    parser.add_argument("--commit", help="of the code; what git says when left out")
    parser.add_argument("--out", type=a_path, help="also save as JSON, after every part")
    group = parser.add_argument_group("ingest")
    group.add_argument("--images", type=int, default=1200, help="pictures (default 1,200)")
    group.add_argument("--side", type=int, default=512, help="pixels a side (default 512)")
    group = parser.add_argument_group("loader")
    group.add_argument("--samples", type=int, default=100_000, help="(default 100,000)")
    group.add_argument("--grid", type=int, default=32, help="codes a side (default 32)")
    group.add_argument(
        "--peer", metavar="PYTHON", help="of an environment that has mosaicml-streaming"
    )
    group = parser.add_argument_group("encode")
    group.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    on = "{} on a GPU, {} on a CPU".format
    per_shard, batch = zip(SIZES["cuda"], SIZES["cpu"], strict=True)
    group.add_argument("--per-shard", type=int, help=f"pictures: {on(*per_shard)}")
    group.add_argument("--batch", type=int, help=f"pictures at once: {on(*batch)}")
    group.add_argument("--image-size", type=int, default=256, help="pixels a side (default 256)")
    group.add_argument("--n-vocab", type=int, default=8192, help="codes (default 8,192)")
    group.add_argument("--n-hid", type=int, default=256, help="channels (default 256)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise ``InputError`` for flags that cannot be measured."""
    least = {"runs": 1, "images": 4, "side": 256, "samples": 1, "grid": 1}
    for name, n in least.items():
        value = getattr(args, name)
        require(value >= n, f"--{name} is {value}; take at least {n}")
    for name in ("per_shard", "batch"):
        value = getattr(args, name)
        flag = name.replace("_", "-")
        require(value is None or value >= 1, f"--{flag} is {value}; take at least 1")
    if args.device == "cuda":
        require(torch.cuda.is_available(), "--device cuda: torch sees no CUDA device here")
        require(
            "encode" in args.only, "--device cuda: only the encoder uses one; add --only encode"
        )
    if args.peer:
        require("loader" in args.only, "--peer reads what the loader reads; add --only loader")


def save(path: Path, result: dict[str, Any]) -> None:
    """Write the result as JSON.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, (json.dumps(result, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"--out {path} cannot be written ({error.strerror})") from error


def main(argv: list[str] | None = None) -> None:
    """Measure, tell and, with ``--out``, save."""
    args = parse(argv)
    check(args)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "chip": device_name("cpu"),
        "threads": 1,
        "versions": versions() | {name: version(name) for name in LIBRARIES},
        "commit": args.commit or commit(),
    }
    if args.device == "cuda":
        result["gpu"] = device_name("cuda")
    for name in (name for name in PARTS if name in args.only):
        if args.out:
            save(args.out, result)
        log.info("%s", name)
        with tempfile.TemporaryDirectory() as folder:
            result |= PARTS[name](args, Path(folder))
    result["targets"] = targets(result)
    for target in result["targets"]:
        log.info("{name}: {value:,}, aimed at {least:,}".format(**target))
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if args.out:
        save(args.out, result)


if __name__ == "__main__":
    command(main)
