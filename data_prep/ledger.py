"""Every row of a set is accounted for: counts, reasons, histograms and examples, by shard and all.

A ledger is JSON values, so that it lies beside the shard it is about. The ledgers of all shards
merge into the summary of the set, which has the same form::

    rows_in, rows_out, val_rows         rows_in = rows_out + all rejects; val_rows of rows_out
    rejects     {reason: rows}
    notes       {note: accepted rows}
    histograms  {name of BINS: {label: accepted rows}}
    examples    {reason: [{key, detail, caption, thumbnail}, ...]}
    accepted    [{key, caption, thumbnail}, ...]

A thumbnail is a JPEG in base64, or "" where there was no picture to show.
"""

import base64
import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from data_prep.filters import count_words
from pipeline.data.images import Pixels

REJECTED_EXAMPLES = 3  # of each reason
ACCEPTED_EXAMPLES = 24
THUMBNAIL = 96  # pixels, the longer side
EXCERPT = 240  # characters of a key, detail or caption in an example


class Bins:
    """What a histogram counts by: half-open intervals between fixed edges.

    Args:
        edges: rising; bin i holds edges[i] <= value < edges[i + 1], the last has no end, and what
            is below the first edge counts in the first bin.
        labels: one for each edge; for whole numbers they are made of the edges when None.
    """

    def __init__(self, edges: Iterable[float], labels: Iterable[str] | None = None) -> None:
        self.edges = tuple(edges)
        self.labels = tuple(labels) if labels is not None else tuple(_whole(self.edges))
        assert len(self.labels) == len(self.edges) == len(set(self.labels))

    def label(self, value: float) -> str:
        """The bin of one value."""
        return self.labels[max(0, bisect_right(self.edges, value) - 1)]

    def count(self, values: ArrayLike) -> Counter[str]:
        """How many of many values are in each bin; bins without any are left out."""
        bins = np.searchsorted(np.array(self.edges), np.asarray(values), side="right") - 1
        counts = np.bincount(np.maximum(bins, 0), minlength=len(self.edges)).tolist()
        return Counter({label: n for label, n in zip(self.labels, counts, strict=True) if n})


def _whole(edges: tuple[float, ...]) -> list[str]:
    """Labels as 1, 2, 3-4, 5+."""
    spans = [f"{a:,}" if b == a + 1 else f"{a:,}-{b - 1:,}" for a, b in pairwise(edges)]
    return [*spans, f"{edges[-1]:,}+"]


KIB, MIB = 1 << 10, 1 << 20
BINS = {
    "caption words": Bins([1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 65, 129]),
    "caption characters": Bins([1, 9, 17, 33, 65, 129, 257, 513, 1025]),
    "shorter side, pixels": Bins([1, 64, 128, 256, 384, 512, 768, 1024, 2048]),
    "width to height": Bins(
        [0, 1 / 2, 2 / 3, 4 / 5, 1, np.nextafter(1, 2), 5 / 4, 3 / 2, 2, np.nextafter(2, 3)],
        ["below 1:2", "from 1:2", "from 2:3", "from 4:5", "1:1", "over 1:1", "from 5:4", "from 3:2",
         "2:1", "over 2:1"],
    ),
    "picture bytes": Bins(
        [0, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB],
        ["under 4 KiB", "from 4 KiB", "from 16 KiB", "from 64 KiB", "from 256 KiB", "from 1 MiB",
         "from 4 MiB", "from 16 MiB"],
    ),
}  # fmt: skip


def thumbnail(image_HWC: Pixels) -> str:
    """A picture uint8 [H, W, 3] as a small JPEG in base64."""
    image = Image.fromarray(image_HWC)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return base64.b64encode(file.getvalue()).decode()


def _excerpt(text: str) -> str:
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"


