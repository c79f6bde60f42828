import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from pipeline import train_clip
from pipeline.console import InputError
from pipeline.data.clip_tokens import open_tokens
from pipeline.data.images import augment_clip, centre_crop
from pipeline.models.clip import Clip, load_clip
from pipeline.train_clip import ClipStage
from pipeline.training.engines.engine import PlainEngine
from pipeline.training.optimizer import parameter_groups
from pipeline.weights import load_weights
from tests import tiny as runs
from tests.tiny import arguments, curve, launched, losses, plain, train, whole

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

CPU_CONFIG = runs.ROOT / "ds_configs/zero3_cpu.json"


def stage_of(tiny, **changes):
    run = dataclasses.replace(runs.clip(), **changes)
    return ClipStage(run, str(tiny.pairs), str(tiny.tokenizer))


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The folder of a finished run of plain PyTorch, and its engine."""
    out = tmp_path_factory.mktemp("clip") / "out"
    return out, train(stage_of(tiny), out)


def test_a_run_learns_and_leaves_a_folder_that_describes_itself(trained, tiny):
    out, engine = trained
    run = runs.clip()
    first, last = (np.mean(part) for part in (losses(out)[:3], losses(out)[-3:]))
    # guessing among eight
    assert last < np.log(8) < first
    clip, artifact = load_clip(out)
    assert clip.config == run.model
    assert not clip.training
    tokens = open_tokens(out / "tokenizer", clip.config)
    assert artifact.made_of["tokenizer"] == tokens.fingerprint
    assert artifact.made_of["updates"] == run.steps
    averaged = whole(engine, "ema")
    for name, value in clip.state_dict().items():
        assert torch.equal(value, averaged[name]), name
    assert (out / "done.json").is_file()
    with pytest.raises(InputError, match="holds a clip, a dalle is needed"):
        load_weights(out, "dalle")


def test_validation_is_the_loss_of_figure_3_and_counts_who_is_found(trained, tiny):
    out, engine = trained
    stage = stage_of(tiny)
    stage.prepare(engine)
    images, text = stage._batch(stage._val, 0)
    with torch.no_grad():
        image_BE, text_BE, scale = engine.model(images, text)
    logits = (scale * image_BE @ text_BE.T).double().numpy()

    def cross_entropy(table):
        return np.mean(np.log(np.exp(table).sum(1)) - np.diag(table))

    last = curve(out, "val")[-1]
    assert last["loss"] == pytest.approx(
        (cross_entropy(logits) + cross_entropy(logits.T)) / 2, rel=1e-5
    )
    assert last["top_1"] == np.mean(logits.argmax(1) == np.arange(8))


def test_a_batch_is_pictures_with_their_own_captions(tiny):
    stage = stage_of(tiny)
    stage.prepare(PlainEngine(stage.build, stage.run))
    ((images, text),) = stage.micro_batches(8)
    assert images.shape == (8, 3, 32, 32)
    assert text.shape == (8, runs.N_TEXT)
    reader = stage.data.readers[0]
    ids = stage._train.batch_at(8)[1]
    tokens = stage.tokens.encode_batch([reader[int(i)]["caption"] for i in ids])
    assert torch.equal(text, tokens)
    shown = [centre_crop(reader.decode(reader[int(i)]["image"], 32), 32) for i in ids]
    # the pictures are square, so the crop is all of them
    assert np.array_equal((images * 255).round().permute(0, 2, 3, 1).numpy(), np.stack(shown))


def test_the_crop_is_a_square_of_full_height_and_never_mirrored():
    columns = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None], (20, 60, 3))
    rng = np.random.default_rng(0)
    crops = [augment_clip(columns, 20, rng) for _ in range(40)]
    starts = {int(crop[0, 0, 0]) for crop in crops}
    assert min(starts) < 5
    assert max(starts) > 35
    for crop in crops:
        assert np.array_equal(crop, columns[:, crop[0, 0, 0] : crop[0, 0, 0] + 20])
    with pytest.raises(InputError, match="60x20 pixels is smaller than the 21x21 asked for"):
        augment_clip(columns, 21, rng)


def test_gains_biases_and_the_scale_do_not_decay():
    model = Clip(runs.clip().model)
    groups = parameter_groups(model, runs.clip().optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        # as open_clip's training does
        is_left_out = p.ndim < 2 or "ln_" in name or "bias" in name or "logit_scale" in name
        assert decay[name] == (0 if is_left_out else 0.2), name
    assert sum(value > 0 for value in decay.values()) == 22


def test_captions_end_in_the_end_of_text_where_they_are_cut_too(tiny):
    config = dataclasses.replace(runs.clip().model, n_text=6)
    tokens = ClipStage(
        dataclasses.replace(runs.clip(), model=config), str(tiny.pairs), str(tiny.tokenizer)
    ).tokens
    short, long, none = tokens.encode_batch(["a", "a small red circle in the middle", ""]).tolist()
    end = config.end_of_text
    assert short.index(end) < 5
    assert set(short[short.index(end) + 1 :]) == {0}
    assert long.index(end) == 5
    assert none == [end, 0, 0, 0, 0, 0]


def test_accumulation_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r'cuts the batch into 2 parts a rank, .*_steps": 1'):
        train(stage_of(tiny), tmp_path / "out", micro_batch=4)


def test_too_few_held_out_pictures_for_the_ranks_are_refused(tiny):
    stage = stage_of(tiny)
    engine = PlainEngine(stage.build, stage.run)
    engine.world = 16
    stage.run = dataclasses.replace(stage.run, batch=16)
    with pytest.raises(InputError, match="8 pictures are held out, and 16 ranks"):
        stage.prepare(engine)


def test_a_tokenizer_with_too_many_pieces_is_refused(tiny):
    model = dataclasses.replace(runs.clip().model, n_vocab=300)
    with pytest.raises(InputError, match=r"room for 299 and the end of text; .* --vocab 299"):
        stage_of(tiny, model=model)


def test_a_preset_of_another_kind_is_refused(tiny, tmp_path, monkeypatch):
    words = arguments("clip", tiny, tmp_path / "out", "clip", preset="dalle_demo")
    monkeypatch.setattr(sys, "argv", ["train_clip", *words])
    with pytest.raises(InputError, match="dalle_demo trains the transformer; take a clip preset"):
        train_clip.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.dist
def test_a_killed_run_goes_on_to_the_same_bits(trained, tiny, tmp_path):
    killed = plain("clip", *arguments("clip", tiny, tmp_path / "out", "clip_between_saves_killed"))
    assert killed.returncode != 0
    again = plain("clip", *arguments("clip", tiny, tmp_path / "out", "clip"))
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "out") == losses(trained[0])
    found, wanted = (load_clip(out)[1].fingerprint for out in (tmp_path / "out", trained[0]))
    assert found == wanted


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_of_deepspeed_learn_what_one_of_pytorch_does(trained, tiny, tmp_path, stage):
    ds = json.loads(CPU_CONFIG.read_text())
    if stage == 2:
        ds["zero_optimization"] = {"stage": 2}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    out = tmp_path / "out"
    done = launched("clip", 2, tmp_path / "ds.json", *arguments("clip", tiny, out, "clip"))
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(out), losses(trained[0]), rtol=2e-4)
    for kind in ("train", "val"):
        for mine, one in zip(curve(out, kind), curve(trained[0], kind), strict=True):
            assert mine["top_1"] == pytest.approx(one["top_1"], abs=0.13)
    scales = [[line["scale"] for line in curve(o)] for o in (out, trained[0])]
    np.testing.assert_allclose(*scales, rtol=1e-4)
    assert scales[1][0] != scales[1][-1]
    mine, one = (load_clip(o)[0].state_dict() for o in (out, trained[0]))
    for name, value in one.items():
        assert (mine[name] - value).norm() <= 1e-2 * max(value.norm(), 0.05), name
