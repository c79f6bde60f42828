import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.console import InputError
from pipeline.data.pictures import save_comparison, to_uint8
from pipeline.generation.sampling import generate, pictures
from pipeline.models.dalle import load_dalle
from pipeline.models.dvae import load_dvae
from pipeline.train_dalle import DalleStage
from pipeline.train_dalle import main as train_dalle
from pipeline.training import loop
from pipeline.training.engines.engine import PlainEngine
from pipeline.training.watching import samples
from tests import tiny as runs
from tests.tiny import ROOT, arguments, curve, launched, start, whole

STEPS = [f"step-{step:07d}.png" for step in (5, 10, 15, 20)]
COUNT = 5


def train(tiny, out, dvae=None):
    """The engine of a whole run, and the state of torch's generator after it."""
    stage = DalleStage(
        runs.dalle(), str(tiny.tokens), str(tiny.tokenizer), sample_dvae=dvae, sample_count=COUNT
    )
    engine = PlainEngine(stage.build, stage.run)
    loop.train(stage, engine, out)
    return engine, torch.get_rng_state()


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def wanted(tiny, weights, out):
    """The sheet that pipeline.sample's own functions make of a folder of weights."""
    stage = DalleStage(runs.dalle(), str(tiny.tokens), str(tiny.tokenizer), sample_count=COUNT)
    sheet = stage._make_sheet(str(tiny.dvae))
    model, dvae = load_dalle(weights)[0], load_dvae(tiny.dvae)[0]
    seeds = list(range(COUNT))
    codes = generate(model, sheet._text_BT, seeds, width=COUNT)
    both = (pictures(dvae, c, seeds, COUNT) for c in (sheet._image_BI, codes))
    save_comparison(out, *map(to_uint8, both))
    return read(out)


def export_raw(run, out):
    done = start(
        [sys.executable, "-m", "pipeline.export", "--run", run, "--out", out, "--raw"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_samples_come_with_every_validation_and_change_no_bit(tiny, tmp_path, one_cpu_thread):
    drawn, state = train(tiny, tmp_path / "drawn", str(tiny.dvae))
    without, other_state = train(tiny, tmp_path / "without")
    assert sorted(f.name for f in (tmp_path / "drawn" / "samples").iterdir()) == STEPS
    assert not (tmp_path / "without" / "samples").exists()
    for kind in ("train", "val"):
        assert curve(tmp_path / "drawn", kind) == curve(tmp_path / "without", kind)
    for key in ("weight", "ema"):
        ours, theirs = whole(drawn, key), whole(without, key)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(state, other_state)


def test_they_are_those_of_the_sampler_with_the_weights_of_the_update(
    tiny, tmp_path, one_cpu_thread
):
    train(tiny, tmp_path / "run", str(tiny.dvae))
    weights = export_raw(tmp_path / "run", tmp_path / "weights")
    sheets = [read(tmp_path / "run" / "samples" / name) for name in STEPS]
    assert np.array_equal(sheets[-1], wanted(tiny, weights, tmp_path / "sheet.png"))
    side = runs.IMAGE_SIZE
    for sheet in sheets[:-1]:
        # the same held-out pictures above, the samples of other weights below
        assert np.array_equal(sheet[:side], sheets[-1][:side])
        assert not np.array_equal(sheet[side:], sheets[-1][side:])


@pytest.mark.dist
def test_sharded_parameters_are_gathered_and_nothing_changes(tiny, tmp_path, one_cpu_thread):
    # nothing stays gathered after a pass, as in a model that is larger than what may be live
    ds = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    ds["zero_optimization"] |= {"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 0}
    zero3 = tmp_path / "ds.json"
    zero3.write_text(json.dumps(ds))
    for out, more in (("drawn", {"sample-dvae": tiny.dvae, "sample-count": COUNT}), ("not", {})):
        done = launched(
            "dalle", 2, zero3, *arguments("dalle", tiny, tmp_path / out, "dalle", **more)
        )
        assert done.returncode == 0, done.stderr
    for kind in ("train", "val"):
        assert curve(tmp_path / "drawn", kind) == curve(tmp_path / "not", kind)
    weights = export_raw(tmp_path / "drawn", tmp_path / "weights")
    last = read(tmp_path / "drawn" / "samples" / STEPS[-1])
    assert np.array_equal(last, wanted(tiny, weights, tmp_path / "sheet.png"))


def spoken(monkeypatch):
    warned = []
    monkeypatch.setattr(samples.log, "warning", lambda form, *v: warned.append(form % v))
    return warned


def test_a_model_that_has_no_room_is_not_drawn_and_that_is_said_once(
    tiny, tmp_path, monkeypatch, one_cpu_thread
):
    warned = spoken(monkeypatch)
    monkeypatch.setattr(samples, "free_bytes", lambda device: 1000)
    train(tiny, tmp_path, str(tiny.dvae))
    assert not (tmp_path / "samples").exists()
    assert len(warned) == 1
    assert "pipeline.sample draws them from checkpoints" in warned[0]
    assert len(curve(tmp_path)) == runs.STEPS


def test_free_memory_is_that_of_this_machine():
    assert 2**28 < samples.free_bytes(torch.device("cpu")) < 2**50


def test_weights_that_are_no_numbers_end_no_run(tiny, tmp_path, monkeypatch):
    warned = spoken(monkeypatch)
    stage = DalleStage(runs.dalle(), str(tiny.tokens), str(tiny.tokenizer), sample_count=2)
    engine = PlainEngine(stage.build, stage.run)
    with torch.no_grad():
        engine.module.image_head.weight.fill_(torch.nan)
    stage._make_sheet(str(tiny.dvae)).draw(engine, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
    assert "no samples: the model gives logits that are no numbers" in warned[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sample-count": 0}, "--sample-count is 0; take 1 to 64"),
        ({"sample-count": 65}, "--sample-count is 65; take 1 to 64"),
        ({"sample-dvae": "other"}, "was made by dVAE .*encode the pictures again"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_training(
    tiny, tmp_path, monkeypatch, changes, sentence
):
    changes = {
        name: tiny.other_dvae if value == "other" else value for name, value in changes.items()
    }
    words = arguments("dalle", tiny, tmp_path / "out", "dalle", **changes)
    monkeypatch.setattr("sys.argv", ["train", *words])
    with pytest.raises(InputError, match=sentence):
        train_dalle()
    assert not (tmp_path / "out").exists()


def test_a_small_held_out_side_gives_fewer(tiny):
    stage = DalleStage(runs.dalle(), str(tiny.tokens), str(tiny.tokenizer), sample_count=64)
    n = sum(len(side) for _, side in stage.data.val)
    assert len(stage._make_sheet(str(tiny.dvae))._text_BT) == n < 64
