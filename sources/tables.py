"""Pairs in a table of paths: .csv, .tsv, .jsonl, .json. Paths are relative to its folder.

source = read(Path("pairs.csv"), given={})
"""

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sources.columns import Columns, recognise
from sources.mapped import mapped
from sources.rows import Source
from system.files import UserError

if TYPE_CHECKING:  # imported where it is used, since it takes a second
    import pyarrow

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
LONGEST = 2**20  # characters of a cell
NAMED = 100  # rows of JSON that are looked at for their names


def read(path: Path, given: dict[str, str]) -> Source:
    """The pairs of a table. Raises UserError."""
    try:
        rows = _csv(path) if path.suffix.lower() in (".csv", ".tsv") else _json(path)
        first = list(itertools.islice(rows, NAMED))
        names = list(dict.fromkeys(name for row in first for name in row))
        if not first:
            raise UserError(f"{path} has no pair left: it has no rows.")
        columns = recognise(names, str(path), given)
        table = _arrow(itertools.chain(first, rows), columns)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    return Source(
        where=str(path),
        columns=columns,
        judged=table.select(columns.judged),
        files={str(path): len(table)},
        root=path.absolute().parent,
        table=lambda: mapped(table.select(columns.read)),
    )


def _csv(path: Path) -> Iterator[dict[str, str | None]]:
    """Rows with a header; a row of another length has empty cells only. The header tells whether
    cells end with a comma, a semicolon or a tab."""
    csv.field_size_limit(LONGEST)
    with open(path, "rb") as file:
        start = file.read(2)
    encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with open(path, newline="", encoding=encoding) as file:
        header = file.readline(LONGEST)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            if len(set(names)) < len(names):
                raise UserError(f"{path} has two columns of one name: {', '.join(names)}.")
            for cells in reader:
                if cells:  # no empty line
                    whole = cells if len(cells) == len(names) else [""] * len(names)
                    yield {name: cell or None for name, cell in zip(names, whole, strict=True)}
        except csv.Error as error:
            raise UserError(
                f"Line {reader.line_num} of {path} is no CSV ({error}); write the file again."
            ) from error


def _json(path: Path) -> Iterator[dict[str, Any]]:
    """Objects, one a line, or in one list."""
    with open(path, encoding="utf-8-sig") as file:
        while (start := file.read(1)).isspace():
            pass
        file.seek(0)
        if start == "[":
            yield from (_object(one, path, n) for n, one in enumerate(_parsed(file.read(), path)))
            return
        for number, line in enumerate(file):
            if line.strip():
                yield _object(_parsed(line, path, number), path, number)


def _parsed(text: str, path: Path, number: int | None = None) -> Any:
    try:
        return json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        what = "It" if number is None else f"Line {number + 1}"
        raise UserError(f"{what} of {path} is no JSON; copy it again.") from error


def _object(value: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"Row {number} (from 0) of {path} is no JSON object with names.")
    return value


def _arrow(rows: Iterator[dict], columns: Columns) -> "pyarrow.Table":
    """The columns that are needed, of text; lists of two where a cell has both pictures."""
    import pyarrow as pa

    lists = {columns.of[role]: role for role in ("images", "labels") if role in columns.form}
    kinds = {"images": pa.list_(pa.string()), "labels": pa.list_(pa.float64())}
    names = list(dict.fromkeys([*columns.read, *columns.judged]))
    schema = pa.schema([(n, kinds[lists[n]] if n in lists else pa.string()) for n in names])
    judged, batches = set(columns.judged), []
    while some := list(itertools.islice(rows, 10_000)):  # Python's own take ten times the memory
        cells = {
            name: [_cell(row.get(name), lists.get(name), name in judged) for row in some]
            for name in names
        }
        batches.append(pa.RecordBatch.from_pydict(cells, schema))
    return pa.Table.from_batches(batches, schema)


def _cell(value: Any, kind: str | None, judged: bool) -> Any:
    """As the column holds it; None where it cannot."""
    if kind == "labels":
        whole = isinstance(value, list) and all(type(x) in (int, float, bool) for x in value)
        return [float(x) for x in value] if whole else None
    if kind == "images":
        return [_text(x) for x in value] if isinstance(value, list) else None
    if judged:
        return None if value is None else str(value)
    return _text(value)


def _text(value: Any) -> str | None:
    """Text without what UTF-8 cannot hold (JSON may name half a surrogate pair)."""
    if isinstance(value, dict):  # as datasets writes a picture
        value = value.get("path")
    try:
        return value if isinstance(value, str) and value.encode() is not None else None
    except UnicodeEncodeError:
        return None
