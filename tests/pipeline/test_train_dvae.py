import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import train_dvae
from pipeline.config import FsqConfig
from pipeline.console import InputError
from pipeline.data.images import centre_crop, decode_image
from pipeline.data.pictures import GAP, to_uint8
from pipeline.data.shards import ShardReader
from pipeline.models.dvae import load_dvae
from pipeline.train_dvae import DvaeStage
from pipeline.training.engine import PlainEngine
from tests import tiny as runs
from tests.tiny import arguments, curve, losses, train

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


FSQ = FsqConfig(image_size=runs.IMAGE_SIZE, levels=(4, 3, 2), n_hid=8, n_init=8, n_blk_per_group=1)
KINDS = {"dvae": {}, "fsq": {"model": FSQ, "beta": None, "tau": None}}


def stage_of(tiny, **changes):
    return DvaeStage(dataclasses.replace(runs.dvae(), **changes), str(tiny.pairs))


def finished(tiny, out, **changes):
    """A finished run: its folder and its engine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engine = train(stage_of(tiny, **changes), out)
    torch.set_num_threads(threads)
    return out, engine


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    return finished(tiny, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def trained_fsq(tiny, tmp_path_factory):
    return finished(tiny, tmp_path_factory.mktemp("trained-fsq"), **KINDS["fsq"])


@pytest.fixture
def finished_run(request, kind):
    """The run of either kind."""
    return request.getfixturevalue("trained" if kind == "dvae" else "trained_fsq")


def test_the_loss_falls_and_the_schedules_are_logged(trained):
    out, _ = trained
    lines = curve(out)
    assert lines[-1]["nll"] < lines[0]["nll"] - 0.1
    assert lines[0]["beta"] == 0.0
    assert lines[0]["tau"] == 1.0
    assert lines[10]["beta"] == pytest.approx(0.5)
    assert lines[10]["tau"] == pytest.approx(0.625)
    for line in lines:
        assert line["loss"] == pytest.approx(line["nll"] + line["beta"] * line["kl"], rel=1e-5)


def test_validation_tells_elbo_psnr_and_use_of_the_codebook(trained):
    out, _ = trained
    assert [line["step"] for line in curve(out, "val")] == [5, 10, 15, 20]
    for line in curve(out, "val"):
        assert math.isfinite(line["relaxed_elbo"])
        assert math.isfinite(line["hard_elbo"])
        assert 5 < line["psnr_db"] < 40
        assert 1 <= line["perplexity"] <= line["codes_used"] <= runs.N_CODES
        assert 0 <= line["kl_per_code"] <= math.log(runs.N_CODES)


def test_the_export_holds_the_averaged_weights(tiny, trained):
    out, engine = trained
    dvae, _ = load_dvae(out)
    for name, value in engine.gather("ema").items():
        assert torch.equal(dvae.state_dict()[name], value)
    assert ShardReader(tiny.pairs).fingerprint in (out / "model.json").read_text()


def test_reconstructions_stand_under_their_originals(tiny, trained):
    out, _ = trained
    with Image.open(out / "reconstructions/final.png") as picture:
        sheet = np.asarray(picture)
    size, stage = runs.IMAGE_SIZE, stage_of(tiny)
    assert sheet.shape == (2 * (size + GAP) - GAP, 8 * (size + GAP) - GAP, 3)
    ((reader, side),) = stage.data.val
    pixels = decode_image(reader[side.rows(np.array([0]))[0]]["image"])
    np.testing.assert_array_equal(sheet[:size, :size], centre_crop(pixels, size))
    dvae, _ = load_dvae(out)
    original_BCYX = torch.from_numpy(centre_crop(pixels, size)).permute(2, 0, 1)[None] / 255
    made = to_uint8(dvae.decode(dvae.encode(original_BCYX)))[0]
    assert np.abs(sheet[size + GAP :, :size].astype(int) - made).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_never_stopped_bit_for_bit(tiny, kind, finished_run, tmp_path, monkeypatch):
    out, _ = finished_run
    validate = DvaeStage.validate

    def stop(self, engine, folder):
        if engine.updates == 10:
            raise KeyboardInterrupt
        return validate(self, engine, folder)

    monkeypatch.setattr(DvaeStage, "validate", stop)
    with pytest.raises(KeyboardInterrupt):
        train(stage_of(tiny, **KINDS[kind]), tmp_path)
    monkeypatch.setattr(DvaeStage, "validate", validate)
    train(stage_of(tiny, **KINDS[kind]), tmp_path)
    assert len(curve(out)) == runs.STEPS
    assert curve(tmp_path) == curve(out)
    assert curve(tmp_path, "val") == curve(out, "val")
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_fsq_trains_without_noise_and_without_kl(tiny, trained_fsq):
    out, _ = trained_fsq
    lines = curve(out)
    assert lines[-1]["nll"] < lines[0]["nll"] - 0.1
    for line in lines:
        assert line["loss"] == line["nll"]
        assert line["kl"] == 0
        assert not {"beta", "tau"} & line.keys()
    for line in curve(out, "val"):
        assert line["relaxed_elbo"] == line["hard_elbo"]
        assert line["kl_per_code"] == 0
        assert 1 <= line["perplexity"] <= line["codes_used"] <= 24
    assert stage_of(tiny, **KINDS["fsq"]).noise([3], torch.device("cpu")) is None


def test_the_export_of_fsq_is_a_tokenizer_as_any(trained_fsq):
    out, engine = trained_fsq
    dvae, _ = load_dvae(out)
    assert dvae.config == FSQ
    for name, value in engine.gather("ema").items():
        assert torch.equal(dvae.state_dict()[name], value)
    codes = dvae.encode(torch.rand(2, 3, runs.IMAGE_SIZE, runs.IMAGE_SIZE))
    assert codes.shape == (2, runs.GRID, runs.GRID)
    assert 0 <= codes.min() <= codes.max() < 24


# ---- noise, batches, the command


def test_noise_is_a_function_of_seed_and_position_alone(tiny):
    stage, cpu = stage_of(tiny), torch.device("cpu")
    together = stage.noise([3, 4, 11], cpu)
    assert torch.equal(together[1], stage.noise([4], cpu)[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(stage_of(tiny, seed=1).noise([3], cpu)[0], together[0])


def test_noise_is_standard_gumbel(tiny):
    noise = stage_of(tiny).noise(list(range(100)), torch.device("cpu"))
    assert torch.isfinite(noise).all()
    # mean is Euler's constant, variance pi^2 / 6
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.06)


def shares(stage, engine, world, micro):
    """Loss and gradient as ``world`` ranks with micro-batches of ``micro`` add them up."""
    batches = []
    for rank in range(world):
        engine.rank, engine.world, engine.micro_batch = rank, world, micro
        stage.prepare(engine)
        batches += stage.micro_batches(8)
    engine.rank, engine.world = 0, 1
    totals = sum(stage.counts(batch) for batch in batches)
    engine.model.zero_grad()
    loss = 0.0
    for batch in batches:
        share, _ = stage.loss(engine, batch, totals, 10)
        engine.backward(share)
        loss += share.item()
    return loss, torch.cat([p.grad.flatten() for p in engine.model.parameters()])


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (1, 3), (2, 4), (4, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_does_not_know_how_the_batch_is_cut(tiny, kind, world, micro):
    stage = stage_of(tiny, **KINDS[kind])
    engine = PlainEngine(stage.build, stage.run)
    loss, gradient = shares(stage, engine, 1, 8)
    cut_loss, cut_gradient = shares(stage, engine, world, micro)
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(cut_gradient, gradient, rtol=1e-3, atol=1e-6)


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train_dvae", *map(str, words)])
    train_dvae.main()


def test_the_command_trains(tiny, tmp_path, monkeypatch):
    call(monkeypatch, *arguments("dvae", tiny, tmp_path / "out", "dvae"))
    assert len(losses(tmp_path / "out")) == runs.STEPS


def test_the_command_trains_on_several_sets(tiny, tmp_path, monkeypatch):
    words = arguments("dvae", tiny, tmp_path / "out", "dvae")
    call(monkeypatch, *words, "--data", tiny.pairs, tiny.pairs, "--mix", 2, 1, "--block-order")
    assert len(losses(tmp_path / "out")) == runs.STEPS
    made_of = json.loads((tmp_path / "out/model.json").read_text())["made_of"]
    assert made_of["pairs"] == [ShardReader(tiny.pairs).fingerprint] * 2
    assert made_of["weights"] == [2, 1]
    assert made_of["block"] == 2048


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"preset": "dalle_demo"},
            "dalle_demo trains the transformer; stage 1 takes a dvae preset",
        ),
        ({"preset": f"{runs.__file__}:huge"}, "has no function huge"),
        ({"data": "nowhere"}, "nowhere/manifest.json cannot be read"),
        ({"deepspeed_config": "ds_configs/zero3_cpu.json"}, "is for the deepspeed launcher"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(tiny, tmp_path, monkeypatch, changes, sentence):
    monkeypatch.chdir(runs.ROOT)
    with pytest.raises(InputError, match=sentence):
        call(monkeypatch, *arguments("dvae", tiny, tmp_path / "out", "dvae", **changes))
    assert not (tmp_path / "out").exists()


def test_pictures_smaller_than_the_model_are_named(tiny, tmp_path):
    model = dataclasses.replace(runs.DVAE, image_size=64)
    with pytest.raises(InputError, match=r"picture .*64"):
        train(stage_of(tiny, model=model), tmp_path)
