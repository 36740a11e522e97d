"""The types that the columns of pairs may have, and what they are read as."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sources.columns import Columns
from system.files import UserError

if TYPE_CHECKING:  # imported where they are used, since they take a second
    import datasets
    import pyarrow


def check_columns(columns: Columns, schema: "pyarrow.Schema", where: str | Path):
    """Raises UserError for a column that is missing, or holds what cannot be read as its kind."""
    for role, name in columns.of.items():
        if name not in [*columns.read, *columns.judged]:
            continue  # a word, or best
        if name not in schema.names:
            raise UserError(f"{where} has no column '{name}', it has {', '.join(schema.names)}.")
        wanted = WANTED.get(role, "a label")
        if not holds(wanted, kind := schema.field(name).type):
            raise UserError(f"Column '{name}' of {where} holds {kind}, it must hold {wanted}.")


PICTURE, TEXT, LISTED = "pictures (bytes, or paths)", "text", "lists of two"
WANTED = dict.fromkeys(("image_0", "image_1", "winner", "loser", "image"), PICTURE)
WANTED |= {"caption": TEXT, "images": LISTED, "labels": LISTED}


def holds(wanted: str, kind: "pyarrow.DataType") -> bool:
    """Whether Arrow's `kind` is, or can be cast to, what is wanted."""
    from pyarrow import types as is_

    kind = kind.value_type if is_.is_dictionary(kind) else kind
    text = any(of(kind) for of in (is_.is_string, is_.is_large_string, is_.is_string_view))
    if wanted == TEXT:
        return text
    if wanted == LISTED:
        return is_.is_list(kind) or is_.is_large_list(kind)
    if wanted == PICTURE:
        every = is_.is_binary, is_.is_large_binary, is_.is_binary_view, is_.is_fixed_size_binary
        return text or is_picture(kind) or any(of(kind) for of in every)
    every = is_.is_floating, is_.is_integer, is_.is_boolean, is_.is_decimal
    return text or any(of(kind) for of in every)


def is_picture(kind: "pyarrow.DataType") -> bool:
    """Whether Arrow's `kind` is that of datasets' Image: a struct with bytes and path."""
    from pyarrow import types

    return types.is_struct(kind) and (
        kind.get_field_index("bytes") >= 0 or kind.get_field_index("path") >= 0
    )


def features(columns: Columns, schemas: list["pyarrow.Schema"]) -> "datasets.Features":
    """What the copied columns of all files are cast to: pictures to datasets' Image where one of
    the files has it (bytes can be cast to it), else to bytes or paths."""
    from datasets import Features, Image, Value
    from pyarrow import types as is_

    found = dict(Features.from_arrow_schema(plain_schema(schemas[0], columns.copied)))
    kinds = [schema.field(name).type for schema in schemas for name in columns.pictures]
    picture = (
        None if any(is_.is_list(kind) or holds(TEXT, kind) for kind in kinds) else Value("binary")
    )
    if any(map(is_picture, kinds)):
        picture = Image(decode=False)
    if picture:
        found |= dict.fromkeys(columns.pictures, picture)
    return Features({sys.intern(name): feature for name, feature in found.items()})


def plain_schema(schema: "pyarrow.Schema", names: list[str]) -> "pyarrow.Schema":
    """Numbers of all kinds as float64, text as string, others as they are."""
    import pyarrow as pa

    fields = []
    for name in names:
        kind = schema.field(name).type
        if holds(TEXT, kind):
            kind = pa.string()
        elif holds("a label", kind):
            kind = pa.float64()
        fields.append((name, kind))
    return pa.schema(fields)


def plain_table(table: "pyarrow.Table") -> "pyarrow.Table":
    """The table in the types of plain_schema."""
    return table.cast(plain_schema(table.schema, table.column_names), safe=False)
