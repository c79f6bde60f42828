"""The format of shard sets: columns, file names, manifest; one for pairs and one for tokens.

A set is a flat folder::

    shard-00000.arrow   uncompressed Arrow IPC file, read by pread; never rewritten in place
    shard-00000.json    its sidecar, written after it: rows, val_rows, bytes, sha256, made_of, and
                        [rows, at, bytes, crc32] of each record batch in the file
    manifest.json       written last: every shard in order, and what the set was made of
    sources.json        of pairs by reference: where the sources lie, to be edited when they move

In every shard the rows to train on come first and the last ``val_rows`` rows are for validation.

Rows of kind ``pairs`` (``made_of`` holds at least ``bytes``, ``val_fraction``, the share of rows
for validation, ``image_size``, and ``upscale``: smaller pictures are enlarged when they are read):

    key string · caption string · the picture · width, height int32, upright pixels · image_sha
    binary[16], see ``image_sha`` · phash uint64, see ``data_prep.hashes``

    the picture, when made_of["bytes"] is "inline": image binary, the encoded file; when it is
    "reference": source uint16, number of the root in sources.json · file string, relative to
    it · offset, size int64, where in that file the encoded picture stands

Rows of kind ``tokens`` (``made_of`` holds ``grid``, ``n_vocab`` and ``crops``, called K here):

    key · caption · image_tokens uint16 [K * grid * grid], raster order, each below n_vocab ·
    crops float32 [K * 4]: left, top, side in pixels of the upright image and flip (0 or 1) ·
    image_sha

The same rows give the same bytes, so a shard that is written twice is harmless.
"""

import json
import re
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.console import InputError

SCHEMA_VERSION = 2
KINDS = ("pairs", "tokens")
BYTES = ("inline", "reference")  # how a pair set holds its pictures
ROWS_PER_SHARD = {"pairs": 16_384, "tokens": 65_536}
# fields of a manifest, and of what it says of each shard
MANIFEST = {
    "schema_version": int,
    "kind": str,
    "rows": int,
    "shards": list,
    "fingerprint": str,
    "made_of": dict,
}
ENTRY = {"name": str, "rows": int, "val_rows": int, "bytes": int, "sha256": str}
SOURCES = "sources.json"  # the roots that references are relative to
COPY_AGAIN = "copy it again or prepare the set again"
N_CROP = 4  # left, top, side, flip
SHARD_NAME = re.compile(r"shard-\d{5,}\.arrow")


def shard_name(index: int) -> str:
    """File name of one shard of a set."""
    return f"shard-{index:05d}.arrow"


def image_sha(data: bytes) -> bytes:
    """The first 16 bytes of the sha256 of an encoded image: its identity in every shard set."""
    return sha256(data).digest()[:16]


def split_of(group: str, val_fraction: float) -> str:
    """``"val"`` for about ``val_fraction`` of all groups, else ``"train"``.

    Depends on the group alone, so a sample keeps its side however the set is sharded or grown.

    Args:
        group: what must not be divided: the key of a row, or the picture that several rows share.
        val_fraction: in [0, 1].

    Raises:
        InputError: val_fraction is not in [0, 1].
    """
    if not 0.0 <= val_fraction <= 1.0:
        raise InputError(f"val_fraction {val_fraction} is outside [0, 1]")
    draw = int.from_bytes(blake2b(group.encode(), digest_size=8).digest(), "little") % 10**6
    return "val" if draw < round(val_fraction * 10**6) else "train"


def schema_of(kind: str, made_of: dict[str, Any]) -> pa.Schema:
    """Columns of a set, in order.

    Raises:
        InputError: unknown kind, or a ``made_of`` that lacks what the kind needs (see the module).
    """
    if kind not in KINDS:
        raise InputError(f"shard kind {kind!r} is unknown: it is one of {', '.join(KINDS)}")
    both = [pa.field("key", pa.string()), pa.field("caption", pa.string())]
    sha = pa.field("image_sha", pa.binary(16))
    if kind == "pairs":
        size = [pa.field("width", pa.int32()), pa.field("height", pa.int32())]
        return pa.schema([*both, *_picture(made_of), *size, sha, pa.field("phash", pa.uint64())])
    for name, top in (("grid", 1 << 12), ("n_vocab", 1 << 16), ("crops", 1 << 10)):
        _require(made_of, name, int, 1, top, "token")
    n_image = made_of["crops"] * made_of["grid"] ** 2
    tokens = pa.field("image_tokens", pa.list_(pa.uint16(), n_image))
    crops = pa.field("crops", pa.list_(pa.float32(), made_of["crops"] * N_CROP))
    return pa.schema([*both, tokens, crops, sha])


