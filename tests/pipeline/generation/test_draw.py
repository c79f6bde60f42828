import math

import pytest
import torch

from pipeline.console import InputError
from pipeline.generation.draw import WHOLE, guide, pick, require_numbers, token_weights


def brute_force(logits, temperature, top_k, top_p):
    """Probabilities in plain Python."""
    kept = set(range(len(logits)))
    if top_k is not None:
        least = sorted(logits, reverse=True)[top_k - 1]
        kept = {i for i in kept if logits[i] >= least}
    mass = {i: math.exp(logits[i] / temperature) for i in kept}
    total = sum(mass.values())
    if top_p is not None:
        likeliest, running = sorted(mass, key=mass.get, reverse=True), 0.0
        last = None
        for i in likeliest:
            running += mass[i] / total
            last = mass[i]
            if running >= top_p:
                break
        mass = {i: m for i, m in mass.items() if m >= last}
        total = sum(mass.values())
    return [mass.get(i, 0.0) / total for i in range(len(logits))]


@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 40])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_weights_are_the_filtered_probabilities(temperature, top_k, top_p):
    logits = 3 * torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    # two as likely as each other, at the top
    logits[::2, 3] = logits[::2, 8] = 9.0
    weights = token_weights(logits, temperature, top_k, top_p)
    for row, got in zip(logits.double().tolist(), weights, strict=True):
        want = torch.tensor(brute_force(row, temperature, top_k, top_p), dtype=torch.float64)
        share = got.double() / got.sum()
        assert torch.equal(share > 1e-9, want > 1e-9)
        assert (share - want).abs().max() <= 1e-5


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(0))
    weights = token_weights(logits, 0, None, None)
    noise = torch.rand(6, 1, dtype=torch.float64)
    assert torch.equal(pick(weights, noise)[:, 0], logits.argmax(-1))
    cold = token_weights(1e4 * logits, 0.01, 5, 0.9)
    assert torch.equal(cold.argmax(-1), logits.argmax(-1))


def test_pick_inverts_the_running_sum():
    weights = torch.tensor([[0, 2, 0, 1, 1, 0]]) * (WHOLE // 4)
    below_one = math.nextafter(1.0, 0.0)
    for noise, token in ((0.0, 1), (0.4999, 1), (0.5, 3), (0.7499, 3), (0.75, 4), (below_one, 4)):
        assert pick(weights, torch.tensor([[noise]], dtype=torch.float64)).item() == token


def test_guidance_moves_away_from_logits_of_no_caption():
    generator = torch.Generator().manual_seed(0)
    with_WV, without_WV = torch.randn(2, 3, 7, generator=generator)
    rows = torch.cat([with_WV, without_WV])
    assert torch.equal(guide(rows, 1.0), with_WV)
    assert torch.equal(guide(rows, 0.0), without_WV)
    want = without_WV.double() + 2.5 * (with_WV.double() - without_WV.double())
    assert (guide(rows, 2.5) - want).abs().max() < 1e-5
    assert torch.equal(guide(rows, None), rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(value):
    logits = torch.zeros(2, 5)
    require_numbers(logits)
    logits[1, 3] = value
    with pytest.raises(InputError, match="take an earlier checkpoint"):
        require_numbers(logits)
