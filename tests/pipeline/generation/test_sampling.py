import pytest
import torch

from pipeline.console import InputError
from pipeline.generation.draw import Settings
from pipeline.generation.sampling import (
    Sampler,
    cache_bytes,
    fitting_width,
    generate,
    pictures,
    prepare,
    waves,
)
from pipeline.models.dalle import NO_TOKEN
from tests.pipeline.generation.helpers import (
    random_captions,
    random_dalle,
    random_dvae,
    tiny_config,
)

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def model():
    return random_dalle(CONFIG)


@pytest.mark.parametrize(
    ("dtype", "threads"),
    [
        (torch.float32, 1),
        (torch.bfloat16, 1),
        # seconds on a quiet machine, minutes where threads wait for a busy core
        pytest.param(torch.float32, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_image_does_not_depend_on_the_rest_of_the_request(dtype, threads):
    torch.set_num_threads(threads)
    # a width that fits no vector unit, a model wide enough to be computed in pieces
    config = tiny_config(d_model=192, n_head=3, n_image_vocab=333, grid=3, n_layer=2)
    model, dvae = random_dalle(config), random_dvae(config)
    prepare(model, dtype)
    text = random_captions(config, 7)

    def ask(wanted):
        seeds = [10 + i for i in wanted]
        codes = generate(model, text[wanted], seeds, width=5)
        return codes, pictures(dvae, codes, seeds, width=5)

    codes, images = ask(list(range(7)))
    assert len({tuple(row.tolist()) for row in codes}) == 7
    for wanted in ([3], [6, 5, 4, 3, 2, 1, 0], [1, 6], [4, 4, 0]):
        got_codes, got_images = ask(wanted)
        assert torch.equal(got_codes, codes[wanted])
        assert torch.equal(got_images, images[wanted])


def test_rows_belong_to_seeds():
    assert list(waves([7, 4, 5, 9], 4)) == [[1, 2, None, 0], [None, 3, None, None]]
    seeds = list(range(100, 116))
    assert [sorted(wave) for wave in waves(seeds, 16)] == [list(range(16))]
    seeds = [3, 3, 8, 2**62]
    found = [i for wave in waves(seeds, 3) for i in wave if i is not None]
    assert sorted(found) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True}, {"mup_width": 16}, {"n_layer": 1}, {"grid": 6}], ids=str
)
@pytest.mark.parametrize("is_prepared", [False, True])
def test_greedy_codes_are_those_of_the_full_forward(changes, is_prepared):
    config = tiny_config(**changes)
    model = random_dalle(config)
    if is_prepared:
        prepare(model, torch.float32)
    text = random_captions(config, 2)
    codes = generate(model, text, [0, 1], settings=Settings(temperature=0), width=2)
    for i in range(config.n_image):
        _, logits = model(text, codes)
        assert torch.equal(logits[:, i].argmax(-1), codes[:, i])


def test_caption_and_seed_matter(model):
    text = random_captions(CONFIG, 2)
    one, other = generate(model, text, [0, 0], width=1)
    assert not torch.equal(one, other)
    assert not torch.equal(one, generate(model, text[:1], [1], width=1)[0])


def test_tokens_come_as_often_as_the_model_says(model):
    """The first token of many images against the softmax of the full forward."""
    n = 3000
    text = random_captions(CONFIG, 1).expand(n, -1)
    config = tiny_config(grid=1)
    small = random_dalle(config)
    codes = generate(small, text, range(n), settings=Settings(temperature=1.7), width=500)
    _, logits = small(text[:1], codes[:1])
    p = (logits[0, 0] / 1.7).softmax(-1)
    seen = torch.bincount(codes[:, 0], minlength=config.n_image_vocab) / n
    # four standard deviations
    assert ((seen - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1 / n).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; take 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-30}, "0.01 to 100"),
        ({"top_k": 0}, "top_k is 0; take 1 to 24"),
        ({"top_k": 25}, "top_k is 25; take 1 to 24"),
        ({"top_p": 0.0}, "top_p is 0.0; take more than 0"),
        ({"top_p": 1.5}, "at most 1"),
        ({"guidance": -0.5}, "guidance is -0.5; take 1 for none"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"width": 0}, "width is 0"),
        ({"width": 10**8}, "take 1 to 4096"),
    ],
    ids=str,
)
def test_settings_out_of_bounds_are_named(model, settings, words):
    width = settings.pop("width", 1)
    with pytest.raises(InputError, match=words):
        Sampler(model, Settings(**settings), width)


