"""Preference pairs: read, check, preprocess, shard, collate.

    pairs = Pairs(read_pairs("out/toy/pairs"), resolution=64, seed=0)
    for batch in loader(pairs, 0, steps=40, rank=0, world=1, micro_batch=8, accumulation=2):
        batch["pixels"], batch["captions"]  # (2P, 3, h, w) uint8, winners first; P captions

A pair has one number for the whole run: n = step * G + place, where G is the global batch. Its row,
shape, crop, flip and caption dropout are functions of (seed, n) alone. So the data do not depend on
ranks, workers, accumulation or interruptions, and a resumed run counts on from its step.

Where this departs from the released script, and why:
 1. A pair that cannot be read (an image, a caption) is left out, and named; another, drawn from
    all, takes its place. There a broken image leaves one column shorter than the others, so that
    `datasets` raises IndexError and the run ends.
 2. The pair shares its flip and random crop. There each image draws its own, so that winner and
    loser also differ by what nobody judged.
 3. A batch may cross the end of an epoch. There the last incomplete batch is lost.
 4. Transparency becomes white, the EXIF orientation is applied, colours are those of the embedded
    profile, and grey of more than 8 bits is scaled. There all four are ignored.
 5. Labels other than 0, 0.5 and 1 are an error where they are more than 1 %. There all such rows
    are removed like ties.
 6. A pair of one picture with itself is broken, and one without a caption. There both are trained
    on.
"""

import hashlib
import itertools
import math
import pickle

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sources import buckets, named, parquet, saved, tables
from sources.columns import asked
from sources.order import Bucketed, Shuffled, Windowed
from sources.pictures import PIXELS, decode, what_is_broken
from sources.rows import PICTURES, Rows, Source
from system.files import UserError, expanded
from system.hub import check_pairs, reason
from system.workers import PREFETCH, Loader, Spawn, in_shared_memory, leave_if_orphaned

AUGMENT, SAMPLE = 1, 3  # with those of sources/order.py, the random streams of one seed
BROKEN_LIMIT = 100  # tries to find a whole pair; more mean that hardly any is


# --------------------------------------------------------------------------------------------------
# Reading. Columns and labels are checked before the Arrow cache (335 GB for Pick-a-Pic) is built.

TABLES = [f"{name}{kind}" for name in ("pairs", "metadata") for kind in tables.SUFFIXES]


def read_pairs(
    source: str, split: str = "train", labels_only=False, partial=False, columns=(), stream=0
) -> Rows:
    """The pairs of a source that are no ties; pictures are read when they are asked for, encoded.

    source:
      - a .parquet file; a folder of them, searched recursively and sorted (of files named as on the
        hub, train-00000-of-00645.parquet, those of `split`, all of them unless `partial`)
      - a .csv, .tsv, .jsonl or .json file with paths of pictures, relative to its folder; a folder
        with such a file called pairs or metadata
      - a folder of NAME_winner.EXT, NAME_loser.EXT and NAME.txt; a .tar of KEY.winner.EXT,
        KEY.loser.EXT and KEY.txt, or a folder of them
      - a folder by datasets' save_to_disk; a hub id
    columns: "ROLE=NAME", ..., where the names are none that sources.columns knows.

    Raises UserError.

    Disk: parquet files are copied once, at about their size (335 GB for Pick-a-Pic v2), into the
    Arrow cache in HF_DATASETS_CACHE (else HF_HOME/datasets), and stay there; a hub id is downloaded
    first, to HF_HUB_CACHE, at its size again. All others are read where they are.
    stream: copy nothing; of parquet files each process keeps so many row groups in memory.
    labels_only: for a dry run: of parquet files, read and check the labels and copy nothing; of the
    hub download nothing, and take the number of rows from its page."""
    check_pairs(source)
    import datasets

    try:
        found = _find(source, split, partial, asked(columns), labels_only, stream)
        if stream and found.sample is None:
            raise UserError(f"--stream: {source} is no folder of parquet files; leave it out.")
        return Rows(found, found.judged is None or (labels_only and found.sample is not None))
    except UserError:
        raise
    except Exception as error:  # of datasets and the hub, which have no common class
        generic = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = (generic and error.__cause__) or error
        raise UserError(f"Cannot read the pairs '{source}': {reason(cause)}.") from error


