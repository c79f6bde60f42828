"""Record batches of a shard set through pread: what stands where, checked before a row is believed.

Files are never mapped: one that is cut under a map kills the process, here it is an error that
names it. The first row that is wanted of a record batch makes the whole of it be read, held
against its crc32 and parsed; from then on only the place of its buffers is kept, and rows are read
where they stand. A file that is another one than before (size, time, inode) is checked anew.
"""

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from pipeline.console import InputError
from pipeline.data.gather import Column, Ends, Located, Rows, Source, read_all, width_of
from pipeline.data.schema import COPY_AGAIN, read_batch_table

# bytes of offsets of strings that stay in memory, one read less for each row of a set that has no
# more; what does not fit is read where it stands
ENDS_BYTES = 64 << 20
MAX_OPEN = 256  # files at once; many systems stop a process at 1024
_SHARD, _NUMBER, _ROWS, _AT, _BYTES, _CRC = range(6)  # columns of RecordBatches._facts


class _File:
    """An open shard; the system closes it with the last user."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.identity = identity(os.fstat(self._descriptor))
        self.read = partial(os.pread, self._descriptor)

    def __del__(self) -> None:
        # not set when the file could not be opened
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class _Held:
    """A record batch in memory, read as if it were the file that it stands in."""

    def __init__(self, message: bytes, at: int) -> None:
        self._message, self._at = message, at

    def read(self, size: int, at: int) -> bytes:
        return self._message[at - self._at : at - self._at + size]


def identity(status: os.stat_result) -> tuple[int, int, int]:
    """What tells a file from another one of its name: size, time of its last change, inode."""
    return status.st_size, status.st_mtime_ns, status.st_ino


class RecordBatches:
    """The record batches of the shards of one set. Threads may share it.

    Memory grows with the record batches that were touched, some 100 bytes each: 13 MB for all of
    250 million rows; and up to ``ENDS_BYTES`` more.

    Args:
        folder: of the set.
        manifest: its content; entries of shards are known to have their fields.
        schema: columns of the set.
        n_held: so many record batches stay in memory, the last used; rows of theirs are then read
            from there, and a touched batch is read whole each time it comes in.

    Attributes:
        starts: first row of each shard and the number of all rows, int64 [shards + 1].
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], schema: pa.Schema, n_held: int
    ) -> None:
        self.folder, self.schema, self._n_held = folder, schema, n_held
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._made_of = {name: manifest[name] for name in ("kind", "made_of")}
        rows = [shard["rows"] for shard in self._shards]
        self.starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)]).astype(np.int64)
        self._paths = [str(folder / shard["name"]) for shard in self._shards]
        self._columns: dict[str, Column] = {}
        n_buffers = 0
        for field in schema:
            self._columns[field.name] = Column(n_buffers, width_of(field.type))
            n_buffers += self._columns[field.name].n_buffers
        # one row for each record batch of the touched shards, in the order of their rows
        self._first = np.empty(0, np.int64)
        self._facts = np.empty((0, 6), np.int64)
        self._buffers = np.empty((0, n_buffers), np.int64)
        self._checked = np.empty(0, np.bool_)
        self._touched = np.zeros(len(rows), np.bool_)
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._identities: dict[int, tuple[int, int, int]] = {}
        self._held: OrderedDict[int, _Held] = OrderedDict()
        # of touched record batches, by their first row
        self._ends: dict[int, Ends] = {}
        self._ends_left = ENDS_BYTES
        self._lock = threading.Lock()

    def look(self) -> None:
        """Raise ``InputError`` unless every shard is there and has its size."""
        problems = []
        for k in range(len(self._shards)):
            try:
                self._look(k)
            except InputError as error:
                problems.append(str(error))
        if problems:
            more = f" ({len(problems) - 1} more shards are damaged)" if len(problems) > 1 else ""
            raise InputError(problems[0] + more)

    def locate(self, rows: Rows) -> Located:
        """Rows, int64 [n] in any order and with repeats, of which columns can then be read.

        Raises:
            InputError: a shard or a record batch of theirs is not what was written.
        """
        places, rows = _ascending(rows)
        if rows.size and not 0 <= rows[0] <= rows[-1] < self.starts[-1]:
            raise IndexError(f"rows {rows[0]}..{rows[-1]} of a set of {self.starts[-1]}")
        shards = (self.starts.searchsorted(rows, side="right") - 1).tolist()
        with self._lock:
            files = {k: self._file(k) for k in dict.fromkeys(shards)}
            # their numbers change when a shard is touched, so that they are asked for behind it
            batches = self._first.searchsorted(rows, side="right") - 1
            sources: list[Source]
            if self._n_held:
                sources = self._in_memory(batches, files)
            else:
                unchecked = batches[~self._checked[batches]]
                for b in dict.fromkeys(unchecked.tolist()):
                    self._parse(b, self._message(b, files[int(self._facts[b, _SHARD])]))
                sources = [files[k] for k in shards]
            first = self._first[batches]
            return Located(
                places,
                batches,
                rows - first,
                self._buffers[batches],
                sources,
                [self._ends.get(i) for i in first.tolist()],
                self._columns,
                partial(self._damaged, self._facts),
            )

    def whole(self, k: int) -> Iterator[pa.RecordBatch]:
        """The record batches of shard ``k``, each read and checked now."""
        first, stop = self.starts[k], self.starts[k + 1]
        while first < stop:
            with self._lock:
                file = self._file(k)
                b = int(np.searchsorted(self._first, first))
                batch = self._parse(b, self._message(b, file))
            yield batch
            first += batch.num_rows

    # ---- record batches

    def _in_memory(self, batches: Rows, files: dict[int, _File]) -> list[Source]:
        """Sources of the rows of ``batches`` when whole record batches are kept."""
        held: dict[int, _Held] = {}
        for b in dict.fromkeys(batches.tolist()):
            first = int(self._first[b])
            if first not in self._held or not self._checked[b]:
                message = self._message(b, files[int(self._facts[b, _SHARD])])
                self._parse(b, message)
                self._held[first] = _Held(message, int(self._facts[b, _AT]))
            self._held.move_to_end(first)
            held[b] = self._held[first]
            if len(self._held) > self._n_held:
                self._held.popitem(last=False)
        return [held[b] for b in batches.tolist()]

    def _message(self, b: int, file: _File) -> bytes:
        """The bytes of a record batch as they were written."""
        at, size, crc = self._facts[b, [_AT, _BYTES, _CRC]].tolist()
        message = read_all(file, size, at, partial(self._damaged, self._facts, b))
        if (found := zlib.crc32(message)) != crc:
            raise self._damaged(
                self._facts, b, f"its bytes are not those that were written (crc32 {found:08x})"
            )
        return message

    def _parse(self, b: int, message: bytes) -> pa.RecordBatch:
        """A record batch, zero-copy; where its buffers stand in the file is remembered."""
        buffer = pa.py_buffer(message)
        try:
            batch = ipc.read_record_batch(ipc.read_message(buffer), self.schema)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(self._facts, b, f"Arrow cannot read it ({error})") from error
        at, n_rows = self._facts[b, [_AT, _ROWS]].tolist()
        if batch.num_rows != n_rows:
            raise self._damaged(
                self._facts, b, f"it has {batch.num_rows} rows, its sidecar says {n_rows}"
            )
        where, ends = [], {}
        for name, column in zip(self.schema.names, batch.columns, strict=True):
            # the last ones: what lies before them says which values are missing, and none are
            buffers = column.buffers()[-self._columns[name].n_buffers :]
            # an empty buffer may stand anywhere
            where += [at + (part.address - buffer.address if part else 0) for part in buffers]
            known = self._columns[name]
            if not known.width and n_rows:
                ends[known.buffer] = memoryview(bytes(buffers[0])).cast("i")
        self._buffers[b] = where
        self._checked[b] = True
        self._keep_ends(int(self._first[b]), ends)
        return batch

    def _keep_ends(self, first: int, ends: Ends) -> None:
        """Keep the offsets of the record batch that begins at row ``first``, if there is room."""
        for old in self._ends.pop(first, {}).values():
            self._ends_left += old.nbytes
        size = sum(offsets.nbytes for offsets in ends.values())
        if ends and size <= self._ends_left:
            self._ends[first] = ends
            self._ends_left -= size

    def _damaged(self, facts: Rows, b: int, what: str) -> InputError:
        """A sentence about record batch ``b`` of a table that may have grown since."""
        shard, number = facts[b, [_SHARD, _NUMBER]].tolist()
        return InputError(
            f"{self._paths[shard]}, record batch {number}: {what}; data_prep.verify lists all "
            "damage; copy the shard again or prepare the set again"
        )

    # ---- shards

    def _look(self, k: int) -> tuple[int, int, int]:
        """Identity of a shard that is there and has the bytes that the manifest says."""
        path, size = self._paths[k], self._shards[k]["bytes"]
        try:
            found = identity(os.stat(path))
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing: {COPY_AGAIN}") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): {COPY_AGAIN}") from error
        if found[0] != size:
            raise InputError(f"{path} has {found[0]} bytes, the manifest says {size}: {COPY_AGAIN}")
        return found

    def _file(self, k: int) -> _File:
        """Shard ``k``, open and known; what was checked of it is forgotten when it has changed."""
        found = self._look(k)
        if not self._touched[k]:
            self._touch(k)
        file = self._files.get(k)
        if file is None or file.identity != found:
            try:
                file = _File(self._paths[k])
            except OSError as error:
                raise InputError(f"{self._paths[k]} cannot be read ({error.strerror})") from error
            self._files[k] = file
            if self._identities.setdefault(k, file.identity) != file.identity:
                self._checked[self._facts[:, _SHARD] == k] = False
                self._identities[k] = file.identity
            while len(self._files) > MAX_OPEN:
                self._files.popitem(last=False)
        self._files.move_to_end(k)
        return file

    def _touch(self, k: int) -> None:
        """Take the record batches of a shard from its sidecar."""
        table = read_batch_table(self.folder, self._shards[k], self._made_of)
        rows = table[:, 0]
        facts = np.column_stack([np.full(len(rows), k), np.arange(len(rows)), table])
        place = int(np.searchsorted(self._first, self.starts[k]))

        def insert(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            return np.concatenate([old[:place], new, old[place:]])

        self._first = insert(self._first, self.starts[k] + np.cumsum(rows) - rows)
        self._facts = insert(self._facts, facts)
        self._buffers = insert(self._buffers, np.zeros((len(rows), self._buffers.shape[1]), int))
        self._checked = insert(self._checked, np.zeros(len(rows), np.bool_))
        self._touched[k] = True


def _ascending(rows: Rows) -> tuple[Rows | None, Rows]:
    """``rows`` sorted, and where each was; None when they came so."""
    rows = np.asarray(rows, np.int64)
    if (rows[:-1] <= rows[1:]).all():
        return None, rows
    places = rows.argsort()
    return places, rows[places]
