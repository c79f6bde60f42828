import dataclasses
import json

import pytest
import torch

from pipeline import presets
from pipeline.config import DalleConfig
from pipeline.console import InputError
from pipeline.models.dalle import Dalle, nll_sums
from pipeline.training.engines import ds_config
from pipeline.training.planning.activations import heads_bytes, kept_bytes
from pipeline.training.planning.memory import (
    ACTIVE,
    GIB,
    MOMENTS,
    RESERVE,
    Part,
    estimate,
    largest_micro_batch,
    micro_batches,
    preflight,
)
from pipeline.training.planning.sharding import _largest_sub_group
from tests.tiny import ROOT

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

# all three patterns; the second has a convolution of few windows, as the 12B model has
SMALL = DalleConfig(
    n_layer=3, d_model=128, n_head=4, n_text=32, n_text_vocab=512, grid=8, n_image_vocab=128,
    conv_kernel=5,
)  # fmt: skip
WIDE = dataclasses.replace(SMALL, grid=16, conv_kernel=3)
TINY = dataclasses.replace(SMALL, d_model=64, n_head=2, n_text=16, grid=4)


def file(name, **zero):
    ds = json.loads((ROOT / "ds_configs" / name).read_text())
    return ds | {"zero_optimization": ds["zero_optimization"] | zero}


def bytes_saved(model, micro_batch):
    """Of all that autograd keeps of a forward pass but the parameters."""
    c = model.config
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # the tensors too, so that no memory is used twice
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    text = torch.randint(0, c.n_text_vocab, (micro_batch, c.n_text))
    image = torch.randint(0, c.n_image_vocab, (micro_batch, c.n_image))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(text, image)
    del logits
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk_norm"])
@pytest.mark.parametrize(
    ("config", "dtype", "path"),
    [
        (SMALL, torch.float32, "windowed"),
        (WIDE, torch.float32, "windowed"),
        (WIDE, torch.bfloat16, "windowed"),
        # of the interpreter, which does not multiply bfloat16
        (TINY, torch.float32, "triton"),
        (TINY, torch.float16, "triton"),
    ],
)
def test_kept_activations_are_what_autograd_keeps(config, dtype, path, qk_norm, recompute):
    config = dataclasses.replace(config, qk_norm=qk_norm)
    model = Dalle(config).to(dtype)
    model.set_compute_dtype(dtype)
    model.set_attention_backend(path)
    model.checkpoint_activations = recompute
    c = dtype.itemsize
    sample, once = kept_bytes(config, c, path, recompute)
    counted = 2 * sample + once + (heads_bytes(config) if c < 4 else 0)
    # token numbers and float32 copies of gains are not counted
    assert counted == pytest.approx(bytes_saved(model, 2), rel=0.01)
    assert counted <= bytes_saved(model, 2)


def test_matrices_stored_as_float32_are_kept_in_the_type_they_are_computed_in():
    model = Dalle(SMALL)
    model.set_compute_dtype(torch.bfloat16)
    model.set_attention_backend("windowed")
    sample, once = kept_bytes(SMALL, 2, "windowed", False, copies_weights=True)
    assert once == 2 * SMALL.matrix_parameters
    assert 2 * sample + once == pytest.approx(bytes_saved(model, 2), rel=0.01)


def peak_of_both_passes(model, micro_batch):
    """The most that is allocated at once on top of the parameters."""
    from torch.profiler import ProfilerActivity, profile

    c = model.config
    text = torch.randint(0, c.n_text_vocab, (micro_batch, c.n_text))
    image = torch.randint(0, c.n_image_vocab, (micro_batch, c.n_image))

    def both():
        logits = model(text, image)
        sums = nll_sums(*logits, text, image)
        del logits
        sum(sums).backward()

    both()  # masks are made once
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        both()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("n_vocab", [64, 2048])
def test_the_peak_of_activations_is_counted_and_not_too_low(n_vocab, recompute):
    config = dataclasses.replace(
        SMALL, n_text=64, grid=12, conv_kernel=3, n_text_vocab=n_vocab, n_image_vocab=n_vocab
    )
    model = Dalle(config)
    model.set_attention_backend("windowed")
    model.checkpoint_activations = recompute
    run = dataclasses.replace(presets.dalle_demo(), model=config)
    ds = file("zero3_cpu.json") | {"activation_checkpointing": {"enabled": recompute}}
    found = estimate(run, ds, 1, micro_batch=16, attention="windowed")
    names = {"logits", "heads in float32", "gradients of activations", "attention's workspace"}
    parts = [
        p for p in found.parts if p.name in names or "activations" in p.name or "again" in p.name
    ]
    counted = max(sum(p.n_bytes for p in parts if m in p.moments) for m in ACTIVE)
    assert 1.0 <= counted / peak_of_both_passes(model, 16) <= 1.15


