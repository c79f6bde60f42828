import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kernels.speed import shapes
from pipeline import presets
from pipeline.config import ClipRun, DalleRun, DvaeRun
from pipeline.console import InputError
from pipeline.models.dalle import Dalle, Dense
from pipeline.models.dvae import Conv2d, DiscreteVAE
from pipeline.training.schedules import at
from tests import tiny as runs


@pytest.fixture(scope="module")
def model_12b():
    """The paper's model without its memory."""
    with torch.device("meta"):
        return Dalle(presets.dalle_12b().model)


def test_the_12b_model_has_the_papers_matrices(model_12b):
    dense = [m for m in model_12b.blocks.modules() if isinstance(m, Dense)]
    matrices = sum(m.weight.numel() for m in dense)
    assert matrices == model_12b.config.matrix_parameters == 12_092_178_432


def test_the_12b_model_has_12_29e9_parameters_in_total(model_12b):
    total = sum(p.numel() for p in model_12b.parameters())
    # 12.095e9 in blocks; embeddings and heads of two vocabularies; places and pads
    assert round(total / 1e9, 2) == 12.29
    assert total == EXACT_12B


# blocks: 12 d^2 + 13 d of 64 layers; two vocabularies twice; pads, places, rows, columns, starts,
# the last norm: 4 d of them, with d = 3968
_D = 3968
EXACT_12B = 64 * (12 * _D**2 + 13 * _D) + 2 * (16384 + 8192) * _D + (2 * 256 + 2 * 32 + 4) * _D


@pytest.mark.parametrize(
    ("name", "billions"),
    [("dalle_12b", 12), ("dalle_6b", 5.6), ("dalle_3b", 2.8), ("dalle_1b", 1.25)],
)
def test_the_family_is_that_of_table_1(name, billions):
    model = presets.load(name).model
    assert model.matrix_parameters / 1e9 == pytest.approx(billions, rel=0.03)
    assert model.d_model == 64 * model.n_head
    assert model.n_layer == 64


@pytest.mark.parametrize(
    ("name", "shape"),
    [("dalle_12b", shapes.LAYER), ("dalle_demo", shapes.DEMO), ("dalle_own", shapes.OWN)],
    ids=["dalle_12b", "dalle_demo", "dalle_own"],
)
def test_kernels_are_compiled_and_timed_at_the_shapes_of_presets(name, shape):
    model = presets.load(name).model
    assert shape == shapes.Shape(
        n_text=model.n_text,
        grid=model.grid,
        kernel=model.conv_kernel,
        heads=model.n_head,
        width=model.d_model // model.n_head,
    )


def test_kernels_are_timed_at_the_micro_batch_of_the_12b_model():
    file = Path(__file__).parents[2] / "ds_configs" / "zero3_12b.json"
    assert json.loads(file.read_text())["train_micro_batch_size_per_gpu"] == shapes.BATCH


def test_the_recipe_of_the_transformer_is_appendix_b_2():
    run = presets.dalle_12b()
    assert (run.batch, run.steps, run.warmup) == (1024, 430_000, 5_000)
    o = run.optimizer
    assert (o.betas, o.eps, o.weight_decay) == ((0.9, 0.96), 1e-8, 4.5e-2)
    assert (o.gradient_clipping, o.ema_decay, o.ema_every) == (4.0, 0.99, 25)
    assert o.max_exp_avg_sq == 5.0
    assert (run.lr.start, run.lr.halvings) == (4.5e-4, 5)
    assert (run.lr.window, run.lr.gain, run.lr.patience) == (5_000, 1e-3, 20_000)
    assert (run.z_loss, run.model.qk_norm, run.model.mup_width) == (0, False, None)
    assert run.text_weight == 1 / 8
    assert run.bpe_dropout == 0.1


def test_the_recipe_of_the_image_tokenizer_is_appendix_a_2():
    run = presets.dvae_paper()
    assert (run.batch, run.steps) == (512, 3_000_000)
    o = run.optimizer
    assert (o.betas, o.eps, o.weight_decay) == ((0.9, 0.999), 1e-8, 1e-4)
    assert (o.ema_decay, o.ema_every) == (0.999, 1)
    assert dataclasses.astuple(run.lr) == (1e-4, 1.25e-6, 1_200_000)
    assert dataclasses.astuple(run.beta) == (0.0, 6.6, 5_000)
    assert dataclasses.astuple(run.tau) == (1.0, 1 / 16, 150_000)


def test_schedules_of_the_image_tokenizer_reach_their_ends_where_the_paper_says():
    run = presets.dvae_paper()
    assert (at(run.beta, 0), at(run.beta, 2_500)) == (0, pytest.approx(3.3))
    assert at(run.beta, 4_999) < at(run.beta, 5_000) == at(run.beta, 2_999_999) == 6.6
    assert at(run.tau, 0) == 1
    assert at(run.tau, 149_999) > at(run.tau, 150_000) == at(run.tau, 2_999_999) == 1 / 16
    assert at(run.lr, 0) == 1e-4
    assert at(run.lr, 600_000) == pytest.approx((1e-4 + 1.25e-6) / 2)
    assert at(run.lr, 1_199_999) > at(run.lr, 1_200_000) == at(run.lr, 2_999_999)
    assert at(run.lr, 1_200_000) == pytest.approx(1.25e-6, rel=1e-12)
    # 8 images on each of 64 GPUs, 8 x 8 pixels a code, no noise that the paper does not have
    assert run.batch == 64 * 8
    assert (run.model.image_size, run.model.grid, run.model.n_vocab) == (256, 32, 8192)
    assert (run.optimizer.gradient_clipping, run.pixel_noise) == (0, 0)


