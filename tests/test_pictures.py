"""Laws of pictures.py: what pictures of the wild become, against colours worked out in float64."""

import io
import struct

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageFile
from test_data import encode

from sources.pictures import decode, upright_size

# --------------------------------------------------------------------------------------------------
# Profiles, written by hand; and what they mean, in closed form.

SRGB = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)]
P3 = [(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)]
ADOBE = [(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)]
D50 = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.03]])


def to_xyz(primaries) -> np.ndarray:
    """Linear RGB of these primaries and D65 to XYZ under D50, (3, 3)."""
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    d65 = np.array([0.3127 / 0.329, 1, (1 - 0.3127 - 0.329) / 0.329])
    adapt = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ d65)) @ BRADFORD
    return adapt @ (xyz * np.linalg.solve(xyz, d65))


def srgb_curve(v):
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def in_srgb(xyz) -> np.ndarray:
    """0..255 of XYZ under D50, clipped, not rounded."""
    linear = np.clip(np.linalg.solve(to_xyz(SRGB), np.asarray(xyz, float).T).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def fixed(*values) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))


def profile(space: bytes, tags: dict[bytes, bytes], device=b"mntr", other=b"XYZ ") -> bytes:
    """An ICC profile of version 2."""
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50)} | tags
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"test", 0x02100000, device, space, other)
    head = head.ljust(36, b"\0") + b"acsp" + bytes(28) + fixed(*D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def table(curve) -> bytes:
    values = np.rint(65535 * curve(np.linspace(0, 1, 1024))).astype(int)
    return b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *values)


def of_screen(primaries, curve: bytes) -> bytes:
    matrix, names = to_xyz(primaries), (b"rXYZ", b"gXYZ", b"bXYZ")
    tags = {name: b"XYZ \0\0\0\0" + fixed(*matrix[:, i]) for i, name in enumerate(names)}
    return profile(b"RGB ", tags | {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")})


def lut(inputs: int, outputs: int, *nodes: int) -> bytes:
    """Linear between the corners of a cube; nodes: 16 bits each."""
    head = b"mft2\0\0\0\0" + bytes([inputs, outputs, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    before, after = (struct.pack(">2H", 0, 65535) * count for count in (inputs, outputs))
    middle = struct.pack(f">{len(nodes)}H", *nodes)
    return head + struct.pack(">HH", 2, 2) + before + middle + after


def of_press(lab_of_inks) -> bytes:
    """CMYK to Lab by its 16 corners, lab_of_inks(c, m, y, k) in 0, 1. Back to CMYK: all inks or
    none, which is what littlecms asks for the black point."""
    nodes = [lab_of_inks(*(i >> shift & 1 for shift in (3, 2, 1, 0))) for i in range(16)]
    words = [
        round(w) for lum, a, b in nodes for w in (lum * 652.8, (a + 128) * 256, (b + 128) * 256)
    ]
    there, back = lut(4, 3, *words), lut(3, 4, *[65535] * 16, *[0] * 16)
    tags = {b"A2B0": there, b"A2B1": there, b"B2A0": back, b"B2A1": back}
    return profile(b"CMYK", tags, b"prtr", b"Lab ")


def xyz_of_lab(lab) -> np.ndarray:
    lum, a, b = lab
    f = np.array([(lum + 16) / 116 + a / 500, (lum + 16) / 116, (lum + 16) / 116 - b / 200])
    return D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))


COLOURS = np.array(
    [[0, 0, 0], [255, 255, 255], [128, 128, 128], [200, 100, 50], [20, 180, 160], [250, 30, 240]]
    + [[255, 0, 0], [0, 255, 0], [0, 0, 255], [3, 7, 5]],  # those outside sRGB are clipped
    dtype=np.uint8,
)
SCREENS = {  # primaries, the curve as a function and as the profile has it
    "Display P3": (P3, srgb_curve, table(srgb_curve)),
    "Adobe RGB": (ADOBE, lambda v: v ** (563 / 256), gamma(563 / 256)),
    "gamma 1.8": (SRGB, lambda v: v**1.8, gamma(1.80078125)),
}


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("name", SCREENS)
def test_a_wide_picture_is_what_its_profile_says_in_srgb(name, form):
    primaries, curve, encoded = SCREENS[name]
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    data = encode(
        Image.fromarray(COLOURS.repeat(8, 0)[None].repeat(8, 0)),
        form,
        icc_profile=of_screen(primaries, encoded),
        **lossless.get(form, {}),
    )
    wanted = in_srgb(curve(COLOURS / 255) @ to_xyz(primaries).T)
    found = np.asarray(decode(data))[4, 4::8].astype(float)
    far = np.abs(found - wanted).max()
    assert far < (4 if form == "AVIF" else 1)  # AVIF's own YUV loses some
    assert np.abs(wanted - COLOURS).max() > 15  # and it is not what the file has


def test_transparency_is_laid_over_white_after_the_colours_are_srgb():
    primaries, curve, encoded = SCREENS["Adobe RGB"]
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 51))
    out = np.asarray(decode(encode(image, icc_profile=of_screen(primaries, encoded))))[0, 0]
    colour = in_srgb(curve(np.array([200, 100, 50]) / 255) @ to_xyz(primaries).T)
    assert np.abs(out - (0.2 * colour + 0.8 * 255)).max() < 1.5


