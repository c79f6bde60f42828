"""Where an update's time goes: ``profile.json``, and a table in the log.

The loop marks its parts, torch.profiler records them with all operators, kernels and collectives
of the first rank, and the rest is arithmetic on spans of time:

- *data*, *forward*, *backward* and *optimizer* are the wall time inside the loop's calls, without
  what communication takes there. *data* is waiting for the loader, which reads ahead; with
  activation checkpointing *backward* has the second forward pass in it.
- *communication* is the time in which collectives run and the device computes nothing. On a GPU
  these are the spans of NCCL's kernels, on a CPU those of gloo (from the call to its end) and of
  the calls themselves. Waiting for a slower rank looks the same and is counted.
- *overlapped* is the rest of the collectives' time: something is computed beside them. It is in
  the other parts already, and in the sum no second time.
- *other* is what remains of the update: sums over ranks, figures, the loop.

On a GPU the end of each part waits until the device is done, so that each kernel lies in the part
that launched it; the launches of one part then do not hide behind the kernels of another. What
recording costs shows beside: the mean of the updates before, which nobody recorded.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from pipeline.console import logger
from pipeline.files import write_json

FIRST = 5  # update of a process that is recorded: those before warm up
MOST = 100  # updates: their events are held in memory
PARTS = ("data", "forward", "backward", "optimizer")
UPDATE = "update"
MARK = "daikon::"

Spans = list[tuple[int, int]]  # (start, end) in ns, in order, apart from each other

log = logger("train")


@dataclass(frozen=True)
class Shares:
    """Nanoseconds of some updates.

    Args:
        parts: by name, of PARTS and "communication" and "other": they add up to the updates.
        overlapped: of communication beside computing.
        updates: in all.
    """

    parts: dict[str, int]
    overlapped: int
    updates: int


class Profile:
    """Records updates FIRST to FIRST + ``n`` - 1 of this process, if it is the rank to speak.

    Args:
        n: updates; 0 for none.
        out: folder that profile.json is written to.
        device: of this rank.
        world: ranks.
    """

    def __init__(self, n: int, out: Path, device: torch.device, world: int) -> None:
        self._n, self._out, self._device, self._world = n, out, device, world
        self._seen = 0
        self._profiler: Any = None
        self._walls: list[float] = []
        self._updates: list[int] = []
        self._mark: Any = None

    def begin(self) -> None:
        """An update begins."""
        if not self._n:
            return
        self._seen += 1
        if self._seen == FIRST:
            self._profiler = self._start()
        if self._profiler is not None:
            self._mark = record_function(MARK + UPDATE)
            self._mark.__enter__()
        self._start_s = time.perf_counter()

    def end(self, update: int) -> None:
        """It is done, and was the run's so many."""
        if not self._n:
            return
        self._wait()
        self._walls.append(time.perf_counter() - self._start_s)
        self._updates.append(update)
        if self._profiler is None:
            return
        self._mark.__exit__(None, None, None)
        if self._seen == FIRST - 1 + self._n:
            self._write()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens in here is of part ``name``."""
        if self._profiler is None:
            yield
            return
        with record_function(MARK + name):
            yield
            self._wait()

    def close(self) -> None:
        """The run ends; a recording that still goes on would crash the process."""
        if not self._n:
            return
        if len(self._walls) >= FIRST:
            self._write()
            return
        if self._profiler is not None:
            self._profiler.stop()
        log.warning(
            "--profile: the run ended after %d updates and the first recorded one is number %d: "
            "there is no profile.json", len(self._walls), FIRST,
        )  # fmt: skip

    def _start(self) -> Any:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=activities)
        profiler.start()
        return profiler

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self) -> None:
        self._profiler.stop()
        events = self._profiler.profiler.kineto_results.events()
        on_gpu, n = self._device.type == "cuda", len(self._walls) - FIRST + 1
        shares = take_apart(events, n, on_gpu=on_gpu)
        self._profiler, self._n = None, 0
        # the first waits for the first batch, and compiles what is to be compiled
        before, recorded = self._walls[1 : FIRST - 1], self._walls[FIRST - 1 :]
        found = {
            "updates": self._updates[FIRST - 1 :],
            "update_s": sum(recorded) / n,
            "update_s_not_recorded": sum(before) / len(before),
            "parts_s": {name: ns / n / 1e9 for name, ns in shares.parts.items()},
            "communication_overlapped_s": shares.overlapped / n / 1e9,
            "device": self._device.type,
            "ranks": self._world,
        }
        write_json(self._out / "profile.json", found)
        for line in table(found):
            log.info("%s", line)


def table(found: dict[str, Any]) -> list[str]:
    """Lines of text of profile.json."""
    first, last, whole = found["updates"][0], found["updates"][-1], found["update_s"]
    lines = [f"an update's time on the first of {found['ranks']} ranks, updates {first} to {last}:"]
    for name, seconds in found["parts_s"].items():
        beside = ""
        if name == "communication":
            beside = f"  and {found['communication_overlapped_s']:.4f} s beside computing"
        lines.append(f"  {name:<14}{seconds:>9.4f} s {100 * seconds / whole:>4.0f} %{beside}")
    lines.append(
        f"  {'update':<14}{whole:>9.4f} s   {found['update_s_not_recorded']:.4f} s when it is not "
        "recorded"
    )
    return lines


def take_apart(events: Iterable[Any], n: int, *, on_gpu: bool) -> Shares:
    """Parts of the first ``n`` updates, from torch.profiler's events (``_KinetoEvent``)."""
    events = list(events)
    marks: dict[str, list[tuple[int, int]]] = {}
    thread = None
    for e in events:
        if e.name().startswith(MARK) and e.device_type().name == "CPU":
            marks.setdefault(e.name().removeprefix(MARK), []).append((e.start_ns(), e.end_ns()))
            thread = e.start_thread_id()
    updates = joined(sorted(marks.get(UPDATE, []))[:n])
    sending, computing = _on_gpu(events) if on_gpu else _on_cpu(events, thread)
    alone = within(without(sending, computing), updates)
    parts, rest = {}, updates
    for name in PARTS:
        spans = within(joined(marks.get(name, [])), updates)
        parts[name] = length(without(spans, alone))
        rest = without(rest, spans)
    parts["communication"] = length(alone)
    parts["other"] = length(without(rest, alone))
    overlapped = length(within(within(sending, computing), updates))
    return Shares(parts, overlapped, length(updates))


