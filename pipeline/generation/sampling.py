"""Image tokens from captions, one after another (section 2.6), each image from its own seed.

An image depends on model, caption, seed, sampling settings and batch width, and on nothing else of
a request: not on how many images it asks for, in which order, or which. Arithmetic may round
differently in batches of different widths and in different rows of one, so every batch is
``width`` wide, padded where needed, and an image always sits in row ``seed % width``.

Letters: B rows of a batch, T text positions, I image positions, V image vocabulary, Y X code grid.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.generation.cache import BoundedCache
from pipeline.models.dalle import NO_TOKEN, Attention, Block, Dalle, Dense
from pipeline.models.dvae import DiscreteVAE

WIDTH = 16  # images that are decoded side by side, unless the caller says otherwise
MAX_WIDTH = 4096
WHOLE = 2**40  # probabilities are counted in units of 1 / WHOLE, see ``token_weights``


@torch.inference_mode()
def generate(
    model: Dalle,
    text_BT: Tensor,
    seeds: Sequence[int],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    width: int = WIDTH,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """One image's codes for every caption and seed.

    Args:
        model: any compute dtype, see ``set_sampling_dtype``.
        text_BT: a caption a row, int64 in [0, n_text_vocab), ``NO_TOKEN`` after its end.
        seeds: one an image, 0 or more.
        temperature: divides the logits; 0 takes the likeliest token whatever the seed.
        top_k: draw among this many likeliest tokens (and any as likely as the last of them).
        top_p: draw among the fewest likeliest tokens that have this much probability together,
            after temperature and ``top_k``.
        width: images decoded side by side; part of what decides an image's last bits.
        advance: called with the number of image tokens that were made.

    Returns:
        codes_BI int64 on the CPU, image tokens in raster order.

    Raises:
        InputError: a setting, seed, caption or shape outside these bounds, or weights that give
            no number.
    """
    check_settings(model, temperature, top_k, top_p)
    _check_request(model, text_BT, seeds, width)
    device = model.image_head.weight.device
    codes_BI = torch.empty(len(seeds), model.config.n_image, dtype=torch.int64)
    caches = _caches(model, width)
    for wave in waves(seeds, width):
        rows = _rows(wave)
        text = text_BT[rows].to(device)
        noise_BI = torch.stack([_noise(seeds[i], model.config.n_image) for i in rows]).to(device)

        def draw(logits_BV: Tensor, i: int, noise_BI: Tensor = noise_BI) -> Tensor:
            weights_BV = token_weights(logits_BV, temperature, top_k, top_p)
            return pick(weights_BV, noise_BI[:, i : i + 1])

        def count(n: int, images: int = len(set(rows))) -> None:
            if advance is not None:
                advance(n * images)

        made_BI = _decode(model, caches, text, draw, count).cpu()
        for row, image in enumerate(wave):
            if image is not None:
                codes_BI[image] = made_BI[row]
    return codes_BI


@torch.inference_mode()
def pictures(
    dvae: DiscreteVAE, codes_BI: Tensor, seeds: Sequence[int], width: int = WIDTH
) -> Tensor:
    """The pictures of ``generate``'s codes, float32 [B, 3, 8 Y, 8 X] in [0, 1] on the CPU.

    With the seeds and the width that made the codes a picture's bits depend on nothing else.
    """
    grid = dvae.config.grid
    device = next(dvae.parameters()).device
    images: list[Tensor] = [torch.empty(0)] * len(seeds)
    for wave in waves(seeds, width):
        codes_BYX = codes_BI[_rows(wave)].view(-1, grid, grid).to(device)
        made = dvae.decode(codes_BYX).cpu()
        for row, image in enumerate(wave):
            if image is not None:
                images[image] = made[row]
    return torch.stack(images)


def waves(seeds: Sequence[int], width: int) -> Iterator[list[int | None]]:
    """Batches of ``width`` rows: in each row an index into ``seeds`` or None.

    An index stands in row ``seed % width``: consecutive seeds fill a batch.
    """
    queues: list[list[int]] = [[] for _ in range(width)]
    for i, seed in enumerate(seeds):
        queues[seed % width].append(i)
    for k in range(max(map(len, queues))):
        yield [queue[k] if k < len(queue) else None for queue in queues]


def token_weights(
    logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Probabilities int64 [B, V] in units of 1 / ``WHOLE``, 0 for what must not be drawn.

    Whole numbers, because their sums do not depend on the order of summation: the running sum of
    ``pick`` is the same on every device.
    """
    if temperature == 0:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.zeros_like(logits_BV, dtype=torch.int64).scatter_(1, best_B1, WHOLE)
    if top_k is not None:
        least_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    # the largest is taken away first, lest a low temperature make infinities
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
    weights_BV = (logits_BV.softmax(-1) * WHOLE).long()
    if top_p is not None:
        sorted_BV = weights_BV.sort(-1, descending=True).values
        running_BV = sorted_BV.cumsum(-1)
        enough_B1 = (running_BV[:, -1:].double() * top_p).long()
        # the token that reaches top_p is still drawn
        n_B1 = (running_BV < enough_B1).sum(-1, keepdim=True)
        weights_BV = weights_BV.masked_fill(weights_BV < sorted_BV.gather(1, n_B1), 0)
    return weights_BV