WORLDS = (8, 16, 64, 128, 1024)
STATES = ("parameters", "float32 masters", "gradient buffer", "moments", "average of the weights")


def states(found, *, on_host=False):
    return sum(
        p.n_bytes for p in found.parts
        if p.on_host == on_host and (p.name in STATES or p.name == "gradients of the masters")
    )  # fmt: skip


# GiB a GPU; of 12,292,816,384 parameters a byte each are 11.449 GiB over the world
@pytest.mark.parametrize(
    ("changes", "moments", "bytes_each", "gib"),
    [
        ({}, "float32", 22, (31.5, 15.7, 3.9, 2.0, 0.25)),
        ({"data_types": {}}, "float32", 20, (28.6, 14.3, 3.6, 1.8, 0.22)),
        ({}, "bfloat16", 18, (25.8, 12.9, 3.2, 1.6, 0.20)),
        # float32 masters are a copy of float32 parameters
        ({"bf16": {"enabled": False}}, "float32", 24, (34.3, 17.2, 4.29, 2.15, 0.27)),
    ],
)
def test_states_of_the_12b_model_on_8_to_1024_gpus(changes, moments, bytes_each, gib):
    run = presets.dalle_12b()
    optimizer = dataclasses.replace(run.optimizer, moment_dtype=moments)
    run, ds = dataclasses.replace(run, optimizer=optimizer), file("zero3_12b.json") | changes
    for world, wanted in zip(WORLDS, gib, strict=True):
        found = estimate(run, ds, world, micro_batch=1)
        assert states(found) == bytes_each * found.shards.own
        assert states(found) / GIB == pytest.approx(wanted, rel=0.02)
        # padding
        assert 0 <= found.shards.own - found.shards.total / world <= 1000


def test_hybrid_sharding_holds_what_a_node_alone_would_and_the_errors_of_powersgd():
    run = presets.dalle_12b()
    alone = estimate(run, file("zero3_12b.json"), 8, micro_batch=1)
    for world in (64, 1024):
        found = estimate(run, file("zero3_12b_hybrid.json"), world, micro_batch=1)
        assert (found.world, found.ranks) == (world, 8)
        assert states(found) == states(alone)
    # the matrices of 64 layers, 12 C^2 each, by 8
    matrices = 64 * 12 * 3968**2 // 8
    assert found.of("errors of PowerSGD") == 4 * matrices
    assert found.shards.factors / matrices == pytest.approx(1 - 0.847, abs=1e-3)
    # 112 numbers for each element of a matrix' longer side: three of width C, one of 4 C
    assert found.of("projections of PowerSGD") == 4 * 64 * 112 * 7 * 3968
    assert alone.of("errors of PowerSGD") == 0


def test_stage_2_holds_all_parameters_and_a_share_of_the_rest():
    run = presets.dalle_1b()
    found = estimate(run, file("zero2_small.json"), 64)
    n = found.shards.total
    assert found.of("parameters") == pytest.approx(2 * n, rel=1e-6)
    assert states(found) - found.of("parameters") == 20 * found.shards.own
    assert 0 <= found.shards.own - n / 64 < 10
    assert found.of("gathered parameters") == found.of("small parameters, kept whole") == 0
    # two, while sending overlaps computing
    assert found.of("reduce bucket") == 2 * 2 * 100_000_000
    one = estimate(run, file("zero2_small.json", overlap_comm=False), 64)
    assert one.of("reduce bucket") == 2 * 100_000_000


