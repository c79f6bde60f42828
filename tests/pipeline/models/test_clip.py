"""Against open_clip: ``golden/clip_tiny`` has random weights, inputs, and what it made of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import ClipConfig, TowerConfig
from pipeline.console import InputError
from pipeline.models.clip import MEAN, STD, Clip
from pipeline.models.clip_import import load_foreign

GOLDEN = Path(__file__).parent / "golden/clip_tiny"


@pytest.fixture(scope="module")
def model():
    path = GOLDEN / "open_clip_model.safetensors"
    return load_foreign(path, quick_gelu=True, vision_head_width=32, text_head_width=12)


def test_shapes_give_the_config(model):
    c = json.loads((GOLDEN / "config.json").read_text())
    v, t = c["vision_cfg"], c["text_cfg"]
    assert model.config == ClipConfig(
        image_size=v["image_size"], patch_size=v["patch_size"],
        vision=TowerConfig(v["width"], v["layers"], v["width"] // v["head_width"]),
        n_text=t["context_length"], n_vocab=t["vocab_size"],
        text=TowerConfig(t["width"], t["layers"], t["heads"]), n_embed=c["embed_dim"],
        quick_gelu=c["quick_gelu"],
    )  # fmt: skip


@torch.inference_mode()
def test_features_and_logits_are_those_of_open_clip(model):
    expected = load_file(GOLDEN / "expected.safetensors")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    # its pictures are normalised already
    image, text, scale = model(expected["image"] * std + mean, expected["tokens"])
    torch.testing.assert_close(image, expected["image_features"], rtol=0, atol=1e-6)
    torch.testing.assert_close(text, expected["text_features"], rtol=0, atol=1e-6)
    logits = scale * image @ text.T
    torch.testing.assert_close(logits, expected["logits_per_image"], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_what_stands_behind_the_end_of_a_caption_is_not_read(model):
    tokens = load_file(GOLDEN / "expected.safetensors")["tokens"]
    other = tokens.clone()
    other[0, 3:] = torch.arange(len(other[0, 3:])) + 1
    assert torch.equal(model.encode_text(tokens), model.encode_text(other))
    other[0, 1] += 1
    assert not torch.allclose(model.encode_text(tokens)[0], model.encode_text(other)[0], atol=1e-3)


def test_vit_b_32_has_the_parameters_of_openais():
    with torch.device("meta"):
        clip = Clip(ClipConfig())
    assert sum(p.numel() for p in clip.parameters()) == 151_277_313
    assert sum(p.numel() for p in clip.visual.parameters()) == 87_849_216


def test_the_scale_stays_below_a_hundred(model):
    clip = Clip(model.config)
    clip.logit_scale.data.fill_(9.0)
    assert (
        float(clip(torch.rand(1, 3, 32, 32), torch.tensor([[3, 95, *[0] * 10]]))[2].detach())
        <= 100.01
    )


@pytest.mark.parametrize(("sign", "leads"), [(1.0, True), (-1.0, False)])
def test_a_scale_above_the_bound_is_led_back_and_no_further_up(model, sign, leads):
    clip = Clip(model.config)
    for start in (3.0, 9.0):
        clip.logit_scale.data.fill_(start)
        clip.logit_scale.grad = None
        scale = clip(torch.rand(1, 3, 32, 32), torch.tensor([[3, 95, *[0] * 10]]))[2]
        (sign * scale).backward()
        # below the bound it is the exponential's
        want = sign * float(scale.detach()) if leads or start == 3.0 else 0.0
        assert float(clip.logit_scale.grad) == pytest.approx(want)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"patch_size": 30}, "224 does not divide into patches of 30"),
     ({"n_vocab": 1}, "n_vocab is 1"), ({"n_embed": 0}, "n_embed is 0; take at least 1")],
)  # fmt: skip
def test_shapes_that_make_no_model_are_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        ClipConfig(**changes)
    with pytest.raises(InputError, match="width 10 does not divide into 3 heads"):
        TowerConfig(10, 1, 3)
