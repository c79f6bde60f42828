"""Preparing data while somebody keeps killing it: the set must come out as if nobody had.

    python -m tests.end_to_end.kills --kills 20 --seed 0

Each round starts the job with one to three workers and ends its whole process group with SIGKILL at
a random moment; then it is left alone once. Every byte of the folder must be that of an undisturbed
run. Both jobs of data_prep that write shards are treated so: ingest and encode.
"""

import argparse
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.models.dvae import DiscreteVAE, save_dvae
from tests import tiny

ROOT = Path(__file__).parent.parent.parent
PICTURES = 360
ROWS_PER_SHARD = 40


def make_source(folder: Path, n: int = PICTURES) -> None:
    """Captioned JPEGs of odd sizes, half of them loose and half in archives; some of them twice."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    with ExitStack() as open_archives:
        archives = [
            open_archives.enter_context(tarfile.open(folder / f"{i:05d}.tar", "w"))
            for i in range(6)
        ]
        _fill(folder, archives, rng, n)


def _fill(folder: Path, archives: list[tarfile.TarFile], rng: np.random.Generator, n: int) -> None:
    pictures: list[bytes] = []
    for i in range(n):
        height, width = rng.integers(33, 64, 2)
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        pictures.append(file.getvalue())
        same = i % (n - 20)
        caption = f"a picture of noise and the number {same}"
        if i % 17 == 0:
            caption = ""
        for name, data in ((f"{i:06d}.jpg", pictures[same]), (f"{i:06d}.txt", caption.encode())):
            if i % 2:
                (folder / name).write_bytes(data)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archives[i // 2 % 6].addfile(member, io.BytesIO(data))


def make_dvae(folder: Path) -> None:
    """A dVAE with random weights."""
    torch.manual_seed(0)
    save_dvae(folder, DiscreteVAE(tiny.DVAE))


def ingest(source: Path, out: Path) -> list[str]:
    """The command that makes the pair set."""
    return [
        "data_prep.ingest", str(source), "--out", str(out), "--image-size", str(tiny.IMAGE_SIZE),
        "--val-fraction", "0.1", "--rows-per-shard", str(ROWS_PER_SHARD), "--any-language",
    ]  # fmt: skip


def encode(pairs: Path, dvae: Path, out: Path) -> list[str]:
    """The command that makes the token set."""
    return [
        "data_prep.encode", "--data", str(pairs), "--dvae", str(dvae), "--out", str(out),
        "--batch", "16", "--crops", "2",
    ]  # fmt: skip


def start(command: list[str], workers: int) -> subprocess.Popen[str]:
    """Start a job in a process group of its own."""
    line = [sys.executable, "-m", *command, "--workers", str(workers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(command: list[str], workers: int) -> float:
    """Let a job run to its end; returns its seconds."""
    began = time.monotonic()
    job = start(command, workers)
    said, _ = job.communicate(timeout=600)
    assert job.returncode == 0, f"{command[0]} ended with {job.returncode}:\n{said}"
    return time.monotonic() - began


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a set, hidden ones too, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def survive(
    command: Callable[[Path], list[str]], folder: Path, kills: int, seed: int
) -> tuple[dict[str, str], dict[str, str], int]:
    """Digests of an undisturbed set and of one whose job was killed, and how many kills hit."""
    seconds = finish(command(folder / "calm"), 1)
    draw = random.Random(seed)
    hit = 0
    for _ in range(5 * kills):
        job = start(command(folder / "killed"), draw.randint(1, 3))
        try:
            job.communicate(timeout=draw.uniform(0.2, 0.9) * seconds)
            shutil.rmtree(folder / "killed")  # it was faster: from the beginning
        except subprocess.TimeoutExpired:
            hit += 1
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
        if hit == kills:
            break
    finish(command(folder / "killed"), 2)
    return digests(folder / "calm"), digests(folder / "killed"), hit


def main() -> None:
    """Kill both jobs and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_source(folder / "source")
        make_dvae(folder / "dvae")
        jobs: dict[str, Callable[[Path], list[str]]] = {
            "ingest": lambda out: ingest(folder / "source", out),
            "encode": lambda out: encode(folder / "ingest" / "calm", folder / "dvae", out),
        }
        for what, command in jobs.items():
            (folder / what).mkdir()
            calm, killed, hit = survive(command, folder / what, args.kills, args.seed)
            differing = sorted(set(calm.items()) ^ set(killed.items()))
            assert not differing, f"{what}: {differing[:5]}"
            print(f"{what}: {hit} of {args.kills} kills hit, {len(calm)} files, every byte equal")


if __name__ == "__main__":
    main()
