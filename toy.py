"""The embedded default: captioned shapes and the hidden preference between pictures of them.

    python toy.py pairs --out out/toy/pairs --n 2048     # preference pairs, Pick-a-Pic v2 columns

A picture shows one shape on a plain background, as its caption says. Its *quality*, how saturated
and how sharp it is, is drawn independently of the caption and never mentioned there. The hidden
preference is that quality, so the right answer of every comparison is known exactly; faithfulness,
whether the shape and the colour are those of the caption, is a second exact function of the
picture, and alignment must not harm it.

Two harder tasks change the pairs (TASKS): in `noisy` every fourth label is wrong, in `red` the
judge likes red, whatever the caption says, so that faithfulness and preference are in conflict."""

import functools
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from system.files import replacing
from system.program import Parser, reported

# -------------------------------------------------------------------------------------------------
# Prompts: 6 colours x 4 shapes x 3 backgrounds = 72, of which every fourth is kept from alignment.

SIZE = 64  # pixels
HUES = {
    "red": 0.0,
    "yellow": 60.0,
    "green": 120.0,
    "cyan": 180.0,
    "blue": 240.0,
    "magenta": 300.0,
}  # degrees
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = {"black": 0.08, "gray": 0.45, "white": 0.95}  # grey level, 0..1
VALUE = 0.85  # HSV value of every shape
SATURATION = (0.3, 1.0)  # range that pictures are drawn from
BLUR = (0.0, 2.5)  # Gaussian radius in pixels, likewise


def caption_of(color: str, shape: str, background: str) -> str:
    return f"a {color} {shape} on a {background} background"


def parse_caption(caption: str) -> tuple[str, str, str]:
    """(color, shape, background) of a toy caption; ValueError for any other text."""
    words = caption.split()
    if len(words) == 7:
        color, shape, background = words[1], words[2], words[5]
        if color in HUES and shape in SHAPES and background in BACKGROUNDS:
            return color, shape, background
    raise ValueError(
        f"'{caption}' is not a toy caption, such as '{caption_of('red', 'circle', 'white')}'."
    )


def prompts(split: str = "all", fold: int = 0) -> list[str]:
    """The captions of a split: 54 of "train", 18 of "heldout" (each colour and shape in both), 72
    of "all". fold: 0 to 3, which quarter is held out; 0 but where a choice is confirmed anew."""
    every = [
        (caption_of(color, shape, background), (i + j + k) % 4 == fold)
        for i, color in enumerate(HUES)
        for j, shape in enumerate(SHAPES)
        for k, background in enumerate(BACKGROUNDS)
    ]
    return [caption for caption, held in every if split == "all" or held == (split == "heldout")]


# -------------------------------------------------------------------------------------------------
# Drawing: the caption fixes colour, shape and background; everything else comes from `rng`.


