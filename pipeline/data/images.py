"""From bytes to pixels, and the two augmentations of the paper.

Every picture that this system learns from or shows passes through ``inspect_image``: one place
knows about cameras that turn pictures, printers that use CMYK, and files that lie about their size.
Colour profiles are not applied: numbers are taken as sRGB.

Legend: H W height and width, C = 3 colours; uint8 in [0, 255] throughout.
"""

import io
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from pipeline.console import InputError

Pixels = NDArray[np.uint8]

# a float32 copy of a picture of this size takes 0.8 GB; cameras of 64 million pixels still pass
PIXEL_LIMIT = 2**26
# what a data set may hold. The list is closed because Pillow would also start Ghostscript for EPS.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
SIGNATURES = (b"BM", b"GIF8", b"\xff\xd8\xff", b"\x89PNG", b"II*\0", b"MM\0*", b"RIFF")
ORIENTATION = 274  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow only warns between one and two times its own limit; and it warns about damaged EXIF, which
# costs a picture its orientation at most
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class ImageError(InputError):
    """A picture that cannot be used.

    ``reason`` is one of few stable names, to be counted: "empty file", "not an image",
    "truncated image", "corrupt image", "decompression bomb", "unsupported pixel format", "too long
    to be enlarged".
    ``detail`` is for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Decoded:
    """A picture and what had to be done to it.

    ``notes`` are stable names: "alpha on white", "animated (first frame kept)", "cmyk",
    "exif rotated", "exif unreadable", "palette", "16-bit", "several pages (first kept)".

    Args:
        image: upright, loaded, of mode RGB or L.
        notes: see above.
        data: the file.
    """

    def __init__(self, image: Image.Image, notes: tuple[str, ...], data: bytes) -> None:
        self._image, self.notes, self._data = image, notes, data
        self.width, self.height = image.size

    @property
    def pixels(self) -> Pixels:
        """``decode_image`` of the file; a JPEG is decoded once more, owned and writable."""
        if self._image.mode == "L":
            return decode_image(self._data)
        return np.array(self._image)

    @property
    def luma(self) -> Pixels:
        """Y of ITU-R BT.601 in full range, rounded: uint8 [H, W]; of a JPEG, what the file says."""
        return np.asarray(self._image if self._image.mode == "L" else self._image.convert("L"))


def decode_image(data: bytes) -> Pixels:
    """The RGB pixels of an image file as uint8 [H, W, 3]; ``inspect_image`` says more.

    Raises:
        ImageError: the bytes are no usable picture.
    """
    return np.array(_inspect(data, in_colour=True)._image)


def inspect_image(data: bytes) -> Decoded:
    """Decode a BMP, GIF, JPEG, PNG, TIFF or WebP file and name what was unusual about it.

    Its colours are left out where that is sooner done, until somebody asks for them: a third of the
    time for a JPEG.

    EXIF orientation is applied, alpha is composited on white, CMYK, palette and gray are converted,
    16 bits are scaled to 8 (gray: rounded; colour: Pillow keeps the high byte, at most 1 lower),
    and of several frames the first is kept. The header is checked against ``PIXEL_LIMIT`` before
    any pixel is decoded. Damage inside a JPEG that still has its full length cannot be seen.

    Raises:
        ImageError: the bytes are no usable picture; ``reason`` says why in one name.
    """
    return _inspect(data, in_colour=False)


def _inspect(data: bytes, *, in_colour: bool) -> Decoded:
    """A picture, of mode RGB when ``in_colour``."""
    if not data:
        raise ImageError("empty file", "0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if not in_colour:  # a JPEG holds its luma for itself; others take no notice
                image.draft("L", None)
            upright, notes = _decode(image)
            rgb = upright.convert("RGB") if in_colour and upright.mode == "L" else upright
            return Decoded(rgb, notes, data)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("decompression bomb", str(error)) from error
    except UnidentifiedImageError as error:
        # Pillow's own message carries a memory address, which would differ on every run
        raise _unidentified(data) from error
    except Exception as error:  # a damaged file makes Pillow's plugins raise nearly anything
        raise _broken(data, error) from error


def _decode(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """The first frame of an opened image, upright, as mode L if it is that, else RGB; and notes."""
    if image.width * image.height > PIXEL_LIMIT:
        size = f"the header claims {image.width}x{image.height} pixels, the limit is {PIXEL_LIMIT}"
        raise ImageError("decompression bomb", size)
    notes = []
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    if ";16" in str(getattr(image, "tile", "")):  # how the bytes of the file are to be unpacked
        notes.append("16-bit")
    if not is_tiff:  # a PNG may carry EXIF behind its pixels, so they come first
        image.load()
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF is free-form and often damaged; the pixels are what we came for
        orientation = 1
        notes.append("exif unreadable")
    image.load()
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    if turn is not None:
        notes.append("exif rotated")
    # Pillow turns a TIFF by itself while loading
    upright = image if turn is None or is_tiff else image.transpose(turn)
    if image.mode == "CMYK":
        notes.append("cmyk")
    if image.mode in ("P", "PA"):
        notes.append("palette")
    opaque, has_alpha = _opaque(upright)
    if has_alpha:
        notes.append("alpha on white")
    if _has_more_frames(image):
        notes.append("several pages (first kept)" if is_tiff else "animated (first frame kept)")
    return opaque, tuple(sorted(notes))


def _opaque(image: Image.Image) -> tuple[Image.Image, bool]:
    """One upright frame as mode L or RGB, and whether anything shone through."""
    if image.mode in ("I", "F"):
        raise ImageError("unsupported pixel format", f"mode {image.mode} has no known white")
    if image.mode.startswith("I;16"):
        gray16 = np.asarray(image).astype(np.uint32)
        gray = ((gray16 * 255 + 32767) // 65535).astype(np.uint8)
        alpha = np.where(gray16 == image.info.get("transparency", -1), 0, 255).astype(np.uint8)
        rgba = np.dstack([gray, gray, gray, alpha])
    elif image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
    else:
        # convert would copy what is RGB already
        return image if image.mode in ("L", "RGB") else image.convert("RGB"), False
    if rgba[..., 3].min() == 255:
        return Image.fromarray(np.ascontiguousarray(rgba[..., :3])), False
    colour, alpha16 = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    # the largest sum, 255 * 255 + 127, fits 16 bits
    on_white = ((colour * alpha16 + 255 * (255 - alpha16) + 127) // 255).astype(np.uint8)
    return Image.fromarray(on_white), True


def _has_more_frames(image: Image.Image) -> bool:
    if image.format == "MPO":  # phones hide previews behind a JPEG; that is no animation
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # damage behind the first frame does not concern us
        return False


def _unidentified(data: bytes) -> ImageError:
    start = f"{len(data)} bytes, starting with {data[:8].hex()}"
    if data.startswith(SIGNATURES):
        return ImageError("corrupt image", f"the header cannot be read; {start}")
    return ImageError("not an image", f"none of {', '.join(FORMATS)}; {start}")


def _broken(data: bytes, error: Exception) -> ImageError:
    detail = f"{type(error).__name__}: {error}"
    # libwebp says nothing about lengths, but its container does
    short_riff = data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") > len(data) - 8
    if short_riff or "truncat" in str(error).lower():
        return ImageError("truncated image", detail)
    return ImageError("corrupt image", detail)


ALL = slice(None)


@lru_cache(maxsize=256)
def _taps(n_in: int, n_out: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which old pixels make each new one, and their shares: [K, n_out] each, shares sum to 1."""
    scale, new = n_in / n_out, np.arange(n_out)
    if n_out <= n_in:  # the share of the new pixel's span that each old pixel covers
        left = new * scale
        old = np.floor(left).astype(np.int64) + np.arange(int(np.ceil(scale)) + 1)[:, None]
        covered = np.minimum(left + scale, old + 1) - np.maximum(left, old)
        share = np.clip(covered, 0, None) / scale
    else:
        centre = np.clip((new + 0.5) * scale - 0.5, 0, n_in - 1)
        old = np.floor(centre).astype(np.int64) + np.arange(2)[:, None]
        share = np.clip(1 - np.abs(centre - old), 0, None)
    share = share.astype(np.float32)
    is_used = share.any(axis=1)
    return np.minimum(old, n_in - 1)[is_used], share[is_used]


