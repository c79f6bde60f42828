"""Everything that wants a GPU, in one command that installs and fetches nothing: make gpu-check.

The tests that need a GPU first; then the attention kernels beside PyTorch's, training steps and a
sampled image of a middle-sized model, images a second of the paper's models, and the whole pipeline
small (scenes, ingest, tokenizer, stage 1, encode, stage 2, sampling) through the commands that
users type, and the paper-size encoder. benchmarks/<chip>.json is written after every stage, with
"complete": false until all of them ran, so that a run that is cut leaves what it measured; stages
for which no time is left are named. Without DeepSpeed the two stages train with plain PyTorch, and
this says so.
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kernels.speed import machine
from kernels.speed.figures import ratio_lines
from pipeline.config import require
from pipeline.console import InputError, a_path, command, logger
from pipeline.files import write_json

log = logger("gpu-check")

ROOT = Path(__file__).resolve().parent.parent
# those of the demo, as short as shows that every stage runs and that losses fall
PRESETS = """
import dataclasses
from pipeline import presets
SHORT = {"steps": 100, "val_every": 50, "save_every": 50, "val_images": 64}
def dvae():
    return dataclasses.replace(presets.dvae_demo(), **SHORT)
def dalle():
    return dataclasses.replace(presets.dalle_demo(), **SHORT)
"""
# of the training steps: heads 64 wide as in the paper, a quarter of a billion parameters, which
# train on any GPU that has kernels here
MIDDLE = ["--d_model", "1024", "--layers", "16", "--heads", "16", "--batch", "8",
          "--dtype", "bfloat16", "--runs", "5", "--sample"]  # fmt: skip

# of decoding: the models of its bench, in the number format that they are sampled in
DECODE = ["--decode", "--dtype", "bfloat16"]

# of the encoder: as its bench has it, for a GPU 5,120 pictures
ENCODER = ["--only", "encode"]

# seconds without which a stage is not begun: it would be cut before it has anything to save
LEAST_S = {
    "tests": 30.0,
    "attention": 40.0,
    "steps": 30.0,
    "decode": 40.0,
    "pipeline": 60.0,
    "encode": 60.0,
}
# of the attention bench, what it takes beyond the --seconds that it is given: imports, the start of
# CUDA, the ceilings, and a compilation that was begun just before they were over
START_UP_S = 25.0
# enough to compile FlexAttention for four patterns and two blocks; more would only repeat turns,
# and take from the nine minutes what the later stages need
MOST_ATTENTION_S = 170.0
# each has a CUDA context of its own, and more would wait for the one GPU
MOST_TEST_PROCESSES = 8
TAIL = 3000  # characters of output that a failure shows


class OutOfTime(InputError):
    """A command was still running when its time was over."""


class Watch:
    """The time that is left."""

    def __init__(self, minutes: float) -> None:
        self.end_s = time.monotonic() + 60 * minutes

    def left_s(self) -> float:
        """Seconds to the deadline, 0 after it."""
        return max(self.end_s - time.monotonic(), 0.0)


def run(*words: str, watch: Watch | None = None) -> float:
    """Run a command of the project; its seconds.

    Raises:
        OutOfTime: it was not done at the deadline, and was killed with all that it started.
        InputError: it failed; the end of its output is shown.
    """
    code, output, took_s = outcome(words, watch)
    if code != 0:
        raise InputError(f"`{' '.join(words)}` failed with exit code {code}:\n" + output[-TAIL:])
    return took_s


def outcome(words: tuple[str, ...], watch: Watch | None = None) -> tuple[int, str, float]:
    """Exit code, output and seconds of a command.

    Raises:
        OutOfTime: it was not done at the deadline, and was killed with all that it started.
    """
    log.info("%s", " ".join(words))
    start = time.perf_counter()
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=watch.left_s() if watch else None)
    except subprocess.TimeoutExpired as error:
        _kill(process)
        raise OutOfTime(
            f"`{' '.join(words)}` was cut after {time.perf_counter() - start:.0f} s, when the time "
            "was over; give more --minutes"
        ) from error
    except BaseException:
        _kill(process)
        raise
    return process.returncode, output, round(time.perf_counter() - start, 2)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a command and what it started: they are a process group of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def gpu_tests(watch: Watch, tests: Path = ROOT / "tests") -> dict[str, Any]:
    """Run the tests that are marked gpu; only their files, for others may need DeepSpeed.

    Raises:
        InputError: one fails, or none passes.
        OutOfTime: they were cut.
    """
    files = [str(f) for f in sorted(tests.rglob("test_*.py")) if "mark.gpu" in f.read_text()]
    require(bool(files), f"no test under {tests} is marked gpu, so nothing was checked")
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    # most of their time is the compiler's, on one core
    if importlib.util.find_spec("xdist"):
        words += ["-n", str(min(os.cpu_count() or 1, MOST_TEST_PROCESSES))]
    code, output, took_s = outcome(tuple(words), watch)
    counts = {
        what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", output)
    }
    if code != 0 or not counts.get("passed"):
        raise InputError(
            f"the GPU tests ended with exit code {code} and {counts.get('passed', 0)} passed; "
            f"mend them before anything is measured:\n{output[-TAIL:]}"
        )
    return {"passed": counts["passed"], "skipped": counts.get("skipped", 0), "seconds": took_s}


def saved(out: Path, words: list[str], watch: Watch) -> dict[str, Any]:
    """The JSON that a command leaves in ``out``; if it fails half-way, with the reason as "cut"."""
    try:
        run(*words, watch=watch)
    except InputError as error:
        if not out.is_file():
            raise
        return {**json.loads(out.read_text()), "cut": str(error)}
    return dict(json.loads(out.read_text()))


def attention(folder: Path, watch: Watch, commit: str) -> dict[str, Any]:
    """What ``kernels.bench`` measures; if it is cut, the patterns that it finished."""
    out = folder / "attention.json"
    bench_s = max(min(watch.left_s() - START_UP_S, MOST_ATTENTION_S), 1.0)
    words = [sys.executable, "-m", "kernels.bench", "--seconds", f"{bench_s:.0f}"]
    words += ["--out", str(out), "--commit", commit]
    result = saved(out, words, watch)
    for kind, pattern in result["patterns"].items():
        for name, reason in pattern["left_out"].items():
            log.info("%s: %s was left out: %s", kind, name, reason)
    if any(ratio["value"] is not None for ratio in result["ratios"]):
        for line in ratio_lines(result):
            log.info("%s", line)
    return result


def steps(folder: Path, watch: Watch, commit: str) -> dict[str, Any]:
    """Training steps and a sampled image of a middle-sized model on the device."""
    out = folder / "steps.json"
    words = [sys.executable, "-m", "pipeline.bench", "--device", device(), "--out", str(out)]
    return saved(out, [*words, "--commit", commit, *MIDDLE], watch)


def decode(folder: Path, watch: Watch, commit: str) -> dict[str, Any]:
    """Images a second by batch, of the paper's models."""
    out = folder / "decode.json"
    words = [sys.executable, "-m", "pipeline.bench", "--device", device(), "--out", str(out)]
    return saved(out, [*words, "--commit", commit, *DECODE], watch)


