"""Columns of rows that stand at known places of files: as few reads as there are stretches.

Legend: n rows.
"""

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.console import InputError

Rows = NDArray[np.int64]

# offsets of strings, int32 [rows + 1], by the number of their buffer
Ends = dict[int, memoryview]

_TWO = struct.Struct("<ii")


class Source(Protocol):
    """A file, or a part of it in memory."""

    def read(self, size: int, at: int, /) -> bytes:
        """Up to ``size`` bytes at offset ``at`` of the file."""


@dataclass(frozen=True)
class Column:
    """Where a column stands among the buffers of a record batch.

    ``buffer`` is the number of its first one; ``width`` the bytes of a value, 0 for strings, which
    have two buffers: int32 offsets and bytes.
    """

    buffer: int
    width: int

    @property
    def n_buffers(self) -> int:
        """Buffers that are read."""
        return 1 if self.width else 2


def width_of(kind: pa.DataType) -> int:
    """Bytes of a value of a column; 0 when its values differ."""
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return 0
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size * kind.value_type.bit_width // 8)
    return int(kind.bit_width // 8)


def read_all(source: Source, size: int, at: int, damaged: Callable[[str], InputError]) -> bytes:
    """All ``size`` bytes at ``at``; ``damaged`` makes the error when they are not there."""
    try:
        data = source.read(size, at)
        # systems may give less at a time than was asked for
        while len(data) < size and (more := source.read(size - len(data), at + len(data))):
            data += more
    except OSError as error:
        raise damaged(unreadable(error)) from error
    if len(data) < size:
        raise damaged(f"the file ends at byte {at + len(data)}, {at + size} was expected")
    return data


def unreadable(error: OSError) -> str:
    """What is wrong with a record batch that the system does not give."""
    return f"it cannot be read ({error.strerror})"


@dataclass(slots=True)
class Located:
    """Rows whose record batches were checked.

    Args:
        places: where each row belongs in the order that was asked for; None when that is this.
        batches: number of the record batch of each row, ascending.
        rows: of each in its record batch.
        buffers: offset in the file of every buffer of that, int64 [n, buffers].
        sources: what its bytes are to be read from; holds the files open.
        ends: by the number of a buffer, the offsets in it that are known without a read, of the
            record batch of each row; None where they are not.
        columns: by their names.
        damaged: makes an error about a record batch.
    """

    places: Rows | None
    batches: Rows
    rows: Rows
    buffers: Rows
    sources: list[Source]
    ends: list[Ends | None]
    columns: dict[str, Column]
    damaged: Callable[[int, str], InputError]

    def fixed(self, name: str, width: int | None = None, part: Rows | None = None) -> np.ndarray:
        """Values of a column whose values have one length.

        Args:
            name: of the column.
            width: bytes to read of each value; all of them when None.
            part: which of the parts of ``width`` bytes of each row, in the order that was asked
                for, int64 [n]; the first when None.

        Returns:
            uint8 [n, width], owned.
        """
        column = self.columns[name]
        width = column.width if width is None else width
        at = self.buffers[:, column.buffer] + self.rows * column.width
        if part is not None:
            at += (part if self.places is None else part[self.places]) * width
        # one read for what stands side by side
        is_seam = (at[1:] - at[:-1] != width) | (self.batches[1:] != self.batches[:-1])
        parts, i, sources = [], 0, self.sources
        try:
            for i, n, start in _stretches(is_seam, at):
                data = sources[i].read(n * width, start)
                if len(data) != n * width:
                    data = self._whole(i, n * width, start)
                parts.append(data)
        except OSError as error:
            raise self.damaged(int(self.batches[i]), unreadable(error)) from error
        if self.places is not None and len(parts) == len(at):
            parts = _put_back(parts, self.places)
        # of a bytearray, an array is its own
        values = np.frombuffer(bytearray().join(parts), np.uint8).reshape(-1, width)
        if self.places is None or len(parts) == len(at):
            return values
        result = np.empty_like(values)
        result[self.places] = values
        return result

    def variable(self, name: str) -> list[bytes]:
        """Values of a column of strings or bytes."""
        column = self.columns[name]
        at = self.buffers[:, column.buffer] + self.rows * 4
        data_at = self.buffers[:, column.buffer + 1].tolist()
        values: list[bytes] = []
        is_seam = (at[1:] - at[:-1] != 4) | (self.batches[1:] != self.batches[:-1])
        i, sources, rows = 0, self.sources, self.rows.tolist()
        try:
            for i, n, start in _stretches(is_seam, at):
                ends: Sequence[int]
                if (known := self.ends[i]) is not None:
                    row = rows[i]
                    ends = known[column.buffer][row : row + n + 1]
                else:
                    data = sources[i].read(4 * n + 4, start)
                    if len(data) != 4 * n + 4:
                        data = self._whole(i, 4 * n + 4, start)
                    ends = _TWO.unpack(data) if n == 1 else struct.unpack(f"<{n + 1}i", data)
                first, size = ends[0], ends[-1] - ends[0]
                if first < 0 or size < 0:
                    raise self.damaged(int(self.batches[i]), "its offsets run backwards")
                data = sources[i].read(size, data_at[i] + first)
                if len(data) != size:
                    data = self._whole(i, size, data_at[i] + first)
                if n == 1:
                    values.append(data)
                else:
                    values += (data[a - first : z - first] for a, z in itertools.pairwise(ends))
        except OSError as error:
            raise self.damaged(int(self.batches[i]), unreadable(error)) from error
        return values if self.places is None else _put_back(values, self.places)

    def _whole(self, i: int, size: int, at: int) -> bytes:
        return read_all(self.sources[i], size, at, partial(self.damaged, int(self.batches[i])))


def _put_back(values: list[bytes], places: Rows) -> list[bytes]:
    """Sorted values in the order that was asked for."""
    result = [b""] * len(values)
    for place, value in zip(places.tolist(), values, strict=True):
        result[place] = value
    return result


def _stretches(is_seam: np.ndarray, at: Rows) -> Iterator[tuple[int, int, int]]:
    """First row, rows and offset of the stretches that rows at ``at`` make between seams."""
    seams = is_seam.nonzero()[0] + 1
    if len(seams) >= len(at) - 1:  # every row by itself, or no row
        return zip(range(len(at)), itertools.repeat(1), at.tolist(), strict=False)
    first = np.concatenate([[0], seams])
    n = np.append(seams, len(at)) - first
    return zip(first.tolist(), n.tolist(), at[first].tolist(), strict=True)