def _resample(values: NDArray[Any], n_out: int, part: slice) -> NDArray[np.float32]:
    """Rows ``part`` of what [N, M] values become with ``n_out`` rows: float32 [n, M].

    Tap by tap in one order, so that every machine gives the same bits; a product with the matrix of
    all shares gives none of that and takes four times as long.
    """
    first, *others = zip(*_taps(len(values), n_out), strict=True)
    rows, share = first
    result: NDArray[np.float32] = np.multiply(values[rows[part]], share[part, None], dtype="f4")
    product = np.empty_like(result)
    for rows, share in others:
        result += np.multiply(values[rows[part]], share[part, None], out=product)
    return result


def resize_area_float(
    image_HWC: Pixels, height: int, width: int, rows: slice = ALL, columns: slice = ALL
) -> NDArray[np.float32]:
    """``resize_area`` before it rounds: float32, values in [0, 255]."""
    n_colour = image_HWC.shape[2]
    low = _resample(image_HWC.reshape(len(image_HWC), -1), height, rows)
    low = low.reshape(len(low), -1, n_colour).transpose(1, 0, 2)
    small = _resample(low.reshape(len(low), -1), width, columns)
    return small.reshape(len(small), -1, n_colour).transpose(1, 0, 2)


def resize_area(
    image_HWC: Pixels, height: int, width: int, rows: slice = ALL, columns: slice = ALL
) -> Pixels:
    """Resize uint8 [H, W, C] to [height, width, C]: each new pixel is the mean of what it covers.

    Equal to OpenCV's INTER_AREA, and not to what Pillow (BOX) and torch ("area") call by that name.
    A side that grows is interpolated linearly between pixel centres. Paper: AREA with
    ``align_corners=True``, a step of (n - 1) / (m - 1); here: n / m, so that all count alike.

    Args:
        image_HWC: the picture.
        height: of the whole result.
        width: of the whole result.
        rows: the part of it that is made and returned.
        columns: the same.
    """
    resized = np.rint(resize_area_float(image_HWC, height, width, rows, columns))
    return np.ascontiguousarray(np.clip(resized, 0, 255).astype(np.uint8))