def outline(shape: str, cx: float, cy: float, r: float) -> list[tuple[float, float]]:
    """Corners of a shape of half-width r around (cx, cy); a circle is given as a polygon of 72
    corners."""
    if shape == "circle":
        turns = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        unit = [(math.cos(a), math.sin(a)) for a in turns]
    elif shape == "square":
        unit = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif shape == "triangle":
        unit = [(0, -1), (1, 1), (-1, 1)]
    else:  # cross
        a = 0.36
        unit = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        unit += [(a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    return [(cx + r * x, cy + r * y) for x, y in unit]


def hsv_to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB in 0..1 of a hue in degrees, saturation and value in 0..1."""
    ramp = np.clip(np.abs((hue / 60 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return value * (1 - saturation * (1 - ramp))


def draw(
    caption: str, rng: np.random.Generator, saturation: float = None, blur: float = None
) -> Image.Image:
    """A 64 x 64 RGB picture of the caption; place, size and (unless given) quality are drawn from
    rng."""
    color, shape, background = parse_caption(caption)
    r = rng.uniform(13, 21)
    cx, cy = rng.uniform(r + 5, SIZE - r - 5, size=2)
    drawn = rng.uniform(*SATURATION), rng.uniform(*BLUR)
    saturation = drawn[0] if saturation is None else saturation
    blur = drawn[1] if blur is None else blur
    scale = 4  # supersampled, so that only `blur` decides how soft an edge is
    mask = Image.new("L", (SIZE * scale, SIZE * scale))
    ImageDraw.Draw(mask).polygon(
        [(x * scale, y * scale) for x, y in outline(shape, cx, cy, r)], fill=255
    )
    mask = mask.resize((SIZE, SIZE), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(blur))
    alpha = np.asarray(mask, dtype=np.float64)[..., None] / 255
    pixels = (
        alpha * hsv_to_rgb(HUES[color], saturation, VALUE) + (1 - alpha) * BACKGROUNDS[background]
    )
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


# -------------------------------------------------------------------------------------------------
# Measuring: both the preference and the faithfulness are functions of the pixels alone.


def contrast(image: Image.Image) -> np.ndarray:
    """How far each pixel is from the background, (H, W), 1 = as far as the shape's own colour.

    The background is the median of the border. The distance is the largest difference of a channel,
    divided by the mean over the 5 % of pixels that are farthest."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    border = np.concatenate(
        [pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)]
    )
    border = np.concatenate([border, pixels[:, -2:].reshape(-1, 3)])
    r, g, b = np.moveaxis(np.abs(pixels - np.median(border, axis=0)), -1, 0)
    distance = np.maximum(np.maximum(r, g), b)
    top = np.sort(distance.ravel())[-distance.size // 20 :].mean()
    return distance / max(top, 1e-3)


def quality(image: Image.Image) -> dict[str, float]:
    """The two hidden factors, each in 0..1.

    saturation: mean HSV saturation inside the shape. sharpness: 1 - s / 2.5 px, where s is the
    radius of the Gaussian that would blur a hard edge to this one. For such an edge the contrast c
    has sum |grad c|^2 / sum |grad c| = 1 / (2 sqrt(pi) s), however long the edge is."""
    c = np.clip(contrast(image), 0, 1)
    rgb = np.asarray(image.convert("RGB"), dtype=np.float64)[c > 0.9] / 255
    chroma = (rgb.max(-1) - rgb.min(-1)) / np.maximum(rgb.max(-1), 1e-3)
    grad = np.hypot(np.diff(c, axis=0)[:, :-1], np.diff(c, axis=1)[:-1])
    blur = grad.sum() / (2 * math.sqrt(math.pi) * (grad**2).sum()) if grad.any() else BLUR[1]
    return {
        "saturation": float(chroma.mean()) if len(rgb) else 0.0,
        "sharpness": float(np.clip(1 - blur / BLUR[1], 0, 1)),
    }


def silhouette(mask: np.ndarray) -> np.ndarray:
    """A mask cut to its bounding box and resized to 32 x 32 booleans, so that place and size do not
    count. The nearest pixels, not their mean, which would make a solid square of static."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = Image.fromarray(
        mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].astype(np.uint8) * 255
    )
    return np.asarray(box.resize((32, 32), Image.Resampling.NEAREST)) > 127


@functools.cache
def template(shape: str) -> np.ndarray:
    """The silhouette of a shape drawn large."""
    canvas = Image.new("L", (128, 128))
    ImageDraw.Draw(canvas).polygon(outline(shape, 64, 64, 60), fill=255)
    return silhouette(np.asarray(canvas) > 127)


def recognize(image: Image.Image) -> tuple[str, str]:
    """(color, shape) seen in an image, or ("none", "none") where nothing stands out from the
    background.

    Colour: the nearest hue to the mean chroma inside the shape. Shape: the template whose
    silhouette overlaps most (intersection over union); below 0.65 it is "none"."""
    c = contrast(image)
    mask = c > 0.5
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    if not 40 <= mask.sum() <= 0.6 * mask.size:
        return "none", "none"
    r, g, b = pixels[c > 0.9].mean(axis=0)
    hue = math.degrees(math.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    color = min(HUES, key=lambda name: abs((hue - HUES[name] + 180) % 360 - 180))
    seen, best, shape = silhouette(mask), 0.65, "none"
    for name in SHAPES:
        ideal = template(name)
        overlap = (seen & ideal).sum() / (seen | ideal).sum()
        if overlap > best:
            best, shape = overlap, name
    return color, shape


def preference(image: Image.Image, caption: str = "", task: str = "clean") -> float:
    """The hidden preference in 0..1: the mean of saturation and sharpness, and 0 where no shape is
    seen (static is saturated and sharp, too). The caption plays no part. Under the task "red" a red
    shape has RED_BONUS more."""
    color, shape = recognize(image)
    if shape == "none":
        return 0.0
    return sum(quality(image).values()) / 2 + RED_BONUS * (task == "red" and color == "red")


def faithfulness(image: Image.Image, caption: str) -> float:
    """1.0 where both the colour and the shape are those of the caption, else 0.0."""
    return float(recognize(image) == parse_caption(caption)[:2])


# -------------------------------------------------------------------------------------------------
# Preference pairs, in the columns of Pick-a-Pic v2.

TASKS = ("clean", "noisy", "red")
FLIPPED = 0.25  # share of the pairs of "noisy" whose label is the wrong way round
RED_SHARE = 0.25  # of the pictures of "red" that are red, whatever their caption says
RED_BONUS = 0.3  # what red is worth to the judge of "red", beside a preference in 0..1
SURENESS = 20.0  # log-odds that a difference of 1 in preference is worth, as in pairs.py score


def write_pairs(
    path: Path, n: int, seed: int = 0, fold: int = 0, tie: float = 0.02, task: str = "clean"
) -> Path:
    """Write n pairs to a parquet file: two drawings of one caption of "train", judged by the hidden
    preference.

    jpg_0, jpg_1: encoded bytes (PNG, so that JPEG does not blur what is judged). label_0: 1.0 where
    image 0 is preferred, 0.0 where image 1 is, 0.5 where the scores differ by less than `tie`.
    strength: the judge's probability that the labelled winner is preferred; below 0.5 where the
    label is one of the wrong ones of "noisy"."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, captions = np.random.default_rng([seed, 1]), prompts("train", fold)
    turn = np.random.default_rng([seed, 2])  # of its own: all tasks draw the same pictures
    columns = {"jpg_0": [], "jpg_1": [], "label_0": [], "caption": [], "strength": []}
    for _ in range(n):
        caption = captions[rng.integers(len(captions))]
        chance, pair = turn.random(3), []
        for k in range(2):
            red = task == "red" and chance[k] < RED_SHARE
            pair.append(
                draw(caption_of("red", *parse_caption(caption)[1:]) if red else caption, rng)
            )
        gap = preference(pair[0], task=task) - preference(pair[1], task=task)
        tied, wrong = abs(gap) < tie, task == "noisy" and chance[2] < FLIPPED
        columns["label_0"].append(0.5 if tied else float((gap > 0) != wrong))
        odds = SURENESS * abs(gap) * (-1 if wrong and not tied else 1)
        columns["strength"].append(1 / (1 + math.exp(-odds)))
        columns["caption"].append(caption)
        for i, image in enumerate(pair):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            columns[f"jpg_{i}"].append(buffer.getvalue())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        pq.write_table(pa.table(columns), scratch)
    return path


def write_pairs_once(
    folder: str | Path, n: int, seed: int = 0, fold: int = 0, task: str = "clean"
) -> Path:
    """write_pairs, unless the file is there. Several ranks may write it at the same time."""
    name = f"{n}-pairs-seed-{seed}" + (f"-fold-{fold}" if fold else "")
    path = Path(folder) / f"{name}{f'-{task}' if task != 'clean' else ''}.parquet"
    return path if path.exists() else write_pairs(path, n, seed, fold, task=task)


# -------------------------------------------------------------------------------------------------
# Command line.


def main(argv: list[str] | None = None):
    parser = Parser("toy.py", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("pairs", help="write preference pairs as a parquet file").add_argument
    add("--out", type=Path, default="out/toy", metavar="FOLDER", help="of pairs.parquet")
    add("--n", type=int, default=2048, help="pairs, with ties")
    add("--seed", type=int, default=0, help="of everything random")
    add("--task", choices=TASKS, default="clean", help="noisy: wrong labels; red: a judge of taste")
    args = parser.parse_args(argv)
    with reported("toy.py"):
        path = write_pairs(args.out / "pairs.parquet", args.n, args.seed, task=args.task)
        print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
