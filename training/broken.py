"""Pairs that cannot be read: counted, listed, and so many of them that the data are at fault.

broken.jsonl has a line for each row of the data that was left out: row (from 0, ties not counted),
file, file_row (from 0, in that file, ties counted), reason. Another pair was drawn in its place.

The share that is judged is that of the pairs drawn whose own row is broken. An epoch draws each
row once, so it is the share of the rows; a draw in place of another that is broken is not counted.
"""

import contextlib
import json
from pathlib import Path

from system.files import UserError, is_step, read_log, write
from system.processes import gather, is_main
from training.folder import append_metrics

WARN, ENOUGH = 0.01, 1000  # share from which on to warn; pairs before which no share is judged


class BrokenPairs:
    """limit: the share of the pairs drawn that may be broken. batch: pairs per step. pairs: of the
    data."""

    def __init__(self, out: Path, limit: float, batch: int, pairs: int):
        self.file, self.limit, self.batch = out / "broken.jsonl", limit, batch
        self.enough, self.warned = min(ENOUGH, pairs), False
        self.noted, self.count, self.listed, self.pending = [], 0, set(), ""

    def resume(self, metrics: list[dict]) -> int:
        """The count of the steps that count; rank 0, which hands it to all others."""
        rows = read_log(self.file, lambda line: is_step(line.get("row")))
        self.listed = {line["row"] for line in rows}
        if self.file.exists():  # a kill may have cut its last line short
            write(self.file, "".join(json.dumps(line) + "\n" for line in rows))
        return sum(line.get("broken_pairs") or 0 for line in metrics)

    def note(self, broken: list[dict]):
        """Of a batch, as data.collate has it."""
        self.noted += broken

    def drawn(self) -> int:
        """Pairs of this rank since the last step whose own row is broken."""
        return len({row["n"] for row in self.noted})

    def after_step(self, step: int, count: int) -> str:
        """A warning, or "". count: `drawn` of all ranks. Raises UserError on all of them where the
        share is too large (collective)."""
        if count:
            noted = [row for rank in gather(self.noted) for row in rank]
            if is_main():
                self.list_rows(noted)
        self.noted, self.count = [], self.count + count
        seen = step * self.batch
        share = self.count / seen
        said = f"{share:.1%} of the pairs drawn so far are broken ({self.count:,} of {seen:,})"
        if seen < self.enough or share <= min(WARN, self.limit):
            return ""
        if share > self.limit:
            raise UserError(
                f"{said}, more than --max-broken {self.limit:g}; {self.file} has their rows and "
                "the reasons: mend the data, or repeat the command with a larger --max-broken, "
                "which resumes."
            )
        first, self.warned = not self.warned, True
        return f"{said}; others take their place; {self.file} has the reasons." if first else ""

    def list_rows(self, noted: list[dict]):
        """Append the rows that are not listed yet. A full disk keeps them back for a later step."""
        for row in noted:
            if row["row"] not in self.listed:
                self.listed.add(row["row"])
                self.pending += json.dumps({k: v for k, v in row.items() if k != "n"}) + "\n"
        with contextlib.suppress(OSError):
            append_metrics(self.file.parent, self.pending, self.file.name)
            self.pending = ""