def enlarged_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of what ``enlarge`` gives.

    Raises:
        ImageError: it would have more than ``PIXEL_LIMIT`` pixels.
    """
    short = min(height, width)
    if short >= size:
        return height, width
    height, width = round(height * size / short), round(width * size / short)
    if height * width > PIXEL_LIMIT:
        raise ImageError("too long to be enlarged", f"it would have {width}x{height} pixels")
    return height, width


def enlarge(image_HWC: Pixels, size: int) -> Pixels:
    """A picture whose shorter side is at least ``size``: bicubic when it is smaller, else as it is.

    Raises:
        ImageError: it is too long for that, see ``enlarged_shape``.
    """
    shape = image_HWC.shape[0], image_HWC.shape[1]
    height, width = enlarged_shape(*shape, size)
    if (height, width) == shape:
        return image_HWC
    larger = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(larger)


def augment_dvae(image_HWC: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """The dVAE's training crop, uint8 [size, size, 3]: Listing 1 with ``size`` for its 256.

    A random square of full height or width, resized to a side in [9/8, 12/8] of ``size`` (no larger
    than it was), a random crop of that, mirrored half of the time.

    Raises:
        InputError: a side is below ``size``.
    """
    short = _short_side(image_HWC, size)
    square = image_HWC[_window(image_HWC.shape, short, rng)]
    t_min, t_max = min(short, round(9 / 8 * size)), min(short, round(12 / 8 * size))
    t = int(rng.integers(t_min, t_max + 1))
    crop = resize_area(square, t, t, *_window((t, t), size, rng))
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def augment_dalle(image_HWC: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """The transformer's training crop, uint8 [size, size, 3]: Listing 2 with ``size`` for its 256.

    A square of full height or width near the centre, resized to a side in [1, 9/8] of ``size``, a
    random crop of that. Never mirrored: pictures may contain text.

    Raises:
        InputError: a side is below ``size``.
    """
    short = _short_side(image_HWC, size)
    top, left = (_near_centre(side - short, rng) for side in image_HWC.shape[:2])
    square = image_HWC[top : top + short, left : left + short]
    t = int(rng.integers(size, min(short, round(9 / 8 * size)) + 1))
    return resize_area(square, t, t, *_window((t, t), size, rng))


def augment_clip(image_HWC: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """CLIP's training crop, uint8 [size, size, 3]: a random square of the resized picture.

    Of full height or width (arXiv 2103.00020, section 2.5), so a square picture stays whole, and
    never mirrored: what a caption says of left and right stays true.

    Raises:
        InputError: a side is below ``size``.
    """
    short = _short_side(image_HWC, size)
    return resize_area(image_HWC[_window(image_HWC.shape, short, rng)], size, size)


def centre_crop(image_HWC: Pixels, size: int) -> Pixels:
    """The middle of a picture, uint8 [size, size, 3]: its largest centred square, resized.

    Raises:
        InputError: a side is below ``size``.
    """
    short = _short_side(image_HWC, size)
    top, left = ((side - short) // 2 for side in image_HWC.shape[:2])
    return resize_area(image_HWC[top : top + short, left : left + short], size, size)


def _short_side(image_HWC: Pixels, size: int) -> int:
    height, width = image_HWC.shape[:2]
    if min(height, width) < size:
        raise InputError(
            f"a picture of {width}x{height} pixels is smaller than the {size}x{size} asked for: "
            "ingest the data with --upscale, or choose a smaller image size"
        )
    return min(height, width)


def _near_centre(slack: int, rng: np.random.Generator) -> int:
    """An offset in the middle quarter of what is left over, the bounds of Listing 2."""
    return int(rng.integers(3 * slack // 8, max(3 * slack // 8 + 1, 5 * slack // 8)))


def _window(shape: tuple[int, ...], size: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a random square in a picture of this shape."""
    top = int(rng.integers(0, shape[0] - size + 1))
    left = int(rng.integers(0, shape[1] - size + 1))
    return slice(top, top + size), slice(left, left + size)
