import io

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.curves import DPI, HEIGHT, MANY, HeatMap, Line, Panel, draw, smoothed

NONE = np.zeros(0), np.zeros(0)


def points(*values):
    return np.arange(len(values), dtype=float), np.array(values, dtype=float)


def pixels(*panels):
    with Image.open(io.BytesIO(draw(list(panels)))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def amount_of(image, colour):
    """Pixels of about this colour."""
    return int((np.abs(image - np.array(colour)).sum(-1) < 60).sum())


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # the first two of tab10


def test_few_points_are_not_smoothed():
    values = np.random.default_rng(0).normal(size=MANY)
    assert smoothed(values) is values


def test_smoothing_keeps_a_slope_and_its_ends_and_takes_the_noise():
    n = 10 * MANY
    slope = np.linspace(3, 1, n)
    assert smoothed(slope) == pytest.approx(slope)
    noise = np.random.default_rng(0).normal(size=n)
    even = smoothed(slope + noise)
    window = 2 * (n // 50 // 2) + 1
    assert (even - slope)[window:-window].std() < 1.5 / window**0.5
    assert even[0] == pytest.approx((slope + noise)[0])
    flat = np.full(n, 61.2)
    assert (smoothed(flat) == flat).all()


def test_a_run_has_a_colour_in_line_and_dots():
    blue = Line("a", 0, points(3, 2, 1), NONE)
    orange = Line("b", 1, NONE, points(3, 2, 1))
    image = pixels(Panel("loss", (blue,)))
    assert amount_of(image, BLUE) > 100
    assert amount_of(image, ORANGE) == 0
    assert amount_of(pixels(Panel("loss", (blue, orange))), ORANGE) > 100


def test_a_logarithmic_axis_gives_each_decade_its_room():
    straight = Line("a", 0, points(*np.logspace(-3, 3, 100)), NONE)
    linear, log = (pixels(Panel("norm", (straight,), log=is_log)) for is_log in (False, True))
    # of an exponential, all but the end lies on the floor of a linear axis
    middle = slice(int(0.4 * HEIGHT * DPI), int(0.6 * HEIGHT * DPI))
    assert amount_of(log[middle], BLUE) > 1.5 * amount_of(linear[middle], BLUE)


def test_values_that_are_no_numbers_are_marked_and_hide_nothing():
    holes = Line("a", 0, points(3, np.nan, 2, np.inf, 1), points(np.nan))
    whole = Line("a", 0, points(3, 2, 1), NONE)
    assert amount_of(pixels(Panel("loss", (holes,))), BLUE) > amount_of(
        pixels(Panel("loss", (whole,))), BLUE
    )
    assert amount_of(pixels(Panel("loss", (Line("a", 0, points(np.nan), NONE),))), BLUE) > 0


def test_panels_go_into_rows_and_a_heat_map_is_one():
    line = Line("a", 0, points(1, 2), NONE)
    heat = HeatMap("scales", np.array([5.0, 10.0]), ["x", "y"], np.array([[1.0, 2.0], [3.0, 4.0]]))
    one, four = pixels(Panel("loss", (line,))), pixels(*[Panel("loss", (line,))] * 3, heat)
    assert four.shape[0] == pytest.approx(2 * one.shape[0], abs=2)
    assert four.shape[1] == pytest.approx(3 * one.shape[1], abs=2)
    # the ends of viridis
    assert amount_of(four, (68, 1, 84)) > 500
    assert amount_of(four, (253, 231, 37)) > 500
