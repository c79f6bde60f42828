"""Tab-separated lists of captions and URLs, as of CC3M and CC12M, over downloaded pictures.

The first line may name the columns: ``caption`` or ``text``, and ``url``, or ``file``, ``path`` and
the like for the path of a file. Without names, the column that starts with http:// or https:// in
the first line is the URL, and the first other one the caption: caption<TAB>url of CC3M, url<TAB>
caption of CC12M. Tabs and line ends divide; quotes mean nothing. Empty lines are no rows.

A row finds its picture under ``images``, by

    1. the path in the row, where the list has such a column
    2. "<row>_<crc>", then "<crc>", each without a suffix or with .jpg, .jpeg, .png, .webp or .gif

as the downloaders of these lists name them: <row> counts the rows from 0 without the header, <crc>
is the crc32 of the URL, both in decimal. What was never downloaded is a row, "image missing".

Keys are "<name of the list>/<row>". Dividing reads the list once, for its lines have to be counted.
"""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from data_prep.sources.rows import (
    Piece,
    RawPair,
    Source,
    broken,
    check_unit,
    pair_by_path,
    paths_in,
)
from pipeline.console import InputError
from pipeline.data.places import Place

CAPTION_COLUMNS = ("caption", "text")
URL_COLUMNS = ("url", "image_url")
FILE_COLUMNS = ("file", "path", "file_name", "filename", "filepath", "image", "image_path")
URL_STARTS = (b"http://", b"https://")
SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif")
LINE_LIMIT = 1 << 20  # bytes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Columns:
    """Which column is what, -1 for none; ``n`` in all; the rows start at byte ``start``."""

    caption: int
    url: int
    file: int
    n: int
    start: int


class TsvSource(Source):
    """A ``.tsv`` over pictures in the folder ``images``, by default the one that it lies in."""

    kind = "tsv"
    can_refer = True

    def __init__(self, list_: Place, images: Place | None = None) -> None:
        self.uri, self.name = list_.uri, list_.name
        self._folder = list_.parent
        with self._folder.open(self.name) as lines:
            self._columns = _columns_of(lines, self.uri)
        if images is None and self._columns.file < 0:
            raise InputError(f"{self.uri} has no paths: name the folder of its downloaded pictures")
        self.place = images or self._folder

    def pieces(self, max_rows: int) -> Iterator[Piece]:
        """Ranges of whole lines, counted in bytes."""
        size = self._folder.size(self.name)
        start, n_rows, first = self._columns.start, 0, 0
        with self._folder.open(self.name) as file:
            for at, line in _lines(file, start, size):
                if n_rows == max_rows and _is_row(line):
                    yield self._piece(start, at, first, n_rows, size)
                    start, first, n_rows = at, first + n_rows, 0
                n_rows += _is_row(line)
        if n_rows:
            yield self._piece(start, size, first, n_rows, size)

    def _piece(self, start: int, stop: int, first: int, n_rows: int, size: int) -> Piece:
        return Piece(self.name, start, stop, stop - start, n_rows, ((self.name, size, first),))

    def rows(self, piece: Piece) -> Iterator[RawPair]:
        """The rows of a piece."""
        check_unit(self._folder, piece)
        number = piece.files[0][2]
        with self._folder.open(self.name) as file:
            for _, line in _lines(file, piece.start, piece.stop):
                if _is_row(line):
                    yield self._row(number, line)
                    number += 1

    def _row(self, number: int, line: bytes | None) -> RawPair:
        key = f"{os.path.splitext(self.name)[0]}/{number}"
        if line is None:
            detail = f"more than {LINE_LIMIT} bytes without an end"
            return broken(key, "damaged line", detail, LINE_LIMIT)
        fields = line.rstrip(b"\r\n").split(b"\t")
        if len(fields) != self._columns.n:
            detail = f"{len(fields)} columns, the first line has {self._columns.n}"
            return broken(key, "damaged line", detail, len(line))
        files: list[str] = []
        if self._columns.file >= 0 and (path := fields[self._columns.file]):
            files = paths_in(self.place, path.decode(errors="surrogateescape"))
        elif self._columns.url >= 0 and (url := fields[self._columns.url]):
            crc = zlib.crc32(url)
            files = [stem + suffix for stem in (f"{number}_{crc}", f"{crc}") for suffix in SUFFIXES]
        return pair_by_path(self.place, key, fields[self._columns.caption], files, len(line))


def _is_row(line: bytes | None) -> bool:
    return line is None or bool(line.strip())


def _lines(file: IO[bytes], start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
    """Offset and content of each line; None for one that is longer than ``LINE_LIMIT``."""
    file.seek(start)
    at = start
    while at < stop:
        line = file.readline(LINE_LIMIT)
        end = at + len(line)
        if len(line) < LINE_LIMIT or line.endswith(b"\n"):
            yield at, line
        else:
            while (rest := file.readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
                end += len(rest)
            end += len(rest)
            yield at, None
        if end == at:
            return  # it shrank
        at = end


def _columns_of(file: IO[bytes], uri: str) -> Columns:
    """What the first line says of the columns.

    Raises:
        InputError: it names none, and has no URL.
    """
    first, start = b"", 0
    while not first.strip() and (line := file.readline(LINE_LIMIT)):
        first, start = line, start + len(first)
    fields = first.removeprefix(BYTE_ORDER_MARK).rstrip(b"\r\n").split(b"\t")
    names = [field.strip().lower().decode(errors="replace") for field in fields]
    caption, url, file_ = (_first(names, c) for c in (CAPTION_COLUMNS, URL_COLUMNS, FILE_COLUMNS))
    if caption >= 0 and max(url, file_) >= 0:
        return Columns(caption, url, file_, len(fields), start + len(first))
    urls = [i for i, field in enumerate(fields) if field.startswith(URL_STARTS)]
    if not urls or len(fields) < 2:
        raise InputError(
            f"{uri}: its first line has neither a URL in one of several columns nor their names; "
            "give it caption<TAB>url, url<TAB>caption, or a header of caption and url, file or path"
        )
    caption = next(i for i in range(len(fields)) if i != urls[0])
    if first.startswith(BYTE_ORDER_MARK):
        start += len(BYTE_ORDER_MARK)
    return Columns(caption, urls[0], -1, len(fields), start)


def _first(names: list[str], wanted: tuple[str, ...]) -> int:
    return next((names.index(name) for name in wanted if name in names), -1)
