"""Pictures with captions -> pair shards and a ledger of everything that was left out.

    python -m data_prep.ingest SOURCE... --out DIR --preset dvae_demo

Every picture is decoded once, so that nothing which cannot be decoded reaches a training run; what
is stored are the bytes as they came. No bad row stops the job, and none is lost without a name:
``rejects.json`` beside the manifest counts rows in, rows out, rejects by reason and notes about
accepted rows, ``rejects.jsonl`` lists each reject. The same sources give the same bytes.

Which rows are for validation is decided here, by ``split_of`` of the key.
"""

import argparse
import json
import os
import sys
import unicodedata
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO

from data_prep.hashes import phash
from data_prep.sources import RawPair, all_rows, survey
from pipeline.console import Bar, InputError, command, logger
from pipeline.data.images import ImageError, enlarged_shape, inspect_image
from pipeline.data.schema import image_sha, read_json, split_of
from pipeline.data.shards import ShardWriter
from pipeline.files import write_json

CAPTION_LIMIT = 10_000  # characters
MIN_SIDE = 8  # pixels: what is smaller shows nothing, enlarged or not
MIB = 1 << 20

log = logger("ingest")


class Reject(Exception):
    """A row that does not become a sample: ``reason`` is counted, ``detail`` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Picture:
    """An accepted picture: its size in pixels once upright, its hash, and notes."""

    width: int
    height: int
    phash: int
    notes: tuple[str, ...]


def clean_caption(data: bytes) -> tuple[str, tuple[str, ...]]:
    """A caption on one line, and notes ("control characters stripped") about it.

    A byte order mark is dropped, runs of white space become one space, and other control characters
    go: the tokenizer would spend its vocabulary on them.

    Raises:
        Reject: "caption empty", "caption blank", "caption not UTF-8" or "caption too long".
    """
    if not data:
        raise Reject("caption empty", "0 bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Reject("caption not UTF-8", f"byte {error.start}: {error.reason}") from error
    kept = [c for c in text if c.isspace() or unicodedata.category(c) != "Cc"]
    caption = " ".join("".join(kept).split())
    if not any(_is_read(c) for c in caption):
        raise Reject("caption blank", "nothing but white space, control and invisible characters")
    if len(caption) > CAPTION_LIMIT:
        raise Reject("caption too long", f"{len(caption)} characters, the limit is {CAPTION_LIMIT}")
    return caption, ("control characters stripped",) if len(kept) < len(text) else ()


def _is_read(char: str) -> bool:
    """Whether the tokenizer may keep a character: not spaces, joiners and marks for the unknown."""
    return not char.isspace() and unicodedata.category(char) != "Cf" and char not in "\u2581\ufffd"


def check_picture(data: bytes, image_size: int, upscale: bool) -> Picture:
    """Decode a picture and hold its shorter side against ``image_size``.

    Args:
        data: an encoded picture.
        image_size: pixels a side that training will crop.
        upscale: keep what is smaller too, down to ``MIN_SIDE``: it is enlarged when it is read.

    Raises:
        Reject: a reason of ``ImageError``, "side below N ...", or "too long to be enlarged".
    """
    try:
        decoded = inspect_image(data)
    except ImageError as error:
        raise Reject(error.reason, error.detail) from error
    height, width = decoded.pixels.shape[:2]
    side = f"{width}x{height} pixels"
    if min(height, width) < MIN_SIDE:
        raise Reject(f"side below {MIN_SIDE}", side)
    notes = decoded.notes
    if min(height, width) < image_size:
        if not upscale:
            raise Reject(f"side below {image_size} (--upscale would enlarge it)", side)
        try:
            enlarged_shape(height, width, image_size)
        except ImageError as error:
            raise Reject(error.reason, error.detail) from error
        notes = (*notes, "upscaled")
    return Picture(width, height, phash(decoded.pixels), notes)


class Ledger:
    """Counts of what came in and went out, and one line for each reject.

    Remembers 8 bytes of hash for each key, to find repeated ones: some 70 MB for a million rows.
    """

    def __init__(self, lines: TextIO) -> None:
        self.rows_in = self.rows_out = 0
        self.rejects: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._lines = lines
        self._seen: set[int] = set()

    def check_key(self, key: str) -> None:
        """Raise ``Reject("duplicate key")`` for a key that an earlier row, good or bad, had."""
        digest = int.from_bytes(blake2b(key.encode(), digest_size=8).digest())
        if digest in self._seen:
            detail = "sources that name their files alike: put each in a folder of its own"
            raise Reject("duplicate key", detail)
        self._seen.add(digest)

    def reject(self, key: str, reason: str, detail: str) -> None:
        """Count a row that is left out, by name."""
        self.rejects[reason] += 1
        line = {"key": key, "reason": reason, "detail": detail}
        self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")

    def accept(self, notes: tuple[str, ...]) -> None:
        """Count a row that is kept, and what was noteworthy about it."""
        self.rows_out += 1
        self.notes.update(notes)

    def summary(self) -> dict[str, Any]:
        """The content of ``rejects.json``."""
        lost = self.rows_in - self.rows_out - self.rejects.total()
        assert lost == 0, f"{lost} rows are neither accepted nor rejected"
        return {
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "rejects": dict(sorted(self.rejects.items())),
            "notes": dict(sorted(self.notes.items())),
        }


def ingest(
    sources: list[Path], out: Path, image_size: int, upscale: bool, val_fraction: float = 0.01
) -> dict[str, Any]:
    """Write the pairs of ``sources`` to ``out``; returns the content of its ``rejects.json``.

    A set that ``out`` holds already is left as it is when it was made of the same sources (names
    and sizes of files) in the same way.

    Raises:
        InputError: a source is missing, no row is accepted, or ``out`` holds another set.
    """
    if image_size < MIN_SIDE:
        raise InputError(f"image size {image_size} is below {MIN_SIDE} pixels: take a larger one")
    sources = sorted(sources)
    surveys = [survey(source) for source in sources]
    names = [source.resolve().name for source in sources]  # sets do not depend on where they lay
    made_of = {
        "sources": [
            {"name": name, "files": digest}
            for name, (_, digest) in zip(names, surveys, strict=True)
        ],
        "image_size": image_size,
        "upscale": upscale,
        "bytes": "inline",
        "val_fraction": val_fraction,
    }
    if (out / "manifest.json").exists():
        return _same_set(out, made_of)
    with ShardWriter(out, "pairs", made_of) as writer:
        temporary = out / f".rejects.jsonl.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as lines:
                ledger = Ledger(lines)
                n_bytes = sum(size for size, _ in surveys)
                for pair in _with_bar(sources, ledger, n_bytes):
                    _take(pair, writer, ledger, image_size, upscale)
            os.replace(temporary, out / "rejects.jsonl")
        finally:
            temporary.unlink(missing_ok=True)
        summary = ledger.summary()
        write_json(out / "rejects.json", summary)
        if ledger.rows_out == 0:  # leaves the block without a manifest
            raise InputError(_nothing(names, ledger, out))
    return summary


def _same_set(out: Path, made_of: dict[str, Any]) -> dict[str, Any]:
    """The ledger of a finished set, if it is the one asked for."""
    found = read_json(out / "manifest.json").get("made_of", {})
    for name, value in made_of.items():
        if found.get(name) != value:
            raise InputError(
                f"{out} holds another set, with {name} {json.dumps(found.get(name))} "
                f"and not {json.dumps(value)}: name another folder or delete it"
            )
    log.info("%s holds this set already (same files by name and size); nothing to do", out)
    try:
        summary: dict[str, Any] = json.loads((out / "rejects.json").read_text(encoding="utf-8"))
        table(summary)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{out}/rejects.json: {error}; delete {out} and ingest again") from error
    return summary


def _nothing(names: list[str], ledger: Ledger, out: Path) -> str:
    if ledger.rows_in == 0:
        return f"no picture and no .txt in {', '.join(names)}: a pair is two files of one name"
    reason, n = ledger.rejects.most_common(1)[0]
    return (
        f"none of the {ledger.rows_in} rows of {', '.join(names)} was accepted, "
        f"{n} of them for: {reason}; {out}/rejects.jsonl names each"
    )


def _with_bar(sources: list[Path], ledger: Ledger, n_bytes: int) -> Iterator[RawPair]:
    """Every row of every source, counted in MiB on a progress bar."""
    total, seen = -(-n_bytes // MIB), 0
    with Bar("ingest, MiB", total) as bar:
        for source in sources:
            for pair in all_rows(source):
                yield pair
                seen += pair.n_bytes
                note = f"{ledger.rows_out} pairs, {ledger.rejects.total()} rejects"
                bar.advance(min(seen // MIB, total) - bar.done, note)
        bar.advance(total - bar.done, bar.note)


def _take(
    pair: RawPair, writer: ShardWriter, ledger: Ledger, image_size: int, upscale: bool
) -> None:
    """Accept or reject one row."""
    ledger.rows_in += 1
    try:
        ledger.check_key(pair.key)
        if pair.problem is not None or pair.caption is None or pair.image is None:
            raise Reject(pair.problem or "caption missing", pair.detail)
        caption, caption_notes = clean_caption(pair.caption)
        picture = check_picture(pair.image, image_size, upscale)
    except Reject as reject:
        ledger.reject(pair.key, reject.reason, reject.detail)
        return
    row: dict[str, Any] = {"key": pair.key, "caption": caption, "image": pair.image}
    row |= {"width": picture.width, "height": picture.height, "phash": picture.phash}
    is_val = split_of(pair.key, writer.made_of["val_fraction"]) == "val"
    writer.add(row | {"image_sha": image_sha(pair.image)}, val=is_val)
    ledger.accept(caption_notes + picture.notes)


def table(summary: dict[str, Any]) -> str:
    """The ledger for people: one count a line."""
    lines = [("rows in", summary["rows_in"]), ("rows out", summary["rows_out"])]
    lines += [(f"rejected: {reason}", n) for reason, n in summary["rejects"].items()]
    lines += [(f"noted: {note}", n) for note, n in summary["notes"].items()]
    width = max(len(name) for name, _ in lines)
    return "".join(f"{name:<{width}}  {n:>9,}\n" for name, n in lines)


def main() -> None:
    """Parse the command line and ingest."""
    parser = argparse.ArgumentParser(prog="data_prep.ingest", description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="+", type=Path, help="folder or .tar of image + .txt pairs")
    parser.add_argument("--out", required=True, type=Path, help="folder for the shards")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--preset", help="take the image size from this preset")
    size.add_argument(
        "--image-size", type=int, default=256, help="pixels a side to train at (default: 256)"
    )
    parser.add_argument(
        "--upscale", action="store_true", help="keep pictures that are too small, to be enlarged"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.01, help="share of rows for validation (0.01)"
    )
    args = parser.parse_args()
    image_size = args.image_size
    if args.preset is not None:
        from pipeline import presets

        image_size = presets.load(args.preset).model.image_size
    summary = ingest(args.source, args.out, image_size, args.upscale, args.val_fraction)
    sys.stdout.write(table(summary))


if __name__ == "__main__":
    command(main)
