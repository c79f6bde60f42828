"""The 12B model itself, as one rank of a cluster: what the plan counts is what DeepSpeed makes.

Run as ``python -m tests.end_to_end.test_12b FILE WORLD`` this is that rank. Its peers are a process
group that does nothing, its weights are whatever the memory held: nothing here reads a value.
"""

import json
import os
import resource
import sys
import time

import pytest

from pipeline import presets
from pipeline.training.engines import ds_config
from pipeline.training.planning.memory import estimate
from tests.tiny import ROOT, start

pytestmark = pytest.mark.slow

PRESET = "dalle_12b"
MOST_RSS_GIB = 8


def a_rank_of(world: int, file: str) -> dict:
    """Build the engine as rank 0 of ``world``, make one update; sizes of what it holds."""
    here = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world, "LOCAL_SIZE": 2}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29400, "DS_ACCELERATOR": "cpu"}
    os.environ.update({name: str(value) for name, value in (here | where).items()})
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pipeline.models.dalle import Dalle
    from pipeline.training.engines.engine import STATE_KEYS
    from pipeline.training.engines.zero import ZeroEngine

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    # a CPU has no float16 matrices, which nothing here multiplies
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    # 12e9 random numbers would take minutes
    torch.Tensor.normal_ = lambda self, *args, **kwargs: self

    run, ds = presets.load(PRESET), ds_config.read(ROOT / "ds_configs" / file)
    ds["train_micro_batch_size_per_gpu"] = 1
    stored = "float16" if "fp16" in ds else "bfloat16"

    def build() -> Dalle:
        # else zero.Init would convert, and so touch, 49 GB
        torch.set_default_dtype(getattr(torch, stored))
        model = Dalle(run.model)
        torch.set_default_dtype(torch.float32)
        return model

    started = time.monotonic()
    engine = ZeroEngine(build, run, ds)
    zero = engine._engine.optimizer
    built_s = time.monotonic() - started
    # the update drops them
    shared = [p.ds_secondary_tensor for p in engine.module.parameters()]
    shared_bytes = sum(t.nbytes for t in shared if t is not None)
    del shared
    # as if a backward pass had left them
    partitions = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    zero.grad_partitions_flat_buffer.fill_(1e-6)
    gradients = {i: [partitions[p.ds_id] for p in g] for i, g in enumerate(zero.fp16_groups)}
    zero.averaged_gradients = gradients
    copies = []
    prepare = zero._prepare_sub_group

    def counted(*args):
        prepare(*args)
        copies.append(zero.fp32_partitioned_groups_flat[args[0]].grad.nbytes)

    zero._prepare_sub_group = counted
    zero.step()
    state = engine._optimizer.state
    flats = zero.fp32_partitioned_groups_flat
    names = {key: [state[flat][key] for flat in flats] for key in STATE_KEYS}
    tensors = {
        "parameters": [zero.lp_param_buffer],
        "float32 masters": flats,
        "gradient buffer": [zero.grad_partitions_flat_buffer],
        "moments": names["exp_avg"] + names["exp_avg_sq"],
        "average of the weights": names["ema"],
        "gradients of the masters": [f.grad for f in flats if f.grad is not None],
        "small parameters, kept whole": [p.data for p in zero.persistent_parameters],
        "reduce bucket": [bucket.buffer for bucket in zero.ipg_buckets.values()],
    }
    return {
        "elements": sum(p.ds_tensor.numel() for p in engine.module.parameters()),
        "total": sum(p.ds_numel for p in engine.module.parameters()),
        "bytes": {
            **{name: sum(t.nbytes for t in held) for name, held in tensors.items()},
            "copy shared in the node": shared_bytes,
        },
        "largest copy": max(copies),
        "sub_groups": len(flats),
        "persistent": len(zero.persistent_parameters),
        "rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "built_s": built_s,
        "all_s": time.monotonic() - started,
    }


# every file for the 12B model, with worlds that it is made for
CLUSTERS = [
    ("zero3_12b.json", 64),
    ("zero3_12b_v100_fp16.json", 1024),
    ("zero3_12b_offload.json", 64),
    ("zero3_slow_network.json", 1024),
]


@pytest.fixture(scope="module", params=CLUSTERS, ids=lambda case: f"{case[0]} on {case[1]}")
def case(request):
    """(what was counted, what DeepSpeed made)."""
    file, world = request.param
    command = [sys.executable, "-m", "tests.end_to_end.test_12b", file, world]
    done = start(command, timeout_s=600)
    assert done.returncode == 0, done.stderr[-2000:]
    ds = ds_config.read(ROOT / "ds_configs" / file)
    return estimate(presets.load(PRESET), ds, world, micro_batch=1), json.loads(
        done.stdout.splitlines()[-1]
    )


def test_shards_are_those_that_were_counted(case):
    counted, made = case
    assert made["total"] == counted.shards.total == 12_292_816_384
    assert made["elements"] == counted.shards.own
    assert made["bytes"] == {name: counted.of(name) for name in made["bytes"]}
    if counted.of("an update's copies"):
        # the gradients of a sub-group joined; as much again is the room below the variance's bound
        assert 2 * made["largest copy"] == counted.of("an update's copies")
    assert made["rss_gib"] < MOST_RSS_GIB


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(a_rank_of(int(sys.argv[2]), sys.argv[1])) + "\n")
    sys.stdout.flush()
    os._exit(0)
