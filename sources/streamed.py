"""Parquet files that are read where they are, a row group at a time.

table = RowGroups(files, columns, kept=16)
table[7]                      # a pyarrow.Table of one row, as of a datasets.Dataset
table.group_of(rows.first)    # for order.Windowed, which takes few groups at a time
"""

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from sources.columns import Columns
from system.files import UserError

if TYPE_CHECKING:  # imported where it is used, since it takes a second
    import pyarrow


class RowGroups:
    """The rows of some files, one below the other. The last `kept` row groups that were asked for
    stay in memory, in each process for itself. Raises UserError for a file that cannot be read."""

    def __init__(self, files: list[str], columns: Columns, kept: int):
        import pyarrow.parquet as pq

        self.columns, self.kept, self.groups, sizes = columns.read, kept, [], []
        for file in files:
            about = pq.read_metadata(file)
            self.groups += [(file, i) for i in range(about.num_row_groups)]
            sizes += [about.row_group(i).num_rows for i in range(about.num_row_groups)]
        self.ends = np.cumsum(sizes)
        self.tables: OrderedDict[int, pyarrow.Table] = OrderedDict()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"tables": OrderedDict()}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> "pyarrow.Table":
        group = int(self.group_of(row))
        table = self._read(group)
        return table.slice(row - (self.ends[group] - len(table)), 1)

    def group_of(self, rows: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(self.ends, rows, side="right")

    def _read(self, group: int) -> "pyarrow.Table":
        import pyarrow as pa
        import pyarrow.parquet as pq

        if group not in self.tables:
            file, number = self.groups[group]
            while len(self.tables) >= self.kept:
                self.tables.popitem(last=False)
            try:
                with pq.ParquetFile(file) as parquet:
                    self.tables[group] = parquet.read_row_group(
                        number, columns=self.columns, use_threads=False
                    )
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{file} cannot be read ({error}); copy it again.") from error
        self.tables.move_to_end(group)
        return self.tables[group]
