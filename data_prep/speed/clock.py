"""How long work takes: seconds of the wall, and of the processors, which neighbours disturb less.

On a machine that others use too, a wall clock measures the others. The seconds that a process was
given are nearer to what the work costs, though they grow as well when caches are shared. So both
are taken, of several runs, and the least is named first.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.console import InputError
from pipeline.machine import ROOT

# of a command that failed: what is shown of its output
TAIL = 3


@dataclass
class Times:
    """Seconds of several runs of one thing: of the wall, and of all threads and processes."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def add(self, wall_s: float, cpu_s: float) -> None:
        """Take in one run."""
        self.wall_s.append(wall_s)
        self.cpu_s.append(cpu_s)

    def without(self, start: "Times") -> "Times":
        """The same without what ``start`` takes at the least."""
        return Times(
            [s - min(start.wall_s) for s in self.wall_s],
            [s - min(start.cpu_s) for s in self.cpu_s],
        )

    def of(self, n: int, what: str) -> dict[str, Any]:
        """What is saved: the seconds that ``n`` things take, and things a second."""
        wall_s, cpu_s = spread(self.wall_s), spread(self.cpu_s)
        return {
            what: n,
            f"{what}_per_cpu_s": rate(n, cpu_s["min"]),
            f"{what}_per_cpu_s_median": rate(n, cpu_s["median"]),
            f"{what}_per_s": rate(n, wall_s["min"]),
            "cpu_s": cpu_s,
            "wall_s": wall_s,
        }


def spread(seconds: list[float]) -> dict[str, Any]:
    """Minimum and median, and what they are taken from."""
    runs = [round(s, 5) for s in seconds]
    return {"min": min(runs), "median": round(statistics.median(runs), 5), "runs": runs}


def rate(n: float, seconds: float) -> float | None:
    """Things a second, to four digits; None where no time could be measured."""
    return float(f"{n / seconds:.4g}") if seconds > 0 else None


def timed(work: Callable[[], object], times: Times) -> None:
    """Call ``work`` and take in how long it was."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    times.add(time.perf_counter() - wall, time.process_time() - cpu)


def timed_command(words: list[str], times: Times | None = None) -> str:
    """Run ``python -m`` these words, with all that it starts; returns its standard error.

    Raises:
        InputError: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    wall = time.perf_counter() - wall
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        last = " ".join(done.stderr.strip().splitlines()[-TAIL:])
        raise InputError(f"`{words[0]}` ended with code {done.returncode}: {last}")
    if times is not None:
        cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        times.add(wall, cpu)
    return done.stderr
