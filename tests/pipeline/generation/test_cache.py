import pytest
import torch

from kernels import Pattern, sparse_attention
from pipeline.generation.cache import BoundedCache
from pipeline.models.dalle import NO_TOKEN
from tests.pipeline.generation.helpers import random_captions, random_dalle, tiny_config

KINDS = ["row", "column", "conv", "dense"]


def through_cache(cache, q, k, v):
    n_text = cache.n_text
    parts = [cache.attend(q[:, :n_text], k[:, :n_text], v[:, :n_text])]
    for i in range(n_text, q.shape[1]):
        parts.append(cache.attend(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1]))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("grid", [1, 2, 5, 8])
@pytest.mark.parametrize("n_text", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_stepwise_attention_equals_the_training_forward(kind, n_text, grid):
    pattern = Pattern(kind, n_text, grid, kernel=3)
    generator = torch.Generator().manual_seed(grid)
    cache = BoundedCache(pattern, 3, 2, 8, torch.float32, torch.device("cpu"))
    # the second time its buffers are full of the first picture
    for _ in range(2):
        q, k, v = torch.randn(3, 3, pattern.n_tokens, 2, 8, generator=generator)
        cache.restart()
        got = through_cache(cache, q, k, v)
        want = sparse_attention(q, k, v, pattern, backend="naive")
        assert (got - want).abs().max() <= 1e-5


@pytest.mark.parametrize("edge", ["wrap", "clamp"])
@pytest.mark.parametrize("kernel", [1, 5, 11])
def test_convolutions_of_every_size_and_edge(kernel, edge):
    pattern = Pattern("conv", 3, 7, kernel=kernel, edge=edge)
    q, k, v = torch.randn(3, 2, pattern.n_tokens, 2, 8, generator=torch.Generator().manual_seed(0))
    cache = BoundedCache(pattern, 2, 2, 8, torch.float32, torch.device("cpu"))
    want = sparse_attention(q, k, v, pattern, backend="naive")
    assert (through_cache(cache, q, k, v) - want).abs().max() <= 1e-5


@pytest.mark.parametrize(("kind", "kept"), [("row", 33), ("conv", 192), ("column", 1024)])
def test_a_layer_keeps_no_more_than_its_pattern_needs(kind, kept):
    cache = BoundedCache(Pattern(kind, 256, 32), 1, 1, 4, torch.float32, torch.device("cpu"))
    assert cache.ring_ZBHSD.shape[3] == kept
    assert cache.seen_ZBHSD.shape[3] == 256 + {"row": 33, "conv": 66, "column": 32}[kind]


@pytest.mark.parametrize("kind", [*KINDS, "schedule"])
@pytest.mark.parametrize("grid", [3, 6])
@pytest.mark.parametrize("n_text", [2, 9])
def test_stepwise_logits_equal_the_full_forward(kind, grid, n_text):
    config = tiny_config(grid=grid, n_text=n_text, n_layer=4)
    model = random_dalle(config)
    if kind != "schedule":
        for block in model.blocks:
            block.attention.pattern = Pattern(kind, n_text, grid, kernel=3)
    text = random_captions(config, 3)
    image = torch.randint(24, (3, grid**2), generator=torch.Generator().manual_seed(1))
    _, want = model(text, image)

    caches = [
        BoundedCache(b.attention.pattern, 3, 2, 16, torch.float32, torch.device("cpu"))
        for b in model.blocks
    ]
    x = model.text_embedding(text)
    for block, cache in zip(model.blocks, caches, strict=True):
        x = block(x, cache)
    read = torch.cat([torch.full((3, 1), NO_TOKEN), image[:, :-1]], dim=1)
    for i in range(grid**2):
        x = model.image_embedding(read[:, i : i + 1], first=i)
        for block, cache in zip(model.blocks, caches, strict=True):
            x = block(x, cache)
        got = model.image_head(model.norm(x[:, 0]))
        assert (got - want[:, i]).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)
