import io
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.console import InputError
from pipeline.data import images
from pipeline.data.images import (
    ImageError,
    augment_dalle,
    augment_dvae,
    centre_crop,
    decode_image,
    inspect_image,
    resize_area,
    resize_area_float,
)

# pytest replaces the filters that images.py sets
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin"),
    pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning"),
]

RGB = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def encoded(image, kind="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height, rows, depth=8, colour=2, transparent=b""):
    """A PNG made by hand, to say what Pillow would not write."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    middle = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + body + chunk(b"IEND", b"")


def png16(pixels, **options):
    """A 16-bit PNG of uint16 [H, W] (gray) or [H, W, 3]."""
    height, width = pixels.shape[:2]
    rows = [row.astype(">u2").tobytes() for row in pixels]
    return png(width, height, rows, depth=16, colour=0 if pixels.ndim == 2 else 2, **options)


def on_white(colour, alpha):
    exact = (np.array(colour, float) * alpha + 255 * (255 - alpha)) / 255
    return np.rint(exact).astype(np.uint8).tolist()


def reason_of(data):
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_plain_pixels_come_back_exactly_and_unnoted(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = inspect_image(encoded(RGB, kind, **options))
    np.testing.assert_array_equal(decoded.pixels, RGB)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.flags.writeable
    assert decoded.notes == ()


def test_luma_is_that_of_the_standard_whatever_the_picture_was():
    rgba = np.dstack([RGB, np.full(RGB.shape[:2], 9, np.uint8)])
    gentle = np.asarray(Image.fromarray(RGB // 4 + 96).resize((80, 60), Image.Resampling.BICUBIC))
    for data, atol in (
        (encoded(RGB), 0.51),  # its weights are those in 1/65536
        (encoded(RGB[..., 0]), 0.51),
        (encoded(rgba), 0.51),
        (encoded(RGB, "TIFF"), 0.51),
        # the chroma that comes back from the file is rounded, and nothing is clipped here
        (encoded(gentle, "JPEG", quality=95), 1.51),
        (encoded(gentle, "JPEG", quality=95, progressive=True), 1.51),
        (encoded(RGB[..., 0], "JPEG"), 0.51),
        (encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"), 0.51),
    ):
        decoded = inspect_image(data)
        exact = decoded.pixels @ [0.299, 0.587, 0.114]
        assert decoded.luma.dtype == np.uint8
        assert np.abs(decoded.luma - exact).max() < atol
        np.testing.assert_array_equal(decoded.pixels, decode_image(data))
        assert (decoded.height, decoded.width) == decoded.luma.shape == decoded.pixels.shape[:2]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    upright = decode_image(encoded(RGB, kind))
    decoded = inspect_image(encoded(RGB, kind, exif=exif))
    np.testing.assert_array_equal(decoded.pixels, TURNED[orientation](upright))
    assert decoded.notes == (("exif rotated",) if orientation > 1 else ())


def test_damaged_exif_costs_no_picture():
    data = encoded(RGB, "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    np.testing.assert_array_equal(decode_image(data), decode_image(encoded(RGB, "JPEG")))


@pytest.mark.parametrize("alpha", [0, 1, 127, 128, 254])
def test_alpha_is_composited_on_white(alpha):
    colours = [(0, 0, 0), (100, 10, 255), (255, 255, 255), (3, 77, 201)]
    rgba = np.array([[(*colour, alpha) for colour in colours]], np.uint8)
    decoded = inspect_image(encoded(rgba))
    assert decoded.pixels[0].tolist() == [on_white(colour, alpha) for colour in colours]
    assert decoded.notes == ("alpha on white",)


def test_opaque_alpha_is_not_noted():
    decoded = inspect_image(encoded(np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])))
    np.testing.assert_array_equal(decoded.pixels, RGB)
    assert decoded.notes == ()


def test_every_other_kind_of_transparency_is_on_white():
    gray_alpha = Image.merge("LA", [Image.new("L", (2, 2), 40), Image.new("L", (2, 2), 100)])
    assert decode_image(encoded(gray_alpha))[0, 0].tolist() == on_white((40, 40, 40), 100)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    for options, expected in (
        ({"transparency": 1}, [[10, 20, 30], [255, 255, 255]]),
        ({"transparency": b"\x40\xff"}, [on_white((10, 20, 30), 64), [200, 100, 50]]),
    ):
        decoded = inspect_image(encoded(palette, **options))
        assert decoded.pixels[0].tolist() == expected
        assert decoded.notes == ("alpha on white", "palette")
    rows = [bytes([9, 8, 7, 1, 2, 3])]
    keyed = png(2, 1, rows, transparent=struct.pack(">3H", 1, 2, 3))
    assert decode_image(keyed)[0].tolist() == [[9, 8, 7], [255, 255, 255]]
    gray16 = np.array([[257 * 9, 12345]], np.uint16)
    keyed16 = png16(gray16, transparent=struct.pack(">H", 12345))
    assert decode_image(keyed16)[0].tolist() == [[9] * 3, [255] * 3]


def test_16_bits_are_scaled_and_not_clipped():
    gray = np.array([[0, 128, 129, 257, 300, 32768, 65279, 65535]], np.uint16)
    decoded = inspect_image(png16(gray))
    assert decoded.pixels[0, :, 0].tolist() == [0, 0, 1, 1, 1, 128, 254, 255]
    assert decoded.notes == ("16-bit",)
    colour = RGB.astype(np.uint16) * 257
    decoded = inspect_image(png16(colour))
    np.testing.assert_array_equal(decoded.pixels, RGB)
    assert decoded.notes == ("16-bit",)
    turned = Image.Exif()
    turned[274] = 6
    image = Image.fromarray(np.arange(0, 6 * 257, 257, dtype=np.uint16).reshape(2, 3))
    decoded = inspect_image(encoded(image, exif=turned))
    assert decoded.pixels[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]


def test_cmyk_palette_gray_and_bilevel_become_rgb():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    decoded = inspect_image(encoded(cmyk, "JPEG", quality=95))
    assert np.abs(decoded.pixels.astype(int) - (255, 0, 0)).max() <= 3
    assert decoded.notes == ("cmyk",)
    gray = inspect_image(encoded(RGB[..., 0]))
    np.testing.assert_array_equal(gray.pixels, np.dstack([RGB[..., 0]] * 3))
    assert decode_image(encoded(Image.new("1", (2, 2), 1))).tolist() == [[[255] * 3] * 2] * 2
    few = Image.fromarray(RGB).quantize(4)
    decoded = inspect_image(encoded(few))
    np.testing.assert_array_equal(decoded.pixels, np.asarray(few.convert("RGB")))
    assert decoded.notes == ("palette",)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    decoded = inspect_image(data)
    assert decoded.pixels.tolist() == [[[255, 0, 0]] * 4] * 4
    assert "animated (first frame kept)" in decoded.notes


def test_pages_of_a_tiff_are_no_animation():
    pages = [Image.fromarray(RGB), Image.fromarray(RGB[::-1])]
    decoded = inspect_image(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    np.testing.assert_array_equal(decoded.pixels, RGB)
    assert decoded.notes == ("several pages (first kept)",)


# 81 million is above our limit alone, 144 makes Pillow warn, 900 makes it raise
@pytest.mark.parametrize("side", [9_000, 12_000, 30_000])
def test_a_bomb_is_refused_by_its_header(side, monkeypatch):
    def load(self):
        raise AssertionError("pixels were decoded")

    data = png(side, side, [bytes(100)])
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert reason_of(data) == "decompression bomb"


def test_the_largest_allowed_picture_passes_the_limit(monkeypatch):
    monkeypatch.setattr(images, "PIXEL_LIMIT", 60)
    assert decode_image(encoded(RGB)).shape == (6, 10, 3)
    monkeypatch.setattr(images, "PIXEL_LIMIT", 59)
    assert reason_of(encoded(RGB)) == "decompression bomb"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_file_is_named_and_never_half_a_picture(kind, share):
    noise = np.random.default_rng(1).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    data = encoded(noise, kind)
    assert reason_of(data[: int(len(data) * share)]) == "truncated image"


def test_a_progressive_jpeg_may_not_be_truncated():
    noise = np.random.default_rng(1).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    data = encoded(noise, "JPEG", progressive=True)
    assert reason_of(data[: len(data) * 2 // 3]) == "truncated image"


def test_what_is_no_picture_is_told_from_a_broken_one():
    assert reason_of(b"") == "empty file"
    assert reason_of(b"<html>404 not found</html>") == "not an image"
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not an image"
    assert reason_of(encoded(RGB, "JPEG")[:20]) == "corrupt image"
    damaged = bytearray(encoded(RGB))
    damaged[45:60] = bytes(15)
    assert reason_of(bytes(damaged)) == "corrupt image"
    assert reason_of(encoded(Image.new("F", (4, 4)), "TIFF")) == "unsupported pixel format"


def test_details_are_the_same_on_every_run():
    for data in (b"no image", encoded(RGB, "JPEG")[:20]):
        details = set()
        for _ in range(3):
            with pytest.raises(ImageError) as caught:
                decode_image(data)
            details.add(caught.value.detail)
        assert len(details) == 1
        assert "0x" not in details.pop()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_random_damage_raises_nothing_but_image_errors(kind):
    rng = np.random.default_rng(2)
    good = np.frombuffer(encoded(RGB, kind), np.uint8)
    for _ in range(150):
        bad = good.copy()
        bad[rng.integers(0, len(bad), 4)] = rng.integers(0, 256, 4)
        try:
            pixels = decode_image(bad.tobytes())
        except ImageError:
            continue
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3


# ---- resize


def covered(image, height, width):
    """Exact coverage by brute force: each pixel cut into pieces that fit both grids."""
    fine = np.repeat(image.astype(np.float64), height, axis=0)
    rows = fine.reshape(height, image.shape[0], *image.shape[1:]).mean(1)
    fine = np.repeat(rows, width, axis=1)
    return fine.reshape(height, width, image.shape[1], image.shape[2]).mean(2)


@pytest.mark.parametrize(
    ("old", "new"),
    [((63, 111), (17, 64)), ((97, 131), (96, 130)), ((64, 64), (32, 16)), ((301, 211), (11, 7))],
)
def test_area_is_exact_coverage(old, new):
    image = np.random.default_rng(3).integers(0, 256, (*old, 3), dtype=np.uint8)
    exact = covered(image, *new)
    assert np.abs(resize_area_float(image, *new) - exact).max() < 1e-3
    resized = resize_area(image, *new)
    assert resized.dtype == np.uint8
    assert resized.flags.c_contiguous
    assert np.abs(resized - exact).max() < 0.501
    part = slice(2, 7), slice(3, 4)
    np.testing.assert_array_equal(resize_area(image, *new, *part), resized[part])


def test_same_size_changes_nothing():
    np.testing.assert_array_equal(resize_area(RGB, 6, 10), RGB)


def test_enlarging_is_linear_between_pixel_centres():
    ramp = np.array([[[0], [100]]], np.uint8)
    assert resize_area_float(ramp, 1, 4)[0, :, 0].tolist() == [0.0, 25.0, 75.0, 100.0]
    larger = resize_area_float(RGB, 17, 31)
    pillow = [
        Image.fromarray(RGB[..., c].astype(np.float32)).resize((31, 17), Image.Resampling.BILINEAR)
        for c in range(3)
    ]
    np.testing.assert_allclose(larger, np.dstack([np.asarray(p) for p in pillow]), atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((6, 10), 12, (12, 20)), ((10, 6), 9, (15, 9)), ((7, 10), 9, (9, 13)), ((6, 10), 6, (6, 10))],
)
def test_small_pictures_are_enlarged_to_their_shorter_side(shape, size, expected):
    image = np.random.default_rng(8).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert images.enlarged_shape(*shape, size) == expected
    larger = images.enlarge(image, size)
    assert larger.shape == (*expected, 3)
    pillow = Image.fromarray(image).resize(expected[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(larger, np.asarray(pillow))
    # what is large enough is left alone
    assert images.enlarge(image, min(shape)) is image
    assert images.enlarge(image, 3) is image


def test_a_thread_too_long_to_be_enlarged_is_named(monkeypatch):
    monkeypatch.setattr(images, "PIXEL_LIMIT", 16 * 16 * 100)
    thread = np.zeros((8, 800, 3), np.uint8)
    assert images.enlarge(thread, 16).shape == (16, 1600, 3)
    for refuse in (lambda: images.enlarge(thread, 17), lambda: images.enlarged_shape(8, 800, 17)):
        with pytest.raises(ImageError, match="1700x17 pixels") as caught:
            refuse()
        assert caught.value.reason == "too long to be enlarged"


# ---- augmentation


@pytest.fixture
def sides(monkeypatch):
    """Heights that ``resize_area`` was asked for."""
    seen = []

    def spy(image, height, width, *part):
        assert height == width
        seen.append(height)
        return resize_area(image, height, width, *part)

    monkeypatch.setattr(images, "resize_area", spy)
    return seen


@pytest.mark.parametrize(
    ("augment", "shape", "expected"),
    [
        (augment_dvae, (90, 60), set(range(36, 49))),  # 9/8 and 12/8 of 32
        (augment_dvae, (40, 90), set(range(36, 41))),
        (augment_dvae, (33, 34), {33}),
        (augment_dalle, (90, 60), set(range(32, 37))),
        (augment_dalle, (34, 60), {32, 33, 34}),
    ],
)
def test_sides_are_those_of_the_listings(augment, shape, expected, sides):
    rng = np.random.default_rng(4)
    image = np.zeros((*shape, 3), np.uint8)
    for _ in range(300):
        crop = augment(image, 32, rng)
        assert (crop.shape, crop.dtype) == ((32, 32, 3), np.uint8)
    assert set(sides) == expected


def test_only_the_dvae_sees_mirrored_pictures():
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None] * 6, (40, 40, 3))
    rng = np.random.default_rng(5)
    flips = [augment_dvae(ramp, 32, rng)[0, 0, 0] > 100 for _ in range(400)]
    assert 150 < sum(flips) < 250
    assert not any(augment_dalle(ramp, 32, rng)[0, 0, 0] > 100 for _ in range(100))


def test_dalle_crops_near_the_centre_and_the_dvae_anywhere():
    # as high as the crop: no resize, so that a pixel's value is its column
    columns = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None], (16, 96, 3))
    rng = np.random.default_rng(6)
    near = {int(augment_dalle(columns, 16, rng)[0, 0, 0]) for _ in range(1000)}
    assert near == set(range(30, 50))  # 3/8 and 5/8 of 96 - 16, the end excluded
    anywhere = {int(augment_dvae(columns, 16, rng)[0].min()) for _ in range(2000)}
    assert anywhere == set(range(81))
    rows = np.ascontiguousarray(columns.transpose(1, 0, 2))
    near = {int(augment_dalle(rows, 16, rng)[0, 0, 0]) for _ in range(1000)}
    assert near == set(range(30, 50))


def test_the_same_generator_gives_the_same_crop():
    image = np.random.default_rng(7).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for augment in (augment_dvae, augment_dalle):
        first, again, other = (augment(image, 32, np.random.default_rng(s)) for s in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


def test_centre_crop_keeps_the_middle():
    columns = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None], (16, 96, 3))
    assert centre_crop(columns, 16)[3, :, 1].tolist() == list(range(40, 56))
    halves = centre_crop(columns, 8)
    assert halves[0, :, 0].tolist() == [int(np.rint(40.5 + 2 * i)) for i in range(8)]
    assert centre_crop(columns.transpose(1, 0, 2), 8)[:, 0, 0].tolist() == halves[0, :, 0].tolist()


def test_a_long_strip_costs_no_memory():
    # resizing all of it would take a matrix of 16,384 x 524,288
    assert centre_crop(np.zeros((128, 1 << 19, 3), np.uint8), 64).shape == (64, 64, 3)


@pytest.mark.parametrize("crop", [centre_crop, augment_dvae, augment_dalle])
def test_a_small_picture_is_refused_with_a_way_out(crop):
    arguments = () if crop is centre_crop else (np.random.default_rng(0),)
    with pytest.raises(InputError, match=r"31x40 pixels .* 32x32 .*--upscale"):
        crop(np.zeros((40, 31, 3), np.uint8), 32, *arguments)


def test_what_is_taken_without_colours_can_be_decoded_with_them():
    """Damage anywhere in a JPEG is seen, or not seen, by both ways of decoding it."""
    rng = np.random.default_rng(7)
    outcomes = Counter()
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}):
        whole = encoded(RGB, "JPEG", **options)
        for _ in range(150):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), rng.integers(1, 4)):
                data[at] = rng.integers(256)
            if rng.random() < 0.3:
                del data[rng.integers(len(data)) :]
            said = []
            for read in (lambda d: inspect_image(d).luma, decode_image):
                try:
                    said.append(read(bytes(data)).shape[:2])
                except ImageError as error:
                    said.append(error.reason)
            assert said[0] == said[1]
            outcomes[said[0] if isinstance(said[0], str) else "taken"] += 1
    assert min(outcomes[kind] for kind in ("taken", "truncated image", "corrupt image")) > 20
