"""What of a picture is kept, and what cannot be."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.console import InputError
from pipeline.generation.prompt import kept_by_mask, read_prompt
from tests.pipeline.generation.helpers import random_dvae, tiny_config

SIDE, GRID = 32, 4


@pytest.fixture(scope="module")
def dvae():
    return random_dvae(tiny_config())


def save(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


def picture(side=SIDE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def mask_of(path, kept):
    """Black where ``kept`` [grid, grid] says so."""
    cells = np.where(np.array(kept, bool), 0, 255).astype(np.uint8)
    return save(path, np.repeat(np.repeat(cells, 8, 0), 8, 1))


def ask(path, dvae, *, keep_rows=None, mask=None, fit=False):
    return read_prompt(path, dvae, keep_rows=keep_rows, mask=mask, fit=fit)


def test_the_top_rows_are_the_codes_of_the_picture(dvae, tmp_path):
    pixels = picture()
    prompt = ask(save(tmp_path / "a.png", pixels), dvae, keep_rows=3)
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    assert torch.equal(prompt.codes_1G, dvae.encode(batch).flatten(1)[:, : 3 * GRID])
    assert prompt.facts["kept_tokens"] == 12
    assert prompt.facts["image_prompt"] == prompt.sha256
    # a mask of the same rows
    mask = mask_of(tmp_path / "m.png", [[1] * 4] * 3 + [[0] * 4])
    assert torch.equal(ask(tmp_path / "a.png", dvae, mask=mask).codes_1G, prompt.codes_1G)


@pytest.mark.parametrize("n", range(1, GRID**2))
def test_a_mask_may_keep_any_beginning(n, tmp_path):
    kept = (np.arange(GRID**2) < n).reshape(GRID, GRID)
    assert kept_by_mask(mask_of(tmp_path / "m.png", kept), SIDE) == n


def test_a_cell_with_one_white_pixel_is_drawn_anew(tmp_path):
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[9, 8] = 255  # row 1, column 1
    pixels[16:] = 255
    with pytest.raises(InputError, match=r"keeps the cell in row 1, column 2 of 4 x 4"):
        kept_by_mask(save(tmp_path / "m.png", pixels), SIDE)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([[0] * 4] + [[1] * 4] * 3, "keeps nothing of the first cell"),
        ([[1] * 4] * 4, "black everywhere, so nothing is left to draw"),
        ([[1] * 4, [1, 0, 0, 1], [0] * 4, [0] * 4],
         r"row 1, column 3 of 4 x 4, behind .* first white cell on \(row 1, column 1\)"),
        ([[1, 0, 0, 0]] * 4, "only a beginning can be kept"),
    ],
    ids=["nothing", "everything", "hole", "column"],
)  # fmt: skip
def test_masks_that_raster_order_cannot_serve_are_refused(kept, words, tmp_path):
    with pytest.raises(InputError, match=words):
        kept_by_mask(mask_of(tmp_path / "m.png", kept), SIDE)


def test_pictures_that_cannot_be_gone_on_with_are_named(dvae, tmp_path):
    good = save(tmp_path / "a.png", picture())
    large = save(tmp_path / "large.png", picture(40))
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "words.png").write_text("no picture")
    for path, changes, words in (
        (large, {"keep_rows": 2}, r"40 x 40 pixels and the model draws 32 x 32: .*--fit"),
        (tmp_path / "cut.png", {"keep_rows": 2}, "name another picture"),
        (tmp_path / "words.png", {"keep_rows": 2}, "name another picture"),
        (tmp_path / "none.png", {"keep_rows": 2}, "cannot be read"),
        (good, {"keep_rows": 0}, "--keep-rows is 0; take 1 to 3"),
        (good, {"keep_rows": 4}, "--keep-rows is 4; take 1 to 3"),
        (good, {"mask": large}, r"40 x 40 pixels; a mask has as many as the picture, 32 x 32"),
    ):
        with pytest.raises(InputError, match=words):
            ask(path, dvae, **changes)


def test_other_sizes_fit_when_that_is_asked_for(dvae, tmp_path):
    pixels = picture()
    wide = np.concatenate([pixels[:, :4] * 0, pixels, pixels[:, :4] * 0], axis=1)
    fitted = ask(save(tmp_path / "wide.png", wide), dvae, keep_rows=2, fit=True)
    exact = ask(save(tmp_path / "a.png", pixels), dvae, keep_rows=2)
    assert torch.equal(fitted.codes_1G, exact.codes_1G)
    small = save(tmp_path / "small.png", picture(16))
    assert ask(small, dvae, keep_rows=2, fit=True).codes_1G.shape == (1, 8)
