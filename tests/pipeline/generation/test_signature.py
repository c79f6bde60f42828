import numpy as np
import pytest

from pipeline.console import InputError
from pipeline.generation.signature import COLOURS, LINE, add_signature


@pytest.mark.parametrize(("side", "square"), [(16, 2), (64, 2), (128, 3), (256, 6)])
def test_five_squares_stand_in_the_lower_right_corner(side, square):
    image = np.full((side, side + 8, 3), 99, np.uint8)
    signed = add_signature(image)
    for i, colour in enumerate(reversed(COLOURS)):
        bottom = side - i * square
        assert (signed[bottom - square : bottom, -square:] == colour).all()
    assert (signed[side - 5 * square :, -square - 1] == LINE).all()
    assert (signed[side - 5 * square - 1, -square - 1 :] == LINE).all()
    changed = (signed != image).any(-1)
    assert changed.sum() == (5 * square + 1) * (square + 1)
    assert (image == 99).all()


def test_a_picture_without_room_is_refused():
    with pytest.raises(InputError, match="20 x 15 pixels has no room for the signature"):
        add_signature(np.zeros((15, 20, 3), np.uint8))
