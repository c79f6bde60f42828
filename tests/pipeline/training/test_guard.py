import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config import Spike
from pipeline.console import InputError
from pipeline.training.guard import BACK, GO, SKIP, Guard, looking_for_bad_numbers

SPIKE = Spike(deviations=4.0, window=50, skips=3, returns=2)


def losses(n, seed=0):
    rng = np.random.default_rng(seed)
    return (3 + 2 * np.exp(-np.arange(n) / 100) + 0.1 * rng.standard_normal(n)).tolist()


def test_a_loss_that_falls_and_wavers_goes():
    guard = Guard(SPIKE)
    assert {guard.judge(loss) for loss in losses(2000)} == {GO}
    assert guard.skips == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, 9.0, 6.0])
def test_a_spike_is_skipped_and_does_not_become_what_is_usual(bad):
    guard = Guard(SPIKE)
    for loss in losses(100):
        guard.judge(loss)
    usual = list(guard._losses)
    assert [guard.judge(bad) for _ in range(2)] == [SKIP, SKIP]
    assert list(guard._losses) == usual
    assert guard.judge(losses(101)[-1]) == GO
    # not in a row any more
    assert [guard.judge(bad) for _ in range(3)] == [SKIP, SKIP, BACK]
    assert guard.skips == 5


def test_the_first_losses_of_a_run_may_be_anything_that_is_a_number():
    guard = Guard(SPIKE)
    assert guard.judge(9.0) == GO
    assert guard.judge(90.0) == GO
    assert guard.judge(math.nan) == SKIP


def test_a_loss_that_hardly_moves_has_some_room():
    guard = Guard(SPIKE)
    for _ in range(60):
        guard.judge(2.0)
    assert guard.judge(2.0 * 1.039) == GO
    assert guard.judge(2.0 * 1.05) == SKIP


def test_a_norm_that_is_no_number_counts_as_a_spike():
    guard = Guard(SPIKE)
    assert guard.judge_norm(5.0) == GO
    assert [guard.judge_norm(math.inf) for _ in range(3)] == [SKIP, SKIP, BACK]
    assert Guard(None).judge_norm(math.nan) == Guard(None).judge(math.nan) == GO


def test_it_goes_back_so_often_and_then_ends():
    guard = Guard(SPIKE)
    guard.went_back()
    guard.went_back()
    with pytest.raises(InputError, match=r"run away 3 times, 3 updates in a row each .*smaller"):
        guard.went_back()


def test_its_memory_goes_through_json():
    whole, first, second = Guard(SPIKE), Guard(SPIKE), Guard(SPIKE)
    seen = [*losses(80), 9.0, 9.0, *losses(110)[80:], 9.0, 3.1]
    verdicts = [whole.judge(loss) for loss in seen]
    got = [first.judge(loss) for loss in seen[:81]]
    second.restore(json.loads(json.dumps(first.state())))
    assert got + [second.judge(loss) for loss in seen[81:]] == verdicts
    assert second.skips == whole.skips == 3


class Bad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


class Middle(nn.Linear):
    def forward(self, x):
        return Bad.apply(super().forward(x))


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (None, []),
        ("weight", ["the output of 1"]),
        ("gradient", ["the gradient of the output of 0"]),
    ],
)
def test_the_first_bad_number_is_found(where, said):
    model = nn.Sequential(nn.Linear(3, 3), Middle(3, 3) if where == "gradient" else nn.Linear(3, 3),
                          nn.Linear(3, 3))  # fmt: skip
    if where == "weight":
        with torch.no_grad():
            model[1].weight[0, 0] = math.nan
    with looking_for_bad_numbers(model) as found:
        model(torch.ones(2, 3)).sum().backward()
    assert found == said
    # and its hooks are gone
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    model(torch.ones(2, 3))
    assert found == said
