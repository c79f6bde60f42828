import io
import math
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from data_prep import hashes
from data_prep.hashes import MAX_DISTANCE, HashList, hash_line, is_telling
from pipeline.console import InputError
from pipeline.data.images import decode_image, resize_area, resize_area_float

SHA = bytes(range(16))


def picture(seed, height=120, width=160):
    """Pixels with the spectrum of photographs: amplitude falls with frequency."""
    rng = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width
    amplitude = 1 / np.maximum(1.0, np.hypot(y, x)) ** 1.2
    noise = rng.standard_normal((3, *amplitude.shape)) + 1j * rng.standard_normal(
        (3, *amplitude.shape)
    )
    noise = 0.8 * noise[:1] + 0.2 * noise  # colours of one place are much alike
    field = np.fft.irfft2(noise * amplitude, (height, width)).transpose(1, 2, 0)
    low, high = field.min(), field.max()
    return np.rint((field - low) / (high - low) * 255).astype(np.uint8)


def jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return decode_image(file.getvalue())


def luma(image):
    """Of ITU-R BT.601, in whole numbers as JPEG files have it; half a gray level is rounded up."""
    red, green, blue = np.moveaxis(image.astype(np.int64), -1, 0)
    return ((19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16).astype(np.uint8)


def phash(image):
    return hashes.phash(luma(image))


def distance(one, two):
    return (phash(one) ^ phash(two)).bit_count()


def cell_means(image, n=32):
    """Mean luma of n x n cells of equal size in rational numbers, pixel by pixel."""
    height, width = image.shape[:2]
    sums = [[Fraction(0)] * n for _ in range(n)]

    def shares(size):
        for pixel in range(size):
            for cell in range(pixel * n // size, -(-(pixel + 1) * n // size)):
                top = max(Fraction(pixel), Fraction(cell * size, n))
                yield pixel, cell, min(Fraction(pixel + 1), Fraction((cell + 1) * size, n)) - top

    across = list(shares(width))
    for y, i, down in shares(height):
        for x, j, right in across:
            sums[i][j] += down * right * int(image[y, x])
    area = Fraction(height * width, n * n)
    return [[total / area for total in row] for row in sums]


def slow_phash(image):
    """From the definition of the DCT-II, one frequency at a time."""
    mean = [[float(value) for value in row] for row in cell_means(luma(image))]
    low = []
    for u in range(8):
        for v in range(8):
            total = sum(
                mean[i][j]
                * math.cos(math.pi * (2 * i + 1) * u / 64)
                * math.cos(math.pi * (2 * j + 1) * v / 64)
                for i in range(32)
                for j in range(32)
            )
            low.append(total / 16 * (0.5 if u == 0 else 1) ** 0.5 * (0.5 if v == 0 else 1) ** 0.5)
    low = [round(value, 6) for value in low]
    middle = sum(sorted(low)[31:33]) / 2
    return int("".join("1" if value > middle else "0" for value in low), 2)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 50), (31, 7), (8, 41), (1, 1)])
def test_the_hash_is_that_of_the_definition(height, width):
    for seed in range(3):
        image = picture(seed, height, width) if height > 1 else np.full((1, 1, 3), 9, np.uint8)
        assert phash(image) == slow_phash(image)


def test_it_starts_from_area_means():
    # through the resizing of the pipeline the bits are the same, but for near ties
    for seed in range(20):
        image = picture(seed, 100 + seed, 140)
        small = resize_area_float(image, 32, 32)
        assert (phash(image) ^ phash(np.rint(small).astype(np.uint8))).bit_count() <= 4


