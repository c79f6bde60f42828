"""What a run wrote of itself, read again: the events of ``metrics.jsonl``."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.console import InputError

Events = list[dict[str, Any]]

LARGEST = 1e100  # beyond it a figure has run away, and axes cannot be drawn
NO_FIGURES = ("kind", "step", "time_s")


def read_metrics(run: Path) -> Events:
    """The events of a run's metrics.jsonl.

    Raises:
        InputError: no such file, or a line that is no event.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); was {run} trained?") from error
    except ValueError as error:
        raise InputError(f"{path} is no text: {error}; name the folder of a run") from error
    return [_event(path, i + 1, line, is_last=i + 1 == len(lines)) for i, line in enumerate(lines)]


def _event(path: Path, number: int, line: str, is_last: bool) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        half = "was the run killed in the middle of it? Start the run again, or delete the line"
        way_out = half if is_last else "delete the line"
        raise InputError(f"{path}: line {number} is no JSON ({error}); {way_out}") from error
    if (
        not isinstance(event, dict)
        or not isinstance(event.get("kind"), str)
        or not isinstance(event.get("step"), int)
        or not all(isinstance(event[k], int | float) for k in event.keys() - {"kind"})
    ):
        raise InputError(f"{path}: line {number} is no event of a run; delete the line")
    return event


def last(events: Events, kind: str) -> dict[str, float]:
    """The figures of the last event of a kind, with its ``step``; empty without one."""
    found = [e for e in events if e["kind"] == kind]
    return {k: v for k, v in found[-1].items() if k not in ("kind", "time_s")} if found else {}


def names(events: Events, *kinds: str) -> list[str]:
    """Names of the figures in events of these kinds, in the order of their first appearance."""
    found = (name for e in events if e["kind"] in kinds for name in e if name not in NO_FIGURES)
    return list(dict.fromkeys(found))


def series(events: Events, name: str, *kinds: str) -> tuple[np.ndarray, np.ndarray]:
    """(updates, values) float64 [n] of one figure in events of these kinds."""
    points = [(e["step"], e[name]) for e in events if e["kind"] in kinds and name in e]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, np.where(np.abs(values) > LARGEST, np.inf, values)
