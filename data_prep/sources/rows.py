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

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.data.places import Place

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
