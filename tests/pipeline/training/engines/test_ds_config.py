import json

import pytest

from pipeline import presets
from pipeline.console import InputError
from pipeline.training.engines import ds_config
from tests.tiny import ROOT

ZERO = {"stage": 3}
RUN = {"batch": 64, "gradient_clipping": 4.0, "world": 4}


def resolve(ds, **changes):
    return ds_config.resolve(ds, **(RUN | changes))


def test_the_presets_numbers_are_filled_in():
    resolved = resolve({"train_batch_size": "auto", "zero_optimization": ZERO})
    assert resolved["train_batch_size"] == 64
    assert resolved["gradient_clipping"] == 4.0
    assert resolved["train_micro_batch_size_per_gpu"] == 16
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["zero_optimization"] == ZERO


def test_no_clipping_is_told_to_deepspeed_which_would_clip_at_1():
    assert resolve({"zero_optimization": ZERO}, gradient_clipping=0.0)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("micro", "accumulation", "wanted"),
    [("auto", "auto", (16, 1)), (4, "auto", (4, 4)), ("auto", 8, (2, 8)), (8, 2, (8, 2))],
)
def test_micro_batch_and_accumulation_follow_from_each_other(micro, accumulation, wanted):
    ds = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    resolved = resolve(ds | {"zero_optimization": ZERO})
    assert wanted == tuple(resolved[key] for key in ds)


MICRO, ACCUMULATION = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"zero_optimisation": ZERO}, "has zero_optimisation, which is unknown here; known are"),
        ({"optimizer": {"type": "Adam"}}, "has optimizer, which is unknown"),
        ({"zero_optimization": {"stage": 3, "stage3_paramter": 1}},
         "has zero_optimization.stage3_paramter, which is unknown here; known are"),
        ({"bf16": {"enable": True}}, "has bf16.enable, which is unknown here; known are enabled"),
        ({"data_types": {"grad_dtype": "fp32"}}, "known are grad_accum_dtype"),
        ({"bf16": True}, "bf16 is True in the ds_config; it must be an object"),
        ({"zero_optimization": 3}, "zero_optimization is 3 in the ds_config; it must be an object"),
        ({"train_batch_size": 32}, 'train_batch_size is 32 .* preset owns it: write "auto" there'),
        ({"train_batch_size": 64}, "train_batch_size is 64 .* preset owns it"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0 .* preset owns it"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage is 1; write 3 to shard"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is True"),
        ({"zero_optimization": {"stage": 2, "stage3_param_persistence_threshold": 0}},
         "zero_optimization.stage3_param_persistence_threshold means nothing in stage 2"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
         "zero_optimization.offload_optimizer means nothing in stage 2"),
        ({"hybrid_sharding": {}}, "hybrid_sharding.gpus_per_node is None; write how many ranks"),
        ({"hybrid_sharding": {"gpus_per_node": 3}},
         "gpus_per_node is 3; write .* whole number that divides the 4 ranks"),
        ({"hybrid_sharding": {"gpus_per_node": 2, "powersgd_rank": 7}},
         "powersgd_rank is 7; write a whole number that the 2 GPUs of a node can share, or 0"),
        ({"hybrid_sharding": {"gpus_per_node": 2, "rank": 8}}, "has hybrid_sharding.rank, which"),
        ({"hybrid_sharding": {"gpus_per_node": 2}, "zero_optimization": {"stage": 2}},
         "hybrid_sharding shards parameters inside a node already: take stage 3 without"),
        ({"hybrid_sharding": {"gpus_per_node": 2},
          "zero_optimization": ZERO | {"zero_hpz_partition_size": 2}}, "hybrid_sharding shards"),
        ({"hybrid_sharding": {"gpus_per_node": 2},
          "zero_optimization": ZERO | {"offload_optimizer": {"device": "cpu"}}},
         "hybrid_sharding sums gradients on the GPUs: leave out offload_optimizer"),
        ({"comms_logger": {"enabled": "often"}}, "comms_logger.enabled is 'often': Input should"),
        ({"comms_logger": {"x": 1}}, "comms_logger.x is 1: Extra inputs are not permitted"),
        *[({"zero_optimization": ZERO | {key: True}}, f"zero_optimization.{key} is not supported")
          for key in ("compute_grad_norm", "cpu_offload", "zero_quantized_weights")],
        ({"zero_optimization": ZERO | {"offload_optimizer": {"device": "nvme", "nvme_path": "x"}}},
         "offload_optimizer is .*'nvme'.*; write .*cpu.*, or leave it out"),
        ({"zero_optimization": ZERO | {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
         "offload_optimizer.ratio is not supported here: leave it out"),
        ({"zero_optimization": ZERO | {"zero_hpz_partition_size": "2"}}, "size is '2', which does"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}},
         "zero_hpz_partition_size is 3, which does not divide 4 ranks; take a number that does"),
        ({"zero_optimization": {}}, "zero_optimization.stage is None"),
        ({MICRO: 3}, r"micro-batch 3 x accumulation 5 x 4 ranks is 60, and the preset's batch is "
         '64: leave one of them "auto", or take two whose product is 16'),
        ({MICRO: 4, ACCUMULATION: 2}, "micro-batch 4 x accumulation 2 x 4 ranks is 32"),
        ({MICRO: 32}, "micro-batch 32 x accumulation 1 x 4 ranks is 128"),
        ({ACCUMULATION: 32}, "micro-batch 1 x accumulation 32 x 4 ranks is 128"),
        ({MICRO: "8"}, "train_micro_batch_size_per_gpu is '8'; write a whole number from 1 on"),
        ({MICRO: 0}, "train_micro_batch_size_per_gpu is 0"),
        ({ACCUMULATION: -1}, "gradient_accumulation_steps is -1"),
        ({ACCUMULATION: True}, "gradient_accumulation_steps is True"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}},
         "bf16 and fp16 of the ds_config both say in which numbers the matrices are computed"),
        ({"fp16": {"enabled": True}, "compute_dtype": "fp16"}, "fp16 and compute_dtype of the ds"),
        ({"fp16": {"enabled": True, "loss_scale": 0}}, "has fp16.loss_scale, which is unknown"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'; write fp32, bf16 or fp16"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled is 'auto'; write true or false"),
        ({"steps_per_print": "often"}, "steps_per_print is 'often'; write a whole number"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown is 'yes'; write true or false"),
        ({"comms_logger": 3}, "comms_logger is 3; it must be an object"),
        ({"data_types": {"grad_accum_dtype": "f"}}, "data_types.grad_accum_dtype is 'f'; write"),
        ({"communication_data_type": "f"}, "communication_data_type is 'f'; write fp32, bf16"),
        ({"steps_per_print": "auto"}, '"auto" is not understood for steps_per_print'),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
         '"auto" is not understood for zero_optimization.reduce_bucket_size'),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "large"}},
         "zero_optimization.reduce_bucket_size is 'large': Input should be a valid integer"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "moon"}}},
         "zero_optimization.offload_optimizer.device is 'moon'"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_bound(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        resolve({"zero_optimization": ZERO} | changes)


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    with pytest.raises(InputError, match="a batch of 64 cannot be shared by 3 ranks"):
        resolve({"zero_optimization": ZERO}, world=3)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "no ds_config at"), ("{", "is not JSON"), ("[3]", "holds a list; .* JSON object")],
)
def test_a_file_that_is_no_ds_config_is_refused(tmp_path, content, sentence):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=sentence):
        ds_config.read(path)


