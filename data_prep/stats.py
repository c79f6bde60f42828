"""What is in a set: rows, sides, bytes, and how captions, pictures and codes are distributed.

    python -m data_prep.stats DIR [--tokenizer DIR] [--hashes FILE]

Reads every record batch once, each held against its checksum. With ``--hashes`` the pictures of a
pair set, such as an evaluation set, become a list that ``data_prep.ingest --exclude-hashes`` keeps
out of another.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep.filters import count_words
from data_prep.hashes import hash_line
from data_prep.ledger import BINS, Bins
from pipeline.console import Bar, InputError, a_path, command, logger
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizer import Tokenizer
from pipeline.files import write_bytes

CAPTION_TOKENS = Bins([0, 1, 5, 9, 17, 33, 65, 129, 256])  # the paper's model reads 255
TOP_CODES = 8
BAR = 40  # characters of the longest bar

log = logger("stats")


@dataclass
class Distribution:
    """How one number is distributed over the rows; filled array by array, memory is fixed."""

    bins: Bins
    n: int = 0
    total: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, values: NDArray[Any]) -> None:
        """Count the values of some rows [n]."""
        if len(values):
            self.n += len(values)
            self.total += float(values.sum(dtype=np.float64))
            self.low = min(self.low, float(values.min()))
            self.high = max(self.high, float(values.max()))
            self.counts.update(self.bins.count(values))

    @property
    def mean(self) -> float:
        """Of all values; there is one."""
        return self.total / self.n


@dataclass
class Codes:
    """How often each code of an image tokenizer occurs: ``counts`` is int64 [n_vocab]."""

    counts: NDArray[np.int64]

    @property
    def n_used(self) -> int:
        """Codes that occur at all."""
        return int((self.counts > 0).sum())

    @property
    def perplexity(self) -> float:
        """Of the frequencies: how many codes there would be, were all as frequent."""
        share = self.counts[self.counts > 0] / self.counts.sum()
        return float(np.exp(-(share * np.log(share)).sum()))

    def top(self, n: int) -> list[tuple[int, float]]:
        """The most frequent codes with their share; of equal ones the lower first."""
        order = np.argsort(-self.counts, kind="stable")[:n]
        return [(int(i), float(self.counts[i] / self.counts.sum())) for i in order]


class Stats:
    """What is in a set, read in one go.

    Args:
        reader: of a pair or token set.
        tokenizer: to count the tokens of captions; None does not.

    Attributes:
        distributions: name -> ``Distribution``, without rows for an empty set.
        codes: ``Codes`` of a token set, else None.
        hashes: for a pair set when wanted, one ``hash_line`` a picture, in the order of the set.

    Raises:
        InputError: a shard is damaged.
    """

    def __init__(
        self, reader: ShardReader, tokenizer: Tokenizer | None = None, *, want_hashes: bool = False
    ) -> None:
        self._reader, self._tokenizer = reader, tokenizer
        names = list(BINS) if reader.kind == "pairs" else ["caption words", "caption characters"]
        self.distributions = {name: Distribution(BINS[name]) for name in names}
        if tokenizer is not None:
            self.distributions["caption tokens"] = Distribution(CAPTION_TOKENS)
        self.codes: Codes | None = None
        if reader.kind == "tokens":
            self.codes = Codes(np.zeros(reader.made_of["n_vocab"], np.int64))
        # a dictionary keeps the order; five captions of one picture are one line
        self.hashes: dict[str, None] = {}
        n_shards = len(reader.manifest["shards"])
        with Bar("shards", n_shards) as bar:
            for k in range(n_shards):
                for batch in reader.batches(k):
                    self._add(batch)
                    if want_hashes:
                        shas, bits = batch.column("image_sha"), batch.column("phash")
                        pairs = zip(shas.to_pylist(), bits.to_pylist(), strict=True)
                        self.hashes |= dict.fromkeys(hash_line(*pair) for pair in pairs)
                bar.advance()

    def _add(self, batch: pa.RecordBatch) -> None:
        captions = batch.column("caption").to_pylist()
        values = {
            "caption words": [count_words(caption) for caption in captions],
            "caption characters": [len(caption) for caption in captions],
        }
        if self._tokenizer is not None:
            values["caption tokens"] = [len(self._tokenizer.encode(c)) for c in captions]
        if self._reader.kind == "pairs":
            width, height = (batch.column(n).to_numpy() for n in ("width", "height"))
            values["shorter side, pixels"] = np.minimum(width, height)
            values["width to height"] = width / height
            is_inline = "image" in batch.schema.names
            size = pc.binary_length(batch.column("image")) if is_inline else batch.column("size")
            values["picture bytes"] = size.to_numpy()
        for name, found in values.items():
            self.distributions[name].add(np.asarray(found))
        if self.codes is not None:
            codes = batch.column("image_tokens").flatten().to_numpy()
            self.codes.counts += np.bincount(codes, minlength=len(self.codes.counts))

    def text(self) -> str:
        """All of it for people."""
        manifest = self._reader.manifest
        n_val = sum(shard["val_rows"] for shard in manifest["shards"])
        n_bytes = sum(shard["bytes"] for shard in manifest["shards"])
        lines = [
            f"{len(self._reader):,} rows of {self._reader.kind}, "
            f"{len(self._reader) - n_val:,} to train on and {n_val:,} for validation",
            f"{len(manifest['shards']):,} shards, {n_bytes:,} bytes",
            f"fingerprint {self._reader.fingerprint}",
        ]
        for name, value in self._reader.made_of.items():
            told = json.dumps(value, ensure_ascii=False)
            lines.append(f"made of {name}: {told if len(told) <= 200 else told[:199] + '…'}")
        for name, distribution in self.distributions.items():
            lines += ["", *_lines(name, distribution)]
        if self.codes is not None and self.codes.n_used:
            lines += [
                "",
                f"codes: {self.codes.n_used:,} of {len(self.codes.counts):,} used, "
                f"perplexity {self.codes.perplexity:,.1f}",
                "most frequent: "
                + ", ".join(f"{i} ({100 * share:.1f} %)" for i, share in self.codes.top(TOP_CODES)),
            ]
        return "\n".join(lines) + "\n"


def _lines(name: str, distribution: Distribution) -> list[str]:
    """Mean and bounds, and a bar for each bin between the first and the last that has rows."""
    if not distribution.n:
        return [f"{name}: no rows"]
    low, mean, high = distribution.low, distribution.mean, distribution.high
    bounds = [f"{x:,.0f}" if float(x).is_integer() else f"{x:,.2f}" for x in (low, high)]
    lines = [f"{name}: mean {mean:,.2f}, from {bounds[0]} to {bounds[1]}"]
    labels, counts = distribution.bins.labels, distribution.counts
    used = [i for i, label in enumerate(labels) if counts[label]]
    longest = max(counts.values())
    for label in labels[used[0] : used[-1] + 1]:
        n = counts[label]
        bar = "#" * -(-BAR * n // longest)
        lines.append(f"  {label:<12} {n:>11,} {100 * n / distribution.n:5.1f} %  {bar}".rstrip())
    return lines


def main() -> None:
    """Describe a set from the command line."""
    parser = argparse.ArgumentParser(prog="data_prep.stats", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=a_path, metavar="DIR", help="pair or token shards")
    parser.add_argument("--tokenizer", type=a_path, metavar="DIR", help="count caption tokens too")
    parser.add_argument(
        "--hashes",
        type=a_path,
        metavar="FILE",
        help="write the pictures of a pair set as a list",
    )
    args = parser.parse_args()
    reader = ShardReader(args.folder)
    if args.hashes is not None and reader.kind != "pairs":
        raise InputError(f"{args.folder} is a set of {reader.kind}, --hashes takes one of pairs")
    tokenizer = None if args.tokenizer is None else Tokenizer(args.tokenizer)
    stats = Stats(reader, tokenizer, want_hashes=args.hashes is not None)
    if args.hashes is not None:
        name = ascii(args.folder.resolve().name)  # on one line, whatever it is
        head = f"# {len(stats.hashes)} pictures of {name}, fingerprint {reader.fingerprint}\n"
        write_bytes(args.hashes, (head + "\n".join(stats.hashes) + "\n").encode())
        log.info("%d hashes in %s", len(stats.hashes), args.hashes)
    sys.stdout.write(stats.text())


if __name__ == "__main__":
    command(main)
