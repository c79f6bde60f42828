"""Everything that wants a GPU, in one command that installs and fetches nothing: make gpu-check.

Runs the whole pipeline small (scenes, ingest, tokenizer, stage 1, encode, stage 2, sampling)
through the commands that users type, then measures training steps and sampling, and writes
benchmarks/<chip>.json. Without DeepSpeed the two stages train with plain PyTorch, and this says
so.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.console import InputError, command, logger
from pipeline.files import write_json

log = logger("gpu-check")

ROOT = Path(__file__).resolve().parent.parent
PRESETS = """
import dataclasses
from pipeline import presets
SHORT = {"steps": 100, "val_every": 50, "save_every": 50, "val_images": 64}
def dvae():
    return dataclasses.replace(presets.dvae_demo(), **SHORT)
def dalle():
    return dataclasses.replace(presets.dalle_demo(), **SHORT)
"""


def run(*words: str) -> float:
    """Run a command of the project; its seconds.

    Raises:
        InputError: it failed; the end of its output is shown.
    """
    log.info("%s", " ".join(words))
    start = time.perf_counter()
    result = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False, env=_environment()
    )
    if result.returncode != 0:
        raise InputError(
            f"`{' '.join(words)}` failed with exit code {result.returncode}:\n"
            + (result.stdout + result.stderr)[-3000:]
        )
    return round(time.perf_counter() - start, 2)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


def last_event(run_folder: Path, kind: str) -> dict[str, Any]:
    """The last line of a kind in a run's metrics.jsonl."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    event: dict[str, Any] = [e for e in map(json.loads, lines) if e["kind"] == kind][-1]
    return event


def small_pipeline(folder: Path) -> dict[str, Any]:
    """All stages on 1,000 scenes; seconds by stage and the last losses."""
    python = [sys.executable, "-m"]
    (folder / "short.py").write_text(PRESETS)
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    if has_deepspeed:
        with socket.socket() as free:
            free.bind(("", 0))
            port = str(free.getsockname()[1])
        train = [*python, "deepspeed.launcher.runner", "--num_accelerators", "1",
                 "--master_port", port, "--module"]  # fmt: skip
        last = ["--deepspeed_config", "ds_configs/zero3_bf16.json"]
    else:
        train, last = python, []
        log.info("DeepSpeed is not installed here: the stages train with plain PyTorch")
    at = {name: str(folder / name) for name in
          ("scenes", "pairs", "tokenizer", "dvae", "tokens", "dalle", "samples")}  # fmt: skip
    preset = f"{folder}/short.py"
    data = ["--data", at["pairs"]]
    seconds = {
        "scenes": run(*python, "data_prep.scenes", "--count", "1000", "--out", at["scenes"]),
        "ingest": run(
            *python, "data_prep.ingest", at["scenes"], "--out", at["pairs"], "--image-size", "64"
        ),
        "tokenizer": run(
            *python, "data_prep.train_tokenizer", *data, "--out", at["tokenizer"], "--vocab", "512"
        ),
        "train_dvae": run(
            *train, "pipeline.train_dvae", "--preset", f"{preset}:dvae", *data,
            "--out", at["dvae"], *last,
        ),
        "encode": run(
            *python, "data_prep.encode", *data, "--dvae", at["dvae"], "--out", at["tokens"]
        ),
        "train_dalle": run(
            *train, "pipeline.train_dalle", "--preset", f"{preset}:dalle", "--data", at["tokens"],
            "--tokenizer", at["tokenizer"], "--dvae", at["dvae"], "--out", at["dalle"], *last,
        ),
        "sample": run(
            *python, "pipeline.sample", "--model", at["dalle"], "--dvae", at["dvae"],
            "--caption", "a large red circle in the middle on a white background",
            "--count", "16", "--out", at["samples"],
        ),
    }  # fmt: skip
    return {
        "engine": "DeepSpeed ZeRO-3" if has_deepspeed else "plain PyTorch",
        "seconds": seconds,
        "dvae": last_event(folder / "dvae", "val"),
        "dalle": last_event(folder / "dalle", "val"),
    }


def measurements(folder: Path) -> dict[str, Any]:
    """Training steps and a sampled image of a 256-wide model, and attention alone."""
    results = {}
    for name, words in {
        "step_float32": ["pipeline.bench", "--sample"],
        "step_bfloat16": ["pipeline.bench", "--dtype", "bfloat16", "--sample"],
        "attention": ["kernels.bench"],
    }.items():
        out = folder / f"{name}.json"
        run(sys.executable, "-m", *words, "--out", str(out))
        results[name] = json.loads(out.read_text())
    return results


def chip() -> str:
    """A short name of the device for a file: h200, a100-sxm4-80gb, cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def main() -> None:
    """Check and measure from the command line."""
    parser = argparse.ArgumentParser(prog="pipeline.gpu_check", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="run without a GPU, to test the check")
    parser.add_argument("--small", action="store_true", help="leave the measurements out")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.cpu:
        raise InputError("torch sees no CUDA device here, so there is nothing to check")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = {
            "chip": chip(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "pipeline": small_pipeline(Path(folder)),
            **({} if args.small else measurements(Path(folder))),
        }
    report["seconds"] = round(time.perf_counter() - start, 1)
    path = args.out / f"{report['chip']}.json"
    write_json(path, report)
    log.info("all passed in %.0f s; wrote %s", report["seconds"], path)


if __name__ == "__main__":
    command(main)
