"""Checkpoints as they lie on disk: parameters in slices, each rank's in a file of its own.

    checkpoints/step-0001000/rank-00000.safetensors   key/name -> flat slice; name -> its place
                             meta.json                schema version, updates, sha256 of the files,
                                                      what the run is, what else it remembers

Any number of readers takes any range of any parameter, whatever number of ranks wrote it. Nothing
is unpickled. A folder has its final name when all of it is complete and synced.
"""

import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.console import InputError, logger
from pipeline.files import json_bytes, write_json

SCHEMA_VERSION = 3
NAME = re.compile(r"step-(\d{7,})")

log = logger("train")


def folder_of(out: Path, updates: int) -> Path:
    """Where the checkpoint of an update is."""
    return out / "checkpoints" / f"step-{updates:07d}"


def updates_of(folder: Path) -> int:
    """Of which update a folder of ``folder_of`` is."""
    return int(folder.name.rpartition("-")[2])


def rank_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def named(out: Path) -> list[Path]:
    """Folders that have the name of a checkpoint, oldest first, whatever is in them."""
    folders = sorted((out / "checkpoints").glob("step-*"))
    return [folder for folder in folders if NAME.fullmatch(folder.name)]


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Describe a checkpoint; the description is held to a crc32, for nothing else hashes it."""
    meta = {"schema_version": SCHEMA_VERSION, **meta}
    write_json(folder / "meta.json", meta | {"crc32": _crc(meta)})


def _crc(meta: dict[str, Any]) -> str:
    return f"{zlib.crc32(json_bytes(meta)):08x}"


def complete(out: Path) -> list[Path]:
    """Checkpoints whose files all have the sizes that were written, oldest first.

    Others are passed over, and the log says so.
    """
    found = []
    for folder in named(out):
        try:
            meta = json.loads((folder / "meta.json").read_text())
            crc = meta.pop("crc32", None)
            # the second had none; ``read_meta`` refuses it
            if crc != _crc(meta) and not (crc is None and meta["schema_version"] == 2):
                raise ValueError("meta.json is damaged")
            files = {}
            if meta["schema_version"] == SCHEMA_VERSION:  # else ``read_meta`` refuses it
                files = {name: file["bytes"] for name, file in meta["files"].items()}
            sizes = {name: (folder / name).stat().st_size for name in files}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s is no complete checkpoint (%s): passed over", folder, error)
            continue
        if sizes != files:
            log.warning("%s has a file of another size than was written: passed over", folder)
            continue
        found.append(folder)
    return found


def read_meta(folder: Path) -> dict[str, Any]:
    """The description of a complete checkpoint.

    Raises:
        InputError: it was written by other code.
    """
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    if (version := meta["schema_version"]) != SCHEMA_VERSION:
        way_out = "give another --out"
        if isinstance(version, int) and version > SCHEMA_VERSION:
            way_out = "update the code"
        raise InputError(
            f"{folder} has schema version {version}, this code reads {SCHEMA_VERSION}; {way_out}"
        )
    return meta


def damaged(folder: Path, meta: dict[str, Any], part: int = 0, parts: int = 1) -> list[str]:
    """Names of files that are not what was written; looks at one of ``parts`` parts of them."""
    names = sorted(meta["files"])[part::parts]
    return [name for name in names if sha256(folder / name) != meta["files"][name]["sha256"]]


@dataclass(frozen=True)
class Slices:
    """All files of one checkpoint, read by name and range.

    Attributes:
        pieces: "key/name" -> (start, stop, file) of its slices, in order.
        steps: name -> updates of a parameter.
    """

    folder: Path
    pieces: dict[str, list[tuple[int, int, Any]]]
    steps: dict[str, int]

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flat parameter or of its state.

        Raises:
            InputError: some of them are in no file.
        """
        entry, filled = f"{key}/{name}", 0
        whole: Tensor | None = None
        for begin, end, file in self.pieces[entry]:
            low, high = max(start, begin), min(stop, end)
            if low >= high:
                continue
            part = file.get_slice(entry)[low - begin : high - begin]
            if high - low == stop - start:
                return part
            if whole is None:
                whole = part.new_empty(stop - start)
            whole[low - start : high - start] = part  # one part beside the whole, not all
            filled += high - low
        if whole is None or filled != stop - start:
            raise InputError(
                f"{self.folder} lacks elements of {entry} between {start} and {stop}: copy the "
                "checkpoint again, or delete it to go on from the one before"
            )
        return whole

    def numel(self, name: str, key: str) -> int:
        """Elements that there are; 0 for what there is not."""
        return max((end for _, end, _ in self.pieces.get(f"{key}/{name}", ())), default=0)


def open_slices(folder: Path, meta: dict[str, Any]) -> Slices:
    """Open a complete checkpoint.

    Raises:
        InputError: a file cannot be read.
    """
    pieces: dict[str, list[tuple[int, int, Any]]] = {}
    steps: dict[str, int] = {}
    for name in sorted(n for n in meta["files"] if n.endswith(".safetensors")):
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
    return Slices(folder, pieces, steps)


def newest(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint under ``out`` of which every byte is as written, and its description.

    For one reader; damaged ones are passed over, and the log says so.
    """
    for folder in reversed(complete(out)):
        meta = read_meta(folder)
        if bad := damaged(folder, meta):
            log.warning("%s: %s is damaged (sha256 differs): passed over", folder, ", ".join(bad))
            continue
        return folder, meta
    return None
