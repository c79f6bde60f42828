"""Shard sets on disk: the writer and the reader of the format in ``schema.py``, as twins."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from pipeline.console import InputError
from pipeline.data.commit import ShardFile, write_manifest, write_shard
from pipeline.data.schema import (
    ROWS_PER_SHARD,
    SHARD_NAME,
    fingerprint_of,
    image_sha,
    read_json,
    schema_of,
    split_of,
)

__all__ = [
    "ShardReader",
    "ShardWriter",
    "image_sha",
    "split_indices",
    "split_of",
    "write_manifest",
    "write_shard",
]


class ShardWriter:
    """Writes a set row by row: ``with ShardWriter(folder, "pairs", made_of) as w: w.add(row)``.

    The manifest is written when the block ends well; after an exception there is none, and the next
    writer replaces the shards.

    Args:
        folder: made when missing.
        schema_kind: ``"pairs"`` or ``"tokens"``.
        made_of: JSON values; see the module for what a kind needs. Read once, at the start.
        rows_per_shard: ``ROWS_PER_SHARD[kind]`` when None.

    Raises:
        InputError: the folder holds a finished set; the kind, made_of or (``add``) a row is wrong.
    """

    def __init__(
        self,
        folder: str | Path,
        schema_kind: str,
        made_of: dict[str, Any],
        rows_per_shard: int | None = None,
    ) -> None:
        self.folder, self.kind = Path(folder), schema_kind
        # what a reader will get back: tuples become lists here and not only in the file
        self.made_of = json.loads(json.dumps(made_of))
        schema_of(self.kind, self.made_of)
        self.rows_per_shard = (
            ROWS_PER_SHARD[self.kind] if rows_per_shard is None else rows_per_shard
        )
        if self.rows_per_shard < 1:
            raise InputError(f"rows_per_shard is {self.rows_per_shard}, it must be at least 1")
        if (self.folder / "manifest.json").exists():
            raise InputError(
                f"{self.folder} holds a finished set: name another folder or delete it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = 0
        self.manifest: dict[str, Any] | None = None
        self._n_shards = 0
        self._shard: ShardFile | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; its keys are exactly the columns of the kind."""
        if self._shard is None:
            self._shard = ShardFile(self.folder, self._n_shards, self.kind, self.made_of)
        self._shard.add(row)
        self.rows += 1
        if self._shard.rows == self.rows_per_shard:
            self._commit(self._shard)

    def _commit(self, shard: ShardFile) -> None:
        shard.commit()
        self._shard = None
        self._n_shards += 1

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            if self._shard is not None:
                self._shard.abort()
            return
        if self._shard is not None:
            self._commit(self._shard)
        self.manifest = write_manifest(self.folder, self.kind, self._n_shards, self.made_of)


@dataclass(frozen=True)
class _Open:
    """A shard that is mapped: its record batches and the row at which each starts."""

    batches: list[pa.RecordBatch]
    starts: np.ndarray  # int64 [n_batch]


