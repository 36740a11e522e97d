"""Pairs in parquet files: which files of a folder, their checks, their rows.

labels = check("pairs/", split="train")   # {file: labels}; footers and labels are read, no more
rows = copied("pairs/", labels)           # a datasets.Dataset, from a copy in its Arrow cache
for file, row, pair in sample(labels): ...
"""

import contextlib
import hashlib
import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sources.schema import COLUMNS, PICTURES, check_columns, check_labels, features, is_picture
from system.files import UserError, expanded
from system.hub import PAIRS, file_kind, reason

if TYPE_CHECKING:
    import datasets

# Names of the hub: train-00000-of-00645, perhaps with a hash behind.
PART = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<parts>\d{5})")

# --------------------------------------------------------------------------------------------------
# Which files, and what they hold.


def check(path: Path, split: str, partial: bool = False) -> dict[str, np.ndarray]:
    """{file: its labels}, of the files of a split that have rows; columns and labels are checked.

    partial: accept a folder that lacks some of the files that its names count."""
    labels = {}
    for file in files_of(path, split, partial):
        with opened(file) as parquet:
            check_columns(parquet.schema_arrow, file)
            labels[str(file)] = check_labels(parquet.read(["label_0"])["label_0"], file)
    labels = {file: column for file, column in labels.items() if len(column)}
    if not labels:  # datasets cannot read a file without rows
        raise UserError(f"{path} has no pair left: it has no rows.")
    return labels


def files_of(path: Path, split: str, partial: bool) -> list[Path]:
    """The file, or those of a folder, sorted; of files named as on the hub, those of the split."""
    if not path.is_dir():
        if path.suffix != ".parquet" or not path.is_file():
            raise UserError(f"{path} is {file_kind(path)}; pairs are read from {PAIRS}.")
        return [path]
    files = sorted(file for file in path.rglob("*.parquet") if _counts(file, path))
    named = {file: match for file in files if (match := PART.match(file.name))}
    if named:  # a copy of the hub's folder: do not train on its test split
        files = [file for file in files if file in named and named[file]["split"] == split]
    if not files:
        splits = sorted({match["split"] for match in named.values()})
        found = ", ".join(splits) or _contents(path)
        raise UserError(f"{path} has no pairs of split '{split}', it holds {found}.")
    for folder in sorted({file.parent for file in files if file in named}):
        _check_numbers(
            folder, split, [named[file] for file in files if file.parent == folder], partial
        )
    return files


def _counts(file: Path, folder: Path) -> bool:
    """Whether it is a file; what is hidden (the Mac's ._x.parquet, .cache) is none of the data."""
    return file.is_file() and not any(
        part.startswith(".") for part in file.relative_to(folder).parts
    )


def _check_numbers(folder: Path, split: str, parts: list[re.Match], partial: bool):
    """Raises UserError where a number is twice among files named as on the hub, or missing."""
    there = [(int(part["parts"]), int(part["number"])) for part in parts]
    if len(set(there)) < len(there) or len({count for count, _ in there}) > 1:
        raise UserError(
            f"{folder} holds files of two copies of split '{split}' ({parts[0].string}, "
            f"{parts[-1].string}); keep one of them."
        )
    count = there[0][0]
    missing = [n for n in range(count) if (count, n) not in there]
    if missing and not partial:
        names = [f"{split}-{n:05}-of-{count:05}" for n in missing[:3]]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{folder} holds {len(there)} of the {count} files of split '{split}': "
            f"{', '.join(names)}{more} missing; download them, or add --partial-data to train on "
            "what is there."
        )


def _contents(folder: Path) -> str:
    """What a folder without pairs holds, in words."""
    files = (file for file in itertools.islice(folder.rglob("*.*"), 1000) if file.is_file())
    kinds = ", ".join(sorted({file.suffix for file in files})[:5])
    return "no .parquet file and no saved dataset" + (f", but {kinds} files" if kinds else "")