def test_a_palette_has_the_colours_that_its_profile_says():
    primaries, curve, encoded = SCREENS["Display P3"]
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50, 9, 9, 9])
    wanted = in_srgb(curve(np.array([200, 100, 50]) / 255) @ to_xyz(primaries).T)
    data = encode(image, icc_profile=of_screen(primaries, encoded))
    assert np.abs(np.asarray(decode(data))[0, 0] - wanted).max() < 1
    clear = encode(image, icc_profile=of_screen(primaries, encoded), transparency=1)
    assert decode(clear).getcolors() == [(16, (255, 255, 255))]


GREYS = np.array([[0, 10, 60, 128, 200, 255]], dtype=np.uint8)
DARK = profile(b"GRAY", {b"kTRC": gamma(1.80078125)})


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "with alpha", "jpeg"])
def test_grey_with_a_profile_is_scaled_first_and_then_what_the_profile_says(kind):
    image, form = Image.fromarray(GREYS), "PNG"
    if kind == "16 bits":
        image = Image.fromarray(GREYS.astype(np.uint16) * 257)
    if kind == "with alpha":
        image.putalpha(51)
    if kind == "jpeg":
        image, form = Image.fromarray(GREYS.repeat(8, 0).repeat(8, 1)), "JPEG"
    options = {"quality": 100} if kind == "jpeg" else {}
    out = np.asarray(decode(encode(image, form, icc_profile=DARK, **options)))
    wanted = in_srgb((GREYS[0, :, None] / 255) ** 1.80078125 * D50)
    found = out[4, 4::8] if kind == "jpeg" else out[0]
    if kind == "with alpha":  # a fifth of it over white
        found = (found - 0.8 * 255) / 0.2
        assert np.abs(found - wanted).max() < 5
        return
    assert np.abs(found - wanted).max() < (2 if kind == "jpeg" else 1)
    assert np.abs(found - GREYS[0, :, None]).max() > 15


# --------------------------------------------------------------------------------------------------
# sRGB, and what is no profile.


def parametric() -> bytes:
    """sRGB's curve as v4 profiles have it."""
    numbers = 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045
    return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + fixed(*numbers)


@pytest.fixture(scope="module")
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "icc",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        of_screen(SRGB, table(srgb_curve)),
        of_screen(SRGB, parametric()),
        of_screen([(0.64, 0.33), (0.30005, 0.59995), (0.15, 0.06)], table(srgb_curve)),  # off by 1
    ],
    ids=["littlecms", "table", "parametric", "rounded"],
)
def test_srgb_by_whatever_profile_keeps_its_pixels_bit_for_bit(icc, noise):
    assert np.array_equal(decode(encode(noise, icc_profile=icc)), noise)
    clear = noise.copy()
    clear.putalpha(77)
    assert np.array_equal(decode(encode(clear, icc_profile=icc)), decode(encode(clear)))
    grey = noise.convert("L")
    even = profile(b"GRAY", {b"kTRC": table(srgb_curve)})
    assert np.array_equal(decode(encode(grey, icc_profile=even)), grey.convert("RGB"))


