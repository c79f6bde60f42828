"""The processes of a launch: joining them under DeepSpeed's launcher, and leaving them."""

import datetime
import logging
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

from pipeline.console import InputError

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


def join() -> Any:
    """Import DeepSpeed and join its launcher's process group."""
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
        local = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    deepspeed.init_distributed(timeout=COLLECTIVE_TIMEOUT)
    return deepspeed


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