def _on_gpu(events: list[Any]) -> tuple[Spans, Spans]:
    """(collectives, all other work) of the device."""
    sending: Spans = []
    computing: Spans = []
    for e in events:
        if e.device_type().name == "CPU" or e.is_user_annotation():
            continue
        (sending if "nccl" in e.name().lower() else computing).append((e.start_ns(), e.end_ns()))
    return joined(sending), joined(computing)


def _on_cpu(events: list[Any], thread: int | None) -> tuple[Spans, Spans]:
    """(collectives, operators of the training thread that are no part of a collective)."""
    sending, calls, computing = [], [], []
    for e in events:
        span = e.start_ns(), e.end_ns()
        if e.name().startswith("gloo:"):
            sending.append(span)
        elif e.start_thread_id() == thread and e.name().startswith("c10d::"):
            calls.append(span)
        elif e.start_thread_id() == thread and e.name().startswith("aten::"):
            computing.append(span)
    return joined(sending + calls), without(joined(computing), joined(calls))


def joined(spans: Iterable[tuple[int, int]]) -> Spans:
    """The same time, in order and without overlap."""
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif end > start:
            found.append((start, end))
    return found


def within(spans: Spans, others: Spans) -> Spans:
    """The time that both have."""
    found, i, j = [], 0, 0
    while i < len(spans) and j < len(others):
        start, end = max(spans[i][0], others[j][0]), min(spans[i][1], others[j][1])
        if start < end:
            found.append((start, end))
        if spans[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(spans: Spans, others: Spans) -> Spans:
    """The time of ``spans`` that ``others`` do not have."""
    if not spans:
        return []
    edges = [spans[0][0], *(t for span in others for t in span), spans[-1][1]]
    # between the end of one and the start of the next
    return within(spans, joined(zip(edges[::2], edges[1::2], strict=True)))


def length(spans: Spans) -> int:
    """Nanoseconds."""
    return sum(end - start for start, end in spans)
