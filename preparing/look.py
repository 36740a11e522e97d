"""`pairs.py look`, `check` and `convert`: what a source holds, before anything is trained on it."""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

import data
from evaluation import figures
from preparing.survey import Seen, report, survey
from preparing.table import check_out, is_written, write_pairs
from sources.pictures import decode, what_is_broken
from sources.rows import PICTURES, Rows
from system.files import UserError, replacing, warn_once, write
from weights import loading

SHEET = 8  # pairs of the contact sheet


def read(args: Namespace) -> Rows:
    return data.read_pairs(args.source, args.split, partial=True, columns=args.columns)


def look(args: Namespace):
    """Print what --sample pairs hold, and draw some of them."""
    rows = read(args)
    numbers = np.random.default_rng(args.seed).permutation(len(rows))[: args.sample]
    found = survey(rows, numbers.tolist(), args.workers)
    print(f"{args.source}\n{report(rows, found, tokens(args.model))}")
    whole = [seen for seen in found if not seen.reason]
    if not whole:
        raise UserError(
            f"{args.source}: none of {len(found)} pairs can be read; {found[0].reason}."
        )
    sheet(rows, whole[:SHEET], args.out)
    print(f"Look at {args.out}.")


def check(args: Namespace):
    """Read all pairs, and list those that training would leave out."""
    rows = read(args)
    found = survey(rows, range(len(rows)), args.workers)
    print(f"{args.source}\n{report(rows, found, tokens(args.model))}")
    left = [(seen.file, seen.file_row, seen.reason) for seen in found if seen.reason]
    left += [(*rows.origin_of(row), "it has no valid label") for row in rows.odd.tolist()]
    rejected = [dict(zip(("file", "row", "reason"), one, strict=True)) for one in left]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(args.out, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rejected))
    every = len(found) + len(rows.odd)
    print(f"{len(rejected):,} of {every:,} pairs would be left out; {args.out} lists them.")


def convert(args: Namespace):
    """Write the pairs that can be read as a parquet file of training's own columns."""
    check_out(args.out)
    rows = read(args)
    about = {"command": "convert", "pairs": data.fingerprint(rows)}
    if is_written(args.out, about):
        print(f"{args.out} is there already.")
        return
    left: list[str] = []
    more = {} if rows.strengths is None else {"strength": pa.float64()}
    write_pairs(args.out, whole_pairs(rows, left), more, about)
    print(f"{len(rows) - len(left):,} pairs in {args.out}; {len(left):,} broken ones left out.")
    if left:
        print(f"The first: {left[0]}.")


def whole_pairs(rows: Rows, left: list[str]) -> Iterator[dict]:
    """The pairs, in order; what is wrong with the others is appended to `left`."""
    for row in tqdm(range(len(rows)), unit="pair", desc="Converting", delay=1):
        try:
            pair = rows[row]
            data.read_pair(pair, 64)
        except Exception as error:  # as in training: whatever cannot be read
            file, number = rows.origin(row)
            left.append(f"row {number} (from 0) of {file}: {what_is_broken(error)}")
            continue
        yield pair


def sheet(rows: Rows, some: list[Seen], file: Path):
    """A contact sheet: caption, winner and loser of each pair."""
    grid = []
    for seen in some:
        pair = rows[seen.row]
        both = [decode(pair[name]) for name in PICTURES]
        grid.append(both if pair["label_0"] == 1 else both[::-1])
    captions = [seen.caption or "(no caption)" for seen in some]
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as scratch:
        figures.grid(grid, captions, ["winner", "loser"]).save(scratch, "PNG")


def tokens(name: str) -> Callable[[list[str]], list[int]] | None:
    """Counts the tokens of captions as a model does; None, with a warning, without the model."""
    try:
        tokenizer = loading.load_tokenizer(name)
    except (UserError, OSError, ValueError) as error:
        warn_once(f"tokens are not counted: {error}")
        return None
    return lambda texts: [len(ids) for ids in tokenizer(texts)["input_ids"]]
