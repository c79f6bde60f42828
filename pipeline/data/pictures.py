"""Pictures as a person looks at them: tensors to bytes, many to one grid, PNG files.

Letters: B pictures, C three colours, Y X pixels.
"""

from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

GAP = 2  # pixels between the tiles of a grid


def to_uint8(image_BCYX: Tensor) -> np.ndarray:
    """Pictures in [0, 1] as uint8 [B, Y, X, C]."""
    scaled = (image_BCYX.float().clamp(0, 1) * 255).round()
    return rearrange(scaled, "b c y x -> b y x c").cpu().numpy().astype(np.uint8)


def tile(image_BYXC: np.ndarray, columns: int) -> np.ndarray:
    """One uint8 picture of all, row by row with white gaps; the last row may be short."""
    n, height, width, _ = image_BYXC.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.full(
        (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8
    )
    for i, image in enumerate(image_BYXC):
        y, x = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        sheet[y : y + height, x : x + width] = image
    return sheet


def save_comparison(path: Path, above: np.ndarray, below: np.ndarray, columns: int = 8) -> None:
    """A grid: each row of the one, uint8 [B, Y, X, C], over the same row of the other."""
    columns = min(columns, len(above))
    white = np.full((-len(above) % columns, *above.shape[1:]), 255, dtype=np.uint8)
    both = [np.concatenate([part, white]) for part in (above, below)]
    starts = range(0, len(both[0]), columns)
    rows = [part[start : start + columns] for start in starts for part in both]
    save_png(path, tile(np.concatenate(rows), columns))


def save_png(path: Path, image_YXC: np.ndarray) -> None:
    """Write one picture, uint8 [Y, X, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_YXC).save(path)
