"""Training while somebody keeps killing it: the run must end as if nobody had.

    python -m tests.end_to_end.soak --kills 20 --seed 0 --stage 3

Each round starts the run under the launcher and ends a part of it with SIGKILL at a random moment:
one rank, all of it, the outer or the inner half of the launcher, one rank in the middle of a save.
Then nothing of it may be left, and the newest checkpoint must be whole. In the end weights, moments
and averages of every rank and all losses must be those of an undisturbed run, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline import slices
from tests import tiny

ROOT = Path(__file__).parent.parent.parent
RANKS = 2
KINDS = ("a rank", "all", "the outer launcher", "the inner launcher", "a rank in a save")
PRESET = "dalle_soak"
ENDS_WITHIN_S = 60


def config_of(stage: int, folder: Path) -> Path:
    """A ds_config for a CPU."""
    if stage == 3:
        return ROOT / "ds_configs/zero3_cpu.json"
    ds = json.loads((ROOT / "ds_configs/zero2_small.json").read_text())
    del ds["bf16"]
    path = folder / "zero2.json"
    path.write_text(json.dumps(ds | {"train_micro_batch_size_per_gpu": "auto"}))
    return path


class Run:
    """A run that is started again and again.

    Args:
        inputs: of the run.
        out: its folder, whose name no other process has in its command line.
        config: a ds_config.
    """

    def __init__(self, inputs: tiny.Inputs, out: Path, config: Path, steps: int) -> None:
        self.out, self.steps = out, steps
        launcher = Path(sys.executable).parent / "deepspeed"
        options = tiny.arguments("dalle", inputs, out, PRESET)
        self.command = [
            str(launcher), "--num_gpus", str(RANKS), "--master_port", "{port}",
            "--module", "pipeline.train_dalle", *options, "--deepspeed_config", str(config),
        ]  # fmt: skip

    def start(self, said: Path) -> subprocess.Popen[bytes]:
        """In a process group of its own."""
        cpu = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "SOAK_STEPS": str(self.steps)}
        command = [word.replace("{port}", str(tiny.free_port())) for word in self.command]
        with open(said, "w") as file:
            return subprocess.Popen(
                command, cwd=ROOT, env=os.environ | cpu, start_new_session=True,
                stdout=file, stderr=file,
            )  # fmt: skip

    def updates(self) -> int:
        """Made so far, as the run tells it."""
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return 0
        lines = path.read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def processes(self) -> dict[str, list[int]]:
        """Of this run: "outer", "inner" and "ranks"."""
        found: dict[str, list[int]] = {"outer": [], "inner": [], "ranks": []}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_text(errors="replace").split("\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(self.out) not in words or state == "Z":
                continue
            if "deepspeed.launcher.launch" in words:
                kind = "inner"
            else:
                kind = "ranks" if "--local_rank" in " ".join(words) else "outer"
            found[kind].append(int(folder.name))
        return found

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.out / "checkpoints").glob("*.partial"))


def wait_until(holds, seconds: float) -> bool:
    """Whether it holds before so many seconds are over."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def kill(run: Run, job: subprocess.Popen[bytes], kind: str, draw: random.Random) -> bool:
    """End a part of the run at a random moment; False when it had ended before."""
    more = run.updates() + draw.randint(1, 9)
    is_there = wait_until(lambda: run.updates() >= more or job.poll() is not None, 120)
    if kind == "a rank in a save":
        wait_until(lambda: run.is_saving() or job.poll() is not None, 120)
    else:
        time.sleep(draw.uniform(0, 0.3))
    there = run.processes()
    if not is_there or job.poll() is not None or len(there["ranks"]) < RANKS:
        return False
    if kind == "all":
        os.killpg(job.pid, signal.SIGKILL)
    else:
        part = "ranks" if kind.startswith("a rank") else kind.split()[1]
        os.kill(draw.choice(there[part]), signal.SIGKILL)
    return True


def survive(
    inputs: tiny.Inputs, folder: Path, stage: int, kills: int, steps: int, seed: int
) -> tuple[Path, Path, list[str]]:
    """(undisturbed run, disturbed run, what was killed)."""
    config, draw = config_of(stage, folder), random.Random(seed)
    calm = Run(inputs, folder / f"calm-{stage}", config, steps)
    assert calm.start(folder / "calm.txt").wait(600) == 0, (folder / "calm.txt").read_text()
    run = Run(inputs, folder / f"killed-{stage}", config, steps)
    order = [kind for _ in range(kills) for kind in draw.sample(KINDS, len(KINDS))][:kills]
    killed: list[str] = []
    while len(killed) < kills:
        kind, said = order[len(killed)], folder / f"said-{len(killed)}.txt"
        before = slices.newest(run.out)
        job = run.start(said)
        hit = kill(run, job, kind, draw)
        assert hit, f"the run ended by itself before kill {len(killed) + 1}:\n{said.read_text()}"
        is_over = wait_until(lambda: not any(run.processes().values()), ENDS_WITHIN_S)
        assert is_over, f"{kind} was killed, and {run.processes()} live on"
        job.wait()
        killed.append(kind)
        assert not (run.out / "done.json").exists()
        if before is not None:
            where = f"resumed from {before[0]}, written by {RANKS} ranks"
            assert where in said.read_text(), f"not {where}:\n{said.read_text()}"
            newest = slices.newest(run.out)
            assert newest is not None
            assert newest[1]["updates"] >= before[1]["updates"]
    job = run.start(folder / "last.txt")
    assert job.wait(600) == 0, (folder / "last.txt").read_text()
    assert (run.out / "done.json").exists()
    return calm.out, run.out, killed


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two finished runs."""
    found = []
    for kind in ("train", "val"):
        if tiny.curve(one, kind) != tiny.curve(other, kind):
            found.append(f"{kind} figures")
    if (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes():
        found.append("the exported weights")
    last = slices.complete(one)[-1]
    for path in sorted(last.glob("*.safetensors")):
        here, there = load_file(path), load_file(other / path.relative_to(one))
        found += [f"{path.name} {name}" for name in here.keys() ^ there.keys()]
        found += [f"{path.name} {n}" for n in here if not torch.equal(here[n], there[n])]
    return found


def main() -> None:
    """Kill a run and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", type=int, default=3, choices=(2, 3))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        inputs = tiny.make_inputs(Path(name) / "inputs")
        calm, killed, kinds = survive(
            inputs, Path(name), args.stage, args.kills, 10 + 10 * args.kills, args.seed
        )
        found = differences(calm, killed)
        assert not found, found[:5]
        counts = {kind: kinds.count(kind) for kind in KINDS}
        updates = json.loads((killed / "done.json").read_text())["updates"]
        print(f"stage {args.stage}: {len(kinds)} kills {counts}, {updates} updates, no bit differs")


if __name__ == "__main__":
    main()