def pick(weights_BV: Tensor, noise_B1: Tensor) -> Tensor:
    """The token of each row at which the running sum of its weights passes the share ``noise``.

    Args:
        weights_BV: int64, as ``token_weights`` gives them.
        noise_B1: float64, uniform in [0, 1).

    Returns:
        int64 [B, 1]: a token's probability is its weight over the sum of the row.
    """
    running_BV = weights_BV.cumsum(-1)
    share_B1 = (noise_B1 * running_BV[:, -1:]).long()
    return torch.searchsorted(running_BV, share_B1, right=True)


def set_sampling_dtype(model: Dalle, dtype: torch.dtype) -> None:
    """Compute the matrices in ``dtype`` and keep them in it, so that no step casts a weight.

    The model is then for sampling only: what the cast rounds away is gone.
    """
    model.set_compute_dtype(dtype)
    for module in model.modules():
        if isinstance(module, Dense):
            module.to(dtype)


def _decode(
    model: Dalle,
    caches: list[BoundedCache],
    text_BT: Tensor,
    draw: Callable[[Tensor, int], Tensor],
    count: Callable[[int], None],
) -> Tensor:
    """Codes int64 [B, I] of one batch."""
    for cache in caches:
        cache.restart()
    _blocks(model, model.text_embedding(text_BT), caches)
    token_B1 = torch.full_like(text_BT[:, :1], NO_TOKEN)
    codes_BI = torch.empty(len(text_BT), model.config.n_image, dtype=torch.int64).to(token_B1)
    for i in range(model.config.n_image):
        x_B1C = _blocks(model, model.image_embedding(token_B1, first=i), caches)
        logits_BV = model.image_head(model.norm(x_B1C[:, 0]))
        if i == 0:
            require(
                bool(logits_BV.isfinite().all()),
                "the model gives logits that are no numbers: its training has diverged; "
                "take an earlier checkpoint",
            )
        token_B1 = draw(logits_BV, i)
        codes_BI[:, i : i + 1] = token_B1
        count(1)
    return codes_BI


def _blocks(model: Dalle, x_BNC: Tensor, caches: list[BoundedCache]) -> Tensor:
    for block, cache in zip(model.blocks, caches, strict=True):
        x_BNC = block(x_BNC, cache)
    return x_BNC


def _caches(model: Dalle, width: int) -> list[BoundedCache]:
    """One a layer."""
    caches = []
    for block in model.blocks:
        assert isinstance(block, Block)
        attention: Attention = block.attention
        dtype, device = attention.qkv.compute_dtype, attention.qkv.weight.device
        d_head = model.config.d_model // model.config.n_head
        caches.append(
            BoundedCache(attention.pattern, width, model.config.n_head, d_head, dtype, device)
        )
    return caches


def _rows(wave: list[int | None]) -> list[int]:
    """The wave with its empty rows filled by an image that is in it anyway."""
    spare = next(i for i in wave if i is not None)
    return [spare if i is None else i for i in wave]


def _noise(seed: int, n_image: int) -> Tensor:
    """The uniform numbers of one image, float64 [n_image], drawn on the CPU for every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_image, generator=generator, dtype=torch.float64)


def check_settings(
    model: Dalle, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Raise ``InputError`` unless ``generate`` can sample with these settings."""
    require(
        temperature == 0 or (math.isfinite(temperature) and 0.01 <= temperature <= 100),
        f"temperature is {temperature}; take 0 (always the likeliest token) or 0.01 to 100",
    )
    n_vocab = model.config.n_image_vocab
    require(
        top_k is None or 1 <= top_k <= n_vocab,
        f"top_k is {top_k}; take 1 to {n_vocab}, the image vocabulary, or leave it out",
    )
    require(
        top_p is None or 0 < top_p <= 1,
        f"top_p is {top_p}; take more than 0 and at most 1, or leave it out",
    )


def _check_request(model: Dalle, text_BT: Tensor, seeds: Sequence[int], width: int) -> None:
    n_text, n_vocab = model.config.n_text, model.config.n_text_vocab
    require(
        1 <= width <= MAX_WIDTH,
        f"width is {width}; take 1 to {MAX_WIDTH}, and more images come in waves",
    )
    require(len(seeds) >= 1, "no image was asked for; give at least one caption and seed")
    require(
        tuple(text_BT.shape) == (len(seeds), n_text),
        f"captions of shape {tuple(text_BT.shape)} for {len(seeds)} seeds; "
        f"the model takes [{len(seeds)}, {n_text}], one caption an image",
    )
    low, high = int(text_BT.min()), int(text_BT.max())
    require(
        low >= NO_TOKEN and high < n_vocab,
        f"text tokens from {low} to {high}; this model knows 0 to {n_vocab - 1}, "
        "take the tokenizer that was kept beside it",
    )
    for seed in (min(seeds), max(seeds)):
        require(0 <= seed < 2**63, f"seed {seed} is outside 0 to 2^63 - 1; take one inside")
