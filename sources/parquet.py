"""Pairs in parquet files: which files of a folder, their checks, their rows.

source = read(Path("pairs"), split="train", partial=False, given={})
source.judged     # footers and labels are read, no more
source.table()    # a datasets.Dataset, from a copy in its Arrow cache
"""

import contextlib
import functools
import hashlib
import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sources.columns import Columns, numbers, recognise
from sources.rows import Source
from sources.schema import check_columns, features, plain_table
from sources.streamed import RowGroups
from system.files import UserError, expanded
from system.hub import PAIRS, file_kind, reason

if TYPE_CHECKING:  # imported where they are used, since they take a second
    import datasets
    import pyarrow

# Names of the hub: train-00000-of-00645, perhaps with a hash behind.
PART = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<parts>\d{5})")

# --------------------------------------------------------------------------------------------------
# Which files, and what they hold.


def read(path: Path, split: str, partial: bool, given: dict[str, str], stream: int = 0) -> Source:
    """The rows of a file, or of the files of a split that have some. Raises UserError.

    partial: accept a folder that lacks some of the files that its names count. stream: copy
    nothing, keep so many row groups in memory."""
    columns, judged, counts = None, {}, {}
    for file in files_of(path, split, partial):
        with opened(file) as parquet:
            schema = parquet.schema_arrow
            columns = columns or recognise(schema.names, str(file), given)
            check_columns(columns, schema, file)
            if parquet.metadata.num_rows:  # datasets cannot read a file without rows
                judged[str(file)] = plain_table(parquet.read(columns.judged))
                counts[str(file)] = parquet.metadata.num_rows
    if not judged:
        raise UserError(f"{path} has no pair left: it has no rows.")
    return Source(
        where=str(path),
        columns=columns,
        judged=below(judged),
        files=counts,
        root=path if path.is_dir() else path.absolute().parent,
        table=lambda: (
            RowGroups([*judged], columns, stream) if stream else copied(path, columns, judged)
        ),
        sample=functools.partial(sample, columns),
    )


