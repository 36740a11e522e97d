"""Pairs as training reads them: of any source, whatever its columns are called.

rows = Rows(source)
rows[7]         # {"jpg_0": bytes, "jpg_1": bytes, "label_0": 1.0, "caption": "a fox"}
rows.labels     # of all rows; none is a tie
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sources.columns import Columns
from sources.pictures import encoded
from system.files import UserError

if TYPE_CHECKING:  # imported where they are used, since they take a second
    import pyarrow

PICTURES = ("jpg_0", "jpg_1")  # of a row
ODD = 0.01  # the share of labels that may be none; more mean that they have another meaning


@dataclass
class Source:
    """What a reader has found, before pictures are read or copied."""

    where: str  # for messages
    columns: Columns
    judged: "pyarrow.Table | None"  # columns.judged of all rows; None: not here yet
    files: dict[str, int]  # the number of rows of each file, in order
    root: Path  # which paths of pictures start from
    table: Callable[[], Any]  # columns.read of all rows: a Dataset in Arrow's format, or RowGroups
    note: str = ""  # what else is to be said
    sample: Callable | None = None  # of rows, where the table costs a copy: parquet.sample


class Rows:
    """The pairs of a source that have a winner. Raises UserError where there is none.

    labels: (N,) float64, 1 where jpg_0 won and 0 where jpg_1 did. strengths: (N,) float64, the
    probability that the winner wins, nan where it is unknown; or None. description: what was found,
    in words. odd: the source's rows that have no valid label. labels_only: no row can be read, and
    nothing is copied."""

    def __init__(self, source: Source, labels_only: bool = False):
        self.columns, self.root, self.files = source.columns, source.root, source.files
        self.sample_of_files = source.sample
        judged, columns = source.judged, source.columns
        count, self.odd = sum(source.files.values()), np.array([], dtype=np.int64)
        if judged is None:
            self.first = self.second = np.arange(count)
            labels, strengths = np.ones(count), None
            notes = ["not downloaded yet, so that ties, labels and pictures are not checked"]
        elif columns.grouped:
            self.first, self.second = columns.pairs_of_groups(judged).T
            labels, strengths, notes = np.ones(len(self.first)), None, [f"{count} pictures"]
            if not len(labels):
                raise UserError(f"{source.where} has no pair left: no group has two ranks.")
        else:
            labels, strengths = columns.labels(judged), columns.strengths(judged)
            labels = labels[:count] if len(labels) else np.ones(count)
            kept = columns.kept(judged) if judged.num_columns else np.ones(count, bool)
            odd, ties = kept & np.isnan(labels), kept & (labels == 0.5)
            self._refuse_odd(source, odd, int(kept.sum()))
            notes = [f"{ties.sum()} of {count} rows are ties"]
            notes += [f"{(~kept).sum()} have no judgement"] if not kept.all() else []
            if odd.any():
                self.odd = np.flatnonzero(odd)
                file, row = self.origin_of(int(self.odd[0]))
                notes.append(f"{odd.sum()} have no valid label (the first is row {row} of {file})")
            self.first = self.second = np.flatnonzero(kept & (labels == labels) & (labels != 0.5))
            if not len(self.first):
                raise UserError(
                    f"{source.where} has no pair left: {'; '.join(notes)}; give data with winners."
                )
            labels = labels[self.first]
            strengths = None if strengths is None else strengths[self.first]
        self.labels, self.strengths = labels, strengths
        notes += [source.note] if source.note else []
        self.description = f"{len(labels)} pairs; {'; '.join(notes)}; {columns.in_words()}"
        self.table = None if labels_only else source.table()

    def _refuse_odd(self, source: Source, odd: np.ndarray, judged: int):
        """Raises UserError where labels have another meaning than that which was looked for."""
        if odd.sum() <= ODD * judged:
            return
        row, columns = int(np.flatnonzero(odd)[0]), source.columns
        cells = [source.judged[name][row].as_py() for name in columns.judged]
        said = ", ".join(f"{n} {c}" for n, c in zip(columns.judged, cells, strict=True))
        file, number = self.origin_of(row)
        raise UserError(
            f"Row {number} (from 0) of {file} has {said}: the label must be 1 where the first "
            "picture won, 0 where the second won, 0.5 for a tie; say what else it means by "
            "--columns first=WORD second=WORD tie=WORD."
        )

    def __len__(self) -> int:
        return len(self.labels)

    def probability(self, rows) -> np.ndarray | None:
        """That the winner of each of these rows is preferred, (P,) float32; None if not known."""
        return None if self.strengths is None else self.strengths[np.asarray(rows)].astype("f4")

    def __getitem__(self, row: int) -> dict[str, Any]:
        """jpg_0, jpg_1: encoded bytes; label_0; caption (None where its cell is empty); strength,
        where there is one. Raises ValueError where a picture is not there."""
        cells = [self.table[int(self.first[row])]]
        if self.columns.grouped:
            cells.append(self.table[int(self.second[row])])
        return self._pair(row, cells)

    def _pair(self, row: int, cells: list) -> dict[str, Any]:
        """cells: Arrow tables of one row, one or two of them."""
        columns, cells = self.columns, [table.to_pylist()[0] for table in cells]
        if columns.grouped:
            pictures = [one[columns.of["image"]] for one in cells]
        elif "images" in columns.form:
            pictures = cells[0][columns.of["images"]] or []
            if len(pictures) != 2:
                raise ValueError(f"it has {len(pictures)} pictures, not two")
        else:
            pictures = [cells[0][name] for name in columns.pictures]
        found = {}
        for i, picture in enumerate(pictures):
            try:
                found[PICTURES[i]] = encoded(picture, self.root)
            except (ValueError, OSError) as error:
                raise ValueError(f"{PICTURES[i]}: {error}") from error
        found |= {"label_0": float(self.labels[row]), "caption": cells[0][columns.of["caption"]]}
        if self.strengths is not None:
            found["strength"] = float(self.strengths[row])
        return found

    def some(self, count: int, seed: int) -> Iterator[tuple[tuple[str, int], Callable]]:
        """((file, row in it), function that reads the pair) of `count` pairs, or of all; where
        nothing was copied a few less, and none of groups."""
        if self.table is not None:
            for row in np.random.default_rng(seed).permutation(len(self))[:count].tolist():
                yield self.origin(row), functools.partial(self.__getitem__, row)
            return
        if self.columns.grouped or self.sample_of_files is None:
            return
        starts = dict(zip(self.files, np.cumsum([0, *self.files.values()]).tolist(), strict=False))
        decided = np.zeros(sum(self.files.values()), bool)
        decided[self.first] = True
        masks = {file: decided[starts[file] :][:rows] for file, rows in self.files.items()}
        for file, number, cells in self.sample_of_files(masks, count, seed):
            row = int(np.searchsorted(self.first, starts[file] + number))
            yield (file, number), functools.partial(self._pair, row, [cells])

    def select(self, rows) -> "Rows":
        """Some of the pairs, in this order."""
        some = object.__new__(Rows)
        some.__dict__ |= self.__dict__
        rows = np.asarray(rows, dtype=np.int64)
        for name in ("first", "second", "labels", "strengths"):
            values = getattr(self, name)
            setattr(some, name, None if values is None else values[rows])
        return some

    def origin(self, row: int) -> tuple[str, int]:
        """(file, row in it) of a pair, counted from 0; of two rows the first's."""
        return self.origin_of(int(self.first[row]))

    def origin_of(self, row: int) -> tuple[str, int]:
        for file, count in self.files.items():
            if row < count:
                return file, row
            row -= count
        raise IndexError(row)
