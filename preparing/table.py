"""A file of pairs: parquet with the columns of Pick-a-Pic, and what was found out of them.

Its metadata say which command wrote it, so that the same one knows that it is done."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sources import parquet
from sources.rows import PICTURES
from system.files import UserError, differences, replacing

COLUMNS = {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64()}
COLUMNS |= {"caption": pa.string()}
GROUP_ROWS, GROUP_BYTES = 1000, 2**26  # of a row group at most; it is written as soon as one is met
ABOUT = b"pairs.py"


def check_out(out: Path):
    """UserError for an --out that cannot be a file of pairs."""
    if out.suffix != ".parquet":
        raise UserError(f"--out '{out}' must be named *.parquet.")
    if out.is_dir() or any(path.exists() and not path.is_dir() for path in out.parents):
        raise UserError(f"--out '{out}' is a folder, or lies in a file; name another one.")
    there = next(path for path in out.absolute().parents if path.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"--out '{out}' cannot be written; name a place of yours.")


def is_written(out: Path, about: dict) -> bool:
    """Whether the file is there, by this command. UserError where another one wrote it."""
    if not out.exists():
        return False
    with parquet.opened(out) as file:
        kept = (file.schema_arrow.metadata or {}).get(ABOUT)
    if kept is None:
        raise UserError(f"--out '{out}' is there, and another program wrote it; name another one.")
    if differ := differences(json.loads(kept), about, 5):
        raise UserError(
            f"--out '{out}' was written by another command ({differ}); name another --out, or "
            "delete it."
        )
    return True


def write_pairs(out: Path, rows: Iterable[dict], more: dict[str, pa.DataType], about: dict):
    """Write the rows, or leave what was there. more: columns beside COLUMNS. It holds one row group
    in memory, GROUP_BYTES and a pair at most."""
    kinds = COLUMNS | more
    schema = pa.schema(list(kinds.items()), {ABOUT: json.dumps(about, ensure_ascii=False).encode()})
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f"{out.name}.*.new"):  # by a kill
        left.unlink()
    with replacing(out) as scratch, pq.ParquetWriter(scratch, schema) as writer:
        group, size = [], 0

        def flush():
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema))

        for row in rows:
            group.append(row)
            size += sum(len(row[name]) for name in PICTURES)
            if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
                flush()
                group, size = [], 0
        flush()
