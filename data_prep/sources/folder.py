"""Folders of pictures with a ``.txt`` of the same stem beside each; archives and tables in them.

A pair is a picture and a ``.txt`` of the same path but for the last suffix; that path, relative to
the source, is its key. A ``.tar`` counts as the folder that it lies in, and so do the keys of a
``.parquet``. Files that are nothing of these, and hidden ones, are no rows.

The listing decides what is a pair. A piece carries its own part of it, so that nothing is listed
twice, and what has changed since is a row with a problem.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

from data_prep.sources.archive import archive_piece, archive_rows
from data_prep.sources.columns import NoTable
from data_prep.sources.rows import (
    CAPTION_LIMIT,
    IMAGE_LIMIT,
    IMAGE_SUFFIXES,
    Part,
    Piece,
    RawPair,
    Source,
    broken,
    why_no_pair,
)
from data_prep.sources.table import table_pieces, table_rows
from pipeline.data.listing import FileInfo
from pipeline.data.places import FileProblem, Place

UNITS = (".tar", ".parquet")

# What a piece lists: (stem, suffix and bytes of the picture, suffix and bytes of the caption), or
# (key, problem, detail, bytes) of a row that is known to be no pair.
Listed = tuple[Any, ...]


class FolderSource(Source):
    """A folder tree, on this machine or in a bucket."""

    kind = "folder"
    can_refer = True

    def __init__(self, folder: Place) -> None:
        self.uri, self.name, self.place = folder.uri, folder.name, folder

    def pieces(self, max_rows: int) -> Iterator[Piece]:
        """Up to ``max_rows`` stems at a time; archives and tables are pieces of their own."""
        listed: list[Listed] = []
        for found in self._found(max_rows):
            if isinstance(found, tuple):
                listed.append(found)
            if listed and (isinstance(found, Piece) or len(listed) == max_rows):
                yield _piece_of(listed)
                listed = []
            if isinstance(found, Piece):
                yield found
        if listed:
            yield _piece_of(listed)

    def rows(self, piece: Piece) -> Iterator[RawPair]:
        """The rows of a piece."""
        if not piece.unit:
            return (self._row(listed) for listed in piece.files)
        if piece.unit.lower().endswith(".tar"):
            return archive_rows(self.place, piece)
        return table_rows(self.place, self.place, piece)

    def _found(self, max_rows: int) -> Iterator[Listed | Piece]:
        """What a walk through the folder finds: rows and pieces."""
        by_stem = groupby(self.place.files(), key=lambda info: _stem(info.path))
        for stem, same_stem in by_stem:
            infos = list(same_stem)
            parts = [part for info in infos if (part := _part(stem, info)) is not None]
            if parts:
                yield _listed(parts)
            units = [info for info in infos if _suffix(info.path) in UNITS]
            for info in units:
                yield from self._unit(info, max_rows)

    def _unit(self, info: FileInfo, max_rows: int) -> Iterator[Listed | Piece]:
        """The pieces of an archive or a table."""
        problem, detail = info.problem, info.detail
        if problem is None and not _is_utf8(info.path):
            problem, detail = "file name not UTF-8", "rename it"
        if problem is not None:
            yield _no_pair(info.path, problem, detail, info.size)
        elif _suffix(info.path) == ".tar":
            yield archive_piece(info.path, info.size)
        else:
            try:
                yield from table_pieces(self.place, info.path, max_rows)
            except NoTable as error:
                if not error.is_metadata:
                    yield _no_pair(info.path, "damaged table", error.detail, info.size)
            except FileProblem as error:
                yield _no_pair(info.path, "file cannot be read", error.detail, info.size)

    def _row(self, listed: Listed) -> RawPair:
        if len(listed) == 4:
            key, problem, detail, n_bytes = listed
            return RawPair(key, None, None, problem, detail, n_bytes)
        stem, image_suffix, image_size, caption_suffix, caption_size = listed
        n_bytes = image_size + caption_size
        suffix = ""
        try:
            contents = []
            for suffix, size in ((caption_suffix, caption_size), (image_suffix, image_size)):
                limit = CAPTION_LIMIT if suffix == caption_suffix else IMAGE_LIMIT
                content = self.place.read(stem + suffix, limit=limit)
                if len(content) != size:
                    detail = f"{suffix} has {len(content)} bytes and had {size} when it was listed"
                    return broken(stem, "file cannot be read", detail, n_bytes)
                contents.append(content)
        except FileProblem as error:
            return broken(stem, "file cannot be read", f"{suffix}: {error.detail}", n_bytes)
        caption, image = contents
        return RawPair(stem, image, caption, n_bytes=n_bytes, file=stem + image_suffix)


def _piece_of(listed: list[Listed]) -> Piece:
    n_bytes = sum(row[3] if len(row) == 4 else row[2] + row[4] for row in listed)
    return Piece("", n_bytes=n_bytes, n_rows=len(listed), files=tuple(listed))


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _part(stem: str, info: FileInfo) -> Part | None:
    """None for what is no picture and no caption, and no folder with a problem."""
    suffix = os.path.splitext(info.path)[1]
    if suffix.lower() != ".txt" and suffix.lower() not in IMAGE_SUFFIXES:
        if not info.path.endswith("/"):
            return None
        stem = stem.rstrip("/")
    return Part(stem, suffix, info.size, 0, info.size, info.problem, info.detail)


def _listed(parts: list[Part]) -> Listed:
    """What a piece carries of files of one stem."""
    lower = [replace(part, suffix=part.suffix.lower()) for part in parts]
    n_bytes = sum(part.n_bytes for part in parts)
    if (found := why_no_pair(lower)) is not None:
        return _no_pair(parts[0].stem, *found, n_bytes)
    image, caption = parts if lower[1].suffix == ".txt" else parts[::-1]
    return (image.stem, image.suffix, image.size, caption.suffix, caption.size)


def _no_pair(key: str, problem: str, detail: str, n_bytes: int) -> Listed:
    row = broken(key, problem, detail, n_bytes)
    return (row.key, row.problem, row.detail, row.n_bytes)