def _picture(made_of: dict[str, Any]) -> list[pa.Field]:
    """The columns that hold a picture, or say where it is."""
    if made_of.get("bytes") not in BYTES:
        raise InputError(
            f"made_of['bytes'] of a pair set is {made_of.get('bytes')!r}, it must be one of "
            f"{', '.join(BYTES)}"
        )
    _require(made_of, "val_fraction", float, 0, 1, "pair")
    _require(made_of, "image_size", int, 1, 1 << 16, "pair")
    _require(made_of, "upscale", bool, False, True, "pair")
    if made_of["bytes"] == "inline":
        return [pa.field("image", pa.binary())]
    place = [pa.field("source", pa.uint16()), pa.field("file", pa.string())]
    return [*place, pa.field("offset", pa.int64()), pa.field("size", pa.int64())]


def _require(made_of: dict[str, Any], name: str, kind: type, low: Any, top: Any, of: str) -> None:
    """Raise ``InputError`` unless an entry is there, of its type and within its bounds."""
    value = made_of.get(name)
    # a bool is an int to Python, and an int will do for a float
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or not low <= value <= top:
        raise InputError(f"made_of[{name!r}] of a {of} set is {value}, it must be in {low}..{top}")


def read_json(path: Path, schema_version: int = SCHEMA_VERSION) -> dict[str, Any]:
    """A JSON object that carries ``schema_version``.

    Raises:
        InputError: missing, not such an object, or of another schema version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): did the command that writes it finish?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}): copy or make it again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != schema_version:
        raise InputError(
            f"{path} has schema version {version}, this program reads {schema_version}: "
            "update the program or make the file again"
        )
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished set, whose parts agree with one another.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / "manifest.json"
    manifest = read_json(path)
    _check_fields(path, manifest, MANIFEST)
    shards = manifest["shards"]
    for shard in shards:
        _check_fields(path, shard, ENTRY)
        if not SHARD_NAME.fullmatch(shard["name"]):
            raise InputError(f"{path} names {shard['name']!r}, which is no shard")
        if not 0 <= shard["val_rows"] <= shard["rows"]:
            raise InputError(
                f"{path} says that {shard['val_rows']} of the {shard['rows']} rows of "
                f"{shard['name']} are for validation: {COPY_AGAIN}"
            )
    counted, fingerprint = sum(shard["rows"] for shard in shards), fingerprint_of(shards)
    if manifest["fingerprint"] != fingerprint:
        raise InputError(
            f"{path} has fingerprint {manifest['fingerprint']}, its shards have "
            f"{fingerprint}: copy the set again"
        )
    if counted != manifest["rows"]:
        raise InputError(f"{path} lists {counted} rows and claims {manifest['rows']}")
    return manifest


def _check_fields(path: Path, content: Any, fields: dict[str, type]) -> None:
    """Raise ``InputError`` unless ``content`` is an object with these fields of these types."""
    for name, kind in fields.items():
        if not isinstance(content, dict) or type(content.get(name)) is not kind:
            raise InputError(f"{path} lacks or garbles {name}: {COPY_AGAIN}")


def read_batch_table(
    folder: Path, shard: dict[str, Any], made_of: dict[str, Any]
) -> NDArray[np.int64]:
    """Where the record batches of a shard stand, from its sidecar.

    Args:
        folder: of the set.
        shard: its entry in the manifest.
        made_of: ``kind`` and ``made_of`` of the manifest.

    Returns:
        int64 [batches, 4]: rows, offset and bytes in the file, crc32 of these bytes.

    Raises:
        InputError: the sidecar is missing, damaged, or not that of this shard.
    """
    path = (folder / shard["name"]).with_suffix(".json")
    sidecar = read_json(path)
    for name, wanted in (made_of | {name: shard[name] for name in ENTRY}).items():
        if sidecar.get(name) != wanted:
            raise InputError(
                f"{path} has {name} {sidecar.get(name)}, the manifest says {wanted}: {COPY_AGAIN}"
            )
    try:
        table = np.array(sidecar["batches"], np.int64).reshape(-1, 4)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} lacks or garbles its batches: {COPY_AGAIN}") from error
    rows = table[:, 0]
    if (table < 0).any() or (rows == 0).any() or rows.sum() != shard["rows"]:
        raise InputError(
            f"{path} lists record batches of {rows.sum()} rows in all, the manifest says "
            f"{shard['rows']}: {COPY_AGAIN}"
        )
    return table


def fingerprint_of(shards: list[dict[str, Any]]) -> str:
    """sha256 over the hashes of a set's shards and their validation rows, in order.

    The identity of its content.
    """
    lines = (f"{shard['sha256']} {shard['val_rows']}\n" for shard in shards)
    return sha256("".join(lines).encode()).hexdigest()
