"""Encoded pictures, decoded to sRGB of 8 bits in bounded memory, and why one cannot be."""

import functools
import io
import math
import warnings
from pathlib import Path

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageCms,
    ImageOps,
    PngImagePlugin,
    UnidentifiedImageError,
)

from system.hub import reason

# The most pixels of a picture, as decoded and as resized for training. Below PIL's own limits.
PIXELS = 8192 * 8192
SUFFIXES = ".png .jpg .jpeg .webp .avif .jp2 .j2k .gif .bmp .tif .tiff .ppm .pgm .pfm".split()
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
    if not file.is_file() and "\\" in value:  # as Windows writes it
        file = root / value.replace("\\", "/")
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has more than {LARGEST} bytes")
    return file.read_bytes()


def upright_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the picture that `decode` gives, from the file's header alone.

    An orientation that a PNG has behind its pixels is not seen. Raises as `opened` does."""
    image = opened(io.BytesIO(data))
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # PNG's own decodes
    width, height = image.size
    turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # whose size PIL turns itself
    return (width, height) if turned else (height, width)


def decode(data: bytes) -> Image.Image:
    """An upright RGB image of 8 bits in sRGB, transparency over white, grey as `_grey` scales it,
    the first picture of an animation. Colours are those that an embedded profile says.

    A CMYK JPEG is read as Adobe writes it, inverted, also without Adobe's mark, as PIL always does.
    What has no profile is taken as sRGB, and of inks each takes its part of white.
    Of more than PIXELS pixels it raises ValueError before it takes memory for them; below that it
    takes at most 1.6 GB for a moment (measured: a JPEG 2000 of four bands; a PNG takes 0.8 GB).
    Raises whatever PIL does for broken bytes."""
    image = opened(io.BytesIO(data))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    profile = image.info.get("icc_profile")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _grey(image)
    image = _in_srgb(image, profile)
    if image.mode == "RGBA":
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        image = canvas
    return _as(image, "RGB")


# --------------------------------------------------------------------------------------------------
# Colour.

LARGEST_PROFILE = 2**24  # bytes; a JPEG holds at most so many
PngImagePlugin.MAX_TEXT_CHUNK = LARGEST_PROFILE  # beyond it, 1 MB by default, PIL refuses the PNG
SAME = 2  # levels of 255 by which a profile may move a colour and still be sRGB, of many makers


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB, or RGBA where it has transparency, from any mode of 8 bits."""
    clear = image.has_transparency_data
    kind = {"1": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, image.mode)
    kind = kind if kind in ("L", "CMYK") else "RGBA" if clear else "RGB"
    convert = _to_srgb(profile, kind) if profile and len(profile) <= LARGEST_PROFILE else None
    if convert is None:
        return _as(image, "RGBA" if clear else "RGB")
    if kind in ("RGB", "RGBA"):
        image = _as(image, kind)
        convert.apply_in_place(image)
        return image
    alpha = _as(image, "LA").getchannel("A") if clear else None  # of grey; CMYK has none
    image = convert.apply(_as(image, kind))
    if alpha:
        image.putalpha(alpha)
    return image


@functools.lru_cache(maxsize=8)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """How littlecms makes pixels of this mode sRGB; None where the profile is broken, is of another
    kind of pixels, or is sRGB itself, whose pixels stay as they are, bit for bit.

    Relative colorimetric, with black-point compensation: colours that sRGB has stay what they are,
    others are clipped, white and black stay white and black. Perceptual would move all of them by
    each maker's taste, and only where a profile has such a table; those of screens have none."""
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        convert = ImageCms.buildTransform(
            given,
            ImageCms.createProfile("sRGB"),
            mode,
            mode if mode == "RGBA" else "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except Exception:  # of littlecms and PIL, which have no common class
        return None
    return None if mode != "CMYK" and _changes_nothing(convert, mode) else convert


def _changes_nothing(convert: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether all greys, or 5,832 colours, 18 levels a band, stay within SAME levels."""
    levels = np.arange(0, 256, 1 if mode == "L" else 15, dtype=np.uint8)
    each = levels if mode == "L" else np.stack(np.meshgrid(*[levels] * 3), -1).reshape(-1, 3)
    given = Image.fromarray(each[None]).convert(mode)
    moved = np.asarray(convert.apply(given).convert("RGB")).astype(int)
    return np.abs(moved - np.asarray(given.convert("RGB"))).max() <= SAME


def _as(image: Image.Image, mode: str) -> Image.Image:
    """In this mode; PIL would copy one that is."""
    return image if image.mode == mode else image.convert(mode)


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
