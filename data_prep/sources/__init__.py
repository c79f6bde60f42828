"""Where pairs come from: folders, WebDataset archives, Parquet tables, COCO captions, TSV lists.

``open_source`` finds out which; ``Source.pieces`` divides it and ``Source.rows`` reads a piece.
"""

import os
from pathlib import Path

from data_prep.sources.archive import ArchiveSource
from data_prep.sources.coco import CocoSource
from data_prep.sources.folder import FolderSource
from data_prep.sources.rows import CAPTION_LIMIT, IMAGE_LIMIT, Piece, RawPair, Source
from data_prep.sources.table import TableSource
from data_prep.sources.tsv import TsvSource
from pipeline.console import InputError
from pipeline.data.places import Place

__all__ = [
    "CAPTION_LIMIT",
    "IMAGE_LIMIT",
    "Piece",
    "RawPair",
    "Source",
    "open_source",
]


def open_source(uri: str | Path, images: str | Path | None = None) -> Source:
    """The source at a path or an s3:// or gs:// URI.

    Args:
        uri: a folder, a .tar, a .parquet, a .json of COCO captions, or a .tsv.
        images: the folder of the pictures that a .json, a .tsv or a .parquet names.

    Raises:
        InputError: there is nothing, nothing of these, or it cannot be read.
    """
    if not str(uri) or (images is not None and not str(images)):
        raise InputError("a source without a name: give a path for SOURCE, and for --images")
    place = Place(uri)
    folder = None if images is None else Place(images)
    if folder is not None and not folder.is_folder():
        raise InputError(f"{folder.uri} is no folder: name the one that the pictures are in")
    kind = os.path.splitext(place.name)[1].lower()
    if place.is_folder():
        kind = "folder"
    elif not place.exists():
        raise InputError(
            f"source {place.uri} does not exist: name a folder, or a .tar, .parquet, .json or .tsv"
        )
    if kind == ".parquet":
        return TableSource(place, folder)
    if kind == ".tsv":
        return TsvSource(place, folder)
    if kind == ".json":
        if folder is None:
            raise InputError(f"{place.uri} names pictures: name the folder that they are in, too")
        return CocoSource(place, folder)
    if kind not in ("folder", ".tar"):
        raise InputError(
            f"source {place.uri} is neither a folder nor a .tar, .parquet, .json or .tsv: "
            "decompress or unpack it first"
        )
    if folder is not None:
        raise InputError(f"{place.uri} has its pictures with it: leave out {folder.uri}")
    return FolderSource(place) if kind == "folder" else ArchiveSource(place)
