import json
import math

import numpy as np
import pytest

from pipeline.config import Plateau, Ramp, WarmupStableDecay
from pipeline.console import InputError
from pipeline.training.schedules import BUCKETS, LearningRate, at


def warmed_up(kind, warmup, step):
    return LearningRate(kind, warmup).at(step)


FALLING, RISING = Ramp(4.0, 1.0, 8), Ramp(0.0, 6.6, 5000)


@pytest.mark.parametrize("step", range(9))
def test_a_ramp_is_half_a_cosine(step):
    assert at(FALLING, step) == pytest.approx(2.5 + 1.5 * math.cos(math.pi * step / 8), abs=1e-12)


def test_a_ramp_may_rise():
    values = [at(RISING, step) for step in range(5001)]
    assert values[0] == 0.0
    assert values[2500] == pytest.approx(3.3)
    assert values[5000] == pytest.approx(6.6)
    assert values == sorted(values)


@pytest.mark.parametrize("step", [8, 9, 10**7])
def test_a_ramp_stays_where_it_ends(step):
    assert at(FALLING, step) == 1.0


def test_warm_up_is_linear_in_the_update_and_starts_above_zero():
    flat = Ramp(2.0, 2.0, 100)
    assert [warmed_up(flat, 4, step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_warm_up_multiplies_the_ramp():
    assert warmed_up(FALLING, 6, 2) == pytest.approx(at(FALLING, 2) / 2)
    assert warmed_up(FALLING, 6, 5) == at(FALLING, 5)


def test_no_warm_up_is_the_ramp():
    assert [warmed_up(FALLING, 0, step) for step in range(9)] == [at(FALLING, s) for s in range(9)]


# ---- step sizes that hang on the loss

KIND = Plateau(8e-3, halvings=2, window=100, gain=0.01, patience=300)
WARMUP = 40


def told(rate, losses, first=0):
    """Tell a schedule of losses; the step sizes that the updates had."""
    sizes = []
    for step, loss in enumerate(losses, first):
        sizes.append(rate.at(step))
        rate.observe(step, loss)
    return sizes


def by_the_rule(kind, warmup, losses):
    """Updates behind which the step size is halved: the rule as it is written, on all losses."""
    halved, begin = [], warmup
    for step in range(warmup, len(losses)):
        is_asked = (step + 1 - begin) % (kind.window // BUCKETS) == 0
        after_last = not halved or step - halved[-1] >= kind.patience
        if not is_asked or not after_last or step + 1 - begin < 2 * kind.window:
            continue
        before = np.mean(losses[step + 1 - 2 * kind.window : step + 1 - kind.window])
        now = np.mean(losses[step + 1 - kind.window : step + 1])
        if now >= before * (1 - kind.gain) and len(halved) < kind.halvings:
            halved.append(step)
            begin = step + 1
    return halved


def falling_in_stairs(n=2500):
    rng = np.random.default_rng(0)
    steps = np.arange(n)
    stairs = 4 * np.exp(-steps / 200) + 2 * np.exp(-np.maximum(steps - 1100, 0) / 150) + 1
    return (stairs + 0.02 * rng.standard_normal(n)).tolist()


def test_a_plateau_halves_where_the_rule_says():
    losses = falling_in_stairs()
    wanted = by_the_rule(KIND, WARMUP, losses)
    assert len(wanted) == 2
    sizes = told(LearningRate(KIND, WARMUP), losses)
    halvings = np.cumsum([step - 1 in wanted for step in range(len(losses))])
    warm = np.minimum(1, (np.arange(len(losses)) + 1) / WARMUP)
    np.testing.assert_allclose(sizes, 8e-3 * warm * 0.5**halvings, rtol=1e-12)
    # the losses of the warm-up do not count, and while they fall nothing is halved
    assert wanted[0] > WARMUP + 2 * KIND.window + 100
    falling = np.exp(-np.arange(2500) / 400).tolist()
    assert told(LearningRate(KIND, WARMUP), falling)[-1] == 8e-3


def test_a_loss_that_stays_is_a_plateau_of_two_windows():
    rate = LearningRate(KIND, WARMUP)
    told(rate, [1.0] * (WARMUP + 2 * KIND.window - 1))
    assert rate.halvings == 0
    told(rate, [1.0], first=WARMUP + 2 * KIND.window - 1)
    assert rate.halvings == 1
    # then patience, and no third
    told(rate, [1.0] * 299, first=WARMUP + 200)
    assert rate.halvings == 1
    assert rate.wants_losses
    told(rate, [1.0] * 2000, first=WARMUP + 499)
    assert rate.halvings == 2
    assert not rate.wants_losses


@pytest.mark.parametrize("stop", [0, 30, 41, 139, 777, 1500])
def test_a_plateau_goes_on_from_what_json_keeps(stop):
    losses = falling_in_stairs()
    whole = told(LearningRate(KIND, WARMUP), losses)
    first, second = LearningRate(KIND, WARMUP), LearningRate(KIND, WARMUP)
    sizes = told(first, losses[:stop])
    second.restore(json.loads(json.dumps(first.state())))
    assert sizes + told(second, losses[stop:], first=stop) == whole


def test_a_state_that_is_none_is_a_sentence():
    with pytest.raises(InputError, match=r"state of the step size lacks or garbles 'halvings': "):
        LearningRate(KIND, 0).restore({})


def test_what_stands_stays_and_decays_in_the_end():
    rate = LearningRate(WarmupStableDecay(1.0, 0.1, steps=100, decay=10), 4)
    sizes = [rate.at(step) for step in range(105)]
    assert sizes[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert set(sizes[4:91]) == {1.0}
    np.testing.assert_allclose(sizes[90:101], np.linspace(1.0, 0.1, 11))
    assert sizes[101:] == [pytest.approx(0.1)] * 4
    assert not rate.wants_losses
    assert not rate.observe(50, 3.0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Plateau(1.0, window=70), "window is 70 updates; take a multiple of 50"),
        (lambda: Plateau(1.0, halvings=-1), "-1 halvings; take 0 or more"),
        (lambda: Plateau(1.0, patience=9999), "patience is 9999 updates; two windows take 10000"),
        (lambda: WarmupStableDecay(1, 0, 10, 11), "a decay over 11 of 10 updates; take 1 to 10"),
    ],
)
def test_step_sizes_that_make_no_sense_are_refused(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()
