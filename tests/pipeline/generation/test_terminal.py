import re

import numpy as np

from pipeline.generation.terminal import COLUMNS, strip


def pixels_of(text):
    """Colours of the characters, upper and lower, as a terminal would show them."""
    rows = []
    for line in text.split("\n"):
        cells = re.findall(r"\x1b\[48;2;(\d+);(\d+);(\d+);38;2;(\d+);(\d+);(\d+)m▄", line)
        assert line.endswith("\x1b[0m")
        values = np.array(cells, int).reshape(-1, 2, 3)
        rows += [values[:, 0], values[:, 1]]
    return np.stack(rows)


def test_two_pixels_a_character():
    image = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    assert (pixels_of(strip(image)) == image).all()
    # an odd row is doubled
    assert (pixels_of(strip(image[:7])) == image[[*range(7), 6]]).all()


def test_wide_pictures_are_thinned_out():
    image = np.random.default_rng(0).integers(0, 256, (8, 2 * COLUMNS, 3), np.uint8)
    assert (pixels_of(strip(image)) == image[::2, ::2]).all()
