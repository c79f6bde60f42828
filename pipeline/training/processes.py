"""The processes of a launch: joining them under DeepSpeed's launcher, and leaving them."""

import datetime
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from pipeline.console import SECONDS_TO_SPEAK, InputError, OwnError
from pipeline.environment import environment

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
LOST = 69  # EX_UNAVAILABLE of sysexits.h: another rank is gone
TOLD = 5  # differences between ranks that are named


class LostError(OwnError):
    """Another rank is gone: each rank that notices says so, for it may be alone on its node."""

    code = LOST


def join(settings: dict[str, Any]) -> Any:
    """Import DeepSpeed and join its launcher's process group.

    Args:
        settings: JSON values that all ranks must have alike, as they must versions and code.

    Raises:
        InputError: there is no launcher, its port is taken, or the ranks differ.
    """
    try:
        import deepspeed
        import deepspeed.ops
        from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise InputError(
            f"--deepspeed_config needs DeepSpeed, which does not import here ({error}); install "
            "requirements.txt, or leave the flag out to train with plain PyTorch"
        ) from error
    if "RANK" not in os.environ:
        raise InputError(
            "--deepspeed_config is for the deepspeed launcher: start this as "
            "`deepspeed --module pipeline.train_...`, or leave the flag out for plain PyTorch"
        )
    _quieten()
    if get_accelerator().device_name() == "cpu":
        # a C++ extension that only inference uses; building it takes a minute and a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            local = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    else:
        # DeepSpeed does so with the first parameter, and until then all ranks use the first GPU
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        deepspeed.init_distributed(timeout=COLLECTIVE_TIMEOUT)
    except dist.DistError as error:
        raise InputError(_why_not_joined(error)) from error
    agree({**environment(), **settings})
    return deepspeed


def _why_not_joined(error: dist.DistError) -> str:
    host, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if "EADDRINUSE" in str(error):
        return (
            f"port {port} of {host} is taken, by another run perhaps: give the launcher another "
            "one, --master_port N, the same on all nodes"
        )
    return (
        f"the ranks did not find each other at {host}:{port} ({_shortly(error)}): does the first "
        "node run, and do --master_addr and --master_port name it on all nodes?"
    )


def agree(own: dict[str, Any]) -> None:
    """Make sure that all ranks have the same JSON values; all ranks call it, if there are several.

    Raises:
        InputError: they have not; the sentence says which rank has what.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, json.dumps(own, sort_keys=True))
    if sentence := disagreement([json.loads(text) for text in said]):
        raise InputError(sentence)


@contextmanager
def together() -> Iterator[None]:
    """What one rank cannot do ends all of them with its sentence; all ranks come by.

    Raises:
        InputError: of the first rank that raised one.
    """
    error = None
    try:
        yield
    except InputError as raised:
        error = raised
    if not (dist.is_available() and dist.is_initialized()):
        if error is not None:
            raise error
        return
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if error is None else str(error))
    for rank, sentence in enumerate(said):
        if sentence is not None:
            raise InputError(f"rank {rank}: {sentence}" if rank else sentence) from error


def disagreement(of_ranks: Sequence[dict[str, Any]]) -> str:
    """A sentence that names what differs and on which ranks; empty where nothing does.

    Args:
        of_ranks: JSON values of each rank.
    """
    flat = [dict(_leaves(values)) for values in of_ranks]
    names = dict.fromkeys(name for values in flat for name in values)
    told = []
    for name in names:
        ranks_of: dict[str, list[int]] = {}
        for rank, values in enumerate(flat):
            ranks_of.setdefault(str(values.get(name, "not there")), []).append(rank)
        if len(ranks_of) > 1:
            shares = [f"{value} on {_ranges(ranks)}" for value, ranks in ranks_of.items()]
            told.append(f"{name} is {', '.join(shares)}")
    if not told:
        return ""
    more = f"; and {len(told) - TOLD} more" if len(told) > TOLD else ""
    return (
        f"the ranks differ: {'; '.join(told[:TOLD])}{more}. Give all nodes the same packages, "
        "the same checkout and the same command line"
    )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}".lstrip("."))
    else:
        yield path, value


def _ranges(ranks: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as "ranks 0-2, 5"."""
    ends: list[list[int]] = []
    for rank in ranks:
        if ends and ends[-1][1] == rank - 1:
            ends[-1][1] = rank
        else:
            ends.append([rank, rank])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in ends]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(parts)


@contextmanager
def others() -> Iterator[None]:
    """What happens to this rank when another one is gone becomes a sentence.

    Raises:
        LostError: instead of what the communication library throws.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of its own, and names its source file
        if not (isinstance(error, dist.DistError) or "gloo/" in str(error)):
            raise
        # if one of this node's ranks ended, its code is the launcher's and its sentence is enough:
        # meanwhile the launcher ends this rank
        time.sleep(SECONDS_TO_SPEAK)
        raise LostError(
            f"rank {os.environ.get('RANK', '0')} has lost another rank ({_shortly(error)}), which "
            "may have said why: the last checkpoint is kept, start all nodes again"
        ) from error


def _shortly(error: Exception) -> str:
    """The first sentence of a library's, without the place in its source."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+\] ", "", line).split(". ")[0].rstrip(".")


def _quieten() -> None:
    """Leave out what DeepSpeed says of itself, and two warnings that no user can do a thing about.

    All other warnings are shown.
    """
    deepspeed_log = logging.getLogger("DeepSpeed")
    deepspeed_log.setLevel(logging.WARNING)
    # our AdamW, which zero_allow_untested_optimizer allows
    deepspeed_log.addFilter(lambda record: "with an untested optimizer" not in record.getMessage())
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 is about to rename
    warnings.filterwarnings(
        "ignore",
        message=r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",
        category=FutureWarning,
    )


def leave(code: int = 0) -> None:
    """Leave the process group and end the process with ``code``."""
    if not (dist.is_available() and dist.is_initialized()):
        if code:
            sys.exit(code)
        return
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # threads of gloo abort about one exit in six in the interpreter's teardown (pytorch #179291)
    os._exit(code)
