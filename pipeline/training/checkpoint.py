"""Saving a run and going on from it, by any number of ranks (``pipeline.slices``: the files).

Each rank writes its slices into a folder that nobody reads yet, while training goes on. When all of
them are complete and synced the first rank writes the description, with the hash of each file, and
gives the folder its name: a torn save is never read. A resume believes no byte that it has not
hashed; a checkpoint with damage is passed over for the one before.
"""

import argparse
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.console import InputError, OwnError
from pipeline.files import filling, write_json
from pipeline.slices import (
    complete,
    damaged,
    folder_of,
    log,
    named,
    open_slices,
    rank_file,
    read_meta,
    sha256,
    updates_of,
    write_meta,
)
from pipeline.training.engines.engine import Engine

RESUME = ("auto", "must", "never")
KEEP = 2  # the newest; one more than needed, should a disk lose one
SPARE = 1 << 24  # bytes beside the tensors
POLL_S = 0.05

_T = dict[str, Tensor]


@dataclass(frozen=True)
class Keeping:
    """What a run does with checkpoints.

    Args:
        resume: "auto" goes on from the newest if there is one; "must" stops where there is none;
            "never" stops where there is one.
        newest: how many of the newest stay, at least 1.
        every: beside them stay those whose number of updates is a multiple of it; 0 for none.
    """

    resume: str = "auto"
    newest: int = KEEP
    every: int = 0

    def __post_init__(self) -> None:
        if self.newest < 1:
            raise InputError(f"--keep is {self.newest}; keep at least the newest checkpoint")
        if self.every < 0:
            raise InputError(f"--keep-every is {self.every}; take updates, or 0 for none")

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Its options of a command."""
        parser.add_argument(
            "--resume", choices=RESUME, default="auto",
            help="auto: go on from the newest checkpoint under --out if there is one; must: stop "
            "where there is none; never: stop where there is one",
        )  # fmt: skip
        parser.add_argument(
            "--keep", type=int, default=KEEP, metavar="N",
            help=f"the newest N checkpoints stay ({KEEP})",
        )  # fmt: skip
        parser.add_argument(
            "--keep-every",
            type=int,
            default=0,
            metavar="UPDATES",
            help="and those of multiples of so many updates, for good",
        )

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Keeping":
        """What the options say."""
        return cls(args.resume, args.keep, args.keep_every)

    def outlived(self, folders: list[Path], newest: Path) -> list[Path]:
        """Those of ``folders``, oldest first, that may go now that ``newest`` is written.

        What has a higher number was passed over for an older one, and counts for nothing.
        """
        before = [folder for folder in folders if updates_of(folder) < updates_of(newest)]
        old = before[: max(0, len(before) - (self.newest - 1))]
        return [f for f in old if not self.every or updates_of(f) % self.every]

    def check(self, out: Path, has_resumed: bool) -> None:
        """Raise ``InputError`` where ``resume`` and what was found in ``out`` do not agree."""
        if self.resume == "must" and not has_resumed:
            raise InputError(
                f"--resume must, and {out} has no checkpoint: name the folder of the run, or begin "
                "it with --resume auto"
            )
        if self.resume == "never" and has_resumed:
            raise InputError(
                f"--resume never, and {out} has a checkpoint: name another folder, or go on with "
                "--resume auto"
            )


class Save:
    """A checkpoint that is being written, by a thread of its own, while training goes on.

    Made by all ranks together: the tensors are copied before the constructor returns. Each rank's
    thread writes its file; the first rank's waits for all of them and gives the folder its name.

    Args:
        engine: what is saved.
        out: of the run, on a file system that all ranks share.
        described: the kind of the model, what the checkpoint belongs to ("identity"), and the JSON
            values that ``resume`` gives back ("state").
        keeping: what becomes of the checkpoints before.

    Raises:
        InputError: there is no room for it, or copies of the model differ; the checkpoints before
            are kept.
    """

    def __init__(
        self, engine: Engine, out: Path, described: dict[str, Any], keeping: Keeping
    ) -> None:
        engine.check()
        self._engine, self._out, self._keeping = engine, out, keeping
        self._final = folder_of(out, engine.updates)
        self._staged = self._final.with_name(self._final.name + ".partial")
        self._tensors: _T = {}
        self._places = {}
        for name, part in engine.slices():
            self._places[name] = f"{part.start} {part.step}"
            for key, value in part.values.items():
                self._tensors[f"{key}/{name}"] = value.cpu().contiguous().clone()
        self._meta = {
            "updates": engine.updates,
            "applied": engine.applied,
            "world": engine.world,
            "shapes": engine.shapes(),
            **described,
        }
        self._writers = self._prepare()
        self._problem: Exception | None = None
        self._has_written, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="save", daemon=True)
        self._thread.start()

    def _prepare(self) -> int:
        """An empty folder with room for all; how many ranks will write into it."""
        engine = self._engine
        n_bytes = sum(tensor.nbytes for tensor in self._tensors.values())
        own = torch.tensor([n_bytes, n_bytes > 0], dtype=torch.float64, device=engine.device)
        total, writers = engine.sum(own).tolist()
        if engine.rank == 0:
            for left in self._staged.parent.glob("step-*.*"):  # of saves that were killed
                _remove(left)
            check_room(self._out, int(total))
            self._staged.mkdir(parents=True)
        engine.barrier()
        return int(writers)

    def _run(self) -> None:
        try:
            if self._tensors:
                _write(self._staged / rank_file(self._engine.rank), self._tensors, self._places)
                self._tensors.clear()
            self._has_written.set()
            if self._engine.rank == 0:
                self._commit()
        except OSError as error:
            self._problem = OwnError(
                f"{self._staged} cannot be made a checkpoint ({error}): make room and start "
                "again; the checkpoints before it are kept"
            )
        except Exception as error:
            self._problem = error  # which the thread that trains raises
        finally:
            self._has_written.set()

    def _commit(self) -> None:
        """When all ranks have written: the description, the name, and an end for older ones."""
        while len(records := sorted(self._staged.glob("rank-*.json"))) < self._writers:
            if self._is_over.wait(POLL_S):  # a rank cannot
                return
        files = {}
        for record in records:
            files[record.with_suffix(".safetensors").name] = json.loads(record.read_text())
            record.unlink()
        write_meta(self._staged, {**self._meta, "files": files})
        if self._final.exists():  # which was passed over
            _remove(self._final)
        os.rename(self._staged, self._final)
        _sync(self._final.parent)
        for old in self._keeping.outlived(complete(self._out), self._final):
            _remove(old)

    @property
    def problem(self) -> Exception | None:
        """Why this rank could not do its part, as soon as it is known."""
        return self._problem

    def wait(self) -> None:
        """Until the checkpoint is there; all ranks call it.

        Raises:
            InputError: one of them could not write.
        """
        self._has_written.wait()
        self._raise_together()
        self._thread.join()
        self._raise_together()

    def _raise_together(self) -> None:
        n_failed = _sum(self._engine, int(self._problem is not None))
        if n_failed:
            self._is_over.set()
        if self._problem is not None:
            raise self._problem
        if n_failed:
            raise InputError(
                "another rank cannot write its part of the checkpoint: its own line says why"
            )


def _write(path: Path, tensors: _T, places: dict[str, str]) -> None:
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


def _remove(folder: Path) -> None:
    """Delete a checkpoint, or what is left of one; a save goes on where that cannot be done."""
    gone = folder.with_name(folder.name.partition(".")[0] + ".deleted")  # half of it is no torn one
    try:
        if folder != gone:
            shutil.rmtree(gone, ignore_errors=True)
            os.rename(folder, gone)
        if gone.is_symlink():
            gone.unlink()
        else:
            shutil.rmtree(gone)
    except OSError as error:
        log.warning("%s cannot be deleted (%s): delete it yourself", folder, error)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _size(n_bytes: int) -> str:
    unit, n = ("GiB", 30) if n_bytes >= 1 << 30 else ("MiB", 20)
    return f"{n_bytes / 2**n:.1f} {unit}"


def check_room(out: Path, n_bytes: int) -> None:
    """Raise ``InputError`` unless a checkpoint of ``n_bytes`` fits beside those that are there."""
    free = shutil.disk_usage(out).free
    if free < n_bytes + SPARE:
        raise InputError(
            f"a checkpoint takes {_size(n_bytes + SPARE)} and {out} has room for "
            f"{_size(free)}: make room and start again; the checkpoints before are kept"
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
    # file systems lag behind each other: the first rank says what there is
    if _sum(engine, len(named(out)) if engine.rank == 0 else 0):
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
        chosen = updates_of(folders[-1]) if folders else -1
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