def test_the_papers_tokenizer_keeps_two_convolutions_in_float32():
    with torch.device("meta"):
        dvae = DiscreteVAE(presets.dvae_paper().model)
    dvae.set_compute_dtype(torch.bfloat16)
    kept = {
        name: tuple(module.w.shape[:2])
        for name, module in dvae.named_modules()
        if isinstance(module, Conv2d) and module.full_precision
    }
    assert kept == {
        "encoder.blocks.output.conv": (8192, 2048), "decoder.blocks.input": (128, 8192),
    }  # fmt: skip


def test_fsq_has_the_papers_recipe_and_the_levels_of_its_own():
    run, paper = presets.fsq_paper(), presets.dvae_paper()
    assert run.model.levels == (8, 8, 8, 6, 5)
    assert run.model.n_vocab == 15_360
    for name in ("batch", "steps", "lr", "optimizer"):
        assert getattr(run, name) == getattr(paper, name)
    for name in ("image_size", "n_hid", "n_init", "n_blk_per_group", "grid"):
        assert getattr(run.model, name) == getattr(paper.model, name)


@pytest.mark.parametrize(
    ("stage_1", "stage_2"),
    [
        ("dvae_paper", "dalle_12b"),
        ("dvae_demo", "dalle_demo"),
        ("dvae_own", "dalle_own"),
        ("fsq_demo", "dalle_demo"),
    ],
)
def test_transformers_read_the_codes_of_their_tokenizer(stage_1, stage_2):
    codes, reader = presets.load(stage_1).model, presets.load(stage_2).model
    assert (codes.n_vocab, codes.grid) == (reader.n_image_vocab, reader.grid)


def test_the_recipe_of_clip_is_that_of_its_tables_18_and_20():
    run = presets.clip_b32()
    assert (run.batch, run.warmup, run.steps) == (32_768, 2_000, 32 * 400_000_000 // 32_768)
    o = run.optimizer
    assert (o.betas, o.eps, o.weight_decay) == ((0.9, 0.98), 1e-6, 0.2)
    assert (o.gradient_clipping, o.ema_decay) == (0, 0)
    assert dataclasses.astuple(run.lr) == (5e-4, 0, run.steps)
    model = run.model
    assert (model.image_size, model.patch_size, model.n_embed, model.n_text) == (224, 32, 512, 77)
    assert dataclasses.astuple(model.vision) == (768, 12, 12)
    assert dataclasses.astuple(model.text) == (512, 12, 8)


def test_clip_reads_the_captions_of_the_transformer_that_it_ranks():
    clip, dalle = presets.clip_demo().model, presets.dalle_demo().model
    assert clip.end_of_text == dalle.n_text_vocab
    assert clip.n_text <= dalle.n_text
    assert clip.image_size == dalle.image_size


def test_every_name_loads_a_run():
    assert len(presets.names()) >= 7
    for name in presets.names():
        kinds = {"dalle": DalleRun, "clip": ClipRun}
        assert isinstance(presets.load(name), kinds.get(name.partition("_")[0], DvaeRun))


def test_fields_can_be_changed_while_loading():
    run = presets.load("dalle_demo", steps=7)
    assert run == dataclasses.replace(presets.dalle_demo(), steps=7)


def test_a_file_of_the_users_own_is_a_preset():
    assert presets.load(f"{runs.__file__}:dalle") == runs.dalle()
    assert presets.load(f"{runs.__file__}:dvae") == runs.dvae()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match=r"no preset is called 'dalle_13b'; there are .*dalle_12b"):
        presets.load("dalle_13b")


@pytest.mark.parametrize("name", ["load", "_dalle", "names", "DalleRun"])
def test_other_names_of_the_module_are_no_presets(name):
    with pytest.raises(InputError, match="no preset is called"):
        presets.load(name)


@pytest.mark.parametrize(
    ("content", "function", "sentence"),
    [
        (None, "run", "there is no file"),
        ("", "run", "has no function run"),
        ("run = 3", "run", "has no function run"),
        ("def run(): return 3", "run", "gives a int; .* gives a DvaeRun, DalleRun or ClipRun"),
        ("\ndef run(): 1 / 0", "run", r"ZeroDivisionError: division by zero \(line 2\); correct"),
        ("def run(batch): pass", "run", "cannot be made: TypeError: .* missing 1 required"),
        ("def run(: x", "run", "cannot be made: SyntaxError"),
        ("import not_there", "run", r"ModuleNotFoundError: .*'not_there' \(line 1\)"),
        (
            "from pipeline.config import DvaeConfig\ndef run(): return DvaeConfig(image_size=60)",
            "run",
            "^image_size is 60",
        ),
    ],
)
def test_a_file_without_a_preset_is_refused(tmp_path, content, function, sentence):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=sentence):
        presets.load(f"{path}:{function}")


def test_a_file_may_define_dataclasses(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from pipeline import presets\n"
        "@dataclass\n"
        "class Size:\n"
        "    batch: int = 4\n"
        "def run(): return presets.load('dalle_demo', batch=Size().batch)\n"
    )
    assert presets.load(f"{path}:run").batch == 4