@pytest.mark.parametrize("width", [8193, 300_000])
def test_long_strips_have_the_hash_of_any_other_shape(width):
    strip = np.repeat(picture(1, 8, 64), -(-width // 64), axis=1)[:, :width]
    assert distance(strip, resize_area(strip[:, : 64 * (width // 64)], 8, 64)) <= 2
    upright = np.ascontiguousarray(strip.transpose(1, 0, 2))
    # turned about its diagonal, its frequencies are too
    bits = np.array(list(f"{phash(strip):064b}")).reshape(8, 8)
    assert "".join(bits.T.reshape(-1)) == f"{phash(upright):064b}"


@pytest.mark.parametrize("height", [8192, 8224, 8225, 9000])
def test_sums_of_many_bright_rows_do_not_overflow(height):
    image = np.repeat(255 - picture(3, 60, 9) // 4, 150, axis=0)[:height]
    assert distance(image, resize_area(image, 320, 9)) <= 2


@pytest.mark.parametrize("seed", range(30))
def test_a_picture_that_was_encoded_again_or_scaled_or_lit_is_near(seed):
    image = picture(seed, 256, 320)
    again = {
        "jpeg 90": jpeg(image, 90),
        "jpeg 30": jpeg(image, 30),
        "half": resize_area(image, 128, 160),
        "odd size": resize_area(image, 101, 173),
        "brighter": np.clip(image * 1.2 + 10, 0, 255).astype(np.uint8),
        "darker": (image * 0.7).astype(np.uint8),
        "gray": np.repeat(np.rint(image @ [0.299, 0.587, 0.114])[..., None], 3, 2).astype(np.uint8),
    }
    for name, other in again.items():
        assert distance(image, other) <= MAX_DISTANCE, name


def test_different_pictures_are_far():
    hashes = np.array([phash(picture(seed)) for seed in range(300)], np.uint64)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    assert apart[~np.eye(300, dtype=bool)].min() > MAX_DISTANCE


def test_what_has_no_structure_has_no_bits():
    black, gray = np.zeros((40, 40, 3), np.uint8), np.full((123, 77, 3), 99, np.uint8)
    assert phash(black) == 0
    assert phash(gray) == 1 << 63  # its mean, and nothing else
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 32:] = 200
    # no frequency down the picture, and no even one across
    assert phash(halves) & ~(0xFF << 56) == 0


def test_hashes_of_pictures_with_structure_tell_them_apart_and_others_do_not(tmp_path):
    assert all(is_telling(phash(picture(seed))) for seed in range(200))
    stripes = np.repeat(picture(0)[:, :1], 160, axis=1)
    gradient = np.repeat(np.arange(160, dtype=np.uint8)[None, :, None], 120, 0).repeat(3, 2)
    flat = np.full((50, 50, 3), 200, np.uint8)
    found = hash_list(tmp_path, "".join(f"{phash(p):016x}\n" for p in (stripes, gradient, flat)))
    for image in (stripes, gradient, flat, np.full((9, 9, 3), 30, np.uint8), gradient[:, ::-1]):
        assert not is_telling(phash(image))
        assert found.matches(SHA, phash(image)) is None


def hash_list(tmp_path, text):
    path = tmp_path / "list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return HashList.from_file(path)


def test_a_list_names_the_line_that_matches(tmp_path):
    other = bytes(16)
    bits = 0x0123456789ABCDEF
    found = hash_list(
        tmp_path,
        f"# an evaluation set\n\n{SHA.hex()}\n"
        f"{bits:016x}  # a photograph\n{hash_line(b'x' * 16, 0xFFFF << 40)}\r\n"
        f"{SHA.hex().upper()}\n",
    )
    assert len(found) == 4
    assert found.matches(SHA, 0) == "the same bytes as line 3"
    assert found.matches(b"x" * 16, 0) == "the same bytes as line 5"
    assert found.matches(other, bits) == "0 of 64 bits from line 4"
    assert found.matches(other, bits ^ 0b1011) == "3 of 64 bits from line 4"
    assert found.matches(other, bits ^ 0xFF) == "8 of 64 bits from line 4"
    assert found.matches(other, bits ^ 0x1FF) is None
    assert found.matches(other, 0xFFFF << 40) == "0 of 64 bits from line 5"
    only_bytes = hash_list(tmp_path, SHA.hex())
    assert only_bytes.matches(other, 0) is None
    assert only_bytes.matches(SHA, 0) == "the same bytes as line 1"


def test_the_nearest_of_many_is_found(tmp_path):
    rng = np.random.default_rng(0)
    hashes = [int(h) for h in rng.integers(0, 1 << 64, 5_000, dtype=np.uint64)]
    found = hash_list(tmp_path, "".join(f"{h:016x}\n" for h in hashes))
    for k in (0, 17, 4_999):
        near = hashes[k] ^ (1 << 63) ^ 2
        best = min(((h ^ near).bit_count(), i + 1) for i, h in enumerate(hashes))
        assert best == (2, k + 1)
        assert found.matches(SHA, near) == f"2 of 64 bits from line {k + 1}"
    assert all(found.matches(SHA, int(h)) is None for h in rng.integers(0, 1 << 64, 50, np.uint64))


def test_a_list_that_is_none_is_refused_by_line(tmp_path):
    for text, match in [
        ("# nothing\n\n", "holds no hash: it would keep nothing out"),
        ("", "holds no hash"),
        (f"{SHA.hex()}\nabc\n", r"line 2: 'abc' is neither an image_sha \(32 hexadecimal digits\)"),
        ("0123456789abcdeg\n", "line 1: '0123456789abcdeg'"),
        (f"{SHA.hex()} {SHA.hex()}\n", "line 1: "),
        (f"{SHA.hex()} 0123456789abcdef 0123456789abcdef\n", "line 1: "),
        (f"{SHA.hex()}0123456789abcdef\n", "line 1: "),
        (b"\xff\xfe0\x001\x00", "is no text"),
    ]:
        with pytest.raises(InputError, match=match):
            hash_list(tmp_path, text)
    with pytest.raises(InputError, match=r"gone\.txt cannot be read \(No such file"):
        HashList.from_file(tmp_path / "gone.txt")