def _find(
    source: str, split: str, partial: bool, given: dict[str, str], dry: bool, stream: int
) -> Source:
    path = expanded(source)
    if not path.exists():
        return saved.on_hub(source, split, given, dry)
    if saved.is_saved(path):
        return saved.on_disk(path, split, given)
    if path.is_file() and path.suffix.lower() in tables.SUFFIXES:
        return tables.read(path, given)
    if path.is_file() and path.suffix.lower() == ".tar":
        return named.in_tars([path])
    if not path.is_dir():
        return parquet.read(path, split, partial, given, stream)
    kinds = {
        "a table": [path / name for name in TABLES if (path / name).is_file()],
        "parquet files": parquet.visible(path, "*.parquet"),
        "tars": parquet.visible(path, "*.tar"),
    }
    there = [kind for kind, files in kinds.items() if files]
    if len(there) > 1 or len(kinds["a table"]) > 1:
        some = [str(file) for kind in there for file in kinds[kind]]
        raise UserError(f"{path} holds {' and '.join(there)}; give one of them, as {some[0]}.")
    if there == ["a table"]:
        return tables.read(kinds["a table"][0], given)
    if there == ["tars"]:
        return named.in_tars(kinds["tars"])
    found = None if there else named.in_folder(path)
    return found or parquet.read(path, split, partial, given, stream)


