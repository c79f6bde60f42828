"""The format of shard sets: columns, file names, manifest; one for pairs and one for tokens.

A set is a flat folder::

    shard-00000.arrow   uncompressed Arrow IPC file, read through mmap; never rewritten in place
    shard-00000.json    its sidecar, written after it: rows, bytes, sha256, made_of
    manifest.json       written last: every shard in order, and what the set was made of

Rows of kind ``pairs`` (``made_of`` holds at least where they came from):

    key string · caption string · image binary, the encoded file · width, height int32, pixels ·
    image_sha binary[16], see ``image_sha``

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

import pyarrow as pa

from pipeline.console import InputError

SCHEMA_VERSION = 1
KINDS = ("pairs", "tokens")
ROWS_PER_SHARD = {"pairs": 16_384, "tokens": 65_536}
N_CROP = 4  # left, top, side, flip
SHARD_NAME = re.compile(r"shard-\d{5,}\.arrow")


def shard_name(index: int) -> str:
    """File name of one shard of a set."""
    return f"shard-{index:05d}.arrow"


def image_sha(data: bytes) -> bytes:
    """The first 16 bytes of the sha256 of an encoded image: its identity in every shard set."""
    return sha256(data).digest()[:16]


def split_of(key: str, val_fraction: float) -> str:
    """``"val"`` for about ``val_fraction`` of all keys, else ``"train"``.

    Depends on the key alone, so a sample keeps its side however the set is sharded or grown.

    Raises:
        InputError: val_fraction is not in [0, 1].
    """
    if not 0.0 <= val_fraction <= 1.0:
        raise InputError(f"val_fraction {val_fraction} is outside [0, 1]")
    draw = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") % 10**6
    return "val" if draw < round(val_fraction * 10**6) else "train"


def schema_of(kind: str, made_of: dict[str, Any]) -> pa.Schema:
    """Columns of a set, in order.

    Raises:
        InputError: unknown kind, or a token set without grid, n_vocab (at most 65,536) and crops.
    """
    if kind not in KINDS:
        raise InputError(f"shard kind {kind!r} is unknown: it is one of {', '.join(KINDS)}")
    both = [pa.field("key", pa.string()), pa.field("caption", pa.string())]
    sha = pa.field("image_sha", pa.binary(16))
    if kind == "pairs":
        size = [pa.field("width", pa.int32()), pa.field("height", pa.int32())]
        return pa.schema([*both, pa.field("image", pa.binary()), *size, sha])
    for name, top in (("grid", 1 << 12), ("n_vocab", 1 << 16), ("crops", 1 << 10)):
        value = made_of.get(name)
        if not isinstance(value, int) or not 1 <= value <= top:
            raise InputError(f"made_of[{name!r}] of a token set is {value}, it must be in 1..{top}")
    n_image = made_of["crops"] * made_of["grid"] ** 2
    tokens = pa.field("image_tokens", pa.list_(pa.uint16(), n_image))
    crops = pa.field("crops", pa.list_(pa.float32(), made_of["crops"] * N_CROP))
    return pa.schema([*both, tokens, crops, sha])


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
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): copy or make it again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != schema_version:
        raise InputError(
            f"{path} has schema version {version}, this program reads {schema_version}: "
            "update the program or make the file again"
        )
    return content


def fingerprint_of(shards: list[dict[str, Any]]) -> str:
    """sha256 over the hashes of a set's shards, in order: the identity of its content."""
    return sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
