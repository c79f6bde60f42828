"""``examples/slurm.sh`` with stand-ins for srun and scontrol: two nodes on this machine."""

import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import slices
from pipeline.training.watching.watch import LEFT
from tests import tiny as runs
from tests.end_to_end.launches import Launch, has_made, launch, nothing_left, until
from tests.end_to_end.test_training import CPU_CONFIG, assert_same_bits
from tests.tiny import arguments, launched

pytestmark = pytest.mark.dist

# A signal goes to the task alone, or to all processes of it (SignalChildrenProcesses).
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
from pathlib import Path
import psutil

command = sys.argv[sys.argv.index("bash"):]
tasks = []

def forward(number, frame):
    for task in tasks:
        try:
            process = psutil.Process(task.pid)
            below = process.children(recursive=True) if os.environ["SIGNALS"] == "all" else []
            for one in [process, *below]:
                one.send_signal(number)
        except psutil.NoSuchProcess:
            pass

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, forward)
for i in range(2):
    environment = os.environ | {{"SLURM_NODEID": str(i)}}
    tasks.append(subprocess.Popen(command, env=environment, start_new_session=True))
Path(os.environ["CALLS"]).joinpath("srun").touch()
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) tr , "\\n" <<< "$3" ;;
    requeue) echo "$*" >> "$CALLS/scontrol" ;;
    *) exit 1 ;;
esac
"""


@dataclass
class Cluster:
    """Stand-ins on PATH, and what they were asked."""

    folder: Path
    signals: str = "task"

    def __post_init__(self):
        for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
            path = self.folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(script)
            path.chmod(0o755)
        # of which the script makes a port
        self.job = next(job for job in range(140_000, 160_000) if is_free(10_000 + job % 20_000))

    def sbatch(self, *arguments) -> Launch:
        for name in ("srun", "scontrol"):
            (self.folder / name).unlink(missing_ok=True)
        path = f"{self.folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return launch(
            self.folder / "log", runs.ROOT / "examples/slurm.sh", *arguments,
            PATH=path, CALLS=str(self.folder), SIGNALS=self.signals, SLURM_JOB_ID=str(self.job),
            SLURM_JOB_NODELIST="localhost,127.0.0.1", SLURM_SUBMIT_DIR=str(runs.ROOT),
        )  # fmt: skip

    def has_begun(self) -> bool:
        return (self.folder / "srun").exists()

    def requeues(self) -> list[str]:
        path = self.folder / "scontrol"
        return path.read_text().splitlines() if path.exists() else []


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def command(inputs, out, preset="dalle_slow") -> list:
    options = arguments("dalle", inputs, out, preset)
    return ["pipeline.train_dalle", *options, "--deepspeed_config", CPU_CONFIG]


@pytest.mark.parametrize("signals", ["task", "all"])
def test_a_job_whose_time_is_over_saves_is_queued_again_and_goes_on(tiny, tmp_path, signals):
    out, cluster = tmp_path / "job-of-this-test", Cluster(tmp_path, signals)
    with nothing_left(out):
        job = cluster.sbatch(*command(tiny, out))
        until(lambda: has_made(out, 7))
        # the batch shell alone, as B: says
        os.kill(job.process.pid, signal.SIGUSR1)
        assert job.wait() == LEFT, job.said
    assert cluster.requeues() == [f"requeue {cluster.job}"]
    saved = slices.newest(out)[1]["updates"]
    assert f"update {saved} of 20 is saved; start again to go on" in job.said
    assert saved >= 7
    for noise in ("Traceback", "trap"):
        assert noise not in job.said
    with nothing_left(out):
        job = cluster.sbatch(*command(tiny, out, "dalle"))
        assert job.wait() == 0, job.said
    assert f"step-{saved:07d}, written by 2 ranks" in job.said
    assert cluster.requeues() == []
    assert not (runs.ROOT / f"hosts.{cluster.job}").exists()
    whole = tmp_path / "whole"
    done = launched("dalle", 2, CPU_CONFIG, *arguments("dalle", tiny, whole, "dalle"))
    assert done.returncode == 0, done.stderr
    assert_same_bits(out, whole)


def test_a_signal_before_the_ranks_listen_is_not_lost(tiny, tmp_path):
    out, cluster = tmp_path / "job-of-this-test", Cluster(tmp_path)
    with nothing_left(out):
        job = cluster.sbatch(*command(tiny, out))
        until(cluster.has_begun)
        os.kill(job.process.pid, signal.SIGUSR1)
        assert job.wait() == LEFT, job.said
    assert len(cluster.requeues()) == 1
    assert slices.newest(out)[1]["updates"] < runs.STEPS


def test_a_job_that_is_cancelled_saves_and_stays_away(tiny, tmp_path):
    out, cluster = tmp_path / "job-of-this-test", Cluster(tmp_path)
    with nothing_left(out):
        job = cluster.sbatch(*command(tiny, out))
        until(lambda: has_made(out, 7))
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.wait() == LEFT, job.said
    assert slices.newest(out)[1]["updates"] >= 7
    assert cluster.requeues() == []


def test_a_job_that_cannot_work_is_not_queued_again(tiny, tmp_path):
    out, cluster = tmp_path / "job-of-this-test", Cluster(tmp_path)
    with nothing_left(out):
        job = cluster.sbatch(*command(tiny, out, "huge"))
        assert job.wait() == 2
    assert job.errors
    assert cluster.requeues() == []
