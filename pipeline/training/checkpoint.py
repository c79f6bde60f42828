"""Saving a run and going on from it, by any number of ranks (``pipeline.slices``: the files).

Each rank writes its slices into a folder that nobody reads yet. When all of them are complete and
synced the first rank writes the description, with the hash of each file, and gives the folder its
name: a torn save is never read. A resume believes no byte that it has not hashed; a checkpoint with
damage is passed over for the one before.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.console import InputError, OwnError
from pipeline.files import filling, write_json
from pipeline.slices import (
    SCHEMA_VERSION,
    complete,
    damaged,
    folder_of,
    log,
    open_slices,
    rank_file,
    read_meta,
    sha256,
)
from pipeline.training.engine import Engine

KEEP = 2  # the newest; one more than needed, should a disk lose one
SPARE = 1 << 24  # bytes beside the tensors


def save(
    engine: Engine, out: Path, kind: str, identity: dict[str, Any], state: dict[str, Any]
) -> None:
    """Write a checkpoint under ``out``; all ranks call it, on one shared file system.

    Args:
        engine: what is saved.
        out: of the run.
        kind: of the model, "dvae" or "dalle".
        identity: what the checkpoint belongs to.
        state: JSON values that ``resume`` gives back.

    Raises:
        InputError: there is no room for it; the checkpoints before are kept.
    """
    engine.check()
    final = folder_of(out, engine.updates)
    staged = final.with_name(final.name + ".partial")
    tensors, places = {}, {}
    for name, part in engine.slices():
        places[name] = f"{part.start} {part.step}"
        for key, value in part.values.items():
            tensors[f"{key}/{name}"] = value.cpu().contiguous().clone()
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    total = engine.sum(torch.tensor(float(n_bytes), dtype=torch.float64, device=engine.device))
    if engine.rank == 0:
        shutil.rmtree(staged, ignore_errors=True)
        check_room(out, int(total))
        staged.mkdir(parents=True)
    engine.barrier()
    if tensors:
        _write(staged / rank_file(engine.rank), tensors, places)
    engine.barrier()
    if engine.rank == 0:
        _commit(engine, staged, final, {"kind": kind, "identity": identity, "state": state})
        for old in complete(out)[:-KEEP]:
            shutil.rmtree(old)
    engine.barrier()


def _write(path: Path, tensors: dict[str, Tensor], places: dict[str, str]) -> None:
    """A rank's file, on the disk, and what the first rank has to know of it."""
    try:
        with filling(path):
            save_file(tensors, path, metadata=places)
        _sync(path)
        file = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        write_json(path.with_suffix(".json"), file)
    except (OSError, SafetensorError) as error:
        raise OwnError(
            f"{path} cannot be written ({error}): make room and start again; the checkpoints "
            "before it are kept"
        ) from error


def _commit(engine: Engine, staged: Path, final: Path, described: dict[str, Any]) -> None:
    files = {}
    for record in sorted(staged.glob("rank-*.json")):
        files[record.with_suffix(".safetensors").name] = json.loads(record.read_text())
        record.unlink()
    meta = {
        "schema_version": SCHEMA_VERSION,
        "updates": engine.updates,
        "applied": engine.applied,
        "world": engine.world,
        "files": files,
        "shapes": engine.shapes(),
        **described,
    }
    write_json(staged / "meta.json", meta)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(staged, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def check_room(out: Path, n_bytes: int) -> None:
    """Raise ``InputError`` unless a checkpoint of ``n_bytes`` fits beside those that are there."""
    free = shutil.disk_usage(out).free
    if free < n_bytes + SPARE:
        raise InputError(
            f"a checkpoint takes {n_bytes / 2**30:.1f} GiB and {out} has room for "
            f"{free / 2**30:.1f}: make room and start again; the checkpoints before are kept"
        )


def resume(engine: Engine, out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Continue from the newest checkpoint under ``out`` that is whole; all ranks call it.

    Returns:
        The ``state`` that was saved with it, or None where there is no checkpoint.

    Raises:
        InputError: another schema, a checkpoint of another run (what differs is named), or none
            that is not damaged.
    """
    passed_over: list[Path] = []
    while (updates := _agreed(engine, out, passed_over)) is not None:
        folder = folder_of(out, updates)
        meta = read_meta(folder)
        for what, there, here in differences(meta["identity"], identity):
            raise InputError(
                f"{folder} was trained with {what} {there}, this run has {here}; "
                "start it as before, or give another --out"
            )
        try:
            bad = damaged(folder, meta, engine.rank, engine.world)
        except OSError as error:
            bad = [str(error)]
        if _sum(engine, len(bad)) == 0:
            engine.restore(open_slices(folder, meta), meta["updates"], meta["applied"])
            log.info("resumed from %s, written by %d ranks", folder, meta["world"])
            state: dict[str, Any] = meta["state"]
            return state
        for name in bad:
            log.error("%s: %s is damaged (sha256 differs)", folder, name)
        log.warning("%s is damaged: the checkpoint before it is used", folder)
        passed_over.append(folder)
    if passed_over:
        raise InputError(
            f"every checkpoint under {out} is damaged: copy one there that is not, or delete "
            f"{out / 'checkpoints'} to begin anew"
        )
    return None


def _agreed(engine: Engine, out: Path, passed_over: list[Path]) -> int | None:
    """Updates of the checkpoint that the first rank chooses: file systems lag behind each other."""
    chosen = -1
    if engine.rank == 0:
        folders = [folder for folder in complete(out) if folder not in passed_over]
        chosen = int(folders[-1].name.rpartition("-")[2]) if folders else -1
    found = _sum(engine, chosen + 1 if engine.rank == 0 else 0) - 1
    return None if found < 0 else found


def _sum(engine: Engine, value: int) -> int:
    return int(engine.sum(torch.tensor(float(value), dtype=torch.float64, device=engine.device)))


def differences(there: Any, here: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The places where two JSON values differ, as (path, value, value)."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(set(there) | set(here)):
            yield from differences(there.get(key), here.get(key), f"{path}.{key}".lstrip("."))
    elif there != here:
        yield path, there, here
