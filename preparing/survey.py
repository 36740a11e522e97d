"""What a set of pairs holds: every pair read and decoded as in training, and counted.

found = survey(rows, range(len(rows)), workers=2)
print(report(rows, found, tokens=None))
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from tqdm import tqdm

import data
from sources import pictures
from sources.rows import PICTURES, Rows
from system.workers import Loader, Spawn, leave_if_orphaned

SIZE = 256  # pixels, to which pictures are resized on trial
SHOWN = 4  # of the commonest sizes
CUT = 77  # tokens that SDXL and SD1.5 read, with the two at the ends


@dataclass(frozen=True)
class Seen:
    """One pair."""

    row: int
    file: str
    file_row: int  # from 0
    reason: str  # why it is broken; "" where it is whole
    sizes: tuple[tuple[int, int], ...] = ()  # width and height of its pictures
    digests: tuple[str, ...] = ()  # of their bytes, the winner's first
    caption: str = ""


class Reader(torch.utils.data.Dataset):
    def __init__(self, rows: Rows, numbers: Sequence[int]):
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Seen:
        row = int(self.numbers[i])
        place = (row, *self.rows.origin(row))
        try:
            pair = self.rows[row]
            data.read_pair(pair, SIZE)
            both = [pair[name] for name in PICTURES]
            sizes = tuple(pictures.opened(io.BytesIO(one)).size for one in both)
            ordered = both if pair["label_0"] == 1 else both[::-1]
            digests = tuple(hashlib.sha256(one).hexdigest()[:32] for one in ordered)
            return Seen(*place, "", sizes, digests, pair["caption"])
        except Exception as error:  # as in training: whatever cannot be read
            return Seen(*place, pictures.what_is_broken(error))


def survey(rows: Rows, numbers: Sequence[int], workers: int = 0) -> list[Seen]:
    """Read these pairs, with a progress bar."""
    loader = Loader(
        Reader(rows, numbers),
        batch_size=16,
        collate_fn=list,
        num_workers=workers,
        worker_init_fn=leave_if_orphaned,
        multiprocessing_context=Spawn() if workers else None,
    )
    found = []
    with tqdm(total=len(numbers), unit="pair", desc="Reading", delay=1) as bar:
        for some in loader:
            found += some
            bar.update(len(some))
    return found


def report(rows: Rows, found: list[Seen], tokens: Callable[[list[str]], list[int]] | None) -> str:
    """The survey in words, a line each. tokens: the number of tokens of each caption."""
    whole = [seen for seen in found if not seen.reason]
    captions = [seen.caption for seen in whole]
    lines = {"found": rows.description}
    some = "all" if len(found) == len(rows) else f"{len(found):,} of {len(rows):,} pairs, at random"
    lines["read"] = some
    lines["broken"] = _broken(found)
    if "label_0" in rows.columns.form:  # else its column says who won
        first = sum(rows.labels[seen.row] == 1 for seen in found)
        lines["labels"] = f"the first picture won in {_share(first, len(found))}"
    if rows.strengths is not None:
        known = [s for s in rows.strengths[[seen.row for seen in found]] if s == s]
        middle = f", median {median(known):.2f}" if known else ""
        against = sum(s < 0.5 for s in known)
        lines["strength"] = f"{len(known):,} known{middle}; {against:,} below 0.5"
    if whole:
        lines["duplicates"] = _duplicates(whole)
        lines["sizes"] = _sizes([size for seen in whole for size in seen.sizes])
        empty = sum(not text.strip() for text in captions)
        lines["captions"] = f"{len(set(captions)):,} different; {empty:,} empty"
        if tokens:
            counts = sorted(tokens(captions))
            cut = sum(count > CUT for count in counts)
            lines["tokens"] = (
                f"median {median(counts):g}, longest {counts[-1]:,}; "
                f"{_share(cut, len(counts))} of the captions are cut at {CUT}"
            )
    return "\n".join(f"  {name:<12}{text}" for name, text in lines.items())


def _share(count: int, of: int) -> str:
    return f"{count:,} ({count / max(of, 1):.1%})"


def _broken(found: list[Seen]) -> str:
    broken = [seen for seen in found if seen.reason]
    said = _share(len(broken), len(found))
    if broken:
        first = broken[0]
        said += f", the first is row {first.file_row} (from 0) of {first.file}: {first.reason}"
    return said


def _duplicates(whole: list[Seen]) -> str:
    """Of the same bytes: pictures in several pairs, pairs that are there twice, and such as are
    judged both ways."""
    pairs = Counter(seen.digests for seen in whole)
    often = Counter(digest for digests in pairs for digest in digests)
    twice = sum(count - 1 for count in pairs.values())
    against = sum(digests < digests[::-1] and digests[::-1] in pairs for digests in pairs)
    return (
        f"{sum(count > 1 for count in often.values()):,} of {len(often):,} pictures are in several "
        f"pairs; {twice:,} pairs are there again; {against:,} are judged both ways"
    )


def _sizes(sizes: list[tuple[int, int]]) -> str:
    common = Counter(sizes).most_common(SHOWN)
    named = ", ".join(f"{w} x {h} {n / len(sizes):.0%}" for (w, h), n in common)
    other = len(set(sizes)) - len(common)
    odd = sum(w != h for w, h in sizes) / len(sizes)
    sides = [min(size) for size in sizes]
    return (
        f"{named}{f' and {other:,} others' if other else ''}; {odd:.0%} are not square; shorter "
        f"side {min(sides):,} to {max(sides):,}, median {median(sides):,g}"
    )
