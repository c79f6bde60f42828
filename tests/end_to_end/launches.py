"""Launches that go on beside the test: nodes of one run on this machine, or runs of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import tiny as runs
from tests.tiny import CPU, free_port

LAUNCHER = Path(sys.executable).parent / "deepspeed"
PATIENCE_S = 300  # only a hang takes as long, on a machine that others use too


@dataclass(frozen=True)
class Launch:
    """A launcher at work, the leader of its own process group."""

    process: subprocess.Popen
    log: Path

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Its exit code, which must come in time."""
        return self.process.wait(timeout=seconds)

    def kill(self) -> None:
        """End the launcher and its ranks, as the power of a node that goes off does."""
        os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def said(self) -> str:
        """All that came out of it so far."""
        return self.log.read_text()

    @property
    def errors(self) -> list[str]:
        """Lines of the commands that say what is wrong."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


def launch(log: Path, *command, cwd: Path = runs.ROOT, **environment: str) -> Launch:
    """Start a command and do not wait for it."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=cwd, env=os.environ | CPU | environment,
            start_new_session=True, stdout=file, stderr=file,
        )  # fmt: skip
    return Launch(process, log)


def start_nodes(
    folder: Path, options: list[list], slots: int, port: int | None = None, cwds: tuple = ()
) -> list[Launch]:
    """A launcher for each node, without ssh.

    Args:
        folder: for the hostfile and what the launchers say.
        options: of the command, for each node.
        slots: ranks of each.
        port: of rank 0; without, a free one.
        cwds: the checkout of each node; without, this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hosts = folder / "hosts"
    hosts.write_text("".join(f"node-{i} slots={slots}\n" for i in range(len(options))))
    shared = ["--hostfile", hosts, "--num_nodes", len(options), "--num_gpus", slots, "--no_ssh"]
    shared += ["--master_addr", "127.0.0.1", "--master_port", port or free_port()]
    return [
        launch(
            folder / f"node-{i}.log",
            *(LAUNCHER, *shared, "--node_rank", i, "--module", "pipeline.train_dalle", *of_node),
            cwd=cwds[i] if cwds else runs.ROOT,
        )
        for i, of_node in enumerate(options)
    ]


def processes(word: str | Path) -> list[int]:
    """Processes with a word in their command line; a path is no other test's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(word) in (folder / "cmdline").read_text(errors="replace"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@contextmanager
def nothing_left(out: Path) -> Iterator[None]:
    """Inside, processes of the run in ``out`` may be started and must end.

    A launcher takes a moment to see that its last rank has ended.
    """
    try:
        yield
        until(lambda: not processes(out), 60)
    finally:
        for pid in processes(out):
            os.kill(pid, signal.SIGKILL)


def until(holds: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Wait for something that must come in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)


def has_made(out: Path, updates: int) -> bool:
    """Whether the run in ``out`` has told of so many updates."""
    return (out / "metrics.jsonl").exists() and len(runs.losses(out)) >= updates
