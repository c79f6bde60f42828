"""Every shard is made once, whoever makes it, and who dies says so."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from data_prep import engines
from data_prep.engines import Launch, launch_of, run, wait, workers_of
from pipeline.console import InputError, OwnError


def square(folder: Path, k: int) -> int:
    """A file named after the shard, written once more by each call."""
    with open(folder / str(k), "a") as file:
        file.write(f"{os.getpid()}\n")
    return k * k


def refuse(k: int) -> int:
    raise InputError(f"shard {k} will not do")


def die_at_three(folder: Path, k: int) -> int:
    if k == 3 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(folder, k)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_each_shard_once(tmp_path, workers):
    found = dict(run(partial(square, tmp_path), range(7), engine="local", workers=workers))
    assert found == {k: k * k for k in range(7)}
    lines = [(tmp_path / str(k)).read_text().split() for k in range(7)]
    assert [len(line) for line in lines] == [1] * 7
    assert (str(os.getpid()) in {pid for line in lines for pid in line}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_what_a_task_says_is_what_the_job_says(workers):
    with pytest.raises(InputError, match="will not do"):
        list(run(refuse, range(3), engine="local", workers=workers))


@pytest.mark.dist
def test_a_killed_worker_is_a_sentence_and_a_second_run_goes_on(tmp_path):
    task = partial(die_at_three, tmp_path)
    with pytest.raises(InputError, match="one of 2 worker processes was killed"):
        list(run(task, range(6), engine="local", workers=2))
    left = [k for k in range(6) if not (tmp_path / str(k)).exists()]
    assert 3 in left
    assert dict(run(task, left, engine="local", workers=2)) == {k: k * k for k in left}


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(tmp_path, number):
    script = (
        "import sys, time\n"
        "from data_prep.engines import run\n"
        "from tests.data_prep.test_engines import note_and_sleep\n"
        "from functools import partial\n"
        "from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    task = partial(note_and_sleep, Path(sys.argv[1]))\n"
        "    list(run(task, range(2), engine='local', workers=2))\n"
    )
    (tmp_path / "job.py").write_text(script)
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path)]
    # who started the tests in the background has the signal of the keyboard ignored
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = os.environ | {"PYTHONPATH": str(root)}
    job = subprocess.Popen(command, cwd=root, env=environment, preexec_fn=heard)  # noqa: PLW1509
    pids = _wait_for(lambda: [int(p.name[4:]) for p in tmp_path.glob("pid-*")], 2)
    job.send_signal(number)
    # what the workers are at would take ten minutes
    job.wait(timeout=30)
    _wait_for(lambda: [pid for pid in pids if not _is_alive(pid)], 2)


def note_and_sleep(folder: Path, k: int) -> int:
    (folder / f"pid-{os.getpid()}").touch()
    time.sleep(600)
    return k


def _wait_for(found, n: int) -> list:
    end = time.monotonic() + 60
    while len(found()) < n:
        assert time.monotonic() < end, f"waited for {n}, there are {found()}"
        time.sleep(0.1)
    return found()


def _is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_the_shards(world):
    shares = [Launch(rank, world).share(range(20)) for rank in range(world)]
    assert sorted(k for share in shares for k in share) == list(range(20))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, Launch(0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Launch(3, 8)),
        # within a step of srun, and in the batch script around it
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, Launch(2, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Launch(0, 1)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_MIN": "5",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            Launch(2, 4),
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "20",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "10",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            Launch(5, 6),
        ),
        # the launcher inside an array knows better
        (
            {"RANK": "1", "WORLD_SIZE": "2", "SLURM_ARRAY_TASK_ID": "9"},
            Launch(1, 2),
        ),
    ],
)
def test_what_launchers_say(environment, launch):
    assert launch_of(environment) == launch


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "one", "WORLD_SIZE": "2"}],
)
def test_a_launcher_that_contradicts_itself(environment):
    with pytest.raises(InputError, match=r"start it again|no number"):
        launch_of(environment)


def test_what_one_rank_meets_that_rank_says():
    with pytest.raises(OwnError, match="shard 1 will not do"):
        list(run(refuse, [1], engine="local", workers=1))
    with pytest.raises(OwnError, match="set both, or neither"):
        launch_of({"RANK": "1"})
    array = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
    with pytest.raises(OwnError, match=r"rank 6 of 3: give the array a range, such as --array=0-7"):
        launch_of(array | {"SLURM_ARRAY_TASK_ID": "7"})


def test_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert workers_of(None, 100) == 8
    assert workers_of(None, 3) == 3
    assert workers_of(None, 0) == 1
    assert workers_of(20, 100) == 20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers_of(None, 100) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    assert workers_of(None, 100) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    with pytest.raises(InputError, match="LOCAL_WORLD_SIZE='two', which is no number"):
        workers_of(None, 100)
    for asked in (0, -1, 2000):
        with pytest.raises(InputError, match=r"outside 1\.\.1024"):
            workers_of(asked, 10)


def test_waiting_ends_with_the_others(monkeypatch):
    monkeypatch.setattr(engines, "POLL", 0.001)
    counts = iter([0, 1, 1, 3])
    wait(lambda: next(counts), 3, "shards")
    assert next(counts, None) is None


def test_waiting_for_the_dead_ends_in_a_sentence(monkeypatch):
    monkeypatch.setattr(engines, "POLL", 0.001)
    with pytest.raises(InputError, match="2 of 3 shards, and for 0 s no other rank has added one"):
        wait(lambda: 2, 3, "shards", patience=0.01)


def test_ray_that_is_not_installed_is_a_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -r requirements-ray\.txt"):
        list(run(refuse, [0], engine="ray", workers=1))


@pytest.mark.ray
def test_ray_makes_each_shard_and_survives_a_killed_worker(tmp_path):
    task = partial(die_at_three, tmp_path)
    assert dict(run(task, range(6), engine="ray", workers=1)) == {k: k * k for k in range(6)}
    assert (tmp_path / "died").exists()
    with pytest.raises(InputError, match="shard 0 will not do"):
        list(run(refuse, [0], engine="ray", workers=1))
