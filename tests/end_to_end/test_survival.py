"""What the launcher leaves undone: ranks that are asked to leave, and ranks that it left behind."""

import os
import signal

import pytest

from pipeline import slices
from pipeline.training.watching.watch import LEFT
from tests import tiny as runs
from tests.end_to_end.launches import LAUNCHER, has_made, launch, processes, until
from tests.end_to_end.test_training import CPU_CONFIG, assert_same_bits
from tests.tiny import arguments, free_port, launched

pytestmark = pytest.mark.dist


def test_one_rank_that_is_asked_to_leave_takes_all_along_and_the_run_goes_on(tiny, tmp_path):
    outs = {name: tmp_path / name for name in ("asked", "calm")}
    options = arguments("dalle", tiny, outs["asked"], "dalle_asked_to_leave")
    left = launched("dalle", 2, CPU_CONFIG, *options)
    assert left.returncode == LEFT, left.stderr
    assert "update 7 of 20 is saved; start again to go on" in left.stderr
    assert slices.complete(outs["asked"])[-1].name == "step-0000007"
    for out in outs.values():
        done = launched("dalle", 2, CPU_CONFIG, *arguments("dalle", tiny, out, "dalle"))
        assert done.returncode == 0, done.stderr
    assert_same_bits(*outs.values())


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_ranks_end_with_a_launcher_that_was_killed(tiny, tmp_path, which):
    out = tmp_path / "run-of-this-test-alone"
    options = arguments("dalle", tiny, out, "dalle_slow")
    options += ["--deepspeed_config", CPU_CONFIG]
    places = ["--num_gpus", 2, "--master_port", free_port(), "--module", "pipeline.train_dalle"]
    started = launch(tmp_path / "said", LAUNCHER, *places, *options)
    try:
        until(lambda: has_made(out, 3))
        # the outer half of the launcher, the inner one and two ranks
        assert len(processes(out)) == 4
        inner = [pid for pid in processes("deepspeed.launcher.launch") if pid in processes(out)]
        os.kill(started.process.pid if which == "outer" else inner[0], signal.SIGKILL)
        # of the inner one the outer is a witness, and says nothing: its exit code is 0
        until(lambda: len(processes(out)) <= (1 if which == "outer" else 0), 30)
        assert "ends: its launcher is gone" in started.said
    finally:
        for pid in processes(out):
            os.kill(pid, signal.SIGKILL)
        started.process.wait()
    assert slices.newest(out) is None or slices.newest(out)[1]["updates"] % runs.SAVE_EVERY == 0