class ShardReader:
    """Random access to a set through mmap: ``reader[i] -> dict``, ``len(reader)``, columns.

    Every file is checked against the manifest before it is mapped (a file cut short under a map
    would kill the process); shards are mapped on first touch. Arrays handed out are copies.

    Args:
        folder: holds ``manifest.json``.
        kind: when given, the kind that the set must have.

    Raises:
        InputError: no finished set, a newer schema, another kind, or a shard that is missing, cut
            short, or not what the manifest says; the last also on first touch.
    """

    def __init__(self, folder: str | Path, kind: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_json(self.folder / "manifest.json")
        try:
            self.kind: str = self.manifest["kind"]
            self.made_of: dict[str, Any] = dict(self.manifest["made_of"])
            self.fingerprint: str = self.manifest["fingerprint"]
            self._shards = self.manifest["shards"]
            rows = [int(shard["rows"]) for shard in self._shards]
            names = [str(shard["name"]) for shard in self._shards]
            sizes = [int(shard["bytes"]) for shard in self._shards]
            total = int(self.manifest["rows"])
            fingerprint = fingerprint_of(self._shards)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.folder}/manifest.json lacks or garbles {error}") from error
        if kind is not None and self.kind != kind:
            raise InputError(f"{self.folder} is a set of {self.kind}, a set of {kind} is needed")
        if self.fingerprint != fingerprint:
            raise InputError(
                f"{self.folder}/manifest.json has fingerprint {self.fingerprint}, its shards have "
                f"{fingerprint}: copy the set again"
            )
        if sum(rows) != total:
            raise InputError(
                f"{self.folder}/manifest.json lists {sum(rows)} rows and claims {total}"
            )
        self.schema = schema_of(self.kind, self.made_of)
        for name, size in zip(names, sizes, strict=True):
            self._check_size(name, size)
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)]).astype(np.int64)
        self._open: dict[int, _Open] = {}

    def _check_size(self, name: str, size: int) -> Path:
        path = self.folder / name
        if not SHARD_NAME.fullmatch(name):
            raise InputError(f"{self.folder}/manifest.json names {name!r}, which is no shard")
        if not path.is_file():
            raise InputError(f"{path} is missing: copy it again or prepare the set again")
        if (found := path.stat().st_size) != size:
            raise InputError(
                f"{path} has {found} bytes, the manifest says {size}: "
                "copy it again or prepare the set again"
            )
        return path

    def _shard(self, k: int) -> _Open:
        """Shard ``k``, mapped; the file itself is closed again, its pages live with the batches."""
        if k not in self._open:
            shard = self._shards[k]
            path = self._check_size(shard["name"], shard["bytes"])
            try:
                with pa.memory_map(str(path)) as source:
                    file = ipc.open_file(source)
                    batches = [file.get_batch(i) for i in range(file.num_record_batches)]
            except pa.ArrowException as error:
                raise InputError(f"{path} is damaged: {error}; copy it again") from error
            if not file.schema.equals(self.schema):
                raise InputError(f"{path} has the columns {file.schema}, the set has {self.schema}")
            rows = [batch.num_rows for batch in batches]
            if sum(rows) != shard["rows"]:
                raise InputError(f"{path} has {sum(rows)} rows, the manifest says {shard['rows']}")
            self._open[k] = _Open(batches, np.cumsum([0, *rows[:-1]], dtype=np.int64))
        return self._open[k]

    def _groups(
        self, indices: np.ndarray
    ) -> Iterator[tuple[pa.RecordBatch, np.ndarray, np.ndarray]]:
        """Record batches with ``indices``: (batch, places in ``indices``, rows in the batch)."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of a set of {len(self)}")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for k in np.unique(shards):
            shard = self._shard(int(k))
            places = np.flatnonzero(shards == k)
            rows = indices[places] - self._starts[k]
            batches = np.searchsorted(shard.starts, rows, side="right") - 1
            for b in np.unique(batches):
                here = batches == b
                yield shard.batches[b], places[here], rows[here] - shard.starts[b]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row; list columns as arrays (image_tokens uint16 [K*Y*X], crops float32 [K*4])."""
        batch, _, rows = next(self._groups(np.array([index])))
        row = batch.slice(int(rows[0]), 1).to_pylist()[0]
        for field in self.schema:
            if pa.types.is_fixed_size_list(field.type):
                row[field.name] = np.array(row[field.name], field.type.value_type.to_pandas_dtype())
        return row

    def image_tokens(self, indices: np.ndarray) -> np.ndarray:
        """Codes of many rows of a token set: int64 [n] -> uint16 [n, K*Y*X]."""
        width = self.schema.field("image_tokens").type.list_size
        tokens = np.empty((len(indices), width), np.uint16)
        for batch, places, rows in self._groups(indices):
            view = batch.column("image_tokens").flatten().to_numpy().reshape(-1, width)
            tokens[places] = view[rows]
        return tokens

    def column(self, name: str, indices: np.ndarray) -> list[Any]:
        """Values of one column as Python objects, in the order of ``indices``."""
        values: list[Any] = [None] * len(indices)
        for batch, places, rows in self._groups(indices):
            for place, value in zip(places, batch.column(name).take(pa.array(rows)), strict=True):
                with self._undamaged():
                    values[place] = value.as_py()
        return values

    def captions(self, indices: np.ndarray) -> list[str]:
        """Captions of many rows."""
        return self.column("caption", indices)

    def keys(self, indices: np.ndarray) -> list[str]:
        """Keys of many rows."""
        return self.column("key", indices)

    def all_keys(self) -> Iterator[str]:
        """Every key of the set, in order, without the other columns in memory."""
        for k in range(len(self._shards)):
            for batch in self._shard(k).batches:
                with self._undamaged():
                    keys = batch.column("key").to_pylist()
                yield from keys

    @contextmanager
    def _undamaged(self) -> Iterator[None]:
        """Text that is not UTF-8 was not written so."""
        try:
            yield
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.folder} holds text that is damaged ({error.reason}): data_prep.verify "
                "finds the shard; copy it again or prepare the set again"
            ) from error


def split_indices(reader: ShardReader, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the training and of the validation side, int64, by ``split_of``.

    Raises:
        InputError: one side has no rows, or val_fraction is not in [0, 1].
    """
    is_val = np.array([split_of(key, val_fraction) == "val" for key in reader.all_keys()], bool)
    n_val = int(is_val.sum())
    if n_val in (0, len(is_val)):
        raise InputError(
            f"{reader.folder}: of {len(is_val)} rows, {len(is_val) - n_val} are to train on and "
            f"{n_val} to validate with, at val_fraction {val_fraction}, and both need one: "
            "add data or change val_fraction in the preset"
        )
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)
