"""Parquet tables of pictures and captions, read in place, a few rows at a time.

``columns.py`` tells which column is what. A path is looked for from the table's folder, then from
the root of the source. Rows with bytes cannot be referred to, for a Parquet column does not hold
them as they are. Memory holds ``BATCH_ROWS`` pictures and one page of the column, which is as long
as its writer made it.
"""

import posixpath
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources.columns import Layout, NoTable, has_paths, layout_of, without_text
from data_prep.sources.rows import (
    IMAGE_LIMIT,
    Piece,
    RawPair,
    Source,
    as_key,
    broken,
    caption_problem,
    check_unit,
    pair_by_path,
    paths_in,
)
from pipeline.console import InputError
from pipeline.data.places import FileProblem, Place

BATCH_ROWS = 16  # of pictures in memory
PATH_BATCH_ROWS = 1024
BUFFER = 1 << 20  # bytes of a column in memory, besides the page at hand


class TableSource(Source):
    """One ``.parquet``; paths in it are relative to its folder, or to ``images``."""

    kind = "table"

    def __init__(self, table: Place, images: Place | None = None) -> None:
        self.uri, self.name = table.uri, table.name
        self._folder = table.parent
        self.place = images or self._folder
        try:
            with _open(self._folder, self.name) as file:
                self.can_refer = has_paths(file, layout_of(file.schema_arrow))
        except NoTable as error:
            raise InputError(f"{self.uri} has no pairs: {error.detail}") from error

    def pieces(self, max_rows: int) -> Iterator[Piece]:
        """Row groups, and parts of those that are larger than ``max_rows``; counted in rows."""
        try:
            yield from table_pieces(self._folder, self.name, max_rows)
        except NoTable as error:
            raise InputError(f"{self.uri} has no pairs: {error.detail}") from error

    def rows(self, piece: Piece) -> Iterator[RawPair]:
        """The rows of a piece; "damaged table" for each that cannot be decoded."""
        return table_rows(self._folder, self.place, piece)


def table_pieces(place: Place, unit: str, max_rows: int) -> Iterator[Piece]:
    """The pieces of the table ``unit`` of ``place``, cut between row groups where that will do.

    Raises:
        NoTable: it is damaged, or lacks the columns.
        FileProblem, InputError: it cannot be read.
    """
    with _open(place, unit) as file:
        layout = layout_of(file.schema_arrow)
        groups = _groups(file, layout)
    files = ((unit, place.size(unit)),)
    for start, stop in cut([rows for rows, _ in groups], max_rows):
        n_bytes = _bytes_before(groups, stop) - _bytes_before(groups, start)
        yield Piece(unit, start, stop, n_bytes, stop - start, files)


def _bytes_before(groups: list[tuple[int, int]], row: int) -> int:
    """Bytes of the rows before a row; those of a row group are shared out evenly."""
    total = 0
    for rows, n_bytes in groups:
        if row < rows:
            return total + n_bytes * row // rows
        total, row = total + n_bytes, row - rows
    return total


