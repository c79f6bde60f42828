"""How commands speak: one logger, one progress bar, one way to fail.

Every entry point ends in ``if __name__ == "__main__": command(main)``. An ``InputError``, and a
file that the system will not open, make or fill, leave it as one sentence on standard error and
its exit code, 2; anything else is a bug of ours and keeps its traceback.
"""

import argparse
import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO, TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipeline.files import FULL

T = TypeVar("T")

SECONDS_TO_SPEAK = 3.0  # that the other ranks leave to the first one
WIDE = 150  # columns of a terminal that has room for a bar and many words
SECONDS_BETWEEN_LINES = 15.0  # of progress, where the output is a file and no terminal


class InputError(ValueError):
    """A caller, a config or a file is wrong; the message names value, bound and way out."""

    code = 2  # with which a command ends


class OwnError(InputError):
    """An ``InputError`` in what one rank alone reads: that rank says it, whichever it is."""


def is_first_rank() -> bool:
    """True in the one process of a launch that speaks for all of them."""
    return os.environ.get("RANK", "0") in ("", "0")


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what is standard error at the moment: a bar puts something in its place.

    Lines then come above the bar and not into it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def logger(name: str) -> logging.Logger:
    """A logger that says ``[name] 12:00:01 message`` on standard error, on rank 0 only."""
    log = logging.getLogger(f"daikon.{name}")
    if not log.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter(f"[{name}] %(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
        log.setLevel(logging.INFO if is_first_rank() else logging.ERROR)
    return log


def a_path(text: str) -> Path:
    """``type=`` of an argument that names a file or a folder.

    An empty one is refused: it is what a variable of the shell leaves when it is not set, and would
    mean the working directory.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; is a variable of the shell not set?")
    return Path(text)


def duration(seconds: float) -> str:
    """In two units: "40 s", "1h05m", "3d11h"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days}d{hours_left:02d}h"
    if hours:
        return f"{hours}h{minutes_left:02d}m"
    return f"{minutes}m{s:02d}s" if minutes else f"{s} s"


class _Left(TimeRemainingColumn):
    """The time left, as whoever advances the bar estimates it; else rich's own estimate."""

    def render(self, task: Task) -> Text:
        left_s = task.fields["left_s"]
        if left_s is None:
            return super().render(task)
        return Text(duration(left_s), style="progress.remaining", no_wrap=True)


class Bar:
    """A progress bar on a terminal, a line now and then elsewhere, nothing on other ranks.

    Args:
        what: is counted.
        total: of them.
        done: before.
        says_much: beside the bar: on a narrow terminal the words take its place.
    """

    def __init__(self, what: str, total: int, done: int = 0, *, says_much: bool = False) -> None:
        self.what, self.total, self.done, self.note = what, total, done, ""
        self.left_s: float | None = None
        self._log = logger("progress")
        self._start = self._spoke = time.monotonic()
        self._first = done
        self._rich: Progress | None = None
        if is_first_rank() and sys.stderr.isatty():
            from rich.console import Console

            console = Console(stderr=True)
            is_narrow = says_much and console.width < WIDE
            drawn = () if is_narrow else (BarColumn(), TimeElapsedColumn())
            self._rich = Progress(
                TextColumn("{task.description}"),
                MofNCompleteColumn(),
                *drawn,
                _Left(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._rich.add_task(
                what, total=total, completed=done, note="", left_s=None
            )
            self._rich.start()

    def advance(self, n: int = 1, note: str = "", left_s: float | None = None) -> None:
        """Count ``n`` more as done and show ``note`` beside the bar.

        Args:
            n: done.
            note: what else there is to say.
            left_s: seconds to the end; None for the mean speed since the start.
        """
        self.done += n
        self.note, self.left_s = note, left_s
        if self._rich is not None:
            self._rich.update(self._task, completed=self.done, note=note, left_s=left_s)
        elif time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES:
            self._say()

    def _say(self) -> None:
        self._spoke = time.monotonic()
        elapsed = self._spoke - self._start
        rate = (self.done - self._first) / max(elapsed, 1e-9)
        left_s = self.left_s
        if left_s is None and rate > 0:
            left_s = (self.total - self.done) / rate
        left = "" if left_s is None else f", {duration(left_s)} left"
        self._log.info(
            "%s %d/%d, %.0f s%s  %s", self.what, self.done, self.total, elapsed, left, self.note
        )

    def close(self) -> None:
        """Take the bar off the screen and leave its last line."""
        if self._rich is not None:
            self._rich.stop()
        else:
            self._say()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Iterate over ``items`` with a ``Bar``."""
    with Bar(what, total) as bar:
        for item in items:
            yield item
            bar.advance()


def command(main: Callable[[], None]) -> None:
    """Run an entry point: what is wrong with its input becomes a sentence and exit code 2."""
    # which path attention takes is said down there
    logger("kernels")
    try:
        main()
    except InputError as error:
        if _speaks() or isinstance(error, OwnError):
            _say(str(error))
        else:
            # the launcher ends all ranks with the first that leaves: let the one that speaks be it
            time.sleep(SECONDS_TO_SPEAK)
        _end(error.code)
    except OSError as error:
        is_full = error.errno in FULL
        if error.filename is None and not is_full:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        way_out = "name a path that can be used"
        if is_full:
            need = "raise ulimit -f" if error.errno == errno.EFBIG else "make room"
            way_out = f"{need} and start again: what is committed stays"
        # libraries put words of their own around the system's
        said = os.strerror(error.errno) if is_full and error.errno else error.strerror
        _say(f"{where}{said}; {way_out}")
        _end(2)
    except KeyboardInterrupt:
        sys.stderr.write("stopped by the keyboard\n")
        _end(130)


def _speaks() -> bool:
    """The first rank for all; before they have joined the first one of each node for its node."""
    dist = sys.modules.get("torch.distributed")
    has_joined = dist is not None and dist.is_available() and dist.is_initialized()
    return is_first_rank() or (not has_joined and os.environ.get("LOCAL_RANK") == "0")


def printable(text: str) -> str:
    """One line, whatever the names in it hold: nothing that moves a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _say(sentence: str) -> None:
    sys.stderr.write(f"error: {printable(sentence)}\n")


def _end(code: int) -> None:
    """Exit; under a launcher at once, for gloo aborts in the teardown (``engine.leave``)."""
    if "RANK" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
