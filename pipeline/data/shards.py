"""Shard sets on disk as a reader sees them: rows by number, columns of many rows, two sides."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.console import InputError
from pipeline.data.commit import ShardWriter, write_manifest, write_shard
from pipeline.data.gather import Located, Rows
from pipeline.data.images import Pixels, decode_image, enlarge
from pipeline.data.places import Place
from pipeline.data.pread import RecordBatches
from pipeline.data.schema import (
    SOURCES,
    image_sha,
    read_manifest,
    schema_of,
    split_of,
)

__all__ = [
    "ShardReader",
    "ShardWriter",
    "Side",
    "image_sha",
    "split_of",
    "write_manifest",
    "write_shard",
]


class Side:
    """The rows of a set to train on, or those for validation; one range of rows in each shard.

    Memory is one pair of numbers for each shard.

    Args:
        first: row of the set at which the range of each shard begins, int64 [shards].
        counts: its rows, int64 [shards].
    """

    def __init__(self, first: Rows, counts: Rows) -> None:
        counts = np.asarray(counts, np.int64)
        self._ends = np.cumsum(counts)
        # from a sample to its row, in each shard
        self._shift = np.asarray(first, np.int64) - (self._ends - counts)
        self._n = int(counts.sum())

    def __len__(self) -> int:
        return self._n

    def rows(self, samples: Rows) -> Rows:
        """Rows of the set of ``samples``, each in 0..len-1: int64 [n] -> int64 [n]."""
        samples = np.asarray(samples, np.int64)
        if samples.size and not 0 <= samples.min() <= samples.max() < self._n:
            raise IndexError(f"samples {samples.min()}..{samples.max()} of a side of {self._n}")
        return samples + self._shift[self._ends.searchsorted(samples, side="right")]


class ShardReader:
    """Random access to a set: ``reader[i] -> dict``, ``len(reader)``, columns of many rows.

    Every file is held against the manifest when the set is opened, and each record batch against
    its crc32 when the first of its rows is wanted (``pread``). Threads may share a reader; arrays
    handed out are the caller's.

    Args:
        folder: holds ``manifest.json``.
        kind: when given, the kind that the set must have.
        held_batches: so many record batches stay in memory, the last used: for disks that are slow
            to give a single row, and an order that comes back to the same blocks (``order``).
        lazy: look at a shard when its rows are wanted, and not at all of them now.

    Raises:
        InputError: no finished set, another schema, another kind, or a shard that is missing, cut
            short, or not what the manifest says; the last also when rows are read.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str | None = None,
        *,
        held_batches: int = 0,
        lazy: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.kind: str = self.manifest["kind"]
        self.made_of: dict[str, Any] = self.manifest["made_of"]
        self.fingerprint: str = self.manifest["fingerprint"]
        if kind is not None and self.kind != kind:
            raise InputError(f"{self.folder} is a set of {self.kind}, a set of {kind} is needed")
        try:
            self.schema = schema_of(self.kind, self.made_of)
        except InputError as error:
            raise InputError(f"{self.folder}/manifest.json: {error}") from error
        self._batches = RecordBatches(self.folder, self.manifest, self.schema, held_batches)
        if not lazy:
            self._batches.look()
        self._sources: list[Place] | None = None

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row; list columns as arrays (image_tokens uint16 [K*Y*X], crops float32 [K*4]).

        The ``image`` of a pair set by reference is read where it stands.
        """
        rows = np.array([index])
        row = {name: self.column(name, rows)[0] for name in self.schema.names}
        row = {n: v.item() if isinstance(v, np.generic) else v for n, v in row.items()}
        if self.kind == "pairs" and "image" not in row:
            row["image"] = self._referred(row)
        return row

    # ---- columns

    def column(self, name: str, rows: Rows) -> list[Any] | np.ndarray:
        """Values of one column in the order of ``rows``, int64 [n].

        Strings and bytes as a list; numbers as an array [n], lists of them as an array [n, length].
        """
        kind = self.schema.field(name).type
        if pa.types.is_string(kind):
            return self._text(self._batches.locate(rows), name)
        if pa.types.is_binary(kind):
            return self._batches.locate(rows).variable(name)
        if pa.types.is_fixed_size_binary(kind):
            width = kind.byte_width
            data = self._batches.locate(rows).fixed(name).tobytes()
            return [data[i : i + width] for i in range(0, len(data), width)]
        is_list = pa.types.is_fixed_size_list(kind)
        dtype = np.dtype((kind.value_type if is_list else kind).to_pandas_dtype())
        values = self._batches.locate(rows).fixed(name).view(dtype)
        return values if is_list else values[:, 0]

    def image_tokens(self, rows: Rows, crops: Rows | None = None) -> np.ndarray:
        """Codes of many rows of a token set.

        Args:
            rows: int64 [n].
            crops: which of its K crops is wanted of each row, int64 [n]; all of them when None.

        Returns:
            uint16 [n, Y*X] of the crops, else uint16 [n, K*Y*X]; owned.
        """
        return self._image_tokens(self._batches.locate(rows), crops)

    def captioned_tokens(
        self, rows: Rows, crops: Rows | None = None
    ) -> tuple[np.ndarray, list[str]]:
        """``image_tokens`` and ``captions`` of the same rows, which are looked for once."""
        located = self._batches.locate(rows)
        return self._image_tokens(located, crops), self._text(located, "caption")

    def _image_tokens(self, located: Located, crops: Rows | None) -> np.ndarray:
        n_crops = self.made_of["crops"]
        if crops is None:
            return located.fixed("image_tokens").view(np.uint16)
        if crops.size and not 0 <= crops.min() <= crops.max() < n_crops:
            raise IndexError(f"crops {crops.min()}..{crops.max()} of a set of {n_crops} an image")
        width = 2 * self.made_of["grid"] ** 2
        return located.fixed("image_tokens", width, crops).view(np.uint16)

    def captions(self, rows: Rows) -> list[str]:
        """Captions of many rows."""
        return self._text(self._batches.locate(rows), "caption")

    def keys(self, rows: Rows) -> list[str]:
        """Keys of many rows."""
        return self._text(self._batches.locate(rows), "key")

    def _text(self, located: Located, name: str) -> list[str]:
        try:
            return [value.decode() for value in located.variable(name)]
        except UnicodeDecodeError as error:
            # not what was written, for Arrow writes no other text
            raise InputError(
                f"{self.folder} holds text that is damaged ({error.reason}): data_prep.verify "
                "finds the shard; copy it again or prepare the set again"
            ) from error

    def images(self, rows: Rows) -> list[bytes]:
        """Encoded pictures of many rows of a pair set, from the shards or from where they stand.

        Raises:
            InputError: the set has no pictures, or what stands there is not what was ingested.
        """
        if self.kind != "pairs":
            raise InputError(f"{self.folder} is a set of {self.kind}, pictures come from pairs")
        if self.made_of["bytes"] == "inline":
            return self._batches.locate(rows).variable("image")
        columns = [self.column(name, rows) for name in _REFERENCE]
        return [
            self._referred(dict(zip(_REFERENCE, values, strict=True)))
            for values in zip(*columns, strict=True)
        ]

    def _referred(self, row: dict[str, Any]) -> bytes:
        """The bytes of one picture in the user's own files, which must be those of then."""
        key, source, file, offset, size, sha = (row[name] for name in _REFERENCE)
        if self._sources is None:
            self._sources = read_sources(self.folder)
        if source >= len(self._sources):
            raise InputError(
                f"{self.folder}/{SOURCES} names {len(self._sources)} sources, picture {key!r} lies "
                f"in number {source}: put the list of the ingest there"
            )
        place = self._sources[source]
        try:
            data = place.read(file, int(offset), int(size))
        except InputError as error:
            raise InputError(
                f"{self.folder}: picture {key!r}: {error}; if the source has moved, name its new "
                f"place in {SOURCES}"
            ) from error
        if image_sha(data) != sha:
            raise InputError(
                f"{self.folder}: picture {key!r}: bytes {offset}..{offset + size} of {place.uri} "
                f"{file} are not those that were ingested: put the old file there, or ingest again"
            )
        return data

    def decode(self, data: bytes, size: int) -> Pixels:
        """A picture of this set, to be cropped to ``size`` pixels a side: uint8 [H, W, 3].

        Enlarged where it is smaller and the ingest was told to keep such pictures, for crops up to
        the size that it was told.

        Raises:
            ImageError: the bytes are no usable picture.
        """
        pixels = decode_image(data)
        if self.made_of["upscale"] and size <= self.made_of["image_size"]:
            return enlarge(pixels, size)
        return pixels

    def batches(self, k: int) -> Iterator[pa.RecordBatch]:
        """The record batches of shard ``k``, each read whole and checked.

        Raises:
            InputError: one is damaged.
        """
        return self._batches.whole(k)

    # ---- sides

    def split(self, which: str) -> Side:
        """The rows to train on ("train") or for validation ("val").

        Raises:
            InputError: there are none.
        """
        assert which in ("train", "val")
        shards, first = self.manifest["shards"], self._batches.starts[:-1]
        n_val = np.array([shard["val_rows"] for shard in shards], np.int64)
        n_train = np.diff(self._batches.starts) - n_val
        side = Side(first, n_train) if which == "train" else Side(first + n_train, n_val)
        if not len(side):
            fraction = self.made_of.get("val_fraction")
            raise InputError(
                f"{self.folder}: of {len(self)} rows, {n_train.sum()} are to train on and "
                f"{n_val.sum()} to validate with, "
                + (f"at val_fraction {fraction}, " if fraction is not None else "")
                + "and both need one: add data or ingest again with another --val-fraction"
            )
        return side


_REFERENCE = ("key", "source", "file", "offset", "size", "image_sha")


def read_sources(folder: Path) -> list[Place]:
    """The roots that a pair set by reference was ingested from, as ``sources.json`` names them.

    Raises:
        InputError: no such file, or no list of names.
    """
    path = folder / SOURCES
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): it is a list of the places that the "
            "pictures lie in; copy it again or write it"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): correct it") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} is no list of places: correct it")
    return [Place(name) for name in names]
