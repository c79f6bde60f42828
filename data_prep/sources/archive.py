"""WebDataset archives: ``key.jpg`` and ``key.txt`` in a ``.tar``, and what img2dataset adds.

The caption is the ``.txt``, else "caption" of the ``.json``; other members are no rows. Nothing is
unpacked: a member is read where it stands, and its offset goes with its row, so that a set can
refer to it. An archive that hides rows which nobody can count has one row of its own, named after
its file. Memory holds the names of one archive, and one pair.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import IO

from data_prep.sources.rows import (
    IMAGE_SUFFIXES,
    Part,
    Piece,
    RawPair,
    Source,
    as_key,
    broken,
    caption_problem,
    check_unit,
    why_no_pair,
)
from pipeline.data.places import FileProblem, Place

JSON_LIMIT = 1 << 20  # bytes of what a downloader says of one picture
TAR_BLOCK = 512
# archives are padded to 20 blocks, by some programs to 128; two blocks of zeros are their end
MAX_PADDING = (128 + 2) * TAR_BLOCK


class ArchiveSource(Source):
    """One ``.tar``; a folder of them is a ``FolderSource``."""

    kind = "archive"
    can_refer = True

    def __init__(self, archive: Place) -> None:
        self.uri, self.name, self.place = archive.uri, archive.name, archive.parent

    def pieces(self, max_rows: int) -> Iterator[Piece]:
        """The archive in one piece."""
        yield archive_piece(self.name, self.place.size(self.name))

    def rows(self, piece: Piece) -> Iterator[RawPair]:
        """Its pairs sorted by key, then what ails the archive itself."""
        return archive_rows(self.place, piece)


def archive_piece(file: str, size: int) -> Piece:
    """An archive is one piece, for only reading it tells what is in it."""
    return Piece(file, n_bytes=size, files=((file, size),))


def archive_rows(place: Place, piece: Piece) -> Iterator[RawPair]:
    """The rows of an archive; their keys start with the folder that it lies in."""
    try:
        check_unit(place, piece)
        with place.local(piece.unit) as path, open(path, "rb") as archive:
            members = _members(archive, piece.unit)
            for _, same_stem in groupby(members, key=lambda member: member.stem):
                if row := _pair(archive, list(same_stem), piece.unit):
                    yield row
    except FileProblem as error:
        yield broken(piece.unit, "file cannot be read", error.detail, piece.n_bytes)


def _members(archive: IO[bytes], unit: str) -> Iterator[Part]:
    """Pictures, captions and .json sorted by stem, then what ails the archive itself."""
    members: list[Part] = []
    prefix = unit[: len(unit) - len(os.path.basename(unit))]
    try:
        with tarfile.open(fileobj=archive, mode="r:", errors="surrogateescape") as tar:
            file_size = os.fstat(archive.fileno()).st_size
            last = -1
            while (info := tar.next()) is not None:
                if tar.offset <= last:  # a negative size: tarfile would read the same for ever
                    raise tarfile.ReadError(f"the header at byte {info.offset} leads backwards")
                last = tar.offset
                if member := _member(info, prefix, tar.offset - info.offset, file_size):
                    members.append(member)
                tar.members.clear()  # type: ignore[attr-defined]  # it remembers them all
            end = tar.offset
        problem, detail = _look_behind(archive, end)
    except Exception as error:  # a damaged header makes tarfile raise nearly anything
        detail = f"after {len(members)} files: {error}"
        if "unexpected end" in detail or "truncated" in detail:
            problem = "truncated archive"
        else:
            problem = "damaged archive" if members else "not a tar archive"
    yield from sorted(members, key=lambda member: member.stem)
    if problem:
        yield Part(unit, "", problem=problem, detail=detail)


def _member(info: tarfile.TarInfo, prefix: str, taken: int, file_size: int) -> Part | None:
    """None for folders, hidden files, and what is neither picture nor caption."""
    name = info.name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if info.isdir():
        return None
    if name.startswith("/") or ".." in parts or name[1:2] == ":":
        detail = f"the archive names {info.name!r}"
        stem = os.path.splitext(info.name)[0]
        return Part(stem, "", 0, 0, taken, "path escapes the archive", detail)
    if not parts or any(part.startswith(".") for part in parts):
        return None
    stem, suffix = os.path.splitext("/".join(parts))
    member = Part(prefix + stem, suffix.lower(), info.size, info.offset_data, taken)
    if not info.isreg() or info.issparse():
        detail = f"{info.name!r} is a link, a device or a sparse file"
        return replace(member, problem="not a regular file", detail=detail)
    if member.suffix not in (".txt", ".json") and member.suffix not in IMAGE_SUFFIXES:
        return None
    if (missing := info.offset_data + info.size - file_size) > 0:
        detail = f"{member.suffix} lacks its last {missing} bytes"
        return replace(member, problem="truncated archive", detail=detail)
    return member


def _look_behind(archive: IO[bytes], end: int) -> tuple[str | None, str]:
    """Problem and detail of an archive whose last readable header ended before ``end``.

    ``tarfile`` takes a damaged header, and the end of the file, for the end of the archive.
    """
    archive.seek(end)
    behind = archive.read(TAR_BLOCK)
    if len(behind) < TAR_BLOCK:
        return "truncated archive", "the file ends without an end marker"
    if any(behind):
        return "damaged archive", f"no header can be read at byte {end}"
    n_zeros = TAR_BLOCK
    while behind := archive.read(1 << 20):
        if behind.count(0) < len(behind):
            return "damaged archive", f"more follows its end at byte {end}: joined archives?"
        n_zeros += len(behind)
    if n_zeros > MAX_PADDING:
        return "truncated archive", f"it ends in {n_zeros} zeros: was it downloaded whole?"
    return None, ""


# ---- pairs


def _pair(archive: IO[bytes], members: list[Part], unit: str) -> RawPair | None:
    """The row that members of one stem make; a .json alone makes none."""
    key, n_bytes = members[0].stem, sum(member.n_bytes for member in members)
    parts = [member for member in members if member.suffix != ".json"]
    notes = [member for member in members if member.suffix == ".json"]
    if not parts:
        return None
    noted: bytes | str | None = None
    if notes and not any(part.suffix == ".txt" for part in parts):
        noted = _noted_caption(archive, notes[-1])
    found = why_no_pair(parts, has_caption=isinstance(noted, bytes))
    if found is None and isinstance(noted, bytes):
        found = caption_problem(noted)
    if found is not None:
        detail = f"{found[1]}, and {noted}" if isinstance(noted, str) else found[1]
        return broken(key, found[0], detail, n_bytes)
    contents: dict[bool, bytes] = {}
    for part in parts:
        try:
            contents[part.suffix == ".txt"] = _read(archive, part)
        except OSError as error:
            return broken(key, "file cannot be read", f"{part.suffix}: {error}", n_bytes)
    image = next(part for part in parts if part.suffix != ".txt")
    caption = contents.get(True, noted)
    assert isinstance(caption, bytes)
    row = RawPair(as_key(key), contents[False], caption, n_bytes=n_bytes)
    return replace(row, file=unit, offset=image.offset)


def _noted_caption(archive: IO[bytes], note: Part) -> bytes | str:
    """The "caption" of a .json; as text, why there is none."""
    if note.problem is not None or note.size > JSON_LIMIT:
        return f"the .json cannot be read: {note.detail or f'{note.size} bytes'}"
    try:
        content = json.loads(_read(archive, note))
    except (OSError, ValueError, RecursionError) as error:
        return f"the .json cannot be read: {error}"
    caption = content.get("caption") if isinstance(content, dict) else None
    if not isinstance(caption, str):
        return 'no "caption" in the .json'
    return caption.encode(errors="surrogatepass")


def _read(archive: IO[bytes], part: Part) -> bytes:
    archive.seek(part.offset)
    data = archive.read(part.size)
    if len(data) < part.size:
        raise OSError("it shrank while it was read")
    return data
