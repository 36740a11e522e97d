"""In which (height, width) a pair is trained, where pictures keep their ratio.

shapes(1024, 64)                    the buckets
read_sizes(rows, fingerprint)       of all pictures, from their headers; kept beside datasets'
                                    cache, as sizes/FINGERPRINT.npy
assign(sizes, shapes, block)        {shape: its rows}
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from sources.pictures import upright_size
from sources.rows import PICTURES, Rows
from system.files import UserError, expanded, replacing

LONGEST = 2  # of a bucket, how often its shorter side goes into the longer one
SIDE = 64  # pixels: the grid of SDXL's own buckets (2307.01952, appendix I)


def unit(resolution: int, factor: int, levels: int) -> int:
    """What sides of buckets are multiples of, in pixels.

    The VAE's factor times what a UNet of so many levels shrinks latents by, 2^(levels - 1); and of
    64, as SDXL was trained, where that leaves a square of at least 8 units a side."""
    need = factor * 2 ** (levels - 1)
    wide = math.lcm(need, SIDE)
    return wide if resolution >= 8 * wide else need


def shapes(resolution: int, unit: int) -> list[tuple[int, int]]:
    """(height, width) of all buckets, from the widest to the highest.

    Sides are multiples of `unit`, at most 1 : 2, with no more than resolution^2 pixels, and so that
    one of them could not be longer by a unit. So the square takes the most memory.
    Limit: at 1024 px and 64 these are 13 of SDXL's own 40."""
    area, sides = resolution**2, range(unit, 2 * resolution + 1, unit)
    found = {(height, area // height // unit * unit) for height in sides}
    found |= {(width, height) for height, width in found}
    kept = [shape for shape in found if 0 < max(shape) <= LONGEST * min(shape)]
    return sorted(kept, key=lambda shape: shape[0] / shape[1])


# --------------------------------------------------------------------------------------------------
# Sizes.


def read_sizes(rows: Rows, fingerprint: str) -> np.ndarray:
    """(rows, 2, 2) int32: height and width of jpg_0 and of jpg_1, upright, 0 where a header cannot
    be read. The pictures' bytes are read once; processes that ask meanwhile wait. UserError."""
    import datasets

    file = expanded(datasets.config.HF_DATASETS_CACHE) / "sizes" / f"{fingerprint}.npy"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if (kept := _kept(file, len(rows))) is not None:
                return kept
            bar = tqdm(range(len(rows)), desc="reading sizes", unit="pair", mininterval=1)
            sizes = [sizes_of(functools.partial(rows.__getitem__, row)) for row in bar]
            sizes = np.array(sizes, dtype=np.int32)
            with replacing(file) as scratch, open(scratch, "wb") as opened:
                np.save(opened, sizes)
    except OSError as error:
        raise UserError(
            f"--buckets: {error.filename} cannot be written ({error.strerror}); set HF_HOME or "
            "HF_DATASETS_CACHE to a folder with room."
        ) from error
    return sizes


def _kept(file: Path, rows: int) -> np.ndarray | None:
    """What is in the file; None where there is none, or what is there is damaged."""
    try:
        sizes = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return sizes if sizes.shape == (rows, 2, 2) and sizes.dtype == np.int32 else None


def sizes_of(read: Callable[[], dict]) -> list[tuple[int, int]]:
    """(height, width) of both pictures of the pair that read() gives, (0, 0) where one cannot be
    read."""
    try:
        pair = read()
        return [upright_size(pair[name]) for name in PICTURES]
    except Exception:  # as in data.Pairs, which will find the same and say it
        return [(0, 0), (0, 0)]


# --------------------------------------------------------------------------------------------------
# Pairs in buckets.


def assign(
    sizes: np.ndarray, shapes: list[tuple[int, int]], block: int
) -> dict[tuple[int, int], np.ndarray]:
    """{shape: rows of its pairs}, from the widest to the highest, without empty ones.

    A pair goes where the mean of its pictures' ratios is nearest, in logarithms: of 1 : 2 and 2 : 1
    that is the square, whoever won. What cannot be read goes where most are. A bucket of less than
    `block` pairs, which could not fill a block without repeating some, joins the nearest one."""
    ratios = np.log([height / width for height, width in shapes])
    known = sizes.min((1, 2)) > 0
    mean = np.log(sizes[known, :, 0] / sizes[known, :, 1]).mean(1)
    bucket = np.empty(len(sizes), dtype=np.int64)
    bucket[known] = np.abs(mean[:, None] - ratios).argmin(1)
    counts = np.bincount(bucket[known], minlength=len(shapes))
    bucket[~known] = counts.argmax() if known.any() else np.abs(ratios).argmin()
    while True:
        there, counts = np.unique(bucket, return_counts=True)
        if len(there) == 1 or counts.min() >= block:
            return {shapes[i]: np.flatnonzero(bucket == i) for i in there}
        small = there[counts.argmin()]
        others = there[there != small]
        bucket[bucket == small] = others[np.abs(ratios[others] - ratios[small]).argmin()]
