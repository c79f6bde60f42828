import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.pictures import GAP, save_comparison, save_png, tile, to_uint8


def test_pictures_become_bytes_rounded_to_the_nearest():
    levels = torch.arange(256) / 255
    assert to_uint8(levels.view(1, 1, 16, 16).expand(1, 3, 16, 16))[0, :, :, 0].tolist() == (
        torch.arange(256).view(16, 16).tolist()
    )
    values = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.0, 2.0])
    got = to_uint8(values.view(1, 1, 1, -1).expand(1, 3, 1, -1))
    assert got.dtype == np.uint8
    assert got[0, 0, :, 0].tolist() == [0, 0, 0, 1, 254, 255, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bytes_are_ordered_rows_columns_colours(dtype):
    image = torch.zeros(2, 3, 4, 5, dtype=dtype)
    image[1, 2, 3, 0] = 1
    got = to_uint8(image)
    assert got.shape == (2, 4, 5, 3)
    assert np.argwhere(got).tolist() == [[1, 3, 0, 2]]


@pytest.mark.parametrize(
    ("n", "columns", "shape"),
    [
        (1, 4, (1, 1)),
        (4, 4, (1, 4)),
        (5, 4, (2, 4)),
        (6, 2, (3, 2)),
        (3, 1, (3, 1)),
        (2, 9, (1, 2)),
    ],
)
def test_tiles_lie_row_by_row_between_white_gaps(n, columns, shape):
    height, width = 3, 5
    images = np.random.default_rng(0).integers(0, 200, (n, height, width, 3), dtype=np.uint8)
    sheet = tile(images, columns)
    rows, across = shape
    assert sheet.dtype == np.uint8
    assert sheet.shape == (rows * (height + GAP) - GAP, across * (width + GAP) - GAP, 3)
    left = sheet.copy()
    for i in range(n):
        y, x = i // across * (height + GAP), i % across * (width + GAP)
        assert np.array_equal(sheet[y : y + height, x : x + width], images[i])
        left[y : y + height, x : x + width] = 255
    assert (left == 255).all()


@pytest.mark.parametrize(
    ("n", "order"),
    [(2, [[0, 1], [10, 11]]), (5, [[0, 1, 2], [10, 11, 12], [3, 4, None], [13, 14, None]])],
)
def test_what_is_compared_stands_one_over_the_other(tmp_path, n, order):
    above = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((4, 4, 3), dtype=np.uint8)
    save_comparison(tmp_path / "x.png", above, above + 10, columns=3)
    with Image.open(tmp_path / "x.png") as image:
        found = np.asarray(image)[2 :: 4 + GAP, 2 :: 4 + GAP, 0]
    assert found.tolist() == [[255 if i is None else i for i in row] for row in order]


def test_a_png_keeps_every_byte(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    path = tmp_path / "new" / "folder" / "picture.png"
    save_png(path, image)
    with Image.open(path) as found:
        assert (found.format, found.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(found), image)
    save_png(path, image[:3])
    assert Image.open(path).size == (9, 3)