def test_requests_out_of_bounds_are_named(model):
    text = random_captions(CONFIG, 2)
    for bad_text, seeds, words in (
        (text, [0], r"shape \(2, 5\) for 1 seeds"),
        (text[:0], [], "no image was asked for"),
        (text, [0, -1], "seed -1 is outside"),
        (text, [0, 2**63], "is outside 0 to"),
        (text + 300, [0, 1], "this model knows 0 to 299"),
    ):
        with pytest.raises(InputError, match=words):
            generate(model, bad_text, seeds)


def test_a_diverged_model_is_named():
    broken = random_dalle(CONFIG)
    broken.norm.gain[3] = float("nan")
    with pytest.raises(InputError, match="no numbers"):
        generate(broken, random_captions(CONFIG, 1), [0], width=1)


def test_progress_counts_the_tokens_of_real_images(model):
    counted = []
    text = random_captions(CONFIG, 3)
    Sampler(model, width=4).draw(text, [0, 1, 4], advance=counted.append)
    assert sum(counted) == 3 * CONFIG.n_image


@pytest.mark.parametrize("n_given", [0, 1, 7, 15])
def test_given_tokens_stay_and_the_rest_is_drawn_as_after_them(model, n_given):
    """Greedy: what follows given tokens is what the full forward finds likeliest."""
    text = random_captions(CONFIG, 3)
    given = torch.randint(24, (3, n_given), generator=torch.Generator().manual_seed(4))
    sampler = Sampler(model, Settings(temperature=0), 2)
    codes = sampler.draw(text, [5, 6, 7], given)
    assert torch.equal(codes[:, :n_given], given)
    for i in range(n_given, CONFIG.n_image):
        _, logits = model(text, codes)
        assert torch.equal(logits[:, i].argmax(-1), codes[:, i])


def test_an_image_that_is_given_its_own_beginning_is_itself(model):
    text = random_captions(CONFIG, 3)
    sampler = Sampler(model, width=4)
    codes = sampler.draw(text, [5, 6, 7])
    assert torch.equal(sampler.draw(text, [5, 6, 7], codes[:, :9]), codes)


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_guided_tokens_are_those_of_two_full_forwards(model, guidance):
    text = random_captions(CONFIG, 3)
    given = torch.randint(24, (3, 2), generator=torch.Generator().manual_seed(4))
    sampler = Sampler(model, Settings(temperature=0, guidance=guidance), 3)
    codes = sampler.draw(text, [5, 6, 7], given)
    for i in range(2, CONFIG.n_image):
        _, with_text = model(text, codes)
        _, without = model(torch.full_like(text, NO_TOKEN), codes)
        logits = without + guidance * (with_text - without)
        assert torch.equal(logits[:, i].argmax(-1), codes[:, i])


def test_guided_images_do_not_depend_on_the_rest_of_the_request(model):
    text = random_captions(CONFIG, 5)
    settings = Settings(guidance=3.0)
    codes = Sampler(model, settings, 3).draw(text, range(5))
    assert not torch.equal(codes, Sampler(model, width=3).draw(text, range(5)))
    for wanted in ([4], [3, 0], [2, 2, 1, 4]):
        assert torch.equal(Sampler(model, settings, 3).draw(text[wanted], wanted), codes[wanted])


