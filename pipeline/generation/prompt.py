"""Pictures that are given from the top: completion and variations (section 3.3, figure 2d).

Tokens are drawn in raster order, each from those before it. So a beginning of a picture can be kept
and the rest drawn anew, and nothing else: what lies behind cannot be seen from before.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DOWNSAMPLING, require
from pipeline.console import InputError
from pipeline.data.images import ImageError, Pixels, centre_crop, decode_image, enlarge
from pipeline.models.dvae import DiscreteVAE


@dataclass(frozen=True)
class ImagePrompt:
    """The image tokens that are kept: the first ones in raster order, int64 [1, G]."""

    codes_1G: Tensor
    sha256: str  # of the file, 16 digits

    @property
    def facts(self) -> dict[str, object]:
        """For the record of what was drawn."""
        return {"image_prompt": self.sha256, "kept_tokens": self.codes_1G.shape[1]}


def read_prompt(
    path: Path, dvae: DiscreteVAE, *, keep_rows: int | None, mask: Path | None, fit: bool
) -> ImagePrompt:
    """Tokens of the top of a picture.

    Args:
        path: the picture, any format that ingest reads.
        dvae: of the model that goes on with it.
        keep_rows: rows of the code grid, each ``DOWNSAMPLING`` pixels high; or
        mask: a picture of the same size: black is kept, everything else is drawn anew.
        fit: cut out the middle of a picture of another size and scale it, as training does.

    Raises:
        InputError: a picture or mask that cannot be read or has another size, rows outside the
            grid, or a mask that keeps more than a beginning.
    """
    side, grid = dvae.config.image_size, dvae.config.grid
    image_YXC, sha256 = _read(path)
    if fit:
        image_YXC = centre_crop(enlarge(image_YXC, side), side)
    height, width = image_YXC.shape[:2]
    require(
        (height, width) == (side, side),
        f"{path} has {width} x {height} pixels and the model draws {side} x {side}: scale it, or "
        "add --fit to take its middle",
    )
    if mask is not None:
        n_kept = kept_by_mask(mask, side)
    else:
        require(
            keep_rows is not None and 1 <= keep_rows < grid,
            f"--keep-rows is {keep_rows}; take 1 to {grid - 1} of the {grid} rows of "
            f"{DOWNSAMPLING} pixels, and the others are drawn",
        )
        assert keep_rows is not None
        n_kept = keep_rows * grid
    device = next(dvae.parameters()).device
    batch = torch.from_numpy(image_YXC).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        codes_1I = dvae.encode(batch.to(device)).flatten(1).cpu()
    return ImagePrompt(codes_1I[:, :n_kept].clone(), sha256)


def kept_by_mask(path: Path, side: int) -> int:
    """How many tokens a mask keeps.

    Raises:
        InputError: it cannot be read, has another size, keeps nothing, everything, or a token
            behind one that is drawn.
    """
    mask_YXC, _ = _read(path)
    height, width = mask_YXC.shape[:2]
    require(
        (height, width) == (side, side),
        f"{path} has {width} x {height} pixels; a mask has as many as the picture, {side} x {side}",
    )
    grid = side // DOWNSAMPLING
    cells = mask_YXC.reshape(grid, DOWNSAMPLING, grid, DOWNSAMPLING, 3).max(axis=(1, 3, 4))
    is_kept_I = cells.ravel() < 128
    n_kept = int(is_kept_I.argmin()) if not is_kept_I.all() else len(is_kept_I)
    require(n_kept > 0, f"{path} keeps nothing of the first cell; draw without --image")
    require(
        n_kept < len(is_kept_I),
        f"{path} is black everywhere, so nothing is left to draw: paint white what is wanted anew",
    )
    if is_kept_I[n_kept:].any():
        behind = n_kept + int(is_kept_I[n_kept:].argmax())
        y, x = divmod(behind, grid)
        raise InputError(
            f"{path} keeps the cell in row {y}, column {x} of {grid} x {grid}, behind others that "
            "are drawn anew. The model draws row by row from the top left and cannot see what "
            "comes later, so only a beginning can be kept: paint white everything from the first "
            f"white cell on (row {n_kept // grid}, column {n_kept % grid})"
        )
    return n_kept


def _read(path: Path) -> tuple[Pixels, str]:
    """Pixels uint8 [Y, X, 3], and a hash of the file."""
    try:
        data = path.read_bytes()
        return np.ascontiguousarray(decode_image(data)), hashlib.sha256(data).hexdigest()[:16]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name a picture") from error
    except ImageError as error:
        raise InputError(f"{path}: {error}; name another picture") from error
