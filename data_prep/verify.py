"""Is a shard set what its manifest says, to the last byte?

    python -m data_prep.verify DIR

Reads every shard: sha256, crc32 of each record batch, columns, row counts, text, range of the
tokens or hash of each picture; the pictures of a set by reference too, where they stand. Compares
manifest, sidecars and the reject ledger, and names the files that do not belong. Ends with exit
code 2 and the name of what is wrong, and with a list of what the set was made of when nothing is.
"""

import argparse
import json
import zlib
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ipc

from pipeline.console import Bar, InputError, a_path, command, logger
from pipeline.data.schema import (
    ENTRY,
    MANIFEST,
    SOURCES,
    image_sha,
    read_batch_table,
    read_json,
)
from pipeline.data.shards import ShardReader
from pipeline.files import json_bytes

SHOWN = 5  # damaged shards that a message names
# what belongs into the folder of a set besides its shards
BESIDE = ("manifest.json", SOURCES, "plan", "rejects.json", "rejects.jsonl", "report.html")

log = logger("verify")


def check_json(path: Path, fields: set[str]) -> dict[str, Any]:
    """A description of the set whose every byte is as it was written.

    Raises:
        InputError: it has other fields, or is written otherwise.
    """
    content = read_json(path)
    if set(content) != fields:
        raise InputError(f"{path.name} has the fields {sorted(content)}, not {sorted(fields)}")
    if path.read_bytes() != json_bytes(content):
        raise InputError(f"{path.name} is not written as this program writes it")
    return content


def check_shard(reader: ShardReader, k: int) -> None:
    """Read shard ``k`` of the manifest whole.

    Raises:
        InputError: anything about it is not what the manifest says.
    """
    shard = reader.manifest["shards"][k]
    path = reader.folder / shard["name"]
    described = {"kind": reader.kind, "made_of": reader.made_of}
    table = read_batch_table(reader.folder, shard, described)
    check_json(path.with_suffix(".json"), {"schema_version", *described, *ENTRY, "batches"})
    if set(shard) != set(ENTRY):
        raise InputError(f"{path.name}: the manifest has an entry {shard}, which is none")
    try:
        with open(path, "rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path.name} cannot be read ({error.strerror})") from error
    if digest != shard["sha256"]:
        raise InputError(
            f"{path.name} has sha256 {digest}, the manifest says {shard['sha256']}: "
            f"{_where(path, table)}"
        )
    # the bytes are those that were written: what is left to find are mistakes of the writer
    try:
        with pa.OSFile(str(path)) as source:
            arrow = ipc.open_file(source)
            if arrow.schema != reader.schema:
                raise InputError(f"{path.name} has the columns {arrow.schema}")
            if arrow.num_record_batches != len(table):
                raise InputError(f"{path.name} has {arrow.num_record_batches} record batches")
        for batch in reader.batches(k):
            batch.validate(full=True)
            _check_values(path.name, batch, reader)
    except pa.ArrowException as error:
        raise InputError(f"{path.name} is damaged: {error}") from error


def _where(path: Path, table: np.ndarray) -> str:
    """Which record batches are damaged."""
    damaged = []
    with open(path, "rb") as file:
        for number, (_, at, size, crc) in enumerate(table.tolist()):
            file.seek(at)
            if zlib.crc32(file.read(size)) != crc:
                damaged.append(str(number))
    if not damaged:
        return "its record batches are as they were written, what lies around them is not"
    return f"damaged in record batch {', '.join(damaged)} of {len(table)}"


def _check_values(name: str, batch: pa.RecordBatch, reader: ShardReader) -> None:
    if reader.kind == "tokens":
        largest = pc.max(batch.column("image_tokens").flatten()).as_py()
        if largest is not None and largest >= reader.made_of["n_vocab"]:
            raise InputError(
                f"{name} holds token {largest} of a vocabulary of {reader.made_of['n_vocab']}"
            )
    elif reader.made_of["bytes"] == "inline":
        columns = (batch.column(column) for column in ("key", "image", "image_sha"))
        for key, image, sha in zip(*columns, strict=True):
            if image_sha(image.as_py()) != sha.as_py():
                raise InputError(f"{name}: picture {key.as_py()!r} does not have its image_sha")


