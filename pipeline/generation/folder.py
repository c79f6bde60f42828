"""A folder of pictures that any number of processes fill, and that a stopped one goes on with.

    00000-000.png ..     each with its own facts as text, whole or not there
    provenance.json      the request, written first: another one cannot go into the same folder
    samples.jsonl        the facts of all pictures, or of the best, when all are there
    scores.jsonl         of all pictures, where they were scored
    grid.png             those of samples.jsonl in one picture, of the first captions

Nothing is counted anywhere: what is finished is what has a file. So the result does not depend on
who drew what when.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.console import InputError, logger
from pipeline.data.pictures import tile
from pipeline.files import write_bytes
from pipeline.generation.provenance import (
    SIDECAR,
    read_facts,
    software,
    write_picture,
    write_sidecar,
)
from pipeline.generation.request import Order

MOST_IN_GRID = 1024
SCORES = ("clip_score", "likelihood_score")  # facts that pictures can be ranked by

log = logger("sample")


class Folder:
    """Where the pictures of one request go.

    Args:
        path: of the folder.
        orders: all pictures of the request.
        facts: that all of them have in common.
    """

    def __init__(self, path: Path, orders: Sequence[Order], facts: dict[str, Any]) -> None:
        self.path, self.orders, self.facts = path, orders, facts

    def begin(self, request: dict[str, Any]) -> None:
        """Make the folder and write down what goes into it; one process does this.

        Args:
            request: what makes a request another one.

        Raises:
            InputError: it cannot be written, or holds the pictures of another request.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            before = read_request(self.path)
            if before is None:
                write_sidecar(self.path, request)
                return
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({error.strerror}); name another --out"
            ) from error
        if differs := _difference(before, {"facts": request, "software": software()}):
            raise InputError(
                f"{self.path} holds the pictures of another request: {differs}; name another "
                "--out, or delete the whole folder"
            )

    def left(self) -> list[Order]:
        """The pictures that are not there yet.

        Raises:
            InputError: a file that has the name of one and is another picture, or damaged.
        """
        there = {path.name for path in self.path.iterdir()}
        for order in self.orders:
            if order.file in there:
                self._check(order)
        return [order for order in self.orders if order.file not in there]

    def write(
        self, order: Order, image_YXC: np.ndarray, scores: dict[str, float], **marks: bool
    ) -> None:
        """Put a picture there, whole, with ``marks`` as ``write_picture`` takes them."""
        write_picture(self.path / order.file, image_YXC, self._facts_of(order) | scores, **marks)

    def _facts_of(self, order: Order) -> dict[str, Any]:
        return {
            "file": order.file, "caption": order.caption, "seed": order.seed,
            "caption_index": order.caption_index, "image_index": order.image_index,
            "index": order.index, **self.facts,
        }  # fmt: skip

    def _check(self, order: Order) -> None:
        way_out = "delete it, and the same command draws it again"
        path = self.path / order.file
        try:
            found = read_facts(path)
        except InputError as error:
            raise InputError(f"{error}: {way_out}") from error
        for name, value in self._facts_of(order).items():
            if found.get(name) != value:
                raise InputError(
                    f"{path} is another picture than was asked for, its {name} is "
                    f"{found.get(name)!r:.80} and not {value!r:.80}: {way_out}"
                )

    def finish(self, best: int | None) -> None:
        """Write the lists and the grid of what is there; one process does this, at the end.

        Args:
            best: how many pictures of each caption to choose by their score; None for all, as they
                come.

        Raises:
            InputError: a picture is missing or damaged.
        """
        rows = [read_facts(self.path / order.file) for order in self.orders]
        score = next((name for name in SCORES if name in rows[0]), None)
        if score is not None:
            # equal scores: the first of them
            ranked = sorted(rows, key=lambda row: (row["caption_index"], -row[score], row["index"]))
            count = len(rows) // (1 + rows[-1]["caption_index"])
            lines = [
                {name: row[name] for name in ("file", "caption", "seed", "index", score)}
                | {"rank": i % count}
                for i, row in enumerate(ranked)
            ]
            _write_lines(self.path / "scores.jsonl", lines)
            if best is not None:
                rows = [row for i, row in enumerate(ranked) if i % count < best]
        _write_lines(self.path / "samples.jsonl", rows)
        self._write_grid(rows)

    def _write_grid(self, rows: list[dict[str, Any]]) -> None:
        each = len(rows) // (1 + rows[-1]["caption_index"])
        shown = MOST_IN_GRID if each > MOST_IN_GRID else MOST_IN_GRID // each * each
        if shown < len(rows):
            log.info("grid.png shows the first %d of %d pictures", shown, len(rows))
            rows = rows[:shown]
        tiles = []
        for row in rows:
            with Image.open(self.path / row["file"]) as image:
                tiles.append(np.asarray(image.convert("RGB")))
        n_captions = 1 + rows[-1]["caption_index"]
        # a caption a row; with one picture a caption, or one caption, as square as it gets
        columns = each if n_captions > 1 and each > 1 else math.ceil(math.sqrt(len(rows)))
        same = {
            name: value
            for name, value in rows[0].items()
            if all(row.get(name) == value for row in rows)
        }
        # a mark is found in each tile; over the gaps between them it would only blur
        facts = {name: same[name] for name in same if name not in ("signature", "mark")}
        write_picture(
            self.path / "grid.png", tile(np.stack(tiles), columns), facts,
            signature=False, mark=False,
        )  # fmt: skip


def read_request(folder: Path) -> dict[str, Any] | None:
    """What ``provenance.json`` says; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    path = folder / SIDECAR
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["facts"], dict) or not isinstance(found["software"], dict):
            raise TypeError("facts and software are no objects")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({error}): delete the folder, or name another --out"
        ) from error
    return dict(found)


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What two requests do not have in common, in words; empty where they are the same."""
    for part in ("facts", "software"):
        for name in sorted(before[part].keys() | now[part].keys()):
            there, here = before[part].get(name), now[part].get(name)
            if there != here:
                return f"its {name} is {json.dumps(there)} there and {json.dumps(here)} here"
    return ""


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    # ASCII: whatever half characters captions hold, it is JSON
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
