"""Pictures in a terminal, and the part of a picture that there is."""

import numpy as np

COLUMNS = 64  # of a picture, at most
HALF = "\N{LOWER HALF BLOCK}"


def strip(image_YXC: np.ndarray) -> str:
    """Lines that show a picture on a terminal with 24-bit colours, two pixels a character.

    Args:
        image_YXC: uint8; above ``COLUMNS`` pixels wide only every n-th row and column is shown.
    """
    step = -(-image_YXC.shape[1] // COLUMNS)
    seen = image_YXC[::step, ::step]
    if len(seen) % 2:
        seen = np.concatenate([seen, seen[-1:]])
    lines = []
    for above, below in zip(seen[::2], seen[1::2], strict=True):
        cells = (
            f"\x1b[48;2;{a[0]};{a[1]};{a[2]};38;2;{b[0]};{b[1]};{b[2]}m{HALF}"
            for a, b in zip(above.tolist(), below.tolist(), strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
