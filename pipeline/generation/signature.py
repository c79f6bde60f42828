"""A visible signature: five small squares, one above the other, in the lower right corner.

The colours are those of a radish from its leaves to its heart. A line to the left and above, and
the change of colours itself, tell the strip from any background.
"""

import numpy as np

from pipeline.config import require

COLOURS = ((40, 130, 72), (120, 190, 76), (226, 232, 128), (252, 246, 226), (228, 60, 124))
LINE = (28, 28, 32)
SMALLEST = 16  # pixels a side of a picture that has room


def add_signature(image_YXC: np.ndarray) -> np.ndarray:
    """The picture with the signature over its lower right corner.

    A square has a 42nd of the shorter side, 2 pixels at least; the line has a sixth of a square,
    1 pixel at least.

    Args:
        image_YXC: uint8, three colours.

    Raises:
        InputError: a side is below ``SMALLEST``.
    """
    height, width = image_YXC.shape[:2]
    shorter = min(height, width)
    require(
        shorter >= SMALLEST,
        f"a picture of {width} x {height} pixels has no room for the signature, which takes "
        f"{SMALLEST} a side; leave the signature out",
    )
    square = max(2, shorter // 42)
    line = max(1, square // 6)
    tall = square * len(COLOURS)
    out = image_YXC.copy()
    out[-tall - line :, -square - line :] = LINE
    out[-tall:, -square:] = np.repeat(np.array(COLOURS, np.uint8)[:, None], square, axis=0)
    return out
