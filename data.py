"""Preference pairs: read, check, preprocess, shard, collate.

    pairs = Pairs(read_pairs("out/toy/pairs"), resolution=64, seed=0)
    for batch in loader(pairs, 0, steps=40, rank=0, world=1, micro_batch=8, accumulation=2):
        batch["pixels"], batch["captions"]  # (2P, 3, R, R) winners first, then losers; P captions

A pair has one number for the whole run: n = step * G + place, where G is the global batch. Its row,
crop, flip and caption dropout are functions of (seed, n) alone. So the data do not depend on ranks,
workers, accumulation or interruptions, and a resumed run counts on from its step.

Where this departs from the released script, and why:
 1. A broken image drops its pair, and is counted. There it leaves one column shorter than
    the others, so that `datasets` raises IndexError and the run ends.
 2. The pair shares its flip and random crop. There each image draws its own, so that winner and
    loser also differ by what nobody judged.
 3. A batch may cross the end of an epoch. There the last incomplete batch is lost.
 4. Transparency becomes white, and the EXIF orientation is applied. There both are ignored.
 5. A label other than 0, 0.5 and 1 is an error. There such rows are removed like ties.
"""

import contextlib
import hashlib
import io
import itertools
import math
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from system.files import UserError
from system.hub import PAIRS, check_pairs, file_kind, reachable, reason
from system.workers import Loader, Spawn, leave_if_orphaned

if TYPE_CHECKING:  # imported where they are used, since they take a second
    import datasets
    import pyarrow

COLUMNS = {"jpg_0": "binary", "jpg_1": "binary", "label_0": "", "caption": "string"}  # Arrow types
ORDER, AUGMENT = 0, 1  # keep the random streams of one seed apart
# The most pixels of a picture, as decoded and as resized for training. Below PIL's own limits.
PIXELS = 8192 * 8192
# Others are refused: they are rare in data, and a few of their readers start a program (EPS).
FORMATS = ["PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM"]
BROKEN_LIMIT = 100  # broken pairs in a row; more mean that the data are at fault, not a picture


# --------------------------------------------------------------------------------------------------
# Reading: columns and labels are checked before the Arrow cache (335 GB for Pick-a-Pic) is built.


def read_pairs(source: str, split: str = "train", labels_only=False) -> "datasets.Dataset":
    """The rows of a source that are no ties, memory mapped, their images still encoded.

    source: a .parquet file; a folder of them, searched recursively and sorted (of files named as on
    the hub, train-00000-of-00645.parquet, those of `split`); a folder by datasets' save_to_disk; or
    a hub id. Columns: jpg_0, jpg_1 encoded bytes, label_0 1.0 (image 0 won), 0.0 (image 1 won) or
    0.5 (tie), caption. The result's `.info.description` counts pairs and ties. Raises UserError.

    Disk: parquet files are copied once, at about their size (335 GB for Pick-a-Pic v2), into the
    Arrow cache in HF_DATASETS_CACHE (else HF_HOME/datasets), and stay there; a hub id is downloaded
    first, to HF_HUB_CACHE, at its size again. What save_to_disk wrote is read where it is.
    labels_only: of parquet files, read and check the labels and copy nothing, for a dry run."""
    check_pairs(source)
    import datasets

    path = Path(source).expanduser()
    try:
        dataset = _open(path, split, labels_only) if path.exists() else _from_hub(source, split)
    except UserError:
        raise
    except Exception as error:  # of datasets and the hub, which have no common class
        generic = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = (generic and error.__cause__) or error
        raise UserError(f"Cannot read the pairs '{source}': {reason(cause)}.") from error
    labels = _check_labels(dataset.with_format("arrow")["label_0"], source)
    decided = np.flatnonzero(labels != 0.5)
    ties = f"{len(labels) - len(decided)} of {len(labels)} rows are ties (label_0 0.5)"
    if not len(decided):
        raise UserError(f"{source} has no pair left: {ties}; give data with winners.")
    dataset = dataset.select(decided)
    dataset.info.description = f"{len(decided)} pairs; {ties}"
    return dataset


def _from_hub(source: str, split: str) -> "datasets.Dataset":
    import datasets

    datasets.config.HF_HUB_OFFLINE |= not reachable()
    if features := datasets.load_dataset_builder(source).info.features:  # before the download
        _check_columns(features.arrow_schema, source)
    return _columns(datasets.load_dataset(source, split=split), source)


def _open(path: Path, split: str, labels_only: bool) -> "datasets.Dataset":
    import datasets

    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise UserError(f"{path} has no split '{split}', it has {', '.join(dataset)}.")
            dataset = dataset[split]
        return _columns(dataset, path)
    labels = _check_files(path, split)
    if labels_only:
        return datasets.Dataset.from_dict({"label_0": np.concatenate(list(labels.values()))})
    return _columns(_copied(path, list(labels)), path)


def _columns(dataset: "datasets.Dataset", where: str | Path) -> "datasets.Dataset":
    """The columns that are read, images encoded. Raises UserError where one is missing."""
    import datasets

    _check_columns(dataset.features.arrow_schema, where)
    dataset = dataset.select_columns(list(COLUMNS))
    for name in ("jpg_0", "jpg_1"):
        if isinstance(dataset.features[name], datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _check_files(path: Path, split: str) -> dict[str, np.ndarray]:
    """{file: its labels}, of the parquet files of a split that have rows; all are checked."""
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(f"{path} is {file_kind(path)}; pairs are read from {PAIRS}.")
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    splits = {f: m[1] for f in files if (m := re.match(r"(.+)-\d{5}-of-\d{5}", f.name))}
    if splits and path.is_dir():  # a copy of the hub's folder: do not train on its test split
        files = [file for file in files if splits.get(file) == split]
    if not files:
        found = ", ".join(sorted(set(splits.values()))) or _contents(path)
        raise UserError(f"{path} has no pairs of split '{split}', it holds {found}.")
    labels = {}
    for file in files:
        with _parquet(file) as parquet:
            _check_columns(parquet.schema_arrow, file)
            labels[str(file)] = _check_labels(parquet.read(["label_0"])["label_0"], file)
    labels = {file: column for file, column in labels.items() if len(column)}
    if not labels:  # datasets cannot read a file without rows
        raise UserError(f"{path} has no pair left: it has no rows.")
    return labels


def _contents(folder: Path) -> str:
    """What a folder without pairs holds, in words."""
    files = (file for file in itertools.islice(folder.rglob("*.*"), 1000) if file.is_file())
    kinds = ", ".join(sorted({file.suffix for file in files})[:5])
    return "no .parquet file and no saved dataset" + (f", but {kinds} files" if kinds else "")


@contextlib.contextmanager
def _parquet(file: str | Path):
    """A pyarrow.parquet.ParquetFile; UserError where it cannot be read."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is no readable parquet file; copy it again.") from error


def _copied(path: Path, files: list[str]) -> "datasets.Dataset":
    """The files in datasets' Arrow cache, which gives a row in 0.2 ms. UserError for a full disk.

    Parquet itself gives a random row with its row group: 35 MB and 30 ms in groups of 100 rows of
    350 KB, 335 MB and 300 ms in groups of 1,000. A step of 1,024 pairs would read 36 or 340 GB."""
    import datasets

    builder = datasets.load_dataset_builder("parquet", data_files=files, columns=list(COLUMNS))
    cache, folder = Path(builder.cache_dir), Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    if not cache.exists():
        need = sum(_bytes(file) for file in files)
        # What another rank is copying, or a killed one has copied, counts as room. It is measured
        # after the free space: while that rank writes, the sum is too large, never too small.
        room = shutil.disk_usage(folder).free + _size(Path(f"{cache}.incomplete"))
        if need > room and not cache.exists():  # by now it may be complete
            raise UserError(
                f"{path} needs {need / 1e9:.3g} GB for its copy in the Arrow cache, and {folder} "
                f"has {room / 1e9:.3g} GB free: set HF_HOME or HF_DATASETS_CACHE to a folder on a "
                "larger disk."
            )
    builder.download_and_prepare()
    return builder.as_dataset("train")


def _bytes(file: str) -> int:
    """Size of the columns that are read, decompressed."""
    with _parquet(file) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    read = [column for column in columns if column.path_in_schema.split(".")[0] in COLUMNS]
    return sum(column.total_uncompressed_size for column in read)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where there is none, or it is removed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in folder.iterdir())
    return 0


def _check_columns(schema: "pyarrow.Schema", where: str | Path):
    for name, wanted in COLUMNS.items():
        if name not in schema.names:
            raise UserError(f"{where} has no column '{name}', it has {', '.join(schema.names)}.")
        if wanted not in (kind := str(schema.field(name).type)):
            raise UserError(f"Column '{name}' of {where} holds {kind}, it must hold {wanted}.")


def _check_labels(column: "pyarrow.ChunkedArray", where: str | Path) -> np.ndarray:
    labels = column.to_numpy()
    for row in np.flatnonzero(~np.isin(labels, (0.0, 0.5, 1.0)))[:1]:
        raise UserError(
            f"Row {row} (from 0) of {where} has label_0 {labels[row]}: it must be 1 where image 0 "
            "won, 0 where image 1 won, 0.5 for a tie."
        )
    return labels


def fingerprint(dataset: "datasets.Dataset") -> str:
    """16 hex digits that name the rows: all labels, captions and images of 16 rows spread evenly.

    The same on every machine and for every kind of source, so that a resumed run can refuse other
    data. Of labels alone, it names the labels."""
    labels = dataset.with_format("arrow")["label_0"].to_numpy()
    digest = hashlib.sha256(labels.astype("<f4").tobytes())
    rows = sorted({len(dataset) * i // 16 for i in range(16)})
    for row in rows if "caption" in dataset.column_names else []:
        pair = dataset[row]
        images = [_encoded(pair[name]) or b"" for name in ("jpg_0", "jpg_1")]
        for part in (*images, (pair["caption"] or "").encode()):
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# One pair, a function of (seed, n).


def _encoded(value: bytes | dict | None) -> bytes | None:
    return value["bytes"] if isinstance(value, dict) else value  # a dict: datasets' Image feature


def decode(data: bytes) -> Image.Image:
    """An upright RGB image of 8 bits, transparency over white, grey as `_grey` scales it.

    Of more than PIXELS pixels it raises ValueError before it takes memory for them; below that it
    takes at most 1.6 GB for a moment (measured: a JPEG 2000 of four bands; a PNG takes 1.1 GB).
    Raises whatever PIL does for broken bytes."""
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    if (count := math.prod(image.size)) > PIXELS:
        raise ValueError(f"a picture has {count:,} pixels, more than {PIXELS:,}")
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


def preprocess(
    image: Image.Image, resolution: int, crop_at: tuple[float, float] | None, flip: bool
) -> Tensor:
    """Resize the shorter side to `resolution` pixels, crop a square, mirror, scale 0..255 to -1..1.

    image: RGB. crop_at: (across, down) in [0, 1), the place in the room left; None is the centre.
    Bilinear with antialiasing, as released. Returns (3, resolution, resolution) fp32. Raises
    ValueError for a picture so long that it would have more than PIXELS pixels before the crop (at
    1024 px one of 1 : 64): cropping first would round otherwise.
    Limit: an image that already has this size keeps its pixels."""
    size = tuple(resolution * side // min(image.size) for side in image.size)
    if math.prod(size) > PIXELS:
        shape = " x ".join(map(str, image.size))
        raise ValueError(f"a picture of {shape} pixels is too long for {resolution} px")
    image = image.resize(size, Image.Resampling.BILINEAR)
    room = [side - resolution for side in size]
    if crop_at is None:
        left, top = room[0] // 2, room[1] // 2
    else:
        left, top = (int(at * (free + 1)) for at, free in zip(crop_at, room, strict=True))
    pixels = np.asarray(image.crop((left, top, left + resolution, top + resolution)))
    pixels = pixels[:, ::-1] if flip else pixels
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32, order="C")) / 127.5 - 1


class Pairs(torch.utils.data.Dataset):
    """Pair n of a run, n = 0, 1, ... without end. An epoch is len(self) pairs, in a new order.

    dataset: from `read_pairs`. resolution: pixels. crop: "center" or "random". flip: mirror half of
    the pairs. caption_dropout: share of pairs whose caption becomes "". Raises ValueError."""

    def __init__(
        self, dataset, resolution: int, seed: int, crop="center", flip=True, caption_dropout=0.2
    ):
        if crop not in ("center", "random"):
            raise ValueError(f"crop is '{crop}', it must be 'center' or 'random'.")
        self.dataset, self.resolution, self.seed = dataset, resolution, seed
        self.crop, self.flip, self.caption_dropout = crop, flip, caption_dropout
        self._epoch = self._order = self._shared = None

    def __getstate__(self) -> dict:
        """For workers: the rows' files and numbers (7 MB for Pick-a-Pic) go into shared memory. If
        the state exceeded a pipe (64 KB), the trainer would wait for each worker's imports."""
        if self._shared is None:  # an attribute, since it must live until the worker has started
            rows = bytearray(pickle.dumps(self.dataset))
            self._shared = torch.frombuffer(rows, dtype=torch.uint8).share_memory_()
        return self.__dict__ | {"dataset": None, "_epoch": None, "_order": None}

    def __setstate__(self, state: dict):
        shared = state.pop("_shared").numpy()
        self.__dict__ |= state | {"dataset": pickle.loads(shared), "_shared": None}

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, n: int) -> int:
        """The row of pair n: entry n mod N of the permutation that (seed, n div N) gives."""
        epoch, place = divmod(n, len(self))
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, ORDER, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self))
        return int(self._order[place])

    def augmentation(self, n: int) -> tuple[tuple[float, float] | None, bool, bool]:
        """(crop_at, flip, drop the caption) of pair n, the same for its winner and its loser."""
        across, down, flip, drop = np.random.default_rng([self.seed, AUGMENT, n]).random(4)
        crop_at = (across, down) if self.crop == "random" else None
        return crop_at, bool(self.flip and flip < 0.5), bool(drop < self.caption_dropout)

    def __getitem__(self, n: int) -> dict:
        """winner, loser: (3, R, R) fp32 in -1..1. caption, row, n. skipped: number of broken pairs.

        The next pair in order replaces one with a broken image; UserError for 100 in a row."""
        crop_at, flip, drop = self.augmentation(n)
        for skipped in range(BROKEN_LIMIT):
            row = self.row(n + skipped)
            pair = self.dataset[row]
            try:
                images = [decode(_encoded(pair[name])) for name in ("jpg_0", "jpg_1")]
                images = [preprocess(image, self.resolution, crop_at, flip) for image in images]
            except Exception:  # PIL: OSError, SyntaxError, ValueError, struct.error, ...
                continue
            winner, loser = images if pair["label_0"] == 1 else reversed(images)
            item = {"winner": winner, "loser": loser, "row": row, "n": n, "skipped": skipped}
            return {**item, "caption": "" if drop else pair["caption"] or ""}
        raise UserError(
            f"{BROKEN_LIMIT} pairs in a row hold an image that cannot be decoded, the last in row "
            f"{row} (from 0, ties not counted): check jpg_0 and jpg_1 of the data."
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
    """pixels (2P, 3, R, R), winners first, then losers; captions; n, row (P,); skipped, summed."""
    images = [item["winner"] for item in items] + [item["loser"] for item in items]
    return {
        "pixels": torch.stack(images),
        "captions": [item["caption"] for item in items],
        "n": torch.tensor([item["n"] for item in items]),
        "row": torch.tensor([item["row"] for item in items]),
        "skipped": sum(item["skipped"] for item in items),
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
        worker_init_fn=leave_if_orphaned,
        persistent_workers=workers > 0,
        multiprocessing_context=Spawn() if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # iterating draws a seed, which must not change the training's
    )
