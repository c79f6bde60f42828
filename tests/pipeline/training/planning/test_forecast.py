"""Run as ``python -m tests.pipeline.training.planning.test_forecast FILE`` this is rank 0 of 16.

Its peers are a process group that does nothing; it tells what it would have sent them.
"""

import collections
import dataclasses
import json
import os
import sys

import pytest
from safetensors.torch import load_file

from pipeline import presets
from pipeline.config import DalleConfig
from pipeline.console import InputError
from pipeline.training.engines import ds_config
from pipeline.training.planning.forecast import Machine, make_plan
from pipeline.training.planning.memory import GIB
from tests import tiny as runs
from tests.tiny import ROOT, arguments, launched, start

WORLD, ACCUMULATION, UPDATES = 16, 2, 3
# a block is less than what may be live and what prefetching reaches, as in the 12B model
SCALED = {
    "stage3_max_live_parameters": 80_000, "stage3_max_reuse_distance": 80_000,
    "stage3_prefetch_bucket_size": 13_000, "stage3_param_persistence_threshold": 0,
    "reduce_bucket_size": 100_000,
}  # fmt: skip


def small(n_layer=16):
    model = DalleConfig(
        n_layer=n_layer, d_model=64, n_head=2, n_text=16, n_text_vocab=64, grid=4,
        n_image_vocab=48, conv_kernel=3,
    )  # fmt: skip
    run = presets.dalle_12b()
    return dataclasses.replace(run, model=model, batch=2 * WORLD * ACCUMULATION)


def file(name, **zero):
    ds = json.loads((ROOT / "ds_configs" / name).read_text())
    return ds | {"zero_optimization": ds["zero_optimization"] | zero}


def small_file(name):
    """Of ``file``, what a small model takes."""
    if name == "zero2_small.json":
        return file(name, reduce_bucket_size=100_000) | {"train_micro_batch_size_per_gpu": 2}
    ds = file(name, **SCALED) | {"train_micro_batch_size_per_gpu": 2}
    if "hybrid_sharding" in ds:
        ds["hybrid_sharding"] = {"gpus_per_node": 8, "powersgd_rank": 16}
    return ds