WIDE = of_screen(ADOBE, gamma(2.2))
USELESS = {
    "no profile": b"no profile at all",
    "cut off": WIDE[:200],
    "zeros behind its head": WIDE[:132] + bytes(len(WIDE) - 132),
    "of ink": of_press(lambda c, m, y, k: (50, 0, 0)),
    "of grey": DARK,
    "too long": WIDE + bytes(2**24),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_profile_that_is_of_no_use_leaves_the_pixels_as_they_are(name, noise):
    for image in (noise, noise.convert("P"), noise.convert("RGBA")):
        form = "TIFF" if name == "too long" else "PNG"
        plain = decode(encode(image, form))
        found = decode(encode(image, form, icc_profile=USELESS[name]))
        assert np.array_equal(found, plain)
    grey = noise.convert("L")
    assert np.array_equal(decode(encode(grey, icc_profile=WIDE)), grey.convert("RGB"))


# --------------------------------------------------------------------------------------------------
# Ink.


def jpeg_of_inks(*stored: int, transform: int | None = 0) -> bytes:
    """A JPEG of 8 x 8 pixels, four bands of one value each, as the standard says bit by bit.

    transform: of Adobe's mark, 0 for CMYK, 2 for YCCK; None: no mark."""

    def part(marker: int, body: bytes) -> bytes:
        return struct.pack(">HH", 0xFF00 | marker, len(body) + 2) + body

    mark = b"" if transform is None else part(0xEE, b"Adobe\0d\0\0\0\0" + bytes([transform]))
    frame = struct.pack(">BHHB", 8, 8, 8, 4) + b"".join(bytes([i, 0x11, 0]) for i in range(1, 5))
    # Lengths 4 for the categories 0 to 11 of a DC value, in order; one bit for the end of a block.
    codes = bytes([0, 0, 0, 0, 0]) + bytes([12]) + bytes(10)
    dc, ac = bytes([0]) + codes + bytes(range(12)), bytes([0x10, 1]) + bytes(15) + b"\0"
    scan = bytes([4]) + b"".join(bytes([i, 0]) for i in range(1, 5)) + bytes([0, 63, 0])
    bits = ""
    for value in stored:
        level = 8 * (value - 128)  # of quantum 1
        size = abs(level).bit_length()
        bits += f"{size:06b}" + (
            f"{level if level > 0 else level + 2**size - 1:0{size}b}" if size else ""
        )
        bits += "0"
    bits += "1" * (-len(bits) % 8)
    coded = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(
        b"\xff", b"\xff\0"
    )
    tables = part(0xDB, b"\0" + bytes([1] * 64)) + part(0xC4, dc) + part(0xC4, ac)
    return b"\xff\xd8" + mark + tables + part(0xC0, frame) + part(0xDA, scan) + coded + b"\xff\xd9"


@pytest.mark.parametrize("transform", [0, None])
def test_a_jpeg_of_inks_is_read_as_adobe_writes_it_inverted(transform):
    """Stored 255 is no ink; ink takes its part of white."""
    for stored, colour in (
        ((255, 255, 255, 255), (255, 255, 255)),
        ((0, 255, 255, 255), (0, 255, 255)),  # all of the cyan
        ((255, 255, 255, 0), (0, 0, 0)),
        ((255, 255, 255, 100), (100, 100, 100)),
        ((200, 100, 255, 128), (100, 50, 128)),
    ):
        out = decode(jpeg_of_inks(*stored, transform=transform))
        ((count, found),) = out.getcolors()
        assert count == 64 and np.abs(np.subtract(found, colour)).max() <= 1


def test_adobes_ycck_is_turned_into_inks_first():
    """Y, Cb, Cr of the RGB that the three inks leave, inverted as a whole; K apart."""
    red, green, blue = 200, 100, 50
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    ycc = luma, 128 + (blue - luma) / 1.772, 128 + (red - luma) / 1.402
    out = decode(
        jpeg_of_inks(
            *(round(255 - luma) if i == 0 else round(256 - v) for i, v in enumerate(ycc)),
            255,
            transform=2,
        )
    )
    ((_, found),) = out.getcolors()
    assert np.abs(np.subtract(found, (red, green, blue))).max() <= 3, found


def corners(c, m, y, k):
    """Of a press: any black is (0, 0, 0), else a paper of its own, less what the inks take."""
    return (0, 0, 0) if k else (100 - 28 * c - 30 * m - 8 * y, 40 * m - 25 * c, 50 * y - 30 * c)


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_inks_with_a_profile_are_what_it_says(form):
    icc = of_press(corners)
    for inks in (
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (0, 1, 1, 0),
        (0, 0, 0, 1),
    ):
        image = Image.new("CMYK", (8, 8), tuple(255 * i for i in inks))
        data = encode(image, form, icc_profile=icc, **({"quality": 100} if form == "JPEG" else {}))
        wanted = in_srgb(xyz_of_lab(corners(*inks)))
        found = np.asarray(decode(data))[4, 4]
        assert np.abs(found - wanted).max() <= 1.5, inks
        assert (
            decode(encode(image, form)).getpixel((4, 4)) != tuple(found) or inks[3] or not any(inks)
        )


def test_the_black_of_a_press_is_black():
    """Its darkest is L 20; without black-point compensation it would be 48 of 255."""
    icc = of_press(lambda c, m, y, k: (20 if k or c and m and y else 100 - 10 * (c + m + y), 0, 0))
    for inks in ((0, 0, 0, 255), (255, 255, 255, 255)):
        image = Image.new("CMYK", (8, 8), inks)
        assert max(decode(encode(image, "TIFF", icc_profile=icc)).getpixel((0, 0))) <= 2


# --------------------------------------------------------------------------------------------------
# Palettes, animations, orientation.


def test_palettes_with_and_without_transparency():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 200, 30, 0, 0, 0, 40, 50, 60])
    image.putdata([0, 1, 2])
    for form, options, wanted in (
        ("PNG", {}, [(10, 200, 30), (0, 0, 0), (40, 50, 60)]),
        ("PNG", {"transparency": 1}, [(10, 200, 30), (255, 255, 255), (40, 50, 60)]),
        ("PNG", {"transparency": b"\xff\x33\x00"}, [(10, 200, 30), (204,) * 3, (255,) * 3]),
        ("GIF", {}, [(10, 200, 30), (0, 0, 0), (40, 50, 60)]),
        ("GIF", {"transparency": 2}, [(10, 200, 30), (0, 0, 0), (255, 255, 255)]),
        ("TIFF", {}, [(10, 200, 30), (0, 0, 0), (40, 50, 60)]),
        ("BMP", {}, [(10, 200, 30), (0, 0, 0), (40, 50, 60)]),
    ):
        assert [*map(tuple, np.asarray(decode(encode(image, form, **options)))[0])] == wanted, form


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_of_an_animation_the_first_picture_is_taken(form):
    first, *others = (
        Image.new("RGB", (16, 16), c) for c in ((200, 40, 40), (0, 0, 255), (0, 99, 0))
    )
    data = encode(first, form, save_all=True, append_images=others)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(np.asarray(decode(data)).astype(int) - (200, 40, 40)).max() < 6


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_size_is_that_of_the_decoded_picture_and_takes_the_header_alone(form, monkeypatch):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        data = encode(Image.new("RGB", (40, 24)), form, exif=exif)
        size = decode(data).size[::-1]
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", None)  # where pixels are read
            assert upright_size(data) == size
    assert upright_size(encode(Image.new("RGB", (40, 24)), form)) == (24, 40)
