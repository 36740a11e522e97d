"""Pairs that datasets reads itself: what its save_to_disk wrote, and data sets of the hub."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sources.columns import Columns, recognise
from sources.parquet import from_cache
from sources.rows import Source
from sources.schema import check_columns, plain_table
from system.files import UserError
from system.hub import reachable

if TYPE_CHECKING:  # imported where it is used, since it takes a second
    import datasets


def is_saved(path: Path) -> bool:
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def on_disk(path: Path, split: str, given: dict[str, str]) -> Source:
    """The rows of a folder that datasets has saved, read where they are. Raises UserError."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # of datasets and pyarrow, which have no common class
        raise UserError(
            f"{path} cannot be read as a folder that datasets has saved; copy it again, or if its "
            "pairs are in parquet files, move its state.json and dataset_dict.json away."
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"{path} has no split '{split}', it has {', '.join(dataset)}.")
        dataset = dataset[split]
    return _source(dataset, str(path), path, given)


def on_hub(name: str, split: str, given: dict[str, str], dry: bool = False) -> Source:
    """The rows of a data set of the hub, downloaded where they are not in the cache. dry: they are
    counted as its page counts them, and not downloaded."""
    import datasets

    datasets.config.HF_HUB_OFFLINE |= not reachable()
    builder = datasets.load_dataset_builder(name)
    if features := builder.info.features:  # before the download
        schema = features.arrow_schema
        check_columns(recognise(schema.names, name, given), schema, name)
    missing = dry and not os.path.exists(builder.cache_dir)
    if not missing:
        builder.download_and_prepare()
    if not builder.info.splits:
        raise UserError(
            f"--dry-run: the page of {name} does not say how many pairs it has; download it "
            f"(hf download {name} --repo-type dataset --local-dir FOLDER), and give --data FOLDER."
        )
    if (first := re.split(r"[\[+]", split)[0]) not in builder.info.splits:  # or train[:1000], a+b
        there = ", ".join(builder.info.splits)
        raise UserError(f"{name} has no split '{split}', it has {there}.")
    if missing:
        columns = recognise(schema.names, name, given) if features else Columns({}, "unknown")
        count = builder.info.splits[first].num_examples
        return Source(name, columns, None, {name: count}, Path(), builder.as_dataset)
    return _source(from_cache(builder, name, split), name, Path(), given)


def _source(dataset: "datasets.Dataset", where: str, root: Path, given: dict[str, str]) -> Source:
    schema = dataset.features.arrow_schema
    columns = recognise(schema.names, where, given)
    check_columns(columns, schema, where)
    arrow = dataset.with_format("arrow")
    return Source(
        where=where,
        columns=columns,
        judged=plain_table(arrow.select_columns(columns.judged)[:]),
        files={where: len(dataset)},
        root=root,
        table=lambda: arrow.select_columns(columns.read),
    )
