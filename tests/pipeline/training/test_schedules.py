import math

import pytest

from pipeline.config import Ramp
from pipeline.training.schedules import LearningRate, at


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
