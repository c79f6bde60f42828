import copy
import dataclasses
import json
import math
import re
import shutil
import sys
from collections import Counter

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
from pipeline.models.dvae import Conv2d, load_dvae
from pipeline.train_dvae import DvaeStage
from pipeline.training.engines.engine import PlainEngine
from tests import tiny as runs
from tests.tiny import arguments, curve, losses, train, whole

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
    for name, value in whole(engine, "ema").items():
        assert torch.equal(dvae.state_dict()[name], value)
    assert ShardReader(tiny.pairs).fingerprint in (out / "model.json").read_text()


def test_every_validation_leaves_reconstructions(trained):
    out, _ = trained
    found = sorted(file.name for file in (out / "reconstructions").iterdir())
    assert found == ["final.png", *(f"step-{s:07d}.png" for s in range(5, runs.STEPS + 1, 5))]


def test_reconstructions_stand_under_their_originals(tiny, trained):
    out, _ = trained
    with Image.open(out / "reconstructions/final.png") as picture:
        sheet = np.asarray(picture)
    size, stage = runs.IMAGE_SIZE, stage_of(tiny)
    ((reader, side),) = stage.data.val
    rows = 2 * math.ceil(len(side) / 8)
    assert sheet.shape == (rows * (size + GAP) - GAP, 8 * (size + GAP) - GAP, 3)
    pixels = decode_image(reader[side.rows(np.array([0]))[0]]["image"])
    np.testing.assert_array_equal(sheet[:size, :size], centre_crop(pixels, size))
    dvae, _ = load_dvae(out)
    original_BCYX = torch.from_numpy(centre_crop(pixels, size)).permute(2, 0, 1)[None] / 255
    made = to_uint8(dvae.decode(dvae.encode(original_BCYX)))[0]
    below = slice(size + GAP, 2 * size + GAP)
    assert np.abs(sheet[below, :size].astype(int) - made).max() <= 1


def stopped_and_resumed(make_stage, out, monkeypatch):
    """A run that was stopped behind its first half, before anything of update 10 was kept."""
    validate = DvaeStage.validate

    def stop(self, engine, folder):
        if engine.updates == 10:
            raise KeyboardInterrupt
        return validate(self, engine, folder)

    with monkeypatch.context() as patch:
        patch.setattr(DvaeStage, "validate", stop)
        with pytest.raises(KeyboardInterrupt):
            train(make_stage(), out)
    train(make_stage(), out)


def assert_same_bits(out, other):
    assert len(curve(other)) == runs.STEPS
    assert curve(out) == curve(other)
    assert curve(out, "val") == curve(other, "val")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_never_stopped_bit_for_bit(tiny, kind, finished_run, tmp_path, monkeypatch):
    out, _ = finished_run
    stopped_and_resumed(lambda: stage_of(tiny, **KINDS[kind]), tmp_path, monkeypatch)
    assert_same_bits(tmp_path, out)


def test_pictures_by_reference_train_and_resume_as_those_of_the_set(
    tiny, trained, tmp_path, monkeypatch
):
    out, _ = trained
    scenes, pairs = tmp_path / "scenes", tmp_path / "pairs"
    shutil.copytree(tiny.pairs.parent / "scenes", scenes)
    runs.ingest([scenes], pairs, runs.IMAGE_SIZE, val_fraction=0.2, bytes="reference")
    assert ShardReader(pairs).made_of["bytes"] == "reference"
    stopped_and_resumed(lambda: DvaeStage(runs.dvae(), str(pairs)), tmp_path / "out", monkeypatch)
    assert_same_bits(tmp_path / "out", out)
    # it was these files that were read
    shutil.rmtree(scenes)
    with pytest.raises(InputError, match="scenes does not exist: bring it back"):
        train(DvaeStage(runs.dvae(), str(pairs)), tmp_path / "again")


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
    for name, value in whole(engine, "ema").items():
        assert torch.equal(dvae.state_dict()[name], value)
    codes = dvae.encode(torch.rand(2, 3, runs.IMAGE_SIZE, runs.IMAGE_SIZE))
    assert codes.shape == (2, runs.GRID, runs.GRID)
    assert 0 <= codes.min() <= codes.max() < 24


# ---- validation


def with_codes_apart(engine, stage):
    """Make the untrained model tell pictures apart, and its codes matter."""
    module = engine.module
    with torch.no_grad():
        output = module.encoder.blocks.output.conv
        output.w.mul_(20)
        module.decoder.blocks.input.w.mul_(2)
        images, _ = stage._val.batch_at(0)
        output.b.sub_(module.logits(images).mean(dim=(0, 2, 3)))


def held_out(stage):
    """Every picture that a validation looks at, with its Gumbel noise, in float64."""
    for position in range(0, stage._val_images, stage._val_batch):
        images, _ = stage._val.batch_at(position)
        for i, image in enumerate(images):
            yield image[None].double(), stage.noise([position + i], image.device).double()


