"""Images a second that one core takes in, and what each part of ingest costs.

The job is the command as users start it, with one process and every filter on. Before it is under
way it imports, loads the language model, makes the examples of the page, and is given its memory:
a quarter of the pictures is measured for itself and subtracted, for a job of a whole shard or more
does not feel the start.
"""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep import facts
from data_prep.check import clean_caption
from data_prep.filters import Filters, judge_caption
from data_prep.hashes import phash
from data_prep.plan import Settings, Where, make_plan
from data_prep.sources import RawPair, open_source
from data_prep.speed.clock import Times, timed, timed_command
from data_prep.speed.inputs import write_tars
from pipeline.data.images import inspect_image
from pipeline.data.schema import image_sha

PARTS = 128  # pictures whose parts are measured, at most


@dataclass
class _Job:
    """The job over some archives, whole and pass by pass."""

    tars: list[Path]
    job: Times = field(default_factory=Times)
    inspect: Times = field(default_factory=Times)
    merge: Times = field(default_factory=Times)
    write: Times = field(default_factory=Times)

    def run(self, out: Path) -> dict[str, Any]:
        """Once whole, then pass by pass, of which nothing stays; returns the ledger."""
        self._command(out, self.job)
        self.passes(out)
        # the first two passes are done, and the command goes on from there
        return self._command(out, self.write)

    def passes(self, out: Path) -> None:
        """What comes before the shards are written."""
        plan = make_plan([Where(str(tar)) for tar in self.tars], Settings(), out)

        def inspect() -> None:
            for k in range(len(plan.shards)):
                facts.inspect_shard(facts.Job(plan), k)

        timed(inspect, self.inspect)
        timed(partial(facts.merge, plan), self.merge)

    def _command(self, out: Path, times: Times) -> dict[str, Any]:
        words = ["data_prep.ingest", *map(str, self.tars), "--out", str(out), "--workers", "1"]
        timed_command(words, times)
        ledger: dict[str, Any] = json.loads((out / "rejects.json").read_text(encoding="utf-8"))
        shutil.rmtree(out)
        return ledger


def measure(folder: Path, n: int, side: int, runs: int) -> dict[str, Any]:
    """Times of ingest on ``n`` pictures, at least 4, of ``side`` pixels a side.

    Archives and one set at a time are written into ``folder``.
    """
    n_few = n // 4
    some, few = (
        _Job(write_tars(folder / "tars", n, side)),
        _Job(write_tars(folder / "few", n_few, side)),
    )
    _Job(few.tars).passes(folder / "warm")  # loads the language model
    for _ in range(runs):
        few.run(folder / "set")
        ledger = some.run(folder / "set")
    more, n_bytes = n - n_few, sum(tar.stat().st_size for tar in some.tars)
    return {
        "pictures": {
            "n": n,
            "taken": ledger["rows_out"],
            "side": side,
            "kb": round(n_bytes / n / 1000, 1),
        },
        "job": some.job.without(few.job).of(more, "images"),
        "inspect": some.inspect.without(few.inspect).of(more, "images"),
        "merge": some.merge.of(n, "images"),
        "write": some.write.without(few.write).of(more, "images"),
        "quarter": few.job.of(n_few, "images"),
        "parts": _parts(some.tars[0], runs),
    }


def _parts(tar: Path, runs: int) -> dict[str, Any]:
    """What goes on inside ``inspect``, each for itself; caches are warm, so it adds up to less."""
    source = open_source(str(tar))
    pieces = list(source.pieces(PARTS))

    def read() -> list[RawPair]:
        return [pair for piece in pieces for pair in source.rows(piece)]

    pairs = read()
    n_rows = len(pairs)
    pairs = pairs[:PARTS]
    images = [pair.image for pair in pairs if pair.image is not None]
    texts = [pair.caption for pair in pairs if pair.caption is not None]
    lumas = [inspect_image(image).luma for image in images]

    def each(work: Callable[[Any], object], items: list[Any]) -> Callable[[], None]:
        def run() -> None:
            for item in items:
                work(item)

        return run

    parts: dict[str, tuple[int, Callable[[], object]]] = {
        "read": (n_rows, read),
        "caption": (len(texts), each(_judge, texts)),
        "sha256": (len(images), each(image_sha, images)),
        "jpeg decoder": (len(images), each(_load, images)),
        "decode to luma": (len(images), each(_luma, images)),
        "phash": (len(lumas), each(phash, lumas)),
    }
    found = {}
    for name, (n, work) in parts.items():
        times = Times()
        for _ in range(runs):
            timed(work, times)
        found[name] = times.of(n, "images")
    return found


def _judge(caption: bytes) -> None:
    judge_caption(clean_caption(caption)[0], Filters())


def _luma(image: bytes) -> None:
    _ = inspect_image(image).luma


def _load(image: bytes) -> None:
    """What no ingest can do without; a part of "decode to luma"."""
    with Image.open(io.BytesIO(image), formats=["JPEG"]) as opened:
        opened.load()
