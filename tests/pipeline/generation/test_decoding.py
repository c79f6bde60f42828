"""Batches of pictures, recorded and not: on a GPU by the Triton kernel and CUDA graphs."""

import pytest
import torch

from kernels import Pattern
from pipeline.console import InputError
from pipeline.generation.cache import BoundedCache
from pipeline.generation.decoding import Decoder
from pipeline.generation.draw import Settings, noise
from pipeline.generation.sampling import Sampler, prepare
from pipeline.generation.step import block_step
from pipeline.models.dalle import NO_TOKEN
from tests.pipeline.generation.helpers import random_captions, random_dalle, tiny_config

ON_A_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_A_GPU else "cpu")
KINDS = ["row", "column", "conv", "dense"]


def model_of(kind, dtype, d_head=32):
    """One whose layers all have a pattern, or those of the schedule."""
    config = tiny_config(d_model=2 * d_head, n_layer=4)
    model = random_dalle(config).to(DEVICE)
    if kind != "schedule":
        pattern = Pattern(kind, config.n_text, config.grid, kernel=3)
        for block in model.blocks:
            block.attention.pattern = pattern
    prepare(model, dtype)
    return model


def decoder_of(model, width, n_captions, guidance, settings, *, record):
    """A ``Decoder`` with the patterns that the blocks have."""
    decoder = Decoder(model, width, n_captions, guidance, settings.draw, record=record)
    config = model.config
    decoder.caches[:] = [
        BoundedCache(
            block.attention.pattern, decoder.place, config.n_head,
            config.d_model // config.n_head, block.attention.qkv.compute_dtype,
        )
        for block in model.blocks
    ]  # fmt: skip
    decoder.steps[:] = [
        block_step(block, cache.kept.attend)
        for block, cache in zip(model.blocks, decoder.caches, strict=True)
    ]
    return decoder


