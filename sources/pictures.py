"""Encoded pictures, decoded to RGB of 8 bits in bounded memory, and why one cannot be."""

import io
import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from system.hub import reason

# The most pixels of a picture, as decoded and as resized for training. Below PIL's own limits.
PIXELS = 8192 * 8192
LARGEST = 2**30  # bytes of a picture
# Others are refused: they are rare in data, and a few of their readers start a program (EPS).
FORMATS = ["PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM"]


def opened(file: Path | io.BytesIO) -> Image.Image:
    """A picture whose pixels are not read yet. Raises ValueError for more than PIXELS of them, and
    whatever PIL does for broken bytes."""
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
        image = Image.open(file, formats=FORMATS)
    if (count := math.prod(image.size)) > PIXELS:
        raise ValueError(f"a picture has {count:,} pixels, more than {PIXELS:,}")
    return image


def encoded(value: bytes | str | dict | None, root: Path) -> bytes:
    """The bytes of a picture's cell: bytes, a path from `root`, datasets' {bytes, path}, or
    {path, start, size} of a place in a file. Raises ValueError, or OSError."""
    if isinstance(value, dict):
        if value.get("size") is not None:
            with open(value["path"], "rb") as file:
                file.seek(value["start"])
                return file.read(min(value["size"], LARGEST))
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if not isinstance(value, str):
        return value or b""
    if "://" in value:
        raise ValueError(f"{value} is a link; download the pictures first")
    file = root / value
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has more than {LARGEST} bytes")
    return file.read_bytes()


def decode(data: bytes) -> Image.Image:
    """An upright RGB image of 8 bits, transparency over white, grey as `_grey` scales it.

    Of more than PIXELS pixels it raises ValueError before it takes memory for them; below that it
    takes at most 1.6 GB for a moment (measured: a JPEG 2000 of four bands; a PNG takes 1.1 GB).
    Raises whatever PIL does for broken bytes."""
    image = opened(io.BytesIO(data))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _grey(image)
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits in 8, black 0 and white 255. PIL would clip it at 255.

    White is what the type says: 65535 of 16 bits (PNG, TIFF, JPEG 2000, and PPM, to which PIL gives
    mode I and scales it so), 4095 of TIFF's 12 bits, 1 of floats (TIFF, PFM). TIFF's WhiteIsZero is
    turned over. Raises ValueError where the type does not tell: floats outside 0..1 (a range that
    neither format fixes), and TIFF's integers with a sign or of 32 bits, which hold measurements
    more often than pictures."""
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image)
    if image.mode == "I" and image.format != "PPM":
        raise ValueError(f"a {image.format} of integers with a sign or of 32 bits has no white")
    white = 1.0 if image.mode == "F" else 2.0 ** tags.get(258, (16,))[0] - 1  # BitsPerSample
    scaled = values.astype(np.float32)
    if not (scaled.min() >= 0 and scaled.max() <= white):  # or nan
        raise ValueError(f"a {image.format} of floats has values outside 0..1")
    scaled *= 255 / white
    grey = np.rint(scaled, out=scaled).astype(np.uint8)
    if tags.get(262) == 0:  # PhotometricInterpretation: WhiteIsZero
        grey = 255 - grey
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def what_is_broken(error: Exception) -> str:
    """In a line that is the same in every run."""
    if isinstance(error, UnidentifiedImageError):
        return f"is no picture that can be read ({', '.join(FORMATS)})"
    if isinstance(error, UnicodeDecodeError):
        return "the caption is no UTF-8"
    return reason(error)