def test_images_of_one_caption_are_those_of_many_captions(model):
    """Whether rows share a caption, and whether the batch before had it, changes no bit."""
    text = random_captions(CONFIG, 2)
    mixed = text[[0, 1, 0, 1, 0, 1, 0]]
    sampler = Sampler(model, width=3)
    codes = sampler.draw(mixed, range(7))
    assert torch.equal(sampler.draw(text[:1].expand(7, -1), range(7))[::2], codes[::2])
    assert torch.equal(sampler.draw(mixed.flip(0), range(6, -1, -1)), codes.flip(0))


def test_rows_are_heard_of_as_they_come(model):
    text, heard = random_captions(CONFIG, 3), []
    sampler = Sampler(model, width=2)
    codes = sampler.draw(
        text, [0, 1, 2], on_row=lambda images, n, rows: heard.append((images, n, rows.clone()))
    )
    assert [(images, n) for images, n, _ in heard] == [
        (images, n) for images in ([0, 1], [2]) for n in (1, 2, 3, 4)
    ]
    for images, n, rows in heard:
        assert torch.equal(rows, codes[images].view(-1, 4, 4)[:, :n])


def test_the_width_is_the_largest_that_fits(model):
    settings = Settings()
    one = cache_bytes(model, 1, 1, settings) + 64 * CONFIG.n_image_vocab
    assert fitting_width(model, settings, int(37 * one / 0.8)) == 32
    assert fitting_width(model, settings, 0) == 1
    assert fitting_width(model, settings, 10**15) == 256
    # guided, two rows an image, and one caption more in all
    assert fitting_width(model, Settings(guidance=2.0), int(37 * one / 0.8)) == 16


def test_the_caches_hold_what_was_said(model):
    sampler = Sampler(model, Settings(guidance=2.0), 3)
    sampler.draw(random_captions(CONFIG, 2), [0, 1])
    assert sampler._decoder.nbytes == cache_bytes(model, 3, 2, sampler.settings)
    kept = [c.kept for c in sampler._decoder.caches]
    assert sampler._decoder.nbytes == sum(
        x.numel() * 4 for k in kept for x in (k.text_ZCHTD, k.image_ZBHSD)
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), r"shape \(2, 3\) for 1 seeds"),
        (torch.zeros(1, 16, dtype=torch.int64), r"\[1, 0 to 15\]"),
        (torch.full((1, 3), 24), "given image tokens from 24 to 24; this model knows 0 to 23"),
        (torch.full((1, 3), -1), "given image tokens from -1"),
    ],
    ids=str,
)
def test_given_tokens_out_of_bounds_are_named(model, given, words):
    with pytest.raises(InputError, match=words):
        Sampler(model).draw(random_captions(CONFIG, 1), [0], given)


def test_other_widths_give_the_same_codes(model):
    """In float32 on a CPU: rounding differs, and no draw is near enough to an edge to show it."""
    text = random_captions(CONFIG, 6)
    codes = generate(model, text, range(6), width=6)
    for width in (1, 2, 5, 16):
        assert torch.equal(generate(model, text, range(6), width=width), codes)


def test_pixels_of_a_wide_batch_are_made_a_few_at_a_time(monkeypatch):
    dvae, seeds = random_dvae(tiny_config(grid=4)), range(37)
    codes = torch.randint(24, (37, 16), generator=torch.Generator().manual_seed(0))
    decode, rows = dvae.decode, []

    def watched(codes_BYX):
        rows.append(len(codes_BYX))
        return decode(codes_BYX)

    monkeypatch.setattr(dvae, "decode", watched)
    images = pictures(dvae, codes, seeds, 40)
    assert rows == [16, 16, 8]
    for i in (0, 15, 16, 36):
        alone = decode(codes[i].view(1, 4, 4))[0]
        torch.testing.assert_close(images[i], alone, rtol=0, atol=1e-5)
