"""Random access of mosaicml-streaming, for ``python -m data_prep.bench --peer PYTHON``.

Runs in an environment of its own, which has mosaicml-streaming and nothing of this project. FOLDER
holds ``tokens.npy`` (uint16 [samples, codes]), ``captions.jsonl`` (a string a line) and ``ids.npy``
(the samples to read, in order). They are written as MDS shards, uncompressed and without hashes,
which is what this library reads fastest: an array of known type and length, and a string. Then all
of ``ids`` are read once, unmeasured, and ``--runs`` times in each of two ways; the last line that
is printed is JSON.
"""

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import streaming
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory


def write(folder: Path) -> None:
    """The samples as MDS shards in ``folder/mds``."""
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    columns = {"tokens": f"ndarray:uint16:{tokens.shape[1]}", "caption": "str"}
    with (
        open(folder / "captions.jsonl", encoding="utf-8") as lines,
        MDSWriter(out=str(folder / "mds"), columns=columns, compression=None, hashes=None) as out,
    ):
        for row, line in zip(tokens, lines, strict=True):
            out.write({"tokens": np.array(row), "caption": json.loads(line)})


def timed(work: Callable[[], object], runs: int) -> dict[str, list[float]]:
    """Seconds of ``runs`` calls, of the wall and of the processors."""
    times: dict[str, list[float]] = {"wall_s": [], "cpu_s": []}
    for _ in range(runs):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        times["wall_s"].append(time.perf_counter() - wall)
        times["cpu_s"].append(time.process_time() - cpu)
    return times


def main() -> None:
    """Write, read, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    write(args.folder)
    clean_stale_shared_memory()
    data = StreamingDataset(local=str(args.folder / "mds"), shuffle=False, batch_size=args.batch)
    ids = [int(i) for i in np.load(args.folder / "ids.npy")]
    batches = [ids[i : i + args.batch] for i in range(0, len(ids), args.batch)]

    def read() -> None:
        for i in ids:
            data[i]

    def read_batches() -> None:
        for batch in batches:
            samples = data[batch]
            np.stack([sample["tokens"] for sample in samples])

    crc, texts = 0, []
    for i in ids:
        sample: dict[str, Any] = data[i]
        crc = zlib.crc32(sample["tokens"].tobytes(), crc)
        texts.append(sample["caption"])
    ways = {
        "one_by_one": timed(read, args.runs),
        "batches": timed(read_batches, args.runs),
    }
    said = {
        "library": "mosaicml-streaming",
        "version": streaming.__version__,
        "crc32": zlib.crc32("".join(texts).encode(), crc),
        "ways": ways,
    }
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
