"""The columns that every source of pairs ends in, those of Pick-a-Pic v2, and their checks.

jpg_0, jpg_1    encoded pictures: bytes, or datasets' Image, a struct with bytes
label_0         1 where picture 0 won, 0 where picture 1 won, 0.5 for a tie
caption         text
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from system.files import UserError

if TYPE_CHECKING:  # imported where they are used, since they take a second
    import datasets
    import pyarrow

PICTURES = ("jpg_0", "jpg_1")
COLUMNS = {"jpg_0": "binary", "jpg_1": "binary", "label_0": "numbers", "caption": "string"}


def check_columns(schema: "pyarrow.Schema", where: str | Path):
    """Raises UserError for a column that is missing, or holds what cannot be read as its kind."""
    for name, wanted in COLUMNS.items():
        if name not in schema.names:
            raise UserError(f"{where} has no column '{name}', it has {', '.join(schema.names)}.")
        if not holds(wanted, kind := schema.field(name).type):
            raise UserError(f"Column '{name}' of {where} holds {kind}, it must hold {wanted}.")


def holds(wanted: str, kind: "pyarrow.DataType") -> bool:
    """Whether Arrow's `kind` is, or can be cast to, what is wanted."""
    from pyarrow import types as is_

    kind = kind.value_type if is_.is_dictionary(kind) else kind
    if wanted == "numbers":
        return any(
            of(kind) for of in (is_.is_floating, is_.is_integer, is_.is_boolean, is_.is_decimal)
        )
    if wanted == "string":
        return any(of(kind) for of in (is_.is_string, is_.is_large_string, is_.is_string_view))
    if is_picture(kind):
        kind = kind.field("bytes").type
    every = is_.is_binary, is_.is_large_binary, is_.is_binary_view, is_.is_fixed_size_binary
    return any(of(kind) for of in every)


def is_picture(kind: "pyarrow.DataType") -> bool:
    """Whether Arrow's `kind` is that of datasets' Image: a struct with bytes (and path)."""
    from pyarrow import types

    return types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def features(pictures: bool) -> "datasets.Features":
    """What all columns are cast to. pictures: to datasets' Image, which bytes can be cast to."""
    from datasets import Features, Image, Value

    picture = Image(decode=False) if pictures else Value("binary")
    others = {"label_0": Value("float64"), "caption": Value("string")}
    return Features({"jpg_0": picture, "jpg_1": picture, **others})


def check_labels(column: "pyarrow.ChunkedArray", where: str | Path) -> np.ndarray:
    """The labels as float64. Raises UserError for the first that is none of 1, 0 and 0.5."""
    labels = column.cast("float64", safe=False).to_numpy()
    for row in np.flatnonzero(~np.isin(labels, (0.0, 0.5, 1.0)))[:1]:
        raise UserError(
            f"Row {row} (from 0) of {where} has label_0 {labels[row]}: it must be 1 where image 0 "
            "won, 0 where image 1 won, 0.5 for a tie."
        )
    return labels
