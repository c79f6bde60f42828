"""Samples a second out of a token set, at random places, in this process and on one core.

Positions go on from run to run, so no sample is read twice; every record batch has been checked
before, as it is after the first moments of an epoch.
"""

import json
import subprocess
import zlib
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.speed.clock import Times, rate, timed, timed_command
from data_prep.speed.inputs import captions, codes, write_pairs, write_tokens
from pipeline.console import InputError
from pipeline.data.loader import TokenLoader
from pipeline.data.order import Order
from pipeline.data.shards import ShardReader, Side
from pipeline.data.stream import Stream
from pipeline.data.tokenizer import Tokenizer
from pipeline.machine import ROOT

BATCH = 64
N_VOCAB = 8192  # codes
N_TEXT = 256
DROPOUT = 0.1  # of byte pairs, as the paper trains
TEXT_VOCAB = 16_384
TAUGHT = 50_000  # captions that the tokenizer is trained on, at most
RACED = 10_000  # samples, at most
FULL_ROWS, FULL_SHARD = 250_000_000, 62_500
PEER = ROOT / "benchmarks" / "peers" / "mosaic_streaming.py"


class Samples:
    """A token set of ``n`` samples in ``folder``, made once for all measurements."""

    def __init__(self, folder: Path, n: int, grid: int) -> None:
        self.folder, self.n = folder, n
        self.tokens, self.captions = codes(n, grid**2, N_VOCAB), captions(n)
        write_tokens(folder / "tokens", self.tokens, self.captions, grid, N_VOCAB)
        self.reader = ShardReader(folder / "tokens", kind="tokens")
        self.side = self.reader.split("train")
        self.read(np.arange(n))  # checks every record batch

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Codes and captions of some rows."""
        return self.reader.captioned_tokens(rows)

    def tokenizer(self) -> Tokenizer:
        """One that is trained on the captions, by the command."""
        taught = self.captions[:TAUGHT]
        write_pairs(self.folder / "pairs", [b""], taught, 8, len(taught))
        words = ["--data", str(self.folder / "pairs"), "--out", str(self.folder / "tokenizer")]
        timed_command(["data_prep.train_tokenizer", *words, "--vocab", str(TEXT_VOCAB)])
        return Tokenizer(self.folder / "tokenizer")


def measure(samples: Samples, runs: int) -> dict[str, Any]:
    """Times of batches at random places, with and without what comes after reading them.

    Each way reads an epoch in ``runs`` runs and one before them, which is not counted.
    """
    n_batches = max(1, samples.n // (BATCH * (runs + 1)))
    order, tokenizer = Order(len(samples.side), seed=0), samples.tokenizer()
    stream = {"batch": BATCH, "rank": 0, "world": 1, "seed": 0}

    def read(position: int) -> object:
        return samples.read(samples.side.rows(order.samples(position, position + BATCH)))

    def loaded(dropout: float) -> Callable[[int], object]:
        sets = [(samples.reader, samples.side)]
        return TokenLoader(sets, tokenizer, n_text=N_TEXT, dropout=dropout, **stream).batch_at

    result: dict[str, Any] = {
        "set": {"samples": samples.n, "shards": len(samples.reader.manifest["shards"])},
        "batch": BATCH,
        "text": {"pieces": tokenizer.n_vocab, **_lengths(tokenizer, samples.captions[:1000])},
    }
    for name, batch_at in {
        "reading": read, "bpe": loaded(0.0), "bpe_dropout": loaded(DROPOUT)
    }.items():  # fmt: skip
        result[name] = _paced(batch_at, n_batches, runs).of(n_batches * BATCH, "samples")
    result["resume"] = _resumes(runs).of(1, "resumes")
    return result


def _resumes(runs: int) -> Times:
    """From the numbers in a manifest of 250 million rows to the rows of a batch, in a new place."""
    counts = np.full(FULL_ROWS // FULL_SHARD, FULL_SHARD - FULL_SHARD // 100)
    first = np.arange(len(counts)) * FULL_SHARD
    positions = count(3 * FULL_ROWS + 12_345, 1_000_003)

    def resume() -> None:
        side = Side(first, counts)
        stream = Stream([len(side)], batch=1024, rank=0, world=1, seed=0)
        side.rows(stream.at(next(positions))[1])

    times = Times()
    for _ in range(runs):
        timed(resume, times)
    return times


def _lengths(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    n_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    n_words = sum(len(text.split()) for text in texts)
    return {"words": round(n_words / len(texts), 2), "tokens": round(n_tokens / len(texts), 2)}


def _paced(batch_at: Callable[[int], object], n_batches: int, runs: int) -> Times:
    positions = count(0, BATCH)

    def some() -> None:
        for _ in range(n_batches):
            batch_at(next(positions))

    times = Times()
    some()
    for _ in range(runs):
        timed(some, times)
    return times


# ---- beside another library


def race(samples: Samples, python: str, runs: int) -> dict[str, Any]:
    """The same random samples by this reader and by mosaicml-streaming, of ``python``.

    Both read codes and caption of local, uncompressed files that the system has in memory, sample
    by sample and in batches, which is what a training loader reads. ``ratio`` is of samples for a
    second of the processor: each of our ways over the faster one of theirs.

    Raises:
        InputError: the other side does not run, or reads something else.
    """
    n = min(samples.n, RACED)
    ids = Order(samples.n, seed=1).samples(0, n)
    batches = [ids[i : i + BATCH] for i in range(0, n, BATCH)]

    def read(parts: list[np.ndarray]) -> None:
        for rows in parts:
            samples.read(rows)

    ours = {}
    for name, parts in {"batches": batches, "one_by_one": np.split(ids, n)}.items():
        times = Times()
        read(parts)
        for _ in range(runs):
            timed(partial(read, parts), times)
        ours[name] = times.of(n, "samples")
    theirs = _peer(samples, python, ids, runs)
    tokens, texts = samples.read(ids)
    if theirs["crc32"] != zlib.crc32("".join(texts).encode(), zlib.crc32(tokens.tobytes())):
        raise InputError(f"--peer: {PEER.name} read other samples than were written")
    fastest = max(way["samples_per_cpu_s"] for way in theirs["ways"].values())
    return {
        "ours": ours,
        "peer": theirs,
        "ratio": {name: rate(way["samples_per_cpu_s"], fastest) for name, way in ours.items()},
    }


def _peer(samples: Samples, python: str, ids: np.ndarray, runs: int) -> dict[str, Any]:
    """What the other library's script says of the same samples."""
    folder = samples.folder / "peer"
    folder.mkdir()
    np.save(folder / "tokens.npy", samples.tokens)
    np.save(folder / "ids.npy", ids)
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(caption) + "\n" for caption in samples.captions)
    words = [python, str(PEER), str(folder), "--runs", str(runs), "--batch", str(BATCH)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"--peer: {python} does not run ({error.strerror})") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise InputError(f"--peer: {PEER.name} ended with code {done.returncode}: {last}")
    try:
        said = json.loads(done.stdout.strip().splitlines()[-1])
        ways = {
            name: Times(way["wall_s"], way["cpu_s"]).of(len(ids), "samples")
            for name, way in said["ways"].items()
        }
        return {**{name: said[name] for name in ("library", "version", "crc32")}, "ways": ways}
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"--peer: {PEER.name} printed no JSON line of times: {error}") from error
