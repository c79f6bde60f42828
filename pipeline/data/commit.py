"""How a shard becomes real: a temporary file, fsync, its name, then the record that vouches for it.

A process that is killed at any point leaves the set without the shard, never with half of one.
"""

import contextlib
import os
import uuid
from collections.abc import Iterable
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from pipeline.console import InputError
from pipeline.data.schema import (
    SCHEMA_VERSION,
    fingerprint_of,
    read_json,
    schema_of,
    shard_name,
)
from pipeline.files import write_json

BATCH_ROWS = 8192  # of a record batch, at most
BATCH_BYTES = 64 << 20  # of images in a record batch, about: bounds the memory of a writer


class ShardFile:
    """One shard while it is written: rows go to a temporary file, ``commit`` makes it real."""

    def __init__(self, folder: Path, index: int, kind: str, made_of: dict[str, Any]) -> None:
        self.path = folder / shard_name(index)
        self.schema = schema_of(kind, made_of)
        self.record = {"schema_version": SCHEMA_VERSION, "kind": kind, "made_of": made_of}
        self.rows = 0
        self._n_vocab = made_of.get("n_vocab", 0)
        self._batch: list[dict[str, Any]] = []
        self._batch_bytes = 0
        self._temporary = folder / f".{self.path.name}.{uuid.uuid4().hex[:8]}.tmp"
        self._sink = pa.OSFile(str(self._temporary), "wb")
        self._writer = ipc.new_file(self._sink, self.schema)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it reaches the disk a record batch at a time."""
        if set(row) != set(self.schema.names):
            raise InputError(
                f"row {row.get('key')!r} has the columns {sorted(row)}, "
                f"a shard of this kind has {sorted(self.schema.names)}"
            )
        self._batch.append(row)
        self._batch_bytes += len(row.get("image") or b"")
        self.rows += 1
        if len(self._batch) == BATCH_ROWS or self._batch_bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        arrays = [self._array(field) for field in self.schema]
        self._writer.write_batch(pa.record_batch(arrays, schema=self.schema))
        self._batch, self._batch_bytes = [], 0

    def _array(self, field: pa.Field) -> pa.Array:
        values = [row[field.name] for row in self._batch]
        where = (
            f"column {field.name!r} of rows {self._batch[0]['key']!r}..{self._batch[-1]['key']!r}"
        )
        try:
            if pa.types.is_fixed_size_list(field.type):
                flat = np.asarray(values)
                self._check(where, field, flat)
                flat = flat.astype(field.type.value_type.to_pandas_dtype()).ravel()
                array = pa.FixedSizeListArray.from_arrays(pa.array(flat), field.type.list_size)
            else:
                array = pa.array(values, field.type)
        except InputError:
            raise
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{where} is not {field.type}: {error}") from error
        if array.null_count:
            raise InputError(f"{where} has {array.null_count} missing values")
        return array

    def _check(self, where: str, field: pa.Field, flat: np.ndarray) -> None:
        expected = (len(self._batch), field.type.list_size)
        if flat.shape != expected:
            raise InputError(
                f"{where} has shape {flat.shape}, a shard of this set takes {expected}"
            )
        if field.name != "image_tokens":
            return
        if flat.dtype.kind not in "iu" or not 0 <= flat.min() <= flat.max() < self._n_vocab:
            raise InputError(
                f"{where} holds {flat.dtype} {flat.min()}..{flat.max()}, "
                f"tokens are whole numbers in 0..{self._n_vocab - 1}"
            )

    def commit(self) -> dict[str, Any]:
        """Finish the file under its own name, then its sidecar; returns its manifest entry."""
        try:
            return self._commit()
        except BaseException:
            self.abort()
            raise

    def _commit(self) -> dict[str, Any]:
        if self._batch:
            self._flush()
        self._writer.close()
        self._sink.close()
        with open(self._temporary, "rb+") as file:
            os.fsync(file.fileno())
            digest = file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
        sidecar = self.path.with_suffix(".json")
        # a sidecar of an earlier try must not vouch for the new file
        sidecar.unlink(missing_ok=True)
        os.replace(self._temporary, self.path)
        shard = {"name": self.path.name, "rows": self.rows, "bytes": size, "sha256": digest}
        write_json(sidecar, self.record | shard)
        return shard

    def abort(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(pa.ArrowException):
            self._writer.close()
        self._sink.close()
        self._temporary.unlink(missing_ok=True)


def write_shard(
    folder: Path, index: int, kind: str, rows: Iterable[dict[str, Any]], made_of: dict[str, Any]
) -> dict[str, Any]:
    """Write and commit one shard of a set that others write too; returns its manifest entry.

    Raises:
        InputError: a row with wrong columns, or a value that its column cannot hold.
    """
    shard = ShardFile(folder, index, kind, made_of)
    try:
        for row in rows:
            shard.add(row)
        return shard.commit()
    except BaseException:
        shard.abort()
        raise


def write_manifest(
    folder: Path, kind: str, n_shards: int, made_of: dict[str, Any]
) -> dict[str, Any]:
    """Write and return the manifest of a set whose ``n_shards`` shards are all committed.

    Raises:
        InputError: a sidecar is missing, or was made of something else.
    """
    shards = []
    for index in range(n_shards):
        sidecar = read_json((folder / shard_name(index)).with_suffix(".json"))
        if (sidecar["kind"], sidecar["made_of"]) != (kind, made_of):
            raise InputError(
                f"{folder / sidecar['name']} was made of {sidecar['made_of']}, the set of {made_of}"
            )
        shards.append({name: sidecar[name] for name in ("name", "rows", "bytes", "sha256")})
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "rows": sum(shard["rows"] for shard in shards),
        "shards": shards,
        "fingerprint": fingerprint_of(shards),
        "made_of": made_of,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest
