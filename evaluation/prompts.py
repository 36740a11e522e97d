"""Prompt sets to evaluate on: the published benchmarks and lists of your own.

    read("hpdv2")                        # 3,200 prompts of four styles, from the hub
    read("parti=/data/PartiPrompts.tsv") # 1,632 prompts of twelve categories, from a local copy
    read("mine.txt")                     # one prompt per line

A prompt is used exactly as it was published: with its quotation marks, with the blanks at its ends,
and as often as it occurs. So Parti-Prompts are split at tabs alone; a reader of quoted CSV, which
many scripts use, removes the quotation marks of one of them."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import toy
from system.files import UserError, expanded
from system.hub import download, file_kind

STYLES = ("anime", "concept-art", "paintings", "photo")
PUBLISHED = {  # name: (data set on the hub, its files)
    "hpdv2": ("zhwang/HPDv2", [f"benchmark/{style}.json" for style in STYLES]),
    "hpdv2-test": ("zhwang/HPDv2", ["test.json"]),
    "parti": ("nateraw/parti-prompts", ["PartiPrompts.tsv"]),
}
TOYS = {"toy": "heldout", "toy-train": "train"}  # name: split
Rows = list[tuple[str, str | None]]  # (prompt, its category or None)


@dataclass(frozen=True)
class PromptSet:
    name: str  # can name a folder: letters, digits, _ . -
    prompts: list[str]
    categories: list[str] | None  # one per prompt, if the set has any


def read(source: str) -> PromptSet:
    """The prompts of a source, in its order and with its repetitions. Raises UserError.

    source: toy (the captions that alignment never sees), toy-train (the others); hpdv2 (the
    benchmark, its styles are the categories), hpdv2-test (the prompts of HPDv2's test split),
    parti; one of these three as NAME=PATH of a local copy; a .txt file with one prompt per line,
    whose blank lines and outer blanks are dropped; or a .tsv file with the columns Prompt and
    Category. Files are UTF-8."""
    if source in TOYS:
        return PromptSet(source, toy.prompts(TOYS[source]), None)
    (name, copied, copy), path = source.partition("="), expanded(source)
    if name in PUBLISHED:
        hub, files = PUBLISHED[name]
        if copied:
            places = _copies(source, copy, files)
        else:
            places = [_download(hub, file) for file in files]
        rows = [row for both in zip(places, files, strict=True) for row in _rows(*both)]
    elif path.suffix in (".txt", ".tsv"):
        name, rows = re.sub(r"[^\w.-]+", "-", path.stem).lstrip("."), _rows(path, path.name)
    else:
        found = f"{file_kind(path)}, not" if os.path.isfile(path) else "not"
        known = (
            f"{', '.join([*TOYS, *PUBLISHED])}, NAME=PATH of a local copy, or a .txt or .tsv file"
        )
        raise UserError(f"'{source}' is {found} a prompt set: use {known}.")
    if not rows:
        raise UserError(f"'{source}' holds no prompt.")
    prompts, categories = map(list, zip(*rows, strict=True))
    return PromptSet(name or "prompts", prompts, None if None in categories else categories)


def is_text(value) -> bool:
    """Whether it is a string of whole characters. JSON may hold halves of them, as "\\ud83d"."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


# --------------------------------------------------------------------------------------------------
# Where a published set is: on the hub, or in a local copy.


def _download(hub: str, file: str) -> Path:
    instead = "give NAME=PATH of a local copy"
    return download(hub, "prompt set", file, repo_type="dataset", instead=instead)[0]


def _copies(source: str, copy: str, files: list[str]) -> list[Path]:
    """The files in a folder, in the hub's layout or flat; a set of one file may be that file."""
    root = expanded(copy)
    if root.is_file() and len(files) == 1:
        return [root]
    for layout in (files, [Path(file).name for file in files]):
        paths = [root / file for file in layout]
        if all(path.is_file() for path in paths):
            return paths
    absent = next(file for file in files if not (root / file).is_file())
    raise UserError(f"'{source}' names no local copy: '{root}' has no {absent}.")


# --------------------------------------------------------------------------------------------------
# Rows of a file. The suffix of its published name tells the format.


def _rows(path: Path, published: str) -> Rows:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text; save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    if published.endswith(".json"):
        style = Path(published).stem
        return _json(path, text, style if style in STYLES else None)
    lines = text.split("\n")  # splitlines would also split at rare marks inside a prompt
    if published.endswith(".tsv"):
        return _table(path, lines)
    return [(line.strip(), None) for line in lines if line.strip()]


def _json(path: Path, text: str, category: str | None) -> Rows:
    """HPDv2: the benchmark lists prompts, the test split lists objects with a "prompt"."""
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON: {error}.") from error
    except RecursionError as error:
        raise UserError(f"'{path}' is nested too deeply to be a list of prompts.") from error
    if not isinstance(entries, list):
        raise UserError(f"'{path}' must be a list of prompts, or of objects with a 'prompt'.")
    rows = []
    for number, entry in enumerate(entries):
        prompt = entry.get("prompt") if isinstance(entry, dict) else entry
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"Entry {number} (from 0) of '{path}' holds no prompt.")
        if not is_text(prompt):
            half = "half of a character (a lone surrogate); write it out"
            raise UserError(f"Entry {number} (from 0) of '{path}' holds {half}.")
        rows.append((prompt, category))
    return rows


def _table(path: Path, lines: list[str]) -> Rows:
    """Parti-Prompts: tab-separated and unquoted; Challenge and Note are not read."""
    columns, rows = lines[0].split("\t"), []
    for name in ("Prompt", "Category"):
        if name not in columns:
            raise UserError(f"'{path}' has no column '{name}', it has {', '.join(columns)}.")
    for number, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        row = dict(zip(columns, cells, strict=False))  # empty cells at its end may be missing
        if not line.strip():
            continue
        if len(cells) > len(columns):
            wrong = f"has {len(cells)} cells for {len(columns)} columns; a prompt cannot hold a tab"
            raise UserError(f"Line {number} of '{path}' {wrong}.")
        for name in ("Prompt", "Category"):
            if not row.get(name, "").strip():
                raise UserError(f"Line {number} of '{path}' has no {name}.")
        rows.append((row["Prompt"], row["Category"]))
    return rows
