import math

import pytest
import torch

from pipeline.console import InputError
from pipeline.generation.decoding import Decoder
from pipeline.generation.draw import Settings, noise
from pipeline.generation.jacobi import JacobiDecoder
from tests.pipeline.generation.helpers import random_captions, random_dalle, tiny_config

CONFIG = tiny_config()
N_IMAGE = CONFIG.n_image


@pytest.fixture(scope="module")
def model():
    return random_dalle(CONFIG)


def ignore(*_):
    """What is called after each token, by those who do not listen."""


def noise_of(seed):
    return noise(seed, N_IMAGE)[None]


def given(n=0):
    return torch.randint(24, (1, n), generator=torch.Generator().manual_seed(4))


@torch.inference_mode()
def both(model, window, settings, n_given=0, n_pictures=6):
    """Codes of a ``JacobiDecoder`` and of one step a token, and the passes of the first."""
    guidance = None if settings.guidance == 1 else settings.guidance
    decoder = JacobiDecoder(model, guidance, settings.draw, window)
    steps = Decoder(model, 1, 1, guidance, settings.draw)
    text = random_captions(CONFIG, n_pictures)
    text[1] = text[0]  # a caption that has been read
    got, want, n_passes = [], [], 0
    for i in range(n_pictures):
        asked = text[i : i + 1], noise_of(i), given(n_given)
        got.append(decoder.decode(*asked, ignore))
        want.append(steps.decode(*asked, ignore).clone())
        n_passes += decoder.n_passes
    return torch.cat(got), torch.cat(want), n_passes


@pytest.mark.parametrize("window", [1, 2, 5, 16, 99])
def test_pictures_are_those_of_one_step_a_token(model, window):
    got, want, n_passes = both(model, window, Settings(top_k=3))
    assert torch.equal(got, want)
    assert len(got.unique(dim=0)) == len(got)
    if window == 1:
        assert n_passes == 6 * N_IMAGE
    else:
        assert n_passes < 6 * N_IMAGE


@pytest.mark.parametrize(
    "settings",
    [Settings(), Settings(temperature=0), Settings(guidance=2.5), Settings(0.7, None, 0.8)],
    ids=["plain", "greedy", "guided", "top_p"],
)
@pytest.mark.parametrize("n_given", [0, 1, 9, 15])
def test_settings_and_given_tokens_are_kept(model, settings, n_given):
    got, want, _ = both(model, 6, settings, n_given)
    assert torch.equal(got, want)


def test_pictures_come_as_often_as_the_model_says():
    """Every picture of 2 x 2 tokens out of 3 against its probability, chi-square."""
    n, settings = 2000, Settings()
    config = tiny_config(grid=2, n_image_vocab=3, n_layer=1)
    # weights whose tokens depend on each other: drafts taken unseen would add 150 to the chi-square
    model, text = random_dalle(config, seed=5), random_captions(config, 1)
    every = torch.cartesian_prod(*[torch.arange(3)] * 4)
    _, logits = model(text.expand(len(every), -1), every)
    p = logits.softmax(-1).gather(2, every[..., None])[..., 0].prod(1)
    assert (p * n > 5).all()
    decoder, n_passes, found = JacobiDecoder(model, None, settings.draw, 4), 0, []
    # of one generator: 2000 are slow to make
    noise_SI = torch.rand(n, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.inference_mode():
        for noise_I in noise_SI:
            found.append(decoder.decode(text, noise_I[None], given(), ignore)[0])
            n_passes += decoder.n_passes
    # drafts are accepted, and are refused
    assert 1.3 * n < n_passes < 3.5 * n
    place = torch.tensor([27, 9, 3, 1])
    seen = torch.bincount((torch.stack(found) * place).sum(1), minlength=len(every))
    chi_square, degrees = ((seen - n * p) ** 2 / (n * p)).sum(), len(every) - 1
    # four standard deviations of a chi-square
    assert abs(chi_square - degrees) < 4 * math.sqrt(2 * degrees)


def test_every_token_is_heard_of_once_and_stays(model):
    heard = []
    decoder = JacobiDecoder(model, None, Settings(top_k=3).draw, 6)
    with torch.inference_mode():
        codes = decoder.decode(
            random_captions(CONFIG, 1),
            noise_of(0),
            given(),
            lambda n, codes: heard.append((n, codes[:, :n].clone())),
        )
    assert [n for n, _ in heard] == list(range(1, N_IMAGE + 1))
    for n, first in heard:
        assert torch.equal(first, codes[:, :n])


def test_a_diverged_model_is_named():
    broken = random_dalle(CONFIG)
    broken.norm.gain[3] = float("nan")
    decoder = JacobiDecoder(broken, None, Settings().draw)
    with pytest.raises(InputError, match="no numbers"):
        decoder.decode(random_captions(CONFIG, 1), noise_of(0), given(), ignore)
