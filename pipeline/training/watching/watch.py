"""A run's own eyes: signals that ask it to leave, updates that do not come, parents that are gone.

A scheduler that takes a machine back sends SIGTERM or SIGUSR1: the run saves and leaves with code
``LEFT``. An update that takes longer than ``patience`` is a hang: every rank writes the stacks of
its threads and ends. And a rank whose launcher was killed ends too, for the launcher cannot end it.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.console import logger

LEFT = 75  # EX_TEMPFAIL of sysexits.h: start it again and it goes on
HUNG = 70  # EX_SOFTWARE
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POLL_S = 1.0
# after the sentence of a thread that needs the interpreter's lock, which a hang may hold
LAST_WORD_S = 30.0

log = logger("train")


class Watch:
    """``with Watch(out, rank, patience) as watch``, and ``watch.beat()`` with every update.

    Args:
        out: of the run; stacks are written into ``out/stacks``.
        rank: of this process.
        patience: seconds that an update may take, validation and saving beside; 0 waits for ever.
    """

    def __init__(self, out: Path, rank: int, patience: float) -> None:
        self.out, self.rank, self.patience = out, rank, patience
        self.asked: str | None = None  # the signal that asked this rank to leave
        self._beat = time.monotonic()
        self._over = threading.Event()
        self._handlers: dict[int, Any] = {}
        self._elders = _elders()
        self._file: Any = None

    def __enter__(self) -> "Watch":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._handlers[number] = signal.signal(number, self._ask)
        if self.patience:
            folder = self.out / "stacks"
            folder.mkdir(parents=True, exist_ok=True)
            # behind those of a hang before
            self._file = open(folder / f"rank-{self.rank:05d}.txt", "a")
        self.beat()
        threading.Thread(target=self._look, name="watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._file is not None:
            self._file.close()
            path = Path(self._file.name)
            if path.stat().st_size == 0:
                path.unlink()
                with contextlib.suppress(OSError):  # another rank has something to say
                    path.parent.rmdir()

    def beat(self) -> None:
        """An update is done, or something else that takes long."""
        self._beat = time.monotonic()
        if self._file is not None:
            seconds = self.patience + LAST_WORD_S
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name

    def _look(self) -> None:
        while not self._over.wait(POLL_S):
            if _elders() != self._elders:
                self._leave("its launcher is gone", HUNG)
            if self.patience and time.monotonic() - self._beat > self.patience:
                faulthandler.dump_traceback(file=self._file)
                self._leave(
                    f"no update for {self.patience:g} s, so it hangs: the stacks of its threads "
                    f"are in {self._file.name}; the last checkpoint is kept, start it again",
                    HUNG,
                )

    def _leave(self, why: str, code: int) -> None:
        sys.stderr.write(f"error: rank {self.rank} ends: {why}\n")
        sys.stderr.flush()
        os._exit(code)


def _elders() -> tuple[int, ...]:
    """The launcher of this rank, and the one that started that; no other ancestors.

    The inner half of the deepspeed launcher outlives the outer one, so both are looked at.
    """
    parent = os.getppid()
    if "deepspeed.launcher.launch" not in _command(parent):
        # torchrun, srun and the like: whoever started those may leave
        return (parent,) if "RANK" in os.environ else ()
    return parent, _parent(parent)


def _command(pid: int) -> str:
    try:
        return (
            Path(f"/proc/{pid}/cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode("utf-8", "replace")
        )
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        # the name of the program stands in parentheses, and may hold any
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
