"""What all sources speak of: rows, the pieces that a plan divides a source into, and sources.

What cannot be a pair is not left out in silence: it comes as a ``RawPair`` with a ``problem``:

    "broken link" · "caption missing" · "caption too long" · "damaged archive" · "damaged line" ·
    "damaged table" · "file cannot be read" · "file name not UTF-8" · "folder cannot be read" ·
    "image file too large" · "image missing" · "link loop" · "not a regular file" ·
    "not a tar archive" · "path escapes the archive" · "path escapes the folder" ·
    "several captions of one name" · "several images of one name" · "truncated archive"

What stops a job instead is an ``InputError``: the source itself is gone, cannot be reached, or is
no longer what its pieces were made of.
"""

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.console import InputError
from pipeline.data.places import FileProblem, Place

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
CAPTION_LIMIT = 64 << 10  # bytes; longer captions are not read at all
IMAGE_LIMIT = 64 << 20  # bytes


@dataclass(frozen=True)
class RawPair:
    """One row of a source, not yet looked into.

    Attributes:
        key: names the row; relative to the source, UTF-8.
        image: the encoded picture, at most ``IMAGE_LIMIT`` bytes; None when there is a problem.
        caption: at most ``CAPTION_LIMIT`` bytes, not yet decoded; None when there is a problem.
        problem: None for a whole pair, else one of the names above.
        detail: what is wrong, for people.
        n_bytes: what the row takes of the source; their sum is about that of ``Piece.n_bytes``.
        group: rows of one group show one picture and share a side of the split; "" stands for the
            key.
        file: where the bytes of the picture stand, relative to ``Source.place``; "" when they
            stand nowhere as they are (in a Parquet column).
        offset: of the picture's first byte in ``file``.
    """

    key: str
    image: bytes | None
    caption: bytes | None
    problem: str | None = None
    detail: str = ""
    n_bytes: int = 0
    group: str = ""
    file: str = ""
    offset: int = 0


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read at a time; ``Piece(**json)`` of ``asdict`` is equal to it.

    Attributes:
        unit: the file that it is a part of, relative to the root of the source; "" for listed
            files of a folder.
        start: first row or byte of the unit, as its kind counts.
        stop: the one behind its last; -1 for the end.
        n_bytes: what it takes of the source, about.
        n_rows: rows, where they are known without reading, else -1.
        files: what the listing said of its files; JSON values that only its source understands.
    """

    unit: str
    start: int = 0
    stop: int = -1
    n_bytes: int = 0
    n_rows: int = -1
    files: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", _as_tuples(self.files))


def _as_tuples(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples again."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


class Source(ABC):
    """Pairs of pictures and captions that somebody has.

    Attributes:
        kind: "folder", "archive", "table", "coco" or "tsv".
        uri: what the user named.
        name: its last part, without the places above: what sets remember of it.
        place: what ``RawPair.file`` is relative to; ``place.read(row.file, row.offset,
            len(row.image))`` are the bytes of the row. Always a folder.
        can_refer: whether its rows have a ``file``. Rows of a folder that lie in a Parquet column
            have none all the same.
    """

    kind: str
    uri: str
    name: str
    place: Place
    can_refer: bool

    @abstractmethod
    def pieces(self, max_rows: int) -> Iterator[Piece]:
        """Divide the source, in a fixed order, into pieces of at most ``max_rows`` rows.

        An archive is one piece however many rows it has. Nothing but listings, footers and headers
        is read (a TSV is, to count its lines).

        Raises:
            InputError: the source is gone, cannot be reached, or is nothing of its kind.
        """

    @abstractmethod
    def rows(self, piece: Piece) -> Iterator[RawPair]:
        """The rows of a piece: the same in any process, as long as the files are.

        Raises:
            InputError: the source is gone, cannot be reached, or has changed since it was divided.
        """


@dataclass(frozen=True)
class Part:
    """A picture or a caption in a file of its own, or in an archive at ``offset``.

    ``stem`` and ``suffix`` (lower case) make its name; it takes ``n_bytes`` of the source.
    """

    stem: str
    suffix: str
    size: int = 0
    offset: int = 0
    n_bytes: int = 0
    problem: str | None = None
    detail: str = ""


def why_no_pair(parts: list[Part], has_caption: bool = False) -> tuple[str, str] | None:
    """Problem and detail of files of one stem, seen before any of them is read.

    Args:
        parts: pictures and .txt, at least one.
        has_caption: whether a caption was found elsewhere.
    """
    for part in parts:
        if part.problem is not None:
            return part.problem, part.detail
    try:
        parts[0].stem.encode()
    except UnicodeEncodeError:
        return "file name not UTF-8", "rename it"
    captions = [part for part in parts if part.suffix == ".txt"]
    images = [part for part in parts if part.suffix != ".txt"]
    if len(images) > 1:
        return "several images of one name", " ".join(part.suffix for part in images)
    if len(captions) > 1:
        return "several captions of one name", "suffixes that differ in case"
    if not images:
        return "image missing", "no picture beside the .txt"
    if not captions and not has_caption:
        return "caption missing", f"no .txt beside the {images[0].suffix}"
    if captions and captions[0].size > CAPTION_LIMIT:
        return "caption too long", f"{captions[0].size} bytes, the limit is {CAPTION_LIMIT}"
    if images[0].size > IMAGE_LIMIT:
        return "image file too large", f"{images[0].size} bytes, the limit is {IMAGE_LIMIT}"
    return None


# how a problem of one picture's file is named in a row
PICTURE_PROBLEMS = {
    "missing": "image missing",
    "escapes": "path escapes the folder",
    "too large": "image file too large",
    "not a regular file": "not a regular file",
    "cannot be read": "file cannot be read",
}


def as_key(name: str) -> str:
    """A key that ledgers and shards, which are UTF-8, can hold."""
    return name.encode(errors="backslashreplace").decode()


def broken(key: str, problem: str, detail: str, n_bytes: int = 0, group: str = "") -> RawPair:
    """A row that is no pair."""
    return RawPair(as_key(key), None, None, problem, as_key(detail), n_bytes, as_key(group))


def caption_problem(caption: bytes | None) -> tuple[str, str] | None:
    """Problem and detail of a caption that no picture is read for."""
    if caption is None:
        return "caption missing", "the source has none for it"
    if len(caption) > CAPTION_LIMIT:
        return "caption too long", f"{len(caption)} bytes, the limit is {CAPTION_LIMIT}"
    return None


def paths_in(place: Place, path: str, folder: str = "") -> list[str]:
    """Where in a place a picture may be that a list names by ``path``, first to last.

    From ``folder``, the one that the list lies in; then from the root. Absolute paths count when
    they lead into the place.
    """
    if place.is_local and path.startswith(f"{place.uri}/"):
        return [path[len(place.uri) + 1 :]]
    paths = (posixpath.normpath(posixpath.join(start, path)) for start in (folder, ""))
    inside = [p for p in dict.fromkeys(paths) if p != ".." and not p.startswith(("/", "../"))]
    return inside or [path]


def pair_by_path(
    place: Place, key: str, caption: bytes | None, files: list[str], n_bytes: int = 0
) -> RawPair:
    """The row whose picture is the first of ``files`` (relative to ``place``) that there is.

    Rows of one file are one group.
    """
    if found := caption_problem(caption):
        return broken(key, *found, n_bytes)
    if not files:
        return broken(key, "image missing", "the source names no file for it", n_bytes)
    try:
        for file in files:
            file.encode()
        file = files[0] if len(files) == 1 else place.first(files) or files[0]
        image = place.read(file, limit=IMAGE_LIMIT)
    except UnicodeEncodeError:
        return broken(key, "file name not UTF-8", f"rename {files[0]}", n_bytes)
    except FileProblem as error:
        detail = f"{files[0]}: {error.detail}"
        return broken(key, PICTURE_PROBLEMS[error.problem], detail, n_bytes)
    return RawPair(as_key(key), image, caption, n_bytes=n_bytes, group=file, file=file)


def check_unit(place: Place, piece: Piece) -> None:
    """Hold the file of a piece against the size that it was planned with.

    Raises:
        FileProblem: it is there but cannot be read.
        InputError: it is gone, or has another size.
    """
    planned = piece.files[0][1]
    try:
        size = place.size(piece.unit)
    except FileProblem as error:
        if error.problem != "missing":
            raise
        raise InputError(f"{error}; bring it back, or plan anew without it") from error
    if size != planned:
        raise InputError(
            f"{place.uri}, file {piece.unit}: it has {size} bytes and had {planned} when the job "
            "was planned; bring the old one back, or plan anew in another folder"
        )
