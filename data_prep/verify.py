"""Is a shard set what its manifest says, to the last byte?

    python -m data_prep.verify DIR

Reads every shard: sha256, columns, row count, text, range of the tokens or hash of each picture;
compares manifest, sidecars and the reject ledger. Ends with exit code 2 and the name of what is
wrong, and with a list of what the set was made of when nothing is.
"""

import argparse
import json
from hashlib import file_digest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ipc

from pipeline.console import Bar, InputError, command, logger
from pipeline.data.schema import SCHEMA_VERSION, SHARD_NAME, image_sha, read_json
from pipeline.data.shards import ShardReader

SHOWN = 5  # damaged shards that a message names

log = logger("verify")


def check_shard(reader: ShardReader, shard: dict[str, Any]) -> None:
    """Read one shard whole.

    Args:
        reader: of its set.
        shard: its entry in the manifest.

    Raises:
        InputError: anything about it is not what the manifest says.
    """
    path = reader.folder / shard["name"]
    record = {"schema_version": SCHEMA_VERSION, "kind": reader.kind, "made_of": reader.made_of}
    if read_json(path.with_suffix(".json")) != record | shard:
        raise InputError(f"{path.with_suffix('.json').name} and the manifest differ")
    with open(path, "rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    if digest != shard["sha256"]:
        raise InputError(f"{path.name} has sha256 {digest}, the manifest says {shard['sha256']}")
    # the bytes are those that were written: what is left to find are mistakes of the writer
    try:
        with pa.memory_map(str(path)) as source:
            arrow = ipc.open_file(source)
            if arrow.schema != reader.schema:
                raise InputError(f"{path.name} has the columns {arrow.schema}")
            rows = 0
            for i in range(arrow.num_record_batches):
                batch = arrow.get_batch(i)
                batch.validate(full=True)
                _check_values(path.name, batch, reader)
                rows += batch.num_rows
    except pa.ArrowException as error:
        raise InputError(f"{path.name} is damaged: {error}") from error
    if rows != shard["rows"]:
        raise InputError(f"{path.name} has {rows} rows, the manifest says {shard['rows']}")


def _check_values(name: str, batch: pa.RecordBatch, reader: ShardReader) -> None:
    if reader.kind == "tokens":
        largest = pc.max(batch.column("image_tokens").flatten()).as_py()
        if largest is not None and largest >= reader.made_of["n_vocab"]:
            raise InputError(
                f"{name} holds token {largest} of a vocabulary of {reader.made_of['n_vocab']}"
            )
        return
    columns = (batch.column(column) for column in ("key", "image", "image_sha"))
    for key, image, sha in zip(*columns, strict=True):
        if image_sha(image.as_py()) != sha.as_py():
            raise InputError(f"{name}: picture {key.as_py()!r} does not have its image_sha")


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
        rejects = sum(ledger["rejects"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} lacks or garbles {error}: ingest again") from error
    if rows_out != len(reader) or rows_in != rows_out + rejects:
        raise InputError(
            f"{path} counts {rows_in} rows in, {rejects} rejects and {rows_out} rows out, "
            f"the set has {len(reader)}: ingest again"
        )
    return ledger


def verify(folder: Path) -> ShardReader:
    """Check a whole set; returns its reader.

    Raises:
        InputError: names the shards that are damaged, or what else is wrong.
    """
    reader = ShardReader(folder)
    shards = reader.manifest["shards"]
    check_ledger(reader)
    damaged = []
    with Bar("shards", len(shards)) as bar:
        for shard in shards:
            try:
                check_shard(reader, shard)
            except InputError as error:
                damaged.append(str(error))
            bar.advance()
    if damaged:
        more = f"; and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
        raise InputError(
            f"{folder}: {len(damaged)} of {len(shards)} shards are damaged: "
            f"{'; '.join(damaged[:SHOWN])}{more}; copy or prepare them again"
        )
    names = {shard["name"] for shard in shards}
    for path in sorted(folder.iterdir()):
        is_shard = SHARD_NAME.fullmatch(path.with_suffix(".arrow").name) is not None
        if path.suffix == ".tmp" or (is_shard and path.with_suffix(".arrow").name not in names):
            log.warning("%s is not part of the set: a stopped run left it, it can go", path.name)
    return reader


def main() -> None:
    """Verify a set from the command line."""
    parser = argparse.ArgumentParser(description="check a shard set to the last byte")
    parser.add_argument("folder", type=Path, metavar="DIR", help="pair or token shards")
    reader = verify(parser.parse_args().folder)
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
