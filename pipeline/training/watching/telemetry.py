"""What a run tells: metrics.jsonl, TensorBoard, the log and the bar."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.console import Bar, logger
from pipeline.files import write_bytes
from pipeline.training.watching.pace import Pace, said
from pipeline.training.watching.wandb_board import WandbBoard

# where validations put their pictures
PICTURES = ("reconstructions", "samples")


class Telemetry:
    """Writes the figures of rank 0; silent elsewhere.

    ``metrics.jsonl`` has a line an event: ``kind`` is "train", "val", "speed", "blocks" or
    "machine", ``step`` the updates made, and ``time_s`` the seconds of this process. What hangs on
    the clock or the machine stands in "speed" and "machine" alone: the others are the same in
    every run. Lines past a resumed step are taken back, so the curve is one.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        steps: int,
        done: int,
        speaks: bool,
        pace: Pace,
        wandb: WandbBoard | None = None,
    ) -> None:
        self._speaks, self.pace = speaks, pace
        self._log = logger(name)
        if not speaks:
            return
        self._start = time.monotonic()
        self._out, self._name, self._steps, self._wandb = out, name, steps, wandb
        self._open(done)

    def _open(self, done: int) -> None:
        path = self._out / "metrics.jsonl"
        _cut(path, done)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - closed in close()
        # imported late: it takes a second, and only rank 0 needs it
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self._out / "tensorboard"), purge_step=done)
        self.bar = Bar(self._name, self._steps, done, says_much=True)

    def back_to(self, step: int) -> None:
        """Take back what was told of the updates after ``step``."""
        self.pace.restart(step)
        if self._speaks:
            self._shut()
            self._open(step)

    def figures(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Record ``values`` of update ``step``."""
        if not self._speaks:
            return
        event: dict[str, Any] = {"kind": kind, "step": step}
        event |= {name: float(f"{value:.8g}") for name, value in values.items()}
        event["time_s"] = round(time.monotonic() - self._start, 3)
        self._file.write(json.dumps(event) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.figures(kind, step, values)
        if kind == "val":
            self._log.info("step=%d validation %s", step, _line(values))

    def pictures(self, step: int) -> None:
        """Show the pictures that a validation left in the run's folder."""
        if not self._speaks:
            return
        for folder in PICTURES:
            path = self._out / folder / f"step-{step:07d}.png"
            if path.exists():
                with Image.open(path) as image:
                    self._board.add_image(folder, np.asarray(image), step, dataformats="HWC")
                if self._wandb is not None:
                    self._wandb.picture(folder, step, path)

    def update(self, step: int, values: dict[str, float] | None) -> None:
        """Update ``step`` is done; its ``values`` when they were due."""
        if not self._speaks:
            return
        if values is None:
            self.bar.advance(1, self.bar.note, self.bar.left_s)
            return
        speed = self.pace.lap(step)
        self.figures("train", step, values)
        self.figures("speed", step, speed)
        self.bar.advance(1, said(values, speed), self.pace.left_s)

    def close(self) -> None:
        """Flush and close everything."""
        if not self._speaks:
            return
        self._shut()
        if self._wandb is not None:
            self._wandb.close()

    def _shut(self) -> None:
        self.bar.close()
        self._file.close()
        self._board.close()


def _line(values: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in values.items())


def _cut(path: Path, done: int) -> None:
    """Drop the lines of updates after ``done``, and a half-written last one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    write_bytes(path, "".join(kept).encode())