@contextlib.contextmanager
def opened(file: str | Path, **options):
    """A pyarrow.parquet.ParquetFile; UserError where it cannot be read."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file, **options) as parquet:
            yield parquet
    except PermissionError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); change its rights.") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is no readable parquet file; copy it again.") from error


# --------------------------------------------------------------------------------------------------
# Rows.


def copied(path: Path, labels: dict[str, np.ndarray]) -> "datasets.Dataset":
    """The rows in datasets' Arrow cache, which gives a row in 0.2 ms. UserError for a full disk.

    Parquet itself gives a random row with its row group: 35 MB and 30 ms in groups of 100 rows of
    350 KB, 335 MB and 300 ms in groups of 1,000. A step of 1,024 pairs would read 36 or 340 GB."""
    import datasets

    builder = builder_of(labels)
    cache, folder = Path(builder.cache_dir), expanded(datasets.config.HF_DATASETS_CACHE)
    if not cache.exists():
        need = sum(_bytes(file) for file in labels)
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
    rows = from_cache(builder, path, "train")
    if not np.array_equal(rows.with_format("arrow")["label_0"], np.concatenate([*labels.values()])):
        raise _damaged(builder, path, "its labels are not those of the files")
    return rows


def from_cache(builder: "datasets.DatasetBuilder", where: str | Path, split: str):
    """The rows that a builder has put into the Arrow cache. UserError where they are damaged."""
    try:
        return builder.as_dataset(split)
    except Exception as error:  # of pyarrow, datasets, or an OSError
        raise _damaged(builder, where, reason(error)) from error


def _damaged(builder: "datasets.DatasetBuilder", where: str | Path, why: str) -> UserError:
    return UserError(
        f"The copy of {where} in the Arrow cache is damaged ({why}); delete the folder "
        f"{builder.cache_dir} and repeat the command."
    )


def builder_of(labels: dict[str, np.ndarray]) -> "datasets.DatasetBuilder":
    """datasets' own builder, given the files themselves: from patterns it could not read a path
    with [ or *. Its cache is named by what the files hold, since datasets looks at names and times
    alone."""
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.parquet.parquet import Parquet

    files = [str(Path(file).absolute()) for file in labels]
    if odd := [file for file in files if "::" in file]:  # a chain of file systems to datasets
        raise UserError(f"{odd[0]}: rename what has '::' in its name, which datasets cannot read.")
    pictures = False
    for file in files:
        with opened(file) as parquet:
            kinds = [parquet.schema_arrow.field(name).type for name in PICTURES]
        pictures |= any(map(is_picture, kinds))
    seen = [(identity(file, labels[given]),) for file, given in zip(files, labels, strict=True)]
    return Parquet(
        data_files=DataFilesDict({"train": DataFilesList(files, seen)}),
        columns=list(COLUMNS),
        features=features(pictures),
        hash="pairs",
    )


def identity(file: str, labels: np.ndarray) -> str:
    """Changes with a file's time, size, labels, footer, and 16 blocks spread evenly."""
    about, digest = Path(file).stat(), hashlib.sha256(labels.tobytes())
    digest.update(f"{about.st_mtime_ns} {about.st_size}".encode())
    with open(file, "rb") as opened:
        opened.seek(-8, 2)
        footer = 8 + int.from_bytes(opened.read(4), "little")
        opened.seek(-footer, 2)
        digest.update(opened.read())
        for place in range(16):
            opened.seek(about.st_size * place // 16)
            digest.update(opened.read(4096))
    return digest.hexdigest()


def _bytes(file: str) -> int:
    """Size of the columns that are read, decompressed."""
    with opened(file) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    read = [column for column in columns if column.path_in_schema.split(".")[0] in COLUMNS]
    return sum(column.total_uncompressed_size for column in read)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where there is none, or it is removed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in folder.iterdir())
    return 0


def sample(labels: dict[str, np.ndarray], count: int, seed: int) -> Iterator[tuple[str, int, Any]]:
    """(file, row in it, pair as a pyarrow.Table of one row) of `count` pairs that are no ties, or
    a few less, from at most 8 row groups: of Pick-a-Pic 64 pairs by reading 2 GB of 335."""
    rng = np.random.default_rng(seed)
    groups = []
    for file in rng.permutation(list(labels))[:8]:
        with opened(file) as parquet:
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        ends = np.cumsum(sizes)
        groups += [
            (str(file), group, end - size, end)
            for group, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]
    groups = [groups[i] for i in rng.permutation(len(groups))[:8]]
    for file, group, first, end in groups:
        decided = first + np.flatnonzero(labels[file][first:end] != 0.5)
        wanted = set(rng.permutation(decided)[: -(-count // len(groups))].tolist())
        with opened(file, buffer_size=2**20) as parquet:  # or it reads a column of a group at once
            at = first
            for batch in parquet.iter_batches(8, row_groups=[group], columns=list(COLUMNS)):
                for row in sorted(wanted & set(range(at, at + len(batch)))):
                    yield file, row, batch.slice(row - at, 1)
                at += len(batch)
                if not wanted or at > max(wanted):
                    break
