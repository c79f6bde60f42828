"""How a shard becomes real: a temporary file, fsync, its name, then the record that vouches for it.

A process that is killed at any point leaves the set without the shard, never with half of one.
"""

import contextlib
import json
import os
import re
import uuid
import zlib
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from pipeline.console import InputError
from pipeline.data.schema import (
    ENTRY,
    ROWS_PER_SHARD,
    SCHEMA_VERSION,
    fingerprint_of,
    read_json,
    schema_of,
    shard_name,
)
from pipeline.files import filling, json_bytes, write_bytes, write_json

# of a record batch, at most and about: a reader checks a whole one when it first wants a row of it
BATCH_ROWS = 2048
BATCH_BYTES = 16 << 20  # of images
# files of a set that somebody was writing
LEFT_BEHIND = re.compile(
    r"\.(shard-\d{5,}\.(arrow|json)|(manifest|rejects|sources)\.json|rejects\.jsonl|report\.html)"
    r"\.[0-9a-f]+\.tmp"
)


class ShardFile:
    """One shard while it is written: rows go to a temporary file, ``commit`` makes it real.

    Rows for validation wait in memory until then, for they come last.
    """

    def __init__(self, folder: Path, index: int, kind: str, made_of: dict[str, Any]) -> None:
        self.path = folder / shard_name(index)
        self.schema = schema_of(kind, made_of)
        self.record = {"schema_version": SCHEMA_VERSION, "kind": kind, "made_of": made_of}
        self._n_vocab = made_of.get("n_vocab", 0)
        self._n_train = 0
        self._val: list[dict[str, Any]] = []
        self._batch: list[dict[str, Any]] = []
        self._batch_bytes = 0
        self._spans: list[tuple[int, int, int]] = []  # rows, offset and bytes of record batches
        self._temporary = folder / f".{self.path.name}.{uuid.uuid4().hex[:8]}.tmp"
        with filling(self.path):
            self._sink = pa.OSFile(str(self._temporary), "wb")
            self._writer = ipc.new_file(self._sink, self.schema)

    @property
    def rows(self) -> int:
        """Rows so far, of both sides."""
        return self._n_train + len(self._val)

    def add(self, row: dict[str, Any], *, val: bool = False) -> None:
        """Append a row; one to train on reaches the disk a record batch at a time."""
        if set(row) != set(self.schema.names):
            raise InputError(
                f"row {row.get('key')!r} has the columns {sorted(row)}, "
                f"a shard of this kind has {sorted(self.schema.names)}"
            )
        if val:
            self._val.append(row)
        else:
            self._n_train += 1
            self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        self._batch.append(row)
        self._batch_bytes += len(row.get("image") or b"")
        if len(self._batch) == BATCH_ROWS or self._batch_bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        arrays = [self._array(field) for field in self.schema]
        batch = pa.record_batch(arrays, schema=self.schema)
        with filling(self.path):
            self._writer.write_batch(batch)
        # the header of the file is written with the first batch, so its end is what can be asked
        size = ipc.get_record_batch_size(batch)
        self._spans.append((batch.num_rows, self._sink.tell() - size, size))
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
        for row in self._val:
            self._append(row)
        if self._batch:
            self._flush()
        with filling(self.path):
            self._writer.close()
            self._sink.close()
        with open(self._temporary, "rb+") as file:
            with filling(self.path):
                os.fsync(file.fileno())
            digest, sums = _checksums(file, [(at, size) for _, at, size in self._spans])
            size = os.fstat(file.fileno()).st_size
        shard = {
            "name": self.path.name,
            "rows": self.rows,
            "val_rows": len(self._val),
            "bytes": size,
            "sha256": digest,
        }
        batches = [[*span, crc] for span, crc in zip(self._spans, sums, strict=True)]
        self._place(json_bytes(self.record | shard | {"batches": batches}))
        return shard

    def _place(self, record: bytes) -> None:
        """Give the file its name, and write the record that vouches for it."""
        sidecar, before = self.path.with_suffix(".json"), None
        with contextlib.suppress(OSError):
            before = sidecar.read_bytes()
        # one of an earlier try must not vouch for the new file; but where there was none, there may
        # be one by now, of another job with the same shard, which has seen it and goes on
        if before not in (None, record):
            sidecar.unlink(missing_ok=True)
        os.replace(self._temporary, self.path)
        if before != record:
            write_bytes(sidecar, record)

    def abort(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(pa.ArrowException, OSError):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._sink.close()
        self._temporary.unlink(missing_ok=True)


def _checksums(file: BinaryIO, parts: list[tuple[int, int]]) -> tuple[str, list[int]]:
    """sha256 of a file, and crc32 of parts of it: (offset, bytes), in the order of the file."""
    digest, sums = sha256(), []
    file.seek(0)
    for at, size in parts:
        digest.update(file.read(at - file.tell()))
        crc, left = 0, size
        while left and (data := file.read(min(left, 1 << 20))):
            digest.update(data)
            crc, left = zlib.crc32(data, crc), left - len(data)
        sums.append(crc)
    digest.update(file.read())
    return digest.hexdigest(), sums


class ShardWriter:
    """Writes a set row by row: ``with ShardWriter(folder, "pairs", made_of) as w: w.add(row)``.

    The manifest is written when the block ends well; after an exception there is none, and the next
    writer replaces the shards.

    Args:
        folder: made when missing.
        schema_kind: ``"pairs"`` or ``"tokens"``.
        made_of: JSON values; see ``schema`` for what a kind needs. Read once, at the start.
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

    def add(self, row: dict[str, Any], *, val: bool = False) -> None:
        """Append one row to train on, or for validation; its keys are the columns of the kind."""
        if self._shard is None:
            self._shard = ShardFile(self.folder, self._n_shards, self.kind, self.made_of)
        self._shard.add(row, val=val)
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


def write_shard(
    folder: Path,
    index: int,
    kind: str,
    rows: Iterable[dict[str, Any]],
    made_of: dict[str, Any],
    val_rows: Iterable[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Write and commit one shard of a set that others write too; returns its manifest entry.

    Args:
        folder: of the set.
        index: which of its shards this is, from 0.
        kind: ``"pairs"`` or ``"tokens"``.
        rows: to train on, in order.
        made_of: see ``schema`` for what a kind needs.
        val_rows: for validation; asked for when all ``rows`` are written.

    Raises:
        InputError: a row with wrong columns, or a value that its column cannot hold.
    """
    shard = ShardFile(folder, index, kind, made_of)
    try:
        for row in rows:
            shard.add(row)
        for row in val_rows:
            shard.add(row, val=True)
        return shard.commit()
    except BaseException:
        shard.abort()
        raise


def is_committed(
    folder: Path, index: int, made_of: dict[str, Any], n_rows: int | None = None
) -> bool:
    """Whether a shard of a set is finished: there, of its size, with its sidecar.

    The first three arguments are those of ``write_shard``; it must have ``n_rows`` where they are
    known.

    Raises:
        InputError: it is, but was made of something else.
    """
    path = folder / shard_name(index)
    sidecar_path = path.with_suffix(".json")
    if not sidecar_path.exists():
        return False
    sidecar = read_json(sidecar_path)
    if not {"kind", "made_of", *ENTRY} <= set(sidecar) or not _fits(sidecar):
        raise InputError(
            f"{sidecar_path} describes no shard: delete it, and this run makes it again"
        )
    for name, wanted in made_of.items():
        if (found := sidecar["made_of"].get(name)) != wanted:
            raise InputError(
                f"{folder} holds shards with {name} {found}, this run makes them with {name} "
                f"{wanted}: name another --out, or delete that folder"
            )
    is_whole = path.is_file() and path.stat().st_size == sidecar["bytes"]
    return bool(is_whole and n_rows in (None, sidecar["rows"]))


def _fits(sidecar: dict[str, Any]) -> bool:
    """Whether the values of a sidecar are of their types."""
    kinds = {"made_of": dict, **ENTRY}
    return all(type(sidecar[name]) is kind for name, kind in kinds.items())


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
        shards.append({name: sidecar[name] for name in ENTRY})
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "rows": sum(shard["rows"] for shard in shards),
        "shards": shards,
        "fingerprint": fingerprint_of(shards),
        "made_of": made_of,
    }
    write_json(folder / "manifest.json", manifest)
    # what jobs that were killed left behind; one that still writes a shard writes it for nothing
    for path in folder.glob(".*.tmp"):
        if LEFT_BEHIND.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
    return manifest