def test_offload_leaves_the_parameters_on_the_gpu_and_puts_24_bytes_each_on_the_host():
    ds = file("zero3_12b_offload.json")
    for world, gpu, host in ((8, 2.86, 34.3), (64, 0.36, 4.29)):
        found = estimate(presets.dalle_12b(), ds, world, micro_batch=1)
        assert states(found) / GIB == pytest.approx(gpu, rel=0.01)
        assert states(found, on_host=True) == found.host == 24 * found.shards.own
        assert found.host / GIB == pytest.approx(host, rel=0.01)
        assert found.of("an update's copies") == 0
    ds = file("zero3_12b_offload.json", offload_param={"device": "cpu"})
    assert estimate(presets.dalle_12b(), ds, 8).host == 26 * found.shards.own * 8


def test_the_12b_model_keeps_9_7_gib_of_inputs_at_micro_batch_8():
    found = estimate(presets.dalle_12b(), file("zero3_12b.json"), 8)
    assert (found.micro_batch, found.recompute) == (8, True)
    kept = found.of("activations kept")
    blocks = 64 * 8 * 1280 * 3968 * 4
    assert blocks / GIB == pytest.approx(9.7, rel=0.01)
    assert kept == blocks + 8 * 1280 * (2 * 3968 * 4 + 8)
    # without recomputation: 44 C + 4 H + 16 bytes a token and layer
    ds = file("zero3_12b.json") | {"activation_checkpointing": {"enabled": False}}
    more = estimate(presets.dalle_12b(), ds, 8)
    layer = 8 * 1280 * (44 * 3968 + 4 * 62 + 16)
    assert more.of("activations kept") == 64 * layer + kept - blocks
    assert more.of("MLP computed again") == 0


def test_every_part_counts_in_the_peak():
    found = estimate(presets.dalle_12b(), file("zero3_slow_network.json"), 64)
    assert found.peak == max(found.at(moment) for moment in MOMENTS) == found.at(found.worst)
    assert found.of("reserve of the libraries") == RESERVE
    assert found.of("copy shared in the node") == pytest.approx(2 * 12_292_816_384 / 8, rel=1e-4)
    assert found.of("reduce bucket") == 200_000_000
    assert found.of("small parameters, kept whole") == 2 * 3_317_248
    assert found.of("gathered parameters") == 600_000_000
    assert {m for part in found.parts for m in part.moments} == set(MOMENTS)
    more = dataclasses.replace(found, parts=(*found.parts, Part("x", 7)))
    assert more.peak == found.peak + 7


def test_one_gpu_gathers_nothing_and_float16_takes_updates_block_by_block():
    run = presets.dalle_1b()
    alone = estimate(run, file("zero3_bf16.json"), 1, micro_batch=1)
    assert alone.of("gathered parameters") == alone.of("message of a gather") == 0
    assert alone.shards.own == alone.shards.total
    bf16 = estimate(run, file("zero3_12b.json"), 8, micro_batch=1).shards.sub_group
    fp16 = estimate(run, file("zero3_12b_v100_fp16.json"), 8).shards.sub_group
    # the embeddings of both vocabularies, against all matrices
    assert fp16 == 24_576 * 1_280 / 8 < bf16 / 30


def test_recipes_with_a_bounded_variance_or_16_bit_moments_need_copies_in_an_update():
    run, ds = presets.dalle_12b(), file("zero3_12b.json")

    def copies(**changes):
        optimizer = dataclasses.replace(run.optimizer, **changes)
        found = estimate(dataclasses.replace(run, optimizer=optimizer), ds, 64)
        return found.of("an update's copies") / found.shards.sub_group

    assert copies(max_exp_avg_sq=0.0) == 4
    assert copies() == 8
    assert copies(max_exp_avg_sq=0.0, moment_dtype="bfloat16") == 8
    assert copies(moment_dtype="bfloat16") == 12


def test_what_a_file_leaves_out_is_deepspeeds_default_and_both_names_are_read():
    run, ds = presets.dalle_12b(), file("zero3_12b.json")
    bare = estimate(run, ds | {"zero_optimization": {"stage": 3}}, 64)
    assert bare.of("reduce bucket") == 2 * 500_000_000
    assert bare.of("gathered parameters") == 2 * 1_000_000_000
    other = estimate(
        run, ds | {"zero_optimization": {"stage": 3, "max_live_parameters": 2**28}}, 64
    )
    assert other.of("gathered parameters") == 2 * 2**28
    none = file("zero3_12b.json", contiguous_gradients=False)
    assert estimate(run, none, 64).of("reduce bucket") == 0