def test_our_own_switches_are_read_and_not_given_to_deepspeed():
    ds = {"zero_optimization": ZERO, "activation_checkpointing": {"enabled": True}}
    assert ds_config.uses_activation_checkpointing(ds)
    # refused later, by ``resolve``
    assert not ds_config.uses_activation_checkpointing({"activation_checkpointing": []})
    assert not ds_config.uses_activation_checkpointing({"zero_optimization": ZERO})
    assert "activation_checkpointing" not in resolve(ds)
    assert ds_config.compute_dtype_name(ds) == "float32"
    assert ds_config.compute_dtype_name(ds | {"bf16": {"enabled": True}}) == "bfloat16"
    assert ds_config.compute_dtype_name(ds | {"fp16": {"enabled": True}}) == "float16"
    own = ds | {"compute_dtype": "fp16"}
    assert ds_config.compute_dtype_name(own) == "float16"
    assert "compute_dtype" not in resolve(own)
    # scales are the blocks' own
    fp16 = resolve(ds | {"fp16": {"enabled": True}})["fp16"]
    assert fp16 == {"enabled": True, "loss_scale": 1.0}


NATURAL = [
    *[("zero3_cpu.json", preset, world) for preset in ("dalle_demo", "dvae_demo")
      for world in (1, 2, 4)],
    *[("zero3_bf16.json", preset, world) for preset in ("dvae_paper", "dalle_1b", "dalle_3b")
      for world in (1, 8, 64)],
    *[("zero3_12b_hybrid.json", "dalle_12b", world) for world in (8, 64, 128)],
    *[("zero2_small.json", preset, world) for preset in ("dvae_paper", "dalle_1b")
      for world in (1, 8, 64)],
    *[("zero3_12b.json", preset, world) for preset in ("dalle_6b", "dalle_12b")
      for world in (16, 64, 128)],
    *[("zero3_slow_network.json", preset, world) for preset in ("dalle_6b", "dalle_12b")
      for world in (16, 64, 128)],
    *[("zero3_12b_offload.json", "dalle_12b", world) for world in (4, 8, 64)],
    *[("zero3_12b_v100_fp16.json", preset, world) for preset in ("dalle_6b", "dalle_12b")
      for world in (64, 128, 1024)],
]  # fmt: skip


@pytest.mark.parametrize(("name", "preset", "world"), NATURAL)
def test_every_file_passes_the_gate_with_its_presets(name, preset, world):
    ds, run = ds_config.read(ROOT / "ds_configs" / name), presets.load(preset)
    clip = run.optimizer.gradient_clipping
    resolved = ds_config.resolve(ds, batch=run.batch, gradient_clipping=clip, world=world)
    product = resolved[MICRO] * resolved[ACCUMULATION] * world
    assert product == run.batch
    # of the ranks that DeepSpeed knows of
    ranks = ds_config.shard_ranks(ds, world)
    assert resolved["train_batch_size"] == resolved[MICRO] * resolved[ACCUMULATION] * ranks
    assert json.loads(json.dumps(resolved)) == resolved


def test_every_file_of_ds_configs_is_in_that_list():
    assert {p.name for p in (ROOT / "ds_configs").iterdir()} == {name for name, _, _ in NATURAL}


@pytest.mark.parametrize("world", [256, 1024])
def test_the_12b_file_needs_a_smaller_micro_batch_beyond_128_gpus(world):
    # the paper trains with one picture a GPU on 1024 of them (section 2.4)
    ds, run = ds_config.read(ROOT / "ds_configs/zero3_12b.json"), presets.dalle_12b()
    number = {"batch": run.batch, "gradient_clipping": 4.0, "world": world}
    with pytest.raises(InputError, match=f"take two whose product is {1024 // world}"):
        ds_config.resolve(ds, **number)
    assert ds_config.resolve(ds | {MICRO: "auto"}, **number)[MICRO] == 1024 // world
