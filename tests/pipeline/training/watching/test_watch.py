import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.training.watching import watch as watches
from pipeline.training.watching.watch import HUNG, Watch
from tests.tiny import ROOT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_and_does_not_end(tmp_path, number):
    before = signal.getsignal(number)
    with Watch(tmp_path, 0, 0) as watch:
        assert watch.asked is None
        os.kill(os.getpid(), number)
        assert watch.asked == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_a_run_that_beats_leaves_nothing_behind(tmp_path):
    with Watch(tmp_path, 3, 1.0) as watch:
        for _ in range(8):
            time.sleep(0.2)
            watch.beat()
        assert (tmp_path / "stacks/rank-00003.txt").exists()
    assert not (tmp_path / "stacks").exists()


def hung(tmp_path, work, patience, last_word=30.0):
    """A process whose one update is ``work``."""
    code = f"""
import re, time
from pathlib import Path
from pipeline.training.watching import watch
watch.POLL_S, watch.LAST_WORD_S = 0.1, {last_word}
with watch.Watch(Path({str(tmp_path)!r}), 2, {patience}):
    def the_update_that_hangs():
        {work}
    the_update_that_hangs()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    return done, (tmp_path / "stacks/rank-00002.txt").read_text()


def test_a_hang_ends_with_a_sentence_and_the_stacks_of_all_threads(tmp_path):
    done, stacks = hung(tmp_path, "time.sleep(50)", 0.5)
    assert done.returncode == HUNG
    assert done.stderr == (
        f"error: rank 2 ends: no update for 0.5 s, so it hangs: the stacks of its threads are in "
        f"{tmp_path}/stacks/rank-00002.txt; the last checkpoint is kept, start it again\n"
    )
    assert "in the_update_that_hangs" in stacks
    assert stacks.count("hread 0x") == 2


def test_a_hang_that_keeps_the_interpreters_lock_ends_too(tmp_path):
    done, stacks = hung(tmp_path, "re.match('(a+)+$', 'a' * 60 + 'b')", 0.3, last_word=0.7)
    assert done.returncode == 1
    assert "in the_update_that_hangs" in stacks


def test_a_rank_ends_when_its_launcher_is_gone(tmp_path):
    rank = f"""
import time
from pathlib import Path
from pipeline.training.watching import watch
watch.POLL_S = 0.1
with watch.Watch(Path({str(tmp_path)!r}), 1, 0):
    Path({str(tmp_path / "ready")!r}).touch()
    time.sleep(50)
"""
    launcher = f"""
import subprocess, sys
with open({str(tmp_path / "said")!r}, "w") as said:
    rank = subprocess.Popen([sys.executable, "-c", {rank!r}], stderr=said)
print(rank.pid, flush=True)
rank.wait()
"""
    environment = os.environ | {"RANK": "1"}
    started = subprocess.Popen(
        [sys.executable, "-c", launcher], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    pid = int(started.stdout.readline())
    _until((tmp_path / "ready").exists)
    started.kill()
    started.wait()
    started.stdout.close()
    _until(lambda: not os.path.exists(f"/proc/{pid}"))
    assert (tmp_path / "said").read_text() == "error: rank 1 ends: its launcher is gone\n"


def _until(holds):
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_only_launchers_that_must_outlive_their_ranks_are_watched(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert watches._elders() == ()
    monkeypatch.setenv("RANK", "0")
    assert watches._elders() == (os.getppid(),)
    monkeypatch.setattr(watches, "_command", lambda pid: "python -m deepspeed.launcher.launch x")
    assert watches._elders() == (os.getppid(), watches._parent(os.getppid()))
    assert watches._parent(os.getpid()) == os.getppid()
    assert watches._parent(10**9) == 0