def missing_pictures(reader: ShardReader, k: int) -> list[str]:
    """What is wrong with the pictures that shard ``k`` refers to, read where they stand.

    A sentence for each that is not there, or not the one that was ingested.
    """
    first = sum(entry["rows"] for entry in reader.manifest["shards"][:k])
    problems = []
    for row in range(first, first + reader.manifest["shards"][k]["rows"]):
        try:
            reader.images(np.array([row]))
        except InputError as error:
            problems.append(str(error))
    return problems


def check_ledger(reader: ShardReader) -> dict[str, Any] | None:
    """The reject ledger beside a pair set, when there is one.

    Raises:
        InputError: rows in are not rows out plus rejects, or rows out are not the rows of the set.
    """
    path = reader.folder / "rejects.json"
    if not path.exists():
        return None
    try:
        ledger: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows_in, rows_out = ledger["rows_in"], ledger["rows_out"]
        rejects, val_rows = sum(ledger["rejects"].values()), ledger["val_rows"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} lacks or garbles {error}: ingest again") from error
    if rows_out != len(reader) or rows_in != rows_out + rejects:
        raise InputError(
            f"{path} counts {rows_in} rows in, {rejects} rejects and {rows_out} rows out, "
            f"the set has {len(reader)}: ingest again"
        )
    if val_rows != (found := sum(shard["val_rows"] for shard in reader.manifest["shards"])):
        raise InputError(
            f"{path} counts {val_rows} rows for validation, the shards have {found}: ingest again"
        )
    return ledger


def strangers(reader: ShardReader) -> list[str]:
    """Names of the files in the folder of a set that are no part of it, sorted."""
    names = {shard["name"] for shard in reader.manifest["shards"]}
    names |= {Path(name).with_suffix(".json").name for name in names} | set(BESIDE)
    return sorted(path.name for path in reader.folder.iterdir() if path.name not in names)


def verify(folder: Path, *, sources: bool = True) -> ShardReader:
    """Check a whole set; returns its reader.

    Args:
        folder: of the set.
        sources: read the pictures of a set by reference too, where they stand.

    Raises:
        InputError: names the shards that are damaged, the pictures that are not where they were, or
            what else is wrong.
    """
    reader = ShardReader(folder, lazy=True)
    check_json(folder / "manifest.json", set(MANIFEST))
    shards = reader.manifest["shards"]
    check_ledger(reader)
    sources = sources and reader.made_of.get("bytes") == "reference"
    damaged: list[str] = []
    missing: list[str] = []
    with Bar("shards", len(shards)) as bar:
        for k in range(len(shards)):
            try:
                check_shard(reader, k)
                if sources:
                    missing += missing_pictures(reader, k)
            except InputError as error:
                damaged.append(str(error))
            bar.advance()
    for name in strangers(reader):
        log.warning("%s is not part of the set: if a stopped run left it, it can go", name)
    if damaged:
        more = f"; and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
        raise InputError(
            f"{folder}: {len(damaged)} of {len(shards)} shards are damaged: "
            f"{'; '.join(damaged[:SHOWN])}{more}; copy or prepare them again"
        )
    if missing:
        raise InputError(
            f"every shard is as written, but {len(missing)} of {len(reader)} pictures are not "
            f"where they were ingested: {missing[0]}"
        )
    return reader


def main() -> None:
    """Verify a set from the command line."""
    parser = argparse.ArgumentParser(description="check a shard set to the last byte")
    parser.add_argument("folder", type=a_path, metavar="DIR", help="pair or token shards")
    parser.add_argument(
        "--no-sources", action="store_true", help="leave out pictures that the set refers to"
    )
    args = parser.parse_args()
    reader = verify(args.folder, sources=not args.no_sources)
    for name, value in reader.made_of.items():
        log.info("made of  %s: %s", name, value)
    if (ledger := check_ledger(reader)) is not None:
        for reason, count in ledger["rejects"].items():
            log.info("rejected %d: %s", count, reason)
    n_shards = len(reader.manifest["shards"])
    log.info(
        "%d rows of %s in %d shards, every byte as written", len(reader), reader.kind, n_shards
    )
    log.info("fingerprint %s", reader.fingerprint)


if __name__ == "__main__":
    command(main)
