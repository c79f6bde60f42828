import pytest
import torch

from kernels import Pattern
from kernels.attention.decode import Place
from pipeline.generation.cache import BoundedCache
from pipeline.generation.decoding import caches_of
from pipeline.models.dalle import NO_TOKEN
from pipeline.presets import dalle_12b
from tests.pipeline.generation.helpers import random_captions, random_dalle, tiny_config

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("kind", ["row", "column", "conv", "dense", "schedule"])
@pytest.mark.parametrize("grid", [1, 3, 6])
@pytest.mark.parametrize("n_text", [1, 2, 9])
def test_stepwise_logits_equal_the_full_forward(kind, grid, n_text):
    config = tiny_config(grid=grid, n_text=n_text, n_layer=4)
    model = random_dalle(config)
    place = Place(5, 3, CPU)
    caches = caches_of(config, place, torch.float32)
    if kind != "schedule":
        pattern = Pattern(kind, n_text, grid, kernel=3)
        for block in model.blocks:
            block.attention.pattern = pattern
        caches = [BoundedCache(pattern, place, 2, 16, torch.float32) for _ in model.blocks]
    captions = [1, 1, 0, 2, 1]
    text = random_captions(config, 3)
    image = torch.randint(24, (5, grid**2), generator=torch.Generator().manual_seed(1))
    _, want = model(text[captions], image)

    def through_blocks(x):
        for block, cache in zip(model.blocks, caches, strict=True):
            x = block(x, cache)
        return x

    for caption in range(3):
        for cache in caches:
            cache.reading = caption
        through_blocks(model.text_embedding(text[caption : caption + 1]))
        for cache in caches:
            cache.reading = None
    place.restart(captions)
    read = torch.cat([torch.full((5, 1), NO_TOKEN), image[:, :-1]], dim=1)
    for i in range(grid**2):
        x = through_blocks(model.image_embedding(read[:, i : i + 1], place.i_1))
        got = model.image_head(model.norm(x[:, 0]))
        assert (got - want[:, i]).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)
        place.advance()


def bytes_kept(n_rows, n_captions):
    """Of the 12B model in bfloat16."""
    caches = caches_of(dalle_12b().model, Place(n_rows, n_captions, META), torch.bfloat16)
    return sum(cache.kept.nbytes for cache in caches)


def test_the_12b_model_keeps_what_its_patterns_need():
    # 2 * 62 heads * 64 wide * 2 bytes a token and layer; 47 row layers, 16 column, 1 conv
    token = 15_872
    images = token * (47 * 33 + 16 * 993 + 192)
    text = token * 64 * 256
    assert bytes_kept(1, 1) == images + text == 539_886_080  # 0.540 GB an image
    # 0.280 GB with a shared caption
    assert images == 279_839_232 == bytes_kept(2, 1) - bytes_kept(1, 1)
    assert bytes_kept(512, 1) == 512 * images + text
    # a quarter of a cache of all tokens
    assert 4.6 < token * 64 * 1280 / images < 4.7