def brute_force(module, stage, tau):
    """The figures of a validation from their definitions, a picture at a time, in float64."""
    module = copy.deepcopy(module).double()
    for part in module.modules():
        if isinstance(part, Conv2d):
            part.compute_dtype, part.full_precision = torch.float64, False
    sums, codes = Counter(), []

    def nll(x, z):
        """Minus the log of the logit-Laplace density; and the picture."""
        mu, ln_b = module.decoder.blocks(z).chunk(2, dim=1)
        b, logit = torch.exp(ln_b), torch.log(x / (1 - x))
        density = torch.exp(-(logit - mu).abs() / b) / (2 * b * x * (1 - x))
        return -torch.log(density).sum().item(), ((torch.sigmoid(mu) - 0.1) / 0.8).clamp(0, 1)

    def one_hot(logits):
        return (logits == logits.amax(dim=1, keepdim=True)).double()

    n = 0
    for image, noise in held_out(stage):
        x = 0.1 + 0.8 * image
        logits = module.encoder.blocks(x)
        q = torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)
        weights = torch.exp((logits + noise) / tau)
        sums["kl"] += (q * torch.log(q * q.shape[1])).sum().item()
        sums["relaxed"] += nll(x, weights / weights.sum(dim=1, keepdim=True))[0]
        sums["hard"] += nll(x, one_hot(logits + noise))[0]
        _, picture = nll(x, one_hot(logits))
        sums["error"] += (picture - image).pow(2).mean().item()
        codes += logits.argmax(dim=1).flatten().tolist()
        n += 1
    values = image.numel()
    shares = [count / len(codes) for count in Counter(codes).values()]
    return {
        "relaxed_elbo": -(sums["relaxed"] + sums["kl"]) / n / values,
        "hard_elbo": -(sums["hard"] + sums["kl"]) / n / values,
        "kl_per_code": sums["kl"] / len(codes),
        "psnr_db": 10 * math.log10(n / sums["error"]),
        "codes_used": len(shares),
        "perplexity": math.prod(share**-share for share in shares),
        "collapse": 0.0,
    }


@torch.no_grad()
def test_validation_is_what_its_definitions_say(tiny, tmp_path):
    stage = stage_of(tiny, batch=4)
    engine = PlainEngine(stage.build, stage.run)
    stage.prepare(engine)
    with_codes_apart(engine, stage)
    engine.updates = 10  # half of the way down the temperature
    got = stage.validate(engine, tmp_path)
    wanted = brute_force(engine.module, stage, tau=0.625)
    assert got == pytest.approx(wanted, rel=1e-4)
    # the test can tell the three decoders' inputs apart
    assert abs(wanted["hard_elbo"] - wanted["relaxed_elbo"]) > 0.01
    assert wanted["codes_used"] > 5
    engine.updates = 10**6  # the temperature is 1/4: nearer
    later = stage.validate(engine, tmp_path)
    assert later["hard_elbo"] == got["hard_elbo"]
    gaps = [abs(v["hard_elbo"] - v["relaxed_elbo"]) for v in (got, later)]
    assert gaps[1] < gaps[0]


FINE = {"codes_used": 20.0, "perplexity": 8.0}


@pytest.mark.parametrize(
    ("now", "before", "problems"),
    [
        (FINE, {}, []),
        (FINE, {"codes_used": 39.0, "perplexity": 15.0}, []),
        (FINE, {"step": 5}, []),
        (
            FINE | {"codes_used": 9.0},
            FINE,
            ["codes_used is 9 of 100, below 10"],
        ),
        (FINE | {"perplexity": 4.96}, {}, ["perplexity is 4.96 of 100, below 5"]),
        (
            FINE,
            {"codes_used": 40.0, "perplexity": 60.0},
            ["codes_used fell from 40 to 20 of 100", "perplexity fell from 60 to 8 of 100"],
        ),
    ],
)
def test_too_little_use_of_the_codebook_is_told_in_numbers(now, before, problems):
    assert train_dvae.too_little_use(now, before, 100) == problems


@pytest.fixture
def warnings(monkeypatch, caplog):
    monkeypatch.setattr(train_dvae.log, "propagate", True)
    return caplog


def validated(stage, engine, out, updates):
    engine.updates = updates
    return stage.validate(engine, out)["collapse"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_collapsed_codebook_is_an_alarm_after_the_warm_up(tiny, tmp_path, warnings, kind):
    stage = stage_of(tiny, **KINDS[kind])
    engine = PlainEngine(stage.build, stage.run)
    stage.prepare(engine)
    with torch.no_grad():
        engine.module.encoder.blocks.output.conv.w.zero_()  # the same code everywhere
    warmup = runs.STEPS if kind == "dvae" else runs.STEPS // 10
    assert validated(stage, engine, tmp_path, warmup - 1) == 0
    assert not warnings.messages
    assert validated(stage, engine, tmp_path, warmup) == 1
    way_out = {
        "dvae": "raise the KL weight (beta is 1), or let the temperature fall later (tau is 0.25), "
        "or lower the step size (lr is 0.0003)",
        "fsq": "lower the step size (lr is 0.00293)",
    }
    assert warnings.messages == [
        f"the codebook collapses at update {warmup}: codes_used is 1 of 24, below 2.4, perplexity "
        f"is 1 of 24, below 1.2; stop and change the preset: {way_out[kind]}"
    ]


def test_a_codebook_that_halves_is_an_alarm(tiny, tmp_path, warnings):
    stage = stage_of(tiny)
    engine = PlainEngine(stage.build, stage.run)
    stage.prepare(engine)
    with_codes_apart(engine, stage)
    # 10: before the warm-up's end; 30 is what a run that was killed had left behind
    lines = [
        {"kind": kind, "step": step, "codes_used": used, "perplexity": 1.0}
        for kind, step, used in (
            ("val", 10, 400), ("val", 20, 12), ("val", 25, 24), ("train", 26, 1), ("val", 30, 400),
        )
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert validated(stage, engine, tmp_path, 20) == 0
    assert validated(stage, engine, tmp_path, 25) == 0
    with torch.no_grad():
        # a third of the codes is never the argmax
        engine.module.encoder.blocks.output.conv.b[:14] -= 1e4
    assert validated(stage, engine, tmp_path, 30) == 1
    assert re.search(r"update 30: codes_used fell from 24 to \d+ of 24; stop", warnings.messages[0])


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
            "dalle_demo trains the transformer; take a dvae preset",
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