def below(tables: dict[str, "pyarrow.Table"]) -> "pyarrow.Table":
    """The tables of {file: table} one below the other."""
    import pyarrow as pa

    try:
        return pa.concat_tables([*tables.values()], promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(
            f"The files of {Path(next(iter(tables))).parent} hold labels of several types: {error}."
        ) from error


def files_of(path: Path, split: str, partial: bool) -> list[Path]:
    """The file, or those of a folder, sorted; of files named as on the hub, those of the split."""
    if not path.is_dir():
        if path.suffix != ".parquet" or not path.is_file():
            raise UserError(f"{path} is {file_kind(path)}; pairs are read from {PAIRS}.")
        return [path]
    files = visible(path, "*.parquet")
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


def visible(folder: Path, pattern: str) -> list[Path]:
    """Files in it, at any depth, sorted; what is hidden (the Mac's ._x.parquet, .cache) is none of
    the data."""
    return sorted(
        file
        for file in folder.rglob(pattern)
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
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
    return "no pairs that are known" + (f", but {kinds} files" if kinds else "")


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


def copied(path: Path, columns: Columns, judged: dict) -> "datasets.Dataset":
    """The rows in datasets' Arrow cache, which gives a row in 0.2 ms. judged: {file: table}.
    UserError for a full disk.

    Parquet itself gives a random row with its row group: 35 MB and 30 ms in groups of 100 rows of
    350 KB, 335 MB and 300 ms in groups of 1,000. A step of 1,024 pairs would read 36 or 340 GB."""
    import datasets

    builder = builder_of(columns, judged)
    cache, folder = Path(builder.cache_dir), expanded(datasets.config.HF_DATASETS_CACHE)
    if not cache.exists():
        need = sum(_bytes(file, columns) for file in judged)
        # What another rank is copying, or a killed one has copied, counts as room. It is measured
        # after the free space: while that rank writes, the sum is too large, never too small.
        room = shutil.disk_usage(folder).free + _size(Path(f"{cache}.incomplete"))
        if need > room and not cache.exists():  # by now it may be complete
            raise UserError(
                f"{path} needs {need / 1e9:.3g} GB for its copy in the Arrow cache, and {folder} "
                f"has {room / 1e9:.3g} GB free: set HF_HOME or HF_DATASETS_CACHE to a folder on a "
                "larger disk, or read the files where they are (--stream 16)."
            )
    builder.download_and_prepare()
    rows = from_cache(builder, path, "train").with_format("arrow")
    for name in columns.copied:
        if name not in columns.read:
            there = plain_table(rows.select_columns([name])[:])
            if not there[name].equals(below(judged)[name].cast(there[name].type)):
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


def builder_of(columns: Columns, judged: dict) -> "datasets.DatasetBuilder":
    """datasets' own builder, given the files themselves: from patterns it could not read a path
    with [ or *. Its cache is named by what the files hold, since datasets looks at names and times
    alone. judged: {file: table}."""
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.parquet.parquet import Parquet

    files, schemas = [str(Path(file).absolute()) for file in judged], []
    if odd := [file for file in files if "::" in file]:  # a chain of file systems to datasets
        raise UserError(f"{odd[0]}: rename what has '::' in its name, which datasets cannot read.")
    for file in files:
        with opened(file) as parquet:
            schemas.append(parquet.schema_arrow)
    tables = zip(files, judged.values(), strict=True)
    seen = [(identity(file, table, columns),) for file, table in tables]
    return Parquet(
        data_files=DataFilesDict({"train": DataFilesList(files, seen)}),
        columns=columns.copied,
        features=features(columns, schemas),
        hash="pairs",
    )


def identity(file: str, judged: "pyarrow.Table", columns: Columns) -> str:
    """Changes with a file's time, size, labels, footer, and 16 blocks spread evenly."""
    about, digest = Path(file).stat(), hashlib.sha256()
    for name in columns.copied:
        if name in judged.column_names:
            digest.update(_content(judged[name]))
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


def _content(column: "pyarrow.ChunkedArray") -> bytes:
    import pyarrow as pa

    if pa.types.is_floating(column.type):
        return numbers(column).tobytes()
    return "\0".join(map(str, column.to_pylist())).encode()


def _bytes(file: str, names: Columns) -> int:
    """Size of the columns that are read, decompressed."""
    with opened(file) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    read = [column for column in columns if column.path_in_schema.split(".")[0] in names.copied]
    return sum(column.total_uncompressed_size for column in read)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where there is none, or it is removed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in folder.iterdir())
    return 0


def sample(
    columns: Columns, decided: dict[str, np.ndarray], count: int, seed: int
) -> Iterator[tuple[str, int, Any]]:
    """(file, row in it, a pyarrow batch of that row) of `count` rows, or a few less, among those
    that are decided (a mask by file), from at most 8 row groups: of Pick-a-Pic 64 pairs by reading
    2 GB of 335."""
    rng = np.random.default_rng(seed)
    groups = []
    for file in rng.permutation(list(decided))[:8]:
        with opened(file) as parquet:
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        ends = np.cumsum(sizes)
        groups += [
            (str(file), group, end - size, end)
            for group, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]
    groups = [groups[i] for i in rng.permutation(len(groups))[:8]]
    for file, group, first, end in groups:
        rows = first + np.flatnonzero(decided[file][first:end])
        wanted = set(rng.permutation(rows)[: -(-count // len(groups))].tolist())
        with opened(file, buffer_size=2**20) as parquet:  # or it reads a column of a group at once
            at = first
            for batch in parquet.iter_batches(8, row_groups=[group], columns=columns.read):
                for row in sorted(wanted & set(range(at, at + len(batch)))):
                    yield file, row, batch.slice(row - at, 1)
                at += len(batch)
                if not wanted or at > max(wanted):
                    break
