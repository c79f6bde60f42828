"""Where shards are made: this process, processes beside it, ranks of a launcher, or a Ray cluster.

A job is a pure function of a shard number whose result lies on disk, so no engine keeps books: a
shard is done when its file is there, and whoever comes next skips it. Any number of workers may
stop at any moment, and any other number may go on; a shard that two of them make comes out the
same twice.
"""

import importlib
import importlib.util
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

from pipeline.console import InputError, OwnError, logger

T = TypeVar("T")

ENGINES = ("local", "ray")
MAX_WORKERS = 1024
RETRIES = 8  # of a Ray task whose worker died
PATIENCE = 1800.0  # seconds without news from the other ranks
POLL = 0.5  # seconds

log = logger("engine")


@dataclass(frozen=True)
class Launch:
    """Which of how many processes of a launcher this is; they need not know each other."""

    rank: int = 0
    world: int = 1

    def share(self, shards: Sequence[int]) -> list[int]:
        """The shards of this rank."""
        return [k for k in shards if k % self.world == self.rank]


def launch_of(environment: dict[str, str]) -> Launch:
    """Rank and world as deepspeed, torchrun, srun or a Slurm array tell them.

    Raises:
        InputError: numbers that are none, or a rank outside its world.
    """
    # a batch script has SLURM_PROCID too; only a step of srun has the number of its tasks
    names = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    rank, world = 0, 1
    for rank_name, world_name in names:
        if rank_name in environment and world_name in environment:
            rank = _number(environment, rank_name)
            world = _number(environment, world_name)
            break
    if "SLURM_ARRAY_TASK_ID" in environment and "RANK" not in environment:
        first = _number(environment, "SLURM_ARRAY_TASK_MIN")
        step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1)
        task = (_number(environment, "SLURM_ARRAY_TASK_ID") - first) // max(step, 1)
        rank, world = task * world + rank, world * _number(environment, "SLURM_ARRAY_TASK_COUNT")
    if ("RANK" in environment) != ("WORLD_SIZE" in environment):
        raise OwnError("of RANK and WORLD_SIZE the environment has one: set both, or neither")
    if not 0 <= rank < world:
        way_out = "start it again"
        if "SLURM_ARRAY_TASK_ID" in environment:
            way_out = "give the array a range, such as --array=0-7"
        raise OwnError(f"the launcher says rank {rank} of {world}: {way_out}")
    return Launch(rank, world)


def _number(environment: dict[str, str], name: str, default: int = 0) -> int:
    text = environment.get(name, str(default))
    if re.fullmatch(r"-?[0-9]+", text) is None:
        raise OwnError(f"the environment says {name}={text!r}, which is no number")
    return int(text)


def workers_of(asked: int | None, n_shards: int) -> int:
    """Processes to start: what was asked for, else one a core, and none without a shard.

    Raises:
        InputError: asked for less than one or more than ``MAX_WORKERS``.
    """
    if asked is not None and not 1 <= asked <= MAX_WORKERS:
        raise InputError(f"--workers {asked} is outside 1..{MAX_WORKERS}")
    return max(1, min(cores() if asked is None else asked, n_shards))


def cores() -> int:
    """Cores that this rank may take of its machine, at least 1."""
    ranks = max(1, _number(dict(os.environ), "LOCAL_WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def run(
    task: Callable[[int], T], shards: Sequence[int], *, engine: str, workers: int, gpus: int = 0
) -> Iterator[tuple[int, T]]:
    """Call ``task(k)`` for every shard; yields (k, its result) in the order in which they end.

    Args:
        task: picklable, and so is its result; pure but for the files that it writes.
        shards: numbers of this rank's shards that are not done.
        engine: one of ``ENGINES``.
        workers: processes on this machine; with 1 the task runs in this one. Ray has its own count.
        gpus: that a Ray task takes, where the cluster has any.

    Raises:
        OwnError: a worker was killed, the engine is not installed, or what a task raises.
    """
    try:
        if engine == "ray":
            yield from _on_ray(task, shards, gpus)
        elif workers == 1:
            for k in shards:
                yield k, task(k)
        else:
            yield from _beside(task, shards, workers)
    except InputError as error:  # other ranks read other shards: whoever meets it says it
        raise OwnError(str(error)) from error


def _beside(
    task: Callable[[int], T], shards: Sequence[int], workers: int
) -> Iterator[tuple[int, T]]:
    """In processes of this machine, which end with this one."""
    context = get_context("spawn")  # a fork would copy threads' locks and open files
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with, initargs=(os.getpid(),))
    is_done = False
    try:
        futures = {pool.submit(task, k): k for k in shards}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
        is_done = True
    except BrokenProcessPool as error:
        raise InputError(
            f"one of {workers} worker processes was killed or left; was there enough memory? "
            "What is committed stays: start again, with fewer --workers if it was not"
        ) from error
    finally:
        if not is_done:  # nobody takes what they are at, and it may be long
            for process in active_children():
                process.kill()
        pool.shutdown(wait=is_done, cancel_futures=True)


def _end_with(parent: int) -> None:
    """Leave when the process that started this one is gone: nobody would take the results."""
    # the one that started this says what the keyboard did
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _on_ray(task: Callable[[int], T], shards: Sequence[int], gpus: int) -> Iterator[tuple[int, T]]:
    """As tasks of a Ray cluster: the one at RAY_ADDRESS, else one that is started here."""
    if importlib.util.find_spec("ray") is None:
        raise InputError("--engine ray needs Ray: pip install -r requirements-ray.txt")
    ray: Any = importlib.import_module("ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="error")
    options: dict[str, Any] = {"max_retries": RETRIES, "num_cpus": 1}
    if gpus and ray.cluster_resources().get("GPU"):
        options["num_gpus"] = gpus
    remote = ray.remote(**options)(_called)
    try:
        shared = ray.put(task)
        running = {remote.remote(shared, k): k for k in shards}
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                k = running.pop(reference)
                yield k, _result(ray, reference, k)
    finally:
        ray.shutdown()


def _called(task: Callable[[int], T], k: int) -> T:
    return task(k)


def _result(ray: Any, reference: Any, k: int) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from error
        raise
    except ray.exceptions.RayError as error:
        raise InputError(
            f"Ray gave up shard {k} after {RETRIES} tries ({type(error).__name__}): what is "
            "committed stays; start again"
        ) from error


def wait(count: Callable[[], int], total: int, what: str, patience: float = PATIENCE) -> None:
    """Return when ``count()``, which other ranks raise, has reached ``total``.

    Raises:
        InputError: nothing has moved for ``patience`` seconds.
    """
    done, since = count(), time.monotonic()
    if done < total:
        log.info("waiting for other ranks: %d of %d %s", done, total, what)
    while done < total:
        time.sleep(POLL)
        now = count()
        if now > done:
            done, since = now, time.monotonic()
        elif time.monotonic() - since > patience:
            raise InputError(
                f"{done} of {total} {what}, and for {patience:.0f} s no other rank has added one: "
                "have they ended? What is done stays: start all of them again"
            )