def traffic_of_rank_0(name: str) -> dict:
    """Bytes of all collectives of the last update, by kind and size of their group; states."""
    here = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": WORLD, "LOCAL_SIZE": 8}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29400, "DS_ACCELERATOR": "cpu"}
    os.environ.update({key: str(value) for key, value in (here | where).items()})
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    from deepspeed.comm.torch import TorchBackend

    from pipeline.models.dalle import Dalle
    from pipeline.training.engines.nodes import Exchange
    from pipeline.training.engines.zero import ZeroEngine

    run = small()
    engine = ZeroEngine(lambda: Dalle(run.model), run, small_file(name))
    engine.module.set_compute_dtype(engine.compute_dtype)
    engine.module.checkpoint_activations = ds_config.uses_activation_checkpointing(small_file(name))
    sent = collections.Counter()

    def counted(kind):
        call = getattr(TorchBackend, kind)

        def wrapper(self, *args, **kwargs):
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            group = dist.get_world_size(kwargs.get("group"))
            sent[f"{kind} {group}"] += max(t.nbytes for t in tensors)
            return call(self, *args, **kwargs)

        setattr(TorchBackend, kind, wrapper)

    for kind in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast"):
        counted(kind)
    add = Exchange._add

    def added(self, tensors):
        sent[f"between nodes {self.nodes.count}"] += sum(t.nbytes for t in tensors)
        return add(self, tensors)

    Exchange._add = added
    zero, is_stage_2 = engine._engine.optimizer, name == "zero2_small.json"
    for _ in range(UPDATES):
        sent.clear()
        for _ in range(ACCUMULATION):
            text, image = torch.randint(0, 64, (2, 16)), torch.randint(0, 48, (2, 16))
            logits = engine.model(text, image)
            engine.backward(sum(x.logsumexp(-1).mean() for x in logits))
        # nothing was received
        if is_stage_2:
            gradients = [group.flat_partition for group in zero.averaged_gradients.values()]
            for gradient in gradients:
                gradient.normal_(std=1e-3)
        else:
            zero.grad_partitions_flat_buffer.normal_(std=1e-3)
        engine.update(1e-3)
    masters = engine._shards.flats()
    states = [s[key] for s in engine._optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    held = {
        "parameters": zero.bit16_groups_flat if is_stage_2 else [zero.lp_param_buffer],
        "float32 masters": masters,
        "gradient buffer": gradients if is_stage_2 else [zero.grad_partitions_flat_buffer],
        "moments": states,
    }
    if engine._exchange is not None:
        powersgd = engine._exchange.powersgd
        held["errors of PowerSGD"] = list(powersgd.error.values())
        held["projections of PowerSGD"] = list(powersgd._projection.values())
    stored = zero.bit16_groups_flat if is_stage_2 else zero.fp16_partitioned_groups_flat
    is_shared = masters[0].data_ptr() == stored[0].data_ptr()
    sizes = {key: sum(t.nbytes for t in tensors) for key, tensors in held.items()}
    return {"sent": dict(sent), "held": sizes, "is_shared": is_shared}


def made_and_planned(name):
    """What rank 0 did, the plan, and its memory."""
    done = start([sys.executable, "-m", "tests.pipeline.training.planning.test_forecast", name])
    assert done.returncode == 0, done.stderr[-2000:]
    plan = make_plan(small(), small_file(name), Machine(WORLD))
    return json.loads(done.stdout.splitlines()[-1]), plan, plan.memory


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3_12b.json", "zero3_slow_network.json", "zero3_cpu.json"])
def test_traffic_is_what_deepspeed_sends(name):
    made, plan, found = made_and_planned(name)
    sent = made["sent"]
    counted = plan.traffic
    assert sent["reduce_scatter_tensor 16"] == pytest.approx(counted.scattered, rel=1e-3)
    in_node = sent.get("all_gather_into_tensor 8", 0)
    gathered = in_node + sent["all_gather_into_tensor 16"]
    # the last blocks and the heads are still there when the backward pass begins: 2.3 of 16 here
    assert 0.92 * counted.gathered <= gathered <= 1.001 * counted.gathered
    assert (in_node > 0) == (counted.in_node > 0) == (name == "zero3_slow_network.json")
    assert 0.88 * counted.in_node <= in_node <= 1.001 * counted.in_node
    # the norm, which blocks of parameters are whole
    others = sum(size for kind, size in sent.items() if kind.startswith(("all_reduce", "broad")))
    assert others < 0.01 * counted.sent
    assert made["held"] == {key: found.of(key) for key in made["held"]}
    assert not made["is_shared"]


@pytest.mark.slow
def test_traffic_of_stage_2_is_what_deepspeed_sends():
    made, plan, found = made_and_planned("zero2_small.json")
    sent = made["sent"]
    assert sent["all_gather_into_tensor 16"] == plan.traffic.gathered
    assert sent["all_reduce 16"] == pytest.approx(plan.traffic.scattered, rel=1e-3)
    assert plan.traffic.gathered == 2 * found.shards.stored
    assert made["held"] == {key: found.of(key) for key in made["held"]}


@pytest.mark.slow
def test_traffic_of_hybrid_sharding_stays_in_the_node_but_for_factors():
    made, plan, found = made_and_planned("zero3_12b_hybrid.json")
    sent = made["sent"]
    assert sent["reduce_scatter_tensor 8"] == pytest.approx(plan.traffic.scattered, rel=1e-3)
    gathered = sent["all_gather_into_tensor 8"]
    assert 0.92 * plan.traffic.gathered <= gathered <= 1.001 * plan.traffic.gathered
    assert sent["between nodes 2"] == plan.traffic.summed
    assert plan.traffic.summed < 0.6 * 4 * found.shards.own
    assert not [kind for kind in sent if kind.endswith(" 16") and sent[kind] > 100]
    assert made["held"] == {key: found.of(key) for key in made["held"]}


# section 6 of the sanity numbers: C, GFLOP a token forward, of all training, GPU-hours
@pytest.mark.parametrize(
    ("preset", "gflop", "flops", "gpu_hours"),
    [
        ("dalle_1b", 2.62, 4.4e21, 3_100),
        ("dalle_3b", 5.82, 9.8e21, 6_900),
        ("dalle_6b", 11.3, 1.9e22, 13_400),
        ("dalle_12b", 24.5, 4.15e22, 29_100),
    ],
)
def test_the_papers_family_takes_the_flops_and_hours_that_were_derived(
    preset, gflop, flops, gpu_hours
):
    run = presets.load(preset)
    plan = make_plan(run, file("zero3_12b.json"), Machine(64))
    tokens = run.batch * run.model.n_ctx
    assert plan.work.model / tokens / 3 / 1e9 == pytest.approx(gflop, rel=0.01)
    assert plan.work.model * run.steps == pytest.approx(flops, rel=0.02)
    assert plan.gpu_hours_at_mfu == pytest.approx(gpu_hours, rel=0.01)
    assert plan.tokens == 563_609_600_000


def test_the_12b_model_sends_73_8_gb_and_computes_a_third_of_a_second_a_sample():
    run, ds = presets.dalle_12b(), file("zero3_12b.json")
    # fabrics of the design: NVLink, 400, 200 and 100 Gb/s; seconds a micro-step, and the
    # micro-batch below which sending takes longer
    for gpus, gb_s, seconds, even in ((8, 45, 0.20, 0.6), (1024, 45, 1.64, 5.3),
                                      (1024, 22, 3.35, 10.7), (1024, 11, 6.7, 21)):  # fmt: skip
        plan = make_plan(run, ds, Machine(gpus, fabric=gb_s), micro_batch=1)
        n = plan.memory.accumulation
        assert plan.traffic.sent / n / 1e9 == pytest.approx(73.8, rel=0.002)
        alone = 1 - 1 / gpus
        assert plan.traffic.seconds / n == pytest.approx(seconds * alone, rel=0.02)
        sample_s = plan.work.seconds * gpus / 1024
        assert sample_s == pytest.approx(0.31, rel=0.02)
        assert plan.traffic.seconds / n / sample_s == pytest.approx(even * alone, rel=0.06)
        assert plan.bound == ("computing" if gpus == 8 else "sending")


def test_hpz_keeps_all_gathers_but_one_in_the_node():
    run = presets.dalle_12b()
    slow, usual = file("zero3_slow_network.json"), file("zero3_12b.json")
    machine = Machine(64, fabric=11.0)
    here, there = (make_plan(run, ds, machine) for ds in (slow, usual))
    one = 2 * (12_292_816_384 - 3_317_248)
    assert here.memory.accumulation == 2
    assert here.traffic.sent == there.traffic.sent
    assert (here.traffic.in_node, there.traffic.in_node) == (3 * one, 0)
    # four gathers and two reductions become one and two
    assert here.traffic.seconds / there.traffic.seconds == pytest.approx(0.5, abs=0.03)
    # a group larger than the node keeps nothing in it
    wide = make_plan(run, slow, dataclasses.replace(machine, gpus_per_node=4))
    assert wide.traffic.in_node == 0


def test_between_the_nodes_of_hybrid_sharding_goes_a_gigabyte_an_update():
    run, hybrid = presets.dalle_12b(), file("zero3_12b_hybrid.json")
    found = make_plan(run, hybrid, Machine(64, fabric=11.0))
    flat = make_plan(run, file("zero3_12b.json"), Machine(64, fabric=11.0))
    assert found.traffic.summed / 1e9 == pytest.approx(1.02, abs=0.01)
    assert found.traffic.gathered == flat.traffic.gathered
    # 100 Gb/s a GPU: sending bounds ZeRO-3 over all of them, and not this
    assert (flat.bound, found.bound) == ("sending", "computing")
    dense = hybrid | {"hybrid_sharding": {"gpus_per_node": 8}}
    sent = make_plan(run, dense, Machine(64)).traffic.summed
    assert sent == 4 * found.memory.shards.own
    # what is not sent yet is in the checkpoint, the sum of the nodes' errors
    assert found.checkpoint_bytes - flat.checkpoint_bytes == 4 * 8 * found.memory.shards.compressed


def test_what_stage_2_and_hybrid_sharding_may_change_where_they_do_not_fit():
    small = make_plan(presets.dalle_12b(), file("zero2_small.json"), Machine(64, gpu_gib=40))
    texts = [text for text, _, _ in small.changes]
    assert '"stage": 3 in zero_optimization' in texts
    assert texts[-1] == "micro-batch 1, recomputation and offload in stage 3 together"
    hybrid = file("zero3_12b_hybrid.json")
    tight = make_plan(presets.dalle_12b(), hybrid, Machine(64, gpu_gib=40))
    assert ("no hybrid_sharding", True) in [(text, fits) for text, _, fits in tight.changes]
    assert not [text for text, _, _ in tight.changes if text.endswith("GPUs")]


def test_one_gpu_sends_nothing():
    plan = make_plan(presets.dalle_demo(), file("zero3_cpu.json"), Machine(1))
    assert (plan.traffic.sent, plan.traffic.seconds, plan.bound) == (0, 0, "computing")


def test_without_recomputation_the_hardware_does_a_quarter_less():
    run, ds = presets.dalle_12b(), file("zero3_12b.json")
    again = make_plan(run, ds, Machine(64))
    once = make_plan(run, ds | {"activation_checkpointing": {"enabled": False}}, Machine(64))
    assert once.work.hardware == once.work.model == again.work.model
    assert again.work.hardware / again.work.model == pytest.approx(4 / 3, rel=0.01)
    assert once.mfu == pytest.approx(400 / 989)
    assert once.hours * 64 == pytest.approx(once.gpu_hours_at_mfu * 0.4 * 989 / 400)


def test_disk_and_host_of_the_12b_model():
    run, ds = presets.dalle_12b(), file("zero3_12b.json")
    plan = make_plan(run, ds, Machine(64))
    n = 12_292_816_384
    assert plan.checkpoint_bytes == 16 * n
    assert plan.disk_bytes == 3 * 16 * n + 4 * n
    # rank 0 gathers 49 GB at the end; the slices of eight ranks are half of that
    assert plan.host_bytes == 4 * n
    assert make_plan(run, ds, Machine(16)).host_bytes == 8 * n
    offloaded = make_plan(run, file("zero3_12b_offload.json"), Machine(8))
    assert offloaded.host_bytes == pytest.approx((24 + 16) * n, rel=1e-3)
    half = dataclasses.replace(
        run, optimizer=dataclasses.replace(run.optimizer, moment_dtype="bfloat16")
    )
    assert make_plan(half, ds, Machine(64)).checkpoint_bytes == 12 * n


@pytest.mark.dist
def test_a_checkpoint_of_two_ranks_is_as_large_as_planned(tiny, tmp_path):
    preset, name = "dalle_short_with_one_head", ROOT / "ds_configs/zero3_cpu.json"
    options = arguments("dalle", tiny, tmp_path / "out", preset)
    done = launched("dalle", 2, name, *options)
    assert done.returncode == 0, done.stderr[-2000:]
    folders = sorted((tmp_path / "out/checkpoints").iterdir())
    assert len(folders) == 1
    parts = [load_file(path) for path in folders[0].glob("rank-*.safetensors")]
    run = presets.load(f"{runs.__file__}:{preset}")
    plan = make_plan(run, file(name.name), Machine(2))
    assert len(parts) == 2
    assert sum(t.nbytes for part in parts for t in part.values()) == plan.checkpoint_bytes


def test_nothing_is_changed_where_it_fits():
    plan = make_plan(presets.dalle_12b(), file("zero3_12b.json"), Machine(64))
    assert plan.fits
    assert plan.changes == ()
    assert plan.largest_micro_batch == 16


def test_changes_are_told_the_most_helpful_first():
    ds = file("zero3_12b.json") | {"activation_checkpointing": {"enabled": False}}
    plan = make_plan(presets.dalle_12b(), ds, Machine(16, gpu_gib=40))
    assert not plan.fits
    texts = [text for text, _, _ in plan.changes]
    assert texts == [
        '"activation_checkpointing": {"enabled": true}', "micro-batch 1",
        '"offload_optimizer": {"device": "cpu"} in zero_optimization', "128 GPUs",
    ]  # fmt: skip
    peaks = [peak for _, peak, _ in plan.changes]
    assert peaks == sorted(peaks)
    assert [fits for _, peak, fits in plan.changes] == [peak <= 40 * GIB for peak in peaks]
    assert plan.changes[0][2]


def test_where_no_change_is_enough_they_are_told_together():
    # 8 GPUs of 6 GiB: all together on 8 do not fit either, on more they do
    ds = file("zero3_12b.json")
    plan = make_plan(presets.dalle_12b(), ds, Machine(8, gpu_gib=6))
    assert plan.largest_micro_batch is None
    *singles, together, more = plan.changes
    assert not any(fits for _, _, fits in singles)
    assert together[0] == "micro-batch 1, recomputation and offload together"
    assert not together[2]
    assert more[0] == "all of these on 32 GPUs"
    assert more[2]
    # with a little more room eight will do
    *_, last = make_plan(presets.dalle_12b(), ds, Machine(8, gpu_gib=9)).changes
    assert last[0] == "micro-batch 1, recomputation and offload together"
    assert last[2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpus": 0}, "--gpus is 0; take 1 or more"),
        ({"gpus_per_node": -1}, "--gpus-per-node is -1; take 1 or more"),
        ({"gpu_gib": 0.0}, "--gpu-gib is 0; take a number above 0"),
        ({"fabric": -2.5}, "--fabric is -2.5; take a number above 0"),
        ({"fabric": float("inf")}, "--fabric is inf; take a number above 0"),
        ({"tflops": float("nan")}, "--tflops is nan; take a number above 0"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        Machine(**({"gpus": 8} | changes))


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(traffic_of_rank_0(sys.argv[1])) + "\n")
    sys.stdout.flush()
    os._exit(0)