def encode(folder: Path, watch: Watch, commit: str) -> dict[str, Any]:
    """Images a second of the paper-size encoder on the device, in its job and alone.

    Raises:
        InputError: it failed.
        OutOfTime: it was cut.
    """
    out = folder / "encode.json"
    words = [sys.executable, "-m", "data_prep.bench", "--device", device(), "--out", str(out)]
    run(*words, "--commit", commit, *ENCODER, watch=watch)
    return dict(json.loads(out.read_text()))


def last_event(run_folder: Path, kind: str) -> dict[str, Any]:
    """The last line of a kind in a run's metrics.jsonl."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    event: dict[str, Any] = [e for e in map(json.loads, lines) if e["kind"] == kind][-1]
    return event


def small_pipeline(folder: Path, watch: Watch) -> dict[str, Any]:
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
    seconds = {}
    for name, words in {
        "scenes": [*python, "data_prep.scenes", "--count", "1000", "--out", at["scenes"]],
        "ingest": [
            *python, "data_prep.ingest", at["scenes"], "--out", at["pairs"], "--image-size", "64"
        ],
        "tokenizer": [
            *python, "data_prep.train_tokenizer", *data, "--out", at["tokenizer"], "--vocab", "512"
        ],
        "train_dvae": [
            *train, "pipeline.train_dvae", "--preset", f"{preset}:dvae", *data,
            "--out", at["dvae"], *last,
        ],
        "encode": [*python, "data_prep.encode", *data, "--dvae", at["dvae"], "--out", at["tokens"]],
        "train_dalle": [
            *train, "pipeline.train_dalle", "--preset", f"{preset}:dalle", "--data", at["tokens"],
            "--tokenizer", at["tokenizer"], "--dvae", at["dvae"], "--out", at["dalle"], *last,
        ],
        "sample": [
            *python, "pipeline.sample", "--model", at["dalle"], "--dvae", at["dvae"],
            "--caption", "a large red circle in the middle on a white background",
            "--count", "16", "--out", at["samples"],
        ],
    }.items():  # fmt: skip
        seconds[name] = run(*words, watch=watch)
    return {
        "engine": "DeepSpeed ZeRO-3" if has_deepspeed else "plain PyTorch",
        "seconds": seconds,
        "dvae": last_event(folder / "dvae", "val"),
        "dalle": last_event(folder / "dalle", "val"),
    }


def device() -> str:
    """The GPU, if torch sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def file_name() -> str:
    """Of the report: nvidia-h200.json, nvidia-a100-sxm4-80gb.json, cpu.json."""
    name = machine.device_name("cuda").lower() if device() == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") + ".json"