def cut(group_rows: list[int], max_rows: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 row of pieces of at most ``max_rows``, of whole row groups if possible."""
    start = at = 0
    for rows in group_rows:
        if start < at and at + rows - start > max_rows:
            yield start, at
            start = at
        at += rows
        while at - start > max_rows:
            yield start, start + max_rows
            start += max_rows
    if start < at:
        yield start, at


def table_rows(place: Place, images: Place, piece: Piece) -> Iterator[RawPair]:
    """The rows of a piece of a table of ``place``, with pictures by path in ``images``."""
    try:
        check_unit(place, piece)
        with _open(place, piece.unit) as file:
            yield from _Rows(file, images, piece)
    except FileProblem as error:
        yield from _lost(piece.unit, piece.start, piece.stop, "file cannot be read", error.detail)
    except NoTable as error:
        yield from _lost(piece.unit, piece.start, piece.stop, "damaged table", error.detail)


class _Rows:
    """The rows of one piece of an open table."""

    def __init__(self, file: pq.ParquetFile, images: Place, piece: Piece) -> None:
        self.file, self.images, self.piece = file, images, piece
        self.layout = layout_of(file.schema_arrow)
        self.groups = _groups(file, self.layout)
        self.folder = posixpath.dirname(piece.unit)
        columns = (self.layout.image, self.layout.caption, self.layout.key)
        self.columns = [name for name in columns if name]

    def __iter__(self) -> Iterator[RawPair]:
        first = 0
        for index, (rows, _) in enumerate(self.groups):
            start, stop = max(first, self.piece.start), min(first + rows, self.piece.stop)
            if start < stop:
                yield from self._group(index, first, start, stop)
            first += rows

    def _group(self, index: int, first: int, start: int, stop: int) -> Iterator[RawPair]:
        """Rows ``start`` to ``stop`` of the table, which lie in one row group."""
        n_rows = PATH_BATCH_ROWS if self.layout.image_type == "path" else BATCH_ROWS
        batches = self.file.iter_batches(
            n_rows, row_groups=[index], columns=self.columns, use_threads=False
        )
        rows, n_bytes = self.groups[index]
        at, detail = first, "the row group ends before this row"
        while at < stop:
            try:
                batch = next(batches, None)
                if batch is None:
                    break
                skipped = min(max(start - at, 0), batch.num_rows)
                taken = min(stop - at, batch.num_rows) - skipped
                columns = self._columns(batch.slice(skipped, taken))
            except (pa.ArrowException, OSError) as error:
                detail = str(error)
                break
            for number, values in enumerate(zip(*columns, strict=True), at + skipped):
                before, after = (n_bytes * (n - first) // rows for n in (number, number + 1))
                yield from self._row(number, after - before, *values)
            at += batch.num_rows
        yield from _lost(self.piece.unit, max(at, start), stop, "damaged table", detail)

    def _columns(self, batch: pa.RecordBatch) -> tuple[list[Any], list[Any], list[Any]]:
        """Pictures as (bytes, path), captions and keys; texts as bytes."""
        layout, nones = self.layout, [None] * batch.num_rows
        image = batch.column(layout.image)
        if layout.image_type == "struct":
            names = [image.type.field(i).name for i in range(2)]
            parts = dict(zip(names, map(without_text, image.flatten()), strict=True))
            pairs = [parts["bytes"].to_pylist(), parts["path"].to_pylist()]
        else:
            values = without_text(image).to_pylist()
            pairs = [values, nones] if layout.image_type == "bytes" else [nones, values]
        captions = without_text(batch.column(layout.caption)).to_pylist()
        keys = without_text(batch.column(layout.key)).to_pylist() if layout.key else nones
        return list(zip(*pairs, strict=True)), captions, keys

    def _row(
        self, number: int, n_bytes: int, image: tuple[Any, Any], caption: Any, key: Any
    ) -> Iterator[RawPair]:
        """A row of the table: one pair, or one for each of its captions."""
        name = _made_key(self.piece.unit, number)
        if key not in (None, b""):
            text = key.decode(errors="backslashreplace") if isinstance(key, bytes) else str(key)
            name = _beside(self.piece.unit, text)
        if not isinstance(caption, list):
            yield self._pair(name, caption, *image, "", n_bytes)
            return
        if not caption:
            yield broken(name, "caption missing", "an empty list", n_bytes)
        for n, one in enumerate(caption):
            yield self._pair(f"{name}-{n}", one, *image, name, 0 if n else n_bytes)

    def _pair(
        self,
        key: str,
        caption: bytes | None,
        data: bytes | None,
        path: bytes | None,
        group: str,
        n_bytes: int,
    ) -> RawPair:
        if data is None and path:
            text = path.decode(errors="surrogateescape")
            files = paths_in(self.images, text, posixpath.dirname(self.piece.unit))
            return pair_by_path(self.images, key, caption, files, n_bytes)
        found = caption_problem(caption)
        if found is None and data is None:
            found = "image missing", "the table has neither bytes nor a path for it"
        elif found is None and data is not None and len(data) > IMAGE_LIMIT:
            found = "image file too large", f"{len(data)} bytes, the limit is {IMAGE_LIMIT}"
        if found is not None:
            return broken(key, *found, n_bytes, group)
        return RawPair(as_key(key), data, caption, n_bytes=n_bytes, group=as_key(group))


def _lost(unit: str, start: int, stop: int, problem: str, detail: str) -> Iterator[RawPair]:
    for number in range(start, stop):
        yield broken(_made_key(unit, number), problem, detail)


def _made_key(unit: str, number: int) -> str:
    return f"{posixpath.splitext(unit)[0]}/{number}"


def _beside(unit: str, key: str) -> str:
    """A key of the table's own, after the folder that the table lies in."""
    folder = posixpath.dirname(unit)
    return f"{folder}/{key}" if folder else key


def _open(place: Place, unit: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(
            place.open(unit),
            buffer_size=BUFFER,
            pre_buffer=False,
            page_checksum_verification=True,
        )
    except (pa.ArrowException, OSError) as error:
        raise NoTable(f"its footer cannot be read ({error})") from error


def _groups(file: pq.ParquetFile, layout: Layout) -> list[tuple[int, int]]:
    """Rows and bytes of each row group, of the columns that are read."""
    groups = []
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        columns = [group.column(i) for i in range(group.num_columns)]
        wanted = {layout.image, layout.caption, layout.key}
        n_bytes = sum(
            column.total_compressed_size
            for column in columns
            if column.path_in_schema.split(".")[0] in wanted
        )
        groups.append((group.num_rows, n_bytes))
    return groups