@dataclass
class Ledger:
    """The counts of one shard, filled row by row.

    ``rows_in`` is counted by the caller as rows come in, all else by ``accept`` and ``reject``: so
    a row that is lost on the way between is noticed.
    """

    rows_in: int = 0
    rows_out: int = 0
    val_rows: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in BINS}
    )
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    accepted: list[dict[str, str]] = field(default_factory=list)

    def accept(
        self,
        key: str,
        caption: str,
        *,
        width: int,
        height: int,
        n_bytes: int,
        is_val: bool = False,
        notes: Iterable[str] = (),
        thumbnail: str = "",
    ) -> None:
        """Count a row that is kept. The first with a thumbnail become examples."""
        self.rows_out += 1
        self.val_rows += is_val
        self.notes.update(notes)
        values = {
            "caption words": count_words(caption),
            "caption characters": len(caption),
            "shorter side, pixels": min(width, height),
            "width to height": width / height,
            "picture bytes": n_bytes,
        }
        for name, value in values.items():
            self.histograms[name][BINS[name].label(value)] += 1
        if thumbnail and len(self.accepted) < ACCEPTED_EXAMPLES:
            self.accepted.append(
                {"key": _excerpt(key), "caption": _excerpt(caption), "thumbnail": thumbnail}
            )

    def reject(
        self, key: str, reason: str, detail: str, *, caption: str = "", thumbnail: str = ""
    ) -> None:
        """Count a row that is left out, by the name of its reason. The first become examples."""
        self.rejects[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < REJECTED_EXAMPLES:
            examples.append(
                {
                    "key": _excerpt(key),
                    "detail": _excerpt(detail),
                    "caption": _excerpt(caption),
                    "thumbnail": thumbnail,
                }
            )

    def as_dict(self) -> dict[str, Any]:
        """The ledger in JSON values."""
        lost = self.rows_in - self.rows_out - self.rejects.total()
        assert lost == 0, f"{lost} rows are neither accepted nor rejected"
        return {
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "val_rows": self.val_rows,
            "rejects": dict(sorted(self.rejects.items())),
            "notes": dict(sorted(self.notes.items())),
            "histograms": {
                name: {label: counts[label] for label in BINS[name].labels if counts[label]}
                for name, counts in self.histograms.items()
            },
            "examples": dict(sorted(self.examples.items())),
            "accepted": self.accepted,
        }


class _Few:
    """The first ``limit`` of the examples of many shards: of each shard one, then the second."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: list[tuple[int, int, dict[str, str]]] = []

    def add(self, shard: int, examples: list[dict[str, str]]) -> None:
        self._kept += [(place, shard, example) for place, example in enumerate(examples)]
        self._kept = sorted(self._kept, key=lambda entry: entry[:2])[: self.limit]

    def as_list(self) -> list[dict[str, str]]:
        return [example for _, _, example in self._kept]


def merge(ledgers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The summary of a set from the ledgers of its shards, given in their order, one at a time.

    Examples come from as many shards as there are; no more are held than the summary has.
    """
    total = Ledger()
    accepted = _Few(ACCEPTED_EXAMPLES)
    examples: dict[str, _Few] = {}
    for k, ledger in enumerate(ledgers):
        total.rows_in += ledger["rows_in"]
        total.rows_out += ledger["rows_out"]
        total.val_rows += ledger["val_rows"]
        total.rejects.update(ledger["rejects"])
        total.notes.update(ledger["notes"])
        for name, counts in ledger["histograms"].items():
            total.histograms[name].update(counts)
        accepted.add(k, ledger["accepted"])
        for reason, found in ledger["examples"].items():
            examples.setdefault(reason, _Few(REJECTED_EXAMPLES)).add(k, found)
    total.accepted = accepted.as_list()
    total.examples = {reason: few.as_list() for reason, few in examples.items()}
    return total.as_dict()


def table(summary: dict[str, Any]) -> str:
    """The summary for people: one count a line, the commonest first."""
    lines = [("rows in", summary["rows_in"]), ("rows out", summary["rows_out"])]
    lines.append(("of these for validation", summary["val_rows"]))
    for kind, name in (("rejects", "rejected"), ("notes", "noted")):
        counts = sorted(summary[kind].items(), key=lambda entry: (-entry[1], entry[0]))
        lines += [(f"{name}: {reason}", n) for reason, n in counts]
    width = max(len(name) for name, _ in lines)
    return "".join(f"{name:<{width}}  {n:>11,}\n" for name, n in lines)