def test_z_loss_keeps_the_logits_too():
    run, ds = presets.dalle_12b(), file("zero3_12b.json")
    text, image = 8 * 256 * 16_384 * 4, 8 * 1024 * 8_192 * 4
    found = estimate(run, ds, 64)
    assert found.of("logits") == text + image + 2 * image
    found = estimate(dataclasses.replace(run, z_loss=1e-5), ds, 64)
    assert found.of("logits") == 2 * (text + image) + 2 * image


@pytest.mark.parametrize(
    ("sizes", "bound", "largest"),
    [([5, 5, 5], 100, 15), ([5, 5, 5], 10, 10), ([5, 5, 5], 4, 5), ([1, 9, 3, 3], 10, 10)],
)
def test_a_sub_group_ends_with_the_parameter_that_fills_it(sizes, bound, largest):
    assert _largest_sub_group(sizes, bound) == largest


def test_micro_batches_share_the_batch_evenly():
    run = presets.dalle_12b()
    assert micro_batches(run, 64) == [16, 8, 4, 2, 1]
    assert micro_batches(run, 1024) == [1]
    ds = file("zero3_12b.json")
    for micro in (8, 4):
        room = estimate(run, ds, 64, micro_batch=micro).peak
        assert largest_micro_batch(run, ds, 64, room) == micro
        assert largest_micro_batch(run, ds, 64, room - 1) == micro // 2
    assert largest_micro_batch(run, ds, 64, 5 * GIB) is None


def test_the_preflight_lets_pass_what_may_fit():
    run, ds = presets.dalle_12b(), file("zero3_12b.json")
    certain = estimate(run, ds, 64).certain
    # states, small parameters, bucket, kept activations
    assert certain / GIB == pytest.approx(3.94 + 0.19 + 9.99, rel=0.01)
    assert preflight(run, ds, 64, certain) is None
    assert preflight(run, ds, 64, certain - 1) == (
        "a GPU has 14.12 GiB free, and this run holds at least 14.12 GiB: 9.99 GiB of activations "
        "at micro-batch 8, and 4.13 GiB of model states and buffers on 64 GPUs; "
        'set "train_micro_batch_size_per_gpu" to 4 or less'
    )


def test_the_preflight_says_what_to_do_when_no_micro_batch_fits():
    sentence = preflight(presets.dalle_12b(), file("zero3_12b.json"), 8, 16 * GIB)
    assert sentence.startswith("a GPU has 16.00 GiB free, and this run holds at least 41.67 GiB")
    assert sentence.endswith(
        "on 8 GPUs; no micro-batch fits: take more GPUs, activation_checkpointing or "
        "offload_optimizer (python -m pipeline.plan counts each)"
    )


@pytest.mark.parametrize(
    ("zero", "options", "sentence"),
    [
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, {},
         "offload_optimizer is .*'nvme'.*; write .*cpu.*, or leave it out"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/x"}}, {}, "offload_param is .*nvme"),
        ({"zero_hpz_partition_size": 7}, {},
         "zero_hpz_partition_size is 7, which does not divide 64 ranks; take a number that does"),
        ({}, {"attention": "naive"}, "attention is 'naive'; it is planned for triton and windowed"),
        ({}, {"micro_batch": 5}, "micro-batch 5 x accumulation 3 x 64 ranks is 960"),
        ({}, {"micro_batch": 0}, "train_micro_batch_size_per_gpu is 0; write a whole number"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_named(zero, options, sentence):
    with pytest.raises(InputError, match=sentence):
        estimate(presets.dalle_12b(), file("zero3_12b.json", **zero), 64, **options)


def test_counting_draws_no_random_number():
    before = torch.get_rng_state()
    run = dataclasses.replace(presets.dalle_demo(), model=dataclasses.replace(SMALL, n_layer=2))
    estimate(run, ds_config.read(ROOT / "ds_configs/zero3_cpu.json"), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_width_that_the_kernels_do_not_take_is_planned_on_the_plain_path():
    run = presets.dalle_demo()
    odd = dataclasses.replace(run, model=dataclasses.replace(run.model, n_head=8))
    ds = file("zero3_cpu.json")
    assert [estimate(r, ds, 1).attention for r in (run, odd)] == ["triton", "windowed"]
