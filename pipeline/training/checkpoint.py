"""Checkpoints that any number of ranks can read: each rank writes its slices, none of them pickled.

    checkpoints/step-0001000/rank-00000.safetensors   key/name -> flat float32 slice
                             meta.json                updates, sizes of files and parameters,
                             identity

A folder gets its final name when every file in it is complete and synced, so a torn save is never
read.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.console import InputError, logger
from pipeline.files import write_json
from pipeline.training.engine import Engine

log = logger("train")

SCHEMA_VERSION = 2
KEEP = 2  # the newest; one more than needed, should a disk lose one
META = {"schema_version", "updates", "applied", "world", "files", "identity", "state"}
NAME = re.compile(r"step-\d{7}")


def _folder(out: Path, updates: int) -> Path:
    return out / "checkpoints" / f"step-{updates:07d}"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def save(engine: Engine, out: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a checkpoint under ``out``; all ranks call it, on one shared file system.

    Args:
        engine: what is saved.
        out: of the run.
        identity: what the checkpoint belongs to.
        state: JSON values that ``resume`` gives back.
    """
    final = _folder(out, engine.updates)
    staged = final.with_name(final.name + ".partial")
    if engine.rank == 0:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    engine.barrier()
    tensors, places = {}, {}
    for name, part in engine.slices():
        places[name] = f"{part.start} {part.step}"
        for key, value in part.values.items():
            tensors[f"{key}/{name}"] = value.cpu().contiguous().clone()
    path = staged / _rank_file(engine.rank)
    save_file(tensors, path, metadata=places)
    _sync(path)
    engine.barrier()
    if engine.rank == 0:
        meta = {
            "schema_version": SCHEMA_VERSION,
            "updates": engine.updates,
            "applied": engine.applied,
            "world": engine.world,
            "files": {p.name: p.stat().st_size for p in sorted(staged.iterdir())},
            "identity": identity,
            "state": state,
        }
        write_json(staged / "meta.json", meta)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(staged, final)
        _sync(final.parent)
        for old in _complete(out)[:-KEEP]:
            shutil.rmtree(old)
    engine.barrier()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _complete(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first; one with a missing or cut file is passed over."""
    found = []
    for folder in sorted((out / "checkpoints").glob("step-*")):
        if not NAME.fullmatch(folder.name):
            continue
        try:
            meta = json.loads((folder / "meta.json").read_text())
            is_other = meta["schema_version"] != SCHEMA_VERSION  # which ``resume`` refuses
            if missing := (META - set(meta)) if not is_other else set():
                raise KeyError(f"meta.json lacks {', '.join(sorted(missing))}")
            files = meta["files"]
            sizes = {name: (folder / name).stat().st_size for name in files}
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is no complete checkpoint (%s): passed over", folder, error)
            continue
        if sizes != files:
            log.warning("%s has a file of another size than was written: passed over", folder)
            continue
        found.append(folder)
    return found


@dataclass(frozen=True)
class _Source:
    """All files of one checkpoint, read by name and range."""

    folder: Path
    pieces: dict[str, list[tuple[int, int, Any]]]  # "key/name" -> [(start, stop, file)] in order
    steps: dict[str, int]  # name -> updates of a parameter

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flat parameter or state."""
        parts = []
        for begin, end, file in self.pieces[f"{key}/{name}"]:
            low, high = max(start, begin), min(stop, end)
            if low < high:
                parts.append(file.get_slice(f"{key}/{name}")[low - begin : high - begin])
        return torch.cat(parts)


def _open(folder: Path, files: dict[str, int]) -> _Source:
    pieces: dict[str, list[tuple[int, int, Any]]] = {}
    steps: dict[str, int] = {}
    for name in sorted(n for n in files if n.endswith(".safetensors")):
        try:
            file = safe_open(folder / name, framework="pt")
        except SafetensorError as error:
            raise InputError(
                f"{folder / name} cannot be read ({error}); "
                f"delete {folder} to go on from the one before"
            ) from error
        places = {
            parameter: tuple(map(int, place.split()))
            for parameter, place in (file.metadata() or {}).items()
        }
        steps |= {parameter: step for parameter, (_, step) in places.items()}
        for entry in file.keys():  # noqa: SIM118 - safe_open is no dict
            start, _ = places[entry.partition("/")[2]]
            size = file.get_slice(entry).get_shape()[0]
            pieces.setdefault(entry, []).append((start, start + size, file))
    for parts in pieces.values():
        parts.sort(key=lambda part: part[0])
    return _Source(folder, pieces, steps)


def resume(engine: Engine, out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Continue from the newest complete checkpoint under ``out``.

    Returns:
        The ``state`` that was saved with it, or None where there is no checkpoint.

    Raises:
        InputError: a newer schema, or a checkpoint of another run: what differs is named.
    """
    folders = _complete(out)
    if not folders:
        return None
    folder = folders[-1]
    meta = json.loads((folder / "meta.json").read_text())
    if (version := meta["schema_version"]) != SCHEMA_VERSION:
        way_out = "update the code" if version > SCHEMA_VERSION else "give another --out"
        raise InputError(
            f"{folder} has schema version {version}, this code reads {SCHEMA_VERSION}; {way_out}"
        )
    for what, there, here in _differences(meta["identity"], identity):
        raise InputError(
            f"{folder} was trained with {what} {there}, this run has {here}; "
            "start it as before, or give another --out"
        )
    source = _open(folder, meta["files"])
    engine.restore(source.read, source.steps, meta["updates"], meta["applied"])
    log.info("resumed from %s, written by %d ranks", folder, meta["world"])
    state: dict[str, Any] = meta["state"]
    return state


def _differences(there: Any, here: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The places where two JSON values differ, as (path, value, value)."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(set(there) | set(here)):
            yield from _differences(there.get(key), here.get(key), f"{path}.{key}".lstrip("."))
    elif there != here:
        yield path, there, here