Stage = Callable[[Path, Watch], dict[str, Any]]


def check(
    stages: dict[str, Stage], chosen: list[str], report: dict[str, Any], path: Path, watch: Watch
) -> None:
    """Run the chosen stages in order; the report is in its file after each.

    A failure of the tests ends the check. Another stage that fails or is cut is written down, and
    the rest still runs.

    Raises:
        InputError: the tests failed or nothing ran; or, at the end, another stage failed.
    """
    failed: dict[str, str] = {}
    left_out = {name: "not asked for" for name in stages if name not in chosen}
    report |= {"complete": False, "left_out": left_out, "failed": failed, "seconds": {}}
    save = partial(write_json, path, report)
    for name in (name for name in stages if name in chosen):
        if watch.left_s() < LEAST_S[name]:
            reason = f"{watch.left_s():.0f} s were left; it is begun with {LEAST_S[name]:.0f}"
            log.info("%s is left out: %s", name, reason)
            left_out[name] = reason
            continue
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                report[name] = stages[name](Path(folder), watch)
            if "cut" in report[name]:
                failed[name] = report[name].pop("cut")
        except InputError as error:
            failed[name] = str(error)
            save()
            if name == "tests":
                raise
        report["seconds"][name] = round(time.monotonic() - start, 1)
        log.info("%s took %.0f s", name, report["seconds"][name])
        save()
    report["complete"] = not failed and not left_out
    save()
    if not report["seconds"]:
        raise InputError("nothing ran in the time that was given; give more --minutes")
    if failed:
        raise InputError(
            f"{path} holds the rest, but "
            + "\n".join(f"{name} failed: {reason}" for name, reason in failed.items())
        )


def main() -> None:
    """Check and measure from the command line."""
    parser = argparse.ArgumentParser(
        prog="pipeline.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cpu", action="store_true", help="run without a GPU, to test the check")
    parser.add_argument(
        "--minutes", type=float, default=9, help="minutes after which nothing runs any more"
    )
    parser.add_argument("--stages", nargs="+", choices=LEAST_S, help="all when left out")
    parser.add_argument("--commit", default="", help="of the code; what git says when left out")
    parser.add_argument("--out", type=a_path, default=ROOT / "benchmarks")
    args = parser.parse_args()
    require(0 < args.minutes <= 60, f"--minutes is {args.minutes}; take more than 0, at most 60")
    if not torch.cuda.is_available() and not args.cpu:
        raise InputError("torch sees no CUDA device here, so there is nothing to check")
    watch, commit = Watch(args.minutes), args.commit or machine.commit()
    stages: dict[str, Stage] = {
        "tests": lambda _, watch: gpu_tests(watch),
        "attention": lambda folder, watch: attention(folder, watch, commit),
        "steps": lambda folder, watch: steps(folder, watch, commit),
        "decode": lambda folder, watch: decode(folder, watch, commit),
        "pipeline": small_pipeline,
        "encode": lambda folder, watch: encode(folder, watch, commit),
    }
    report: dict[str, Any] = {
        "chip": machine.device_name(device()),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": machine.versions(),
        "commit": commit,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / file_name()
    check(stages, args.stages or list(stages), report, path, watch)
    left_out = "".join(f"; {name} left out: {why}" for name, why in report["left_out"].items())
    log.info("passed%s; wrote %s", left_out, path)


if __name__ == "__main__":
    command(main)
