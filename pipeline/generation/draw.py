"""How a token is drawn from logits, by whole numbers: the same on every device.

Letters: B rows of a batch, V vocabulary, I image positions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import DalleConfig, require

WHOLE = 2**40  # probabilities are counted in units of 1 / WHOLE, see ``token_weights``
MOST_GUIDANCE = 100.0


@dataclass(frozen=True)
class Settings:
    """How tokens are drawn.

    Args:
        temperature: divides the logits; 0 takes the likeliest token whatever the seed.
        top_k: draw among this many likeliest tokens (and any as likely as the last of them).
        top_p: draw among the fewest likeliest tokens that have this much probability together,
            after temperature and ``top_k``.
        guidance: logits are moved from those of an empty caption through the caption's and, above
            1, past them (classifier-free guidance, arXiv 2207.12598). 1 is off; else every image
            is decoded twice, and the model must have learnt empty captions.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0

    def check(self, model: DalleConfig) -> None:
        """Raise ``InputError`` unless such a model can be sampled with these settings."""
        t, n_vocab = self.temperature, model.n_image_vocab
        require(
            t == 0 or (math.isfinite(t) and 0.01 <= t <= 100),
            f"temperature is {t}; take 0 (always the likeliest token) or 0.01 to 100",
        )
        require(
            self.top_k is None or 1 <= self.top_k <= n_vocab,
            f"top_k is {self.top_k}; take 1 to {n_vocab}, the image vocabulary, or leave it out",
        )
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"top_p is {self.top_p}; take more than 0 and at most 1, or leave it out",
        )
        require(
            0 <= self.guidance <= MOST_GUIDANCE,
            f"guidance is {self.guidance}; take 1 for none, or 0 to {MOST_GUIDANCE:g}",
        )

    def draw(self, logits_BV: Tensor, noise_B1: Tensor) -> Tensor:
        """Tokens int64 [B, 1] of logits float32 and noise float64 in [0, 1)."""
        weights_BV = token_weights(logits_BV, self.temperature, self.top_k, self.top_p)
        return pick(weights_BV, noise_B1)


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


def guide(logits_BV: Tensor, guidance: float | None) -> Tensor:
    """Logits of pictures: of the first half of the rows, moved away from those of the second.

    Classifier-free guidance (arXiv 2207.12598), on the logits of tokens.

    Args:
        logits_BV: [2 W, ..., V] with the rows of no caption behind those of captions; [W, ..., V]
            where ``guidance`` is None.
        guidance: see ``Settings``; None for none.
    """
    if guidance is None:
        return logits_BV
    with_WV, without_WV = logits_BV.chunk(2)
    return torch.lerp(without_WV, with_WV, guidance)


def require_numbers(logits: Tensor) -> None:
    """Raise ``InputError`` unless a model gives finite logits."""
    require(
        bool(logits.isfinite().all()),
        "the model gives logits that are no numbers: its training has diverged; take an earlier "
        "checkpoint",
    )


def noise(seed: int, n_image: int) -> Tensor:
    """The uniform numbers of one image, float64 [n_image], drawn on the CPU for every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_image, generator=generator, dtype=torch.float64)