@pytest.mark.gpu
@pytest.mark.skipif(not ON_A_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("kind", [*KINDS, "schedule"])
@torch.inference_mode()
def test_recorded_steps_are_the_steps(kind, guidance, dtype):
    same_codes(kind, guidance, dtype)


@pytest.mark.parametrize("guidance", [None, 2.5])
@torch.inference_mode()
def test_a_decoder_begins_anew_whatever_it_has_decoded(guidance):
    same_codes("schedule", guidance, torch.float32)


def same_codes(kind, guidance, dtype):
    """Batches one after another, with and without given tokens, against a decoder of each alone."""
    model, settings = model_of(kind, dtype), Settings(top_k=12, top_p=0.95)
    config, width = model.config, 19
    text = random_captions(config, 3)[[0, 1, 2, 1, *[0] * 15]]
    other = random_captions(config, 2, seed=7)[[1, *[0] * 18]]
    rows = torch.stack([noise(seed, config.n_image) for seed in range(width)])
    given = torch.randint(24, (width, 7), generator=torch.Generator().manual_seed(4))
    recorded = decoder_of(model, width, 3, guidance, settings, record=True)
    assert recorded.records is ON_A_GPU
    for captions, n_given in ((text, 0), (other, 7), (text, 7), (text, 0)):
        alone = decoder_of(model, width, 3, guidance, settings, record=False)
        assert not alone.records
        batch = captions, rows, given[:, :n_given].to(DEVICE), lambda n, codes: None
        want = alone.decode(*batch)
        assert torch.equal(recorded.decode(*batch), want)
        assert torch.equal(want[:, :n_given].cpu(), given[:, :n_given])
        # pictures differ, or nothing was compared
        assert len(want.unique(dim=0)) > width // 2


@pytest.mark.gpu
@pytest.mark.skipif(not ON_A_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_on_a_gpu_does_not_depend_on_the_rest_of_the_request(guidance, dtype):
    same_images(guidance, dtype)


def same_images(guidance, dtype):
    """Other images beside, other captions, another order: the same codes."""
    model, settings = model_of("schedule", dtype), Settings(guidance=guidance)
    text = random_captions(model.config, 7)
    codes = Sampler(model, settings, 18).draw(text, range(10, 17))
    shared = Sampler(model, settings, 18).draw(text[:1].expand(30, -1), range(10, 40))
    assert torch.equal(shared[0], codes[0])
    sampler = Sampler(model, settings, 18)
    for wanted in ([3], [6, 5, 4, 3, 2, 1, 0], [1, 6], [4, 4, 0]):
        got = sampler.draw(text[wanted], [10 + i for i in wanted])
        assert torch.equal(got, codes[wanted])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_A_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [*KINDS, "schedule"])
def test_logits_of_steps_on_a_gpu_are_those_of_the_training_forward(kind):
    same_logits(kind, 32)


@pytest.mark.parametrize("d_head", [16, 24])
def test_heads_without_a_kernel_are_not_recorded(d_head):
    """Plain PyTorch takes its keys by a number of Python's, which a graph would freeze."""
    same_logits("schedule", d_head)


@torch.inference_mode()
def same_logits(kind, d_head):
    """Greedy codes, and the last logits of the batch, against the whole sequence at once."""
    model = model_of(kind, torch.float32, d_head)
    config, width = model.config, 5
    text = random_captions(config, 2)[[0, 1, 1, 0, 1]]
    decoder = decoder_of(model, width, 2, None, Settings(temperature=0), record=True)
    assert decoder.records is (ON_A_GPU and d_head == 32)
    seen = []
    codes = decoder.decode(
        text,
        torch.zeros(width, config.n_image),
        torch.empty(width, 0, dtype=torch.int64),
        lambda n, _: seen.append(decoder.logits_WV.clone()),
    )
    _, want = model(text.to(DEVICE), codes)
    got = torch.stack(seen, dim=1)
    # of float32; a GPU's products may be summed in other orders
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.skipif(not ON_A_GPU, reason="needs a CUDA device")
@pytest.mark.gpu
def test_a_diverged_model_is_named_on_a_gpu():
    model = model_of("row", torch.float32)
    model.norm.gain[3] = float("nan")
    with pytest.raises(InputError, match="no numbers"):
        Sampler(model, width=2).draw(random_captions(model.config, 1), [0])


@pytest.mark.skipif(not ON_A_GPU, reason="needs a CUDA device")
@pytest.mark.gpu
@torch.inference_mode()
def test_a_recording_outlives_the_tables_that_others_made():
    from kernels.attention.decode import _tables

    model, settings = model_of("row", torch.float32), Settings()
    batch = (
        random_captions(model.config, 1).expand(3, -1),
        torch.stack([noise(seed, 16) for seed in range(3)]),
        torch.empty(3, 0, dtype=torch.int64),
        lambda n, codes: None,
    )
    decoder = decoder_of(model, 3, 1, None, settings, record=True)
    want = decoder.decode(*batch).clone()
    _tables.cache_clear()
    poison = [torch.full((2**10,), -1, dtype=torch.int32, device=DEVICE) for _ in range(64)]
    assert torch.equal(decoder.decode(*batch), want)
    del poison


@pytest.mark.parametrize("n_given", [0, 9])
@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("kind", [*KINDS, "schedule"])
def test_logits_of_every_step_are_those_of_full_forwards(kind, guidance, n_given):
    """With shared captions, guidance and an image prompt; the token drawn is then the same too."""
    model = model_of(kind, torch.float32)
    config = model.config
    decoder = decoder_of(model, 5, 3, guidance, Settings(), record=False)
    text_WT = random_captions(config, 3)[[0, 1, 1, 2, 0]].to(DEVICE)
    noise_WI = torch.stack([noise(seed, config.n_image) for seed in range(5)]).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    given_WI = torch.randint(24, (5, n_given), generator=generator).to(DEVICE)
    seen = []
    with torch.inference_mode():
        codes_WI = decoder.decode(
            text_WT, noise_WI, given_WI, lambda n, _: seen.append(decoder.logits_WV.clone())
        )
        _, want_WIV = model(text_WT, codes_WI)
        if guidance is not None:
            _, without_WIV = model(torch.full_like(text_WT, NO_TOKEN), codes_WI)
            want_WIV = without_WIV + guidance * (want_WIV - without_WIV)
    got_WIV = torch.stack(seen[n_given:], 1)
    want_WIV = want_WIV[:, n_given:]
    # a GPU's products may be summed in other orders
    error = 1e-4 if ON_A_GPU else 1e-5
    assert (got_WIV - want_WIV).abs().max() <= error * want_WIV.abs().max().clamp(min=1)
