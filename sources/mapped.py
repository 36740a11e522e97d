"""A table that was built in memory, mapped from a file, so that loader workers share it."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from system.files import UserError, expanded, replacing

if TYPE_CHECKING:  # imported where they are used, since they take a second
    import datasets
    import pyarrow

SMALL = 2**20  # bytes of a table that is kept in memory


def folder() -> Path:
    """Where tables lie, in the cache of datasets."""
    import datasets

    return expanded(str(datasets.config.HF_DATASETS_CACHE)) / "inpo"


def mapped(table: "pyarrow.Table") -> "datasets.Dataset":
    """The table in Arrow's format, mapped from a file that is named by what it holds. Raises
    UserError for a full disk."""
    import datasets
    import pyarrow as pa

    if table.nbytes < SMALL:
        rows = datasets.Dataset(datasets.table.InMemoryTable(table.combine_chunks()))
        return rows.with_format("arrow")
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=10_000)
    data = stream.getvalue()
    file = folder() / f"{hashlib.sha256(data).hexdigest()[:32]}.arrow"
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as scratch:
                scratch.write_bytes(data)
        except OSError as error:
            raise UserError(
                f"A table of {len(data) / 1e6:.3g} MB cannot be written to {file.parent} "
                f"({error.strerror}): set HF_DATASETS_CACHE to a folder with room."
            ) from error
    return datasets.Dataset.from_file(str(file)).with_format("arrow")
