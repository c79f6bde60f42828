import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import as_dict
from pipeline.console import InputError
from pipeline.data.clip_tokens import OwnTokens
from pipeline.data.images import resize_area
from pipeline.generation.rerank import BATCH, ClipScorer, LikelihoodScorer
from pipeline.models.clip import Clip
from pipeline.models.dalle import NO_TOKEN
from pipeline.weights import save_weights
from tests import tiny as runs
from tests.pipeline.generation.helpers import random_captions, random_dalle, tiny_config

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    clip = Clip(runs.clip().model)
    tokens = OwnTokens(tiny.tokenizer, clip.config)
    tokens.copy_to(out / "tokenizer")
    made_of = {"tokenizer": tokens.fingerprint}
    save_weights(out, "clip", as_dict(clip.config), clip.state_dict(), made_of)
    return out


@pytest.fixture(scope="module")
def many():
    """70 captions, some of them twice, and pictures of the model's size."""
    images = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
    return [f"a picture of number {i * i % 50}" for i in range(70)], images


def test_a_score_is_the_cosine_of_the_models_features(folder, many):
    scorer = ClipScorer(folder)
    captions, images = many
    scores = scorer.score(captions, images)
    assert scores.shape == (70,)
    assert scores.dtype == np.float64
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    image = scorer._clip.encode_image(pictures)
    text = scorer._clip.encode_text(scorer._tokens.encode_batch(captions))
    np.testing.assert_allclose(scores, (image * text).sum(1).numpy(), atol=1e-6)
    assert scores.std() > 1e-2


def test_a_score_hangs_on_no_other_picture(folder, many):
    scorer = ClipScorer(folder)
    captions, images = many
    scores = scorer.score(captions, images)
    for part in (slice(0, 1), slice(5, 9), slice(40, 40 + BATCH), slice(69, 70), slice(0, 0)):
        assert np.array_equal(scorer.score(captions[part], images[part]), scores[part])


def test_pictures_of_other_sizes_are_resized(folder, many):
    scorer = ClipScorer(folder)
    captions, images = many[0][:3], many[1][:3]
    large = images.repeat(2, 1).repeat(2, 2)
    assert np.array_equal(scorer.score(captions, large), scorer.score(captions, images))
    wide = np.concatenate([large[:, :, :8], large, large[:, :, -8:]], axis=2)
    assert np.array_equal(scorer.score(captions, wide), scorer.score(captions, images))
    small = np.stack([resize_area(image, 16, 16) for image in images])
    bicubic = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in small]
    found = scorer.score(captions, small)
    assert np.array_equal(found, scorer.score(captions, np.stack(list(map(np.asarray, bicubic)))))


def test_as_many_captions_as_pictures(folder, many):
    with pytest.raises(ValueError, match="2 captions of 70 pictures"):
        ClipScorer(folder).score(["a", "b"], many[1])


def test_another_tokenizer_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "clip")
    path = tmp_path / "clip/model.json"
    content = json.loads(path.read_text())
    config, made_of = content["config"], {"tokenizer": "0" * 64}
    state = ClipScorer(folder)._clip.state_dict()
    save_weights(tmp_path / "clip", "clip", config, state, made_of)
    with pytest.raises(InputError, match=r"was trained with tokenizer 0{64}, and .*/tokenizer is"):
        ClipScorer(tmp_path / "clip")


def test_the_likelihood_score_is_what_two_forwards_say():
    config = tiny_config()
    model = random_dalle(config)
    text = random_captions(config, 5)
    codes = torch.randint(24, (5, 16), generator=torch.Generator().manual_seed(0))
    got = LikelihoodScorer(model).score(text, codes)
    assert got.shape == (5,)
    for i in range(5):
        sums = []
        for caption in (text[i : i + 1], torch.full((1, config.n_text), NO_TOKEN)):
            _, logits = model(caption, codes[i : i + 1])
            chosen = logits[0].double().log_softmax(-1)[torch.arange(16), codes[i]]
            sums.append(float(chosen.mean()))
        assert abs(got[i] - (sums[0] - sums[1])) <= 1e-5
    # alone, or behind others
    assert LikelihoodScorer(model).score(text[3:4], codes[3:4])[0] == got[3]