def fingerprint(rows: Rows) -> str:
    """16 hex digits that name the rows: all labels, captions and images of 16 rows spread evenly.

    The same on every machine and for every kind of source, so that a resumed run can refuse other
    data. Of labels alone, it names the labels."""
    digest = hashlib.sha256(rows.labels.astype("<f4").tobytes())
    some = sorted({len(rows) * i // 16 for i in range(16)})
    for row in some if rows.table is not None else []:
        try:
            pair = rows[row]
        except Exception:  # as in Pairs: the row is left out
            continue
        images = [pair[name] for name in PICTURES]
        for part in (*images, (pair["caption"] or "").encode()):
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# One pair, a function of (seed, n).


def placed(
    image: tuple[int, int], size: int | tuple[int, int], crop_at: tuple[float, float] | None
) -> tuple[tuple[int, int], int, int]:
    """((height, width) that an image (height, width) is resized to, top and left of its crop).

    size: of the crop, (height, width), or the side of a square. The image covers it, and no more:
    the other side is longer than the crop's, or as long. crop_at: (across, down) in [0, 1), the
    place in the room left; None is the centre."""
    height, width = (size, size) if isinstance(size, int) else size
    if height * image[1] >= width * image[0]:
        resized = height, height * image[1] // image[0]
    else:
        resized = width * image[0] // image[1], width
    room = resized[0] - height, resized[1] - width
    if crop_at is None:
        return resized, room[0] // 2, room[1] // 2
    across, down = crop_at
    return resized, int(down * (room[0] + 1)), int(across * (room[1] + 1))


def preprocess(
    image: Image.Image,
    size: int | tuple[int, int],
    crop_at: tuple[float, float] | None,
    flip: bool,
) -> Tensor:
    """Resize, crop, mirror. image: RGB. size, crop_at: see `placed`.

    Bilinear with antialiasing, as released. Returns (3, height, width) uint8, 0..255, a quarter of
    what fp32 takes on its way to the device (model.encode_images scales it). Raises ValueError for
    a picture so long that it would have more than PIXELS pixels before the crop (at 1024 px one of
    1 : 64): cropping first would round otherwise.
    Limit: an image that already has this size keeps its pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    resized, top, left = placed(image.size[::-1], size, crop_at)
    if math.prod(resized) > PIXELS:
        shape = " x ".join(map(str, image.size))
        raise ValueError(f"a picture of {shape} pixels is too long for {width} x {height}")
    image = image.resize(resized[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    pixels = pixels[:, ::-1] if flip else pixels
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def check_pair(pair: dict):
    """Raises ValueError for what is wrong with a row whose pictures can be read."""
    if pair["jpg_0"] == pair["jpg_1"]:
        raise ValueError("both pictures are the same")
    if pair["caption"] is None:
        raise ValueError("it has no caption")


def told(
    image: tuple[int, int], size: tuple[int, int], crop_at: tuple[float, float] | None, flip: bool
) -> list[int]:
    """What SDXL was told of an image (height, width) in training (2307.01952, section 2.2):
    its height and width before it was resized, top and left of its crop after that, and the
    crop's height and width. Mirrored first, then cropped, as in diffusers' training script."""
    resized, top, left = placed(image, size, crop_at)
    left = resized[1] - size[1] - left if flip else left
    return [*image, top, left, *size]


def read_pair(
    pair: dict,
    size: int | tuple[int, int],
    crop_at: tuple[float, float] | None = None,
    flip: bool = False,
) -> tuple[Tensor, Tensor, str, tuple[tuple[int, int], tuple[int, int]]]:
    """(winner, loser, caption, (height, width) of both pictures before) of a row. Raises
    ValueError, which says what of it is broken."""
    images = []
    for name in PICTURES:
        try:
            image = decode(pair[name] or b"")
            images.append((preprocess(image, size, crop_at, flip), image.size[::-1]))
        except Exception as error:  # PIL: OSError, SyntaxError, ValueError, MemoryError, ...
            raise ValueError(f"{name}: {what_is_broken(error)}") from error
    check_pair(pair)
    (winner, before_w), (loser, before_l) = images if pair["label_0"] == 1 else reversed(images)
    return winner, loser, pair["caption"], (before_w, before_l)


def sample(rows: Rows, resolution: int, count: int = 64) -> tuple[list[str], list[str]]:
    """(captions of whole pairs, what is wrong with the others) of `count` pairs, or of all,
    that are read and decoded.

    They are the same for the same data. Where read_pairs has read labels alone, files are read."""
    captions, broken = [], []
    for (file, row), read in rows.some(count, SAMPLE):
        try:
            captions.append(read_pair(read(), resolution)[2])
        except Exception as error:
            broken.append(f"row {row} (from 0) of {file}: {what_is_broken(error)}")
    return captions, broken


def bucketed(
    rows: Rows, shapes: list[tuple[int, int]], block: int, seed: int, some=slice(None)
) -> Bucketed:
    """The order of all rows in these shapes, in blocks of so many pairs; or of some of the rows,
    which are then numbered from 0. UserError."""
    sizes = buckets.read_sizes(rows, fingerprint(rows))[some]
    return Bucketed(buckets.assign(sizes, shapes, block), block, seed)


def streamed(rows: Rows, window: int, seed: int, resolution: int) -> Windowed:
    """The order in which each row group is read once. rows: read with `stream`."""
    groups = rows.table.group_of(rows.first)
    return Windowed(groups, window, seed, (resolution, resolution))


def sampled_shapes(
    rows: Rows, shapes: list[tuple[int, int]], count: int = 64
) -> dict[tuple[int, int], float]:
    """Shares of the shapes among the pairs of a `sample`, of which only the headers are read; {}
    where there is no sample."""
    sizes = [buckets.sizes_of(read) for _, read in rows.some(count, SAMPLE)]
    members = buckets.assign(np.array(sizes), shapes, block=1) if sizes else {}
    return {shape: len(rows) / len(sizes) for shape, rows in members.items()}


class Pairs(torch.utils.data.Dataset):
    """Pair n of a run, n = 0, 1, ... without end.

    dataset: from `read_pairs`, or any sequence of such rows. resolution: pixels. crop: "center" or
    "random". flip: mirror half of the pairs. caption_dropout: share of pairs whose caption becomes
    "". order: which row is pair n, in which shape; if not given, squares, and an epoch is len(self)
    pairs, in a new order.
    true_sizes: tell SDXL of each picture's own, in place of the published (h, w, 0, 0, h, w) of
    what is left of it. Raises ValueError."""

    def __init__(
        self, dataset, resolution: int, seed: int, crop="center", flip=True, caption_dropout=0.2,
        order: Bucketed | None = None, true_sizes=False,
    ):  # fmt: skip
        if crop not in ("center", "random"):
            raise ValueError(f"crop is '{crop}', it must be 'center' or 'random'.")
        self.dataset, self.resolution, self.seed = dataset, resolution, seed
        self.crop, self.flip, self.caption_dropout = crop, flip, caption_dropout
        self.order = order or Shuffled(len(dataset), seed, (resolution, resolution))
        self.true_sizes, self._shared = true_sizes, None

    def __getstate__(self) -> dict:
        """For workers: the rows' files and numbers (7 MB for Pick-a-Pic), and as many of the order,
        go into shared memory. If the state exceeded a pipe (64 KB), the trainer would wait for each
        worker's imports."""
        if self._shared is None:  # an attribute, since it must live until the worker has started
            rows = bytearray(pickle.dumps((self.dataset, self.order)))
            self._shared = in_shared_memory(torch.frombuffer(rows, dtype=torch.uint8))
        return self.__dict__ | {"dataset": None, "order": None}

    def __setstate__(self, state: dict):
        dataset, order = pickle.loads(state.pop("_shared").numpy())
        self.__dict__ |= state | {"dataset": dataset, "order": order, "_shared": None}

    def __len__(self) -> int:
        return len(self.dataset)

    def place(self, row: int) -> dict:
        """The file of a row and its number there, from 0, where they are known."""
        origin = getattr(self.dataset, "origin", None)
        return dict(zip(("file", "file_row"), origin(row), strict=True)) if origin else {}

    def augmentation(self, n: int) -> tuple[tuple[float, float] | None, bool, bool]:
        """(crop_at, flip, drop the caption) of pair n, the same for its winner and its loser."""
        across, down, flip, drop = np.random.default_rng([self.seed, AUGMENT, n]).random(4)
        crop_at = (across, down) if self.crop == "random" else None
        return crop_at, bool(self.flip and flip < 0.5), bool(drop < self.caption_dropout)

    def read(self, row: int, *how) -> tuple:
        """(winner, loser, caption, sizes before) of a row, see `read_pair`."""
        return read_pair(self.dataset[row], *how)

    def __getitem__(self, n: int) -> dict:
        """winner, loser: (3, h, w) uint8. sizes: of both what SDXL is told, see `told`. caption,
        row, n. broken: the rows in whose place this one came, as dictionaries of n, row, file,
        file_row, and the reason.

        UserError where 100 rows are broken, one after the other."""
        shape, (crop_at, flip, drop) = self.order.shape(n), self.augmentation(n)
        broken = []
        for row in itertools.islice(self.order.tries(n), BROKEN_LIMIT):
            try:  # whatever cannot be read is left out: a cell, a caption, a picture
                winner, loser, caption, before = self.read(row, shape, crop_at, flip)
            except Exception as error:
                place, why = self.place(row), what_is_broken(error)
                broken.append({"n": n, "row": row, **place, "reason": why})
                continue
            sizes = [[*shape, 0, 0, *shape]] * 2
            if self.true_sizes:
                sizes = [told(image, shape, crop_at, flip) for image in before]
            item = {"winner": winner, "loser": loser, "sizes": sizes, "row": row, "n": n}
            return {**item, "broken": broken, "caption": "" if drop else caption}
        raise UserError(
            f"{BROKEN_LIMIT} pairs, drawn one after the other, are broken, the last one row {row} "
            f"(from 0, ties not counted): {broken[-1]['reason']}; check the data."
        )


# --------------------------------------------------------------------------------------------------
# Batches: n = step * G + (micro * world + rank) * micro_batch + j for place j of a micro-batch,
# G = micro_batch * world * accumulation.


def pair_numbers(
    step: int, micro: int, rank: int, world: int, micro_batch: int, accumulation: int
) -> range:
    """The n of a rank's micro-step; all ranks and micro-steps of step s together take
    s * G ... (s + 1) * G - 1."""
    if not (0 <= rank < world and 0 <= micro < accumulation):
        raise ValueError(f"No rank {rank} of {world} or micro-step {micro} of {accumulation}.")
    start = ((step * accumulation + micro) * world + rank) * micro_batch
    return range(start, start + micro_batch)


def collate(items: list[dict]) -> dict:
    """pixels (2P, 3, h, w) uint8, winners first, then losers; sizes, 2P lists of `told`, likewise;
    captions; n, row (P,); broken, joined."""
    pixels = [item["winner"] for item in items] + [item["loser"] for item in items]
    pixels = torch.stack(pixels)
    if torch.utils.data.get_worker_info():  # else a thread would do it, whose errors are lost
        in_shared_memory(pixels)
    return {
        "pixels": pixels,
        "sizes": [item["sizes"][side] for side in (0, 1) for item in items],
        "captions": [item["caption"] for item in items],
        "n": torch.tensor([item["n"] for item in items]),
        "row": torch.tensor([item["row"] for item in items]),
        "broken": [row for item in items for row in item["broken"]],
    }


def loader(
    pairs: Pairs, start_step: int, steps: int, rank: int, world: int,
    micro_batch: int, accumulation: int, workers: int = 0,
) -> torch.utils.data.DataLoader:  # fmt: skip
    """The batches of one rank from `start_step` to `steps`, the end of the run. It keeps no state:
    batch i is micro-step i mod accumulation of step start_step + i div accumulation."""
    shard = (rank, world, micro_batch, accumulation)
    places = [(step, micro) for step in range(start_step, steps) for micro in range(accumulation)]
    return Loader(
        pairs,
        batch_sampler=[pair_numbers(*place, *shard) for place in places],
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=leave_if_orphaned,
        persistent_workers=workers > 0,
        multiprocessing_context=Spawn() if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # iterating draws a seed, which must not change the training's
    )
