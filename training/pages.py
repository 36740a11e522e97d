"""samples.html of a run: its sample pictures over the optimizer steps, for a browser.

The page is that of a judgement (evaluation/page.py), whose columns are here the start and the steps
that drew; it shows curves.png, too, once that is there. It is written again after each drawing and
at the end, from the names in samples/ and from scores.jsonl: a few kilobytes, and no picture is
opened.
"""

import re
from pathlib import Path

from evaluation import page, tables
from system.files import read_log, write
from training.preview import ROWS, is_score

NAME = "samples.html"


def columns(samples: Path, rows: int) -> dict[int, list[str]]:
    """{step: a file name per row, "" where there is none}, in order; 0: the start."""
    there = {path.name for path in samples.glob("*.png")}
    found = {re.fullmatch(r"model_(\d{6,})_\d\d\.png", name) for name in there}
    steps = sorted({int(one[1]) for one in found if one})
    names = {0: [f"start_{row:02d}.png" for row in range(rows)]}
    names |= {step: [f"model_{step:06d}_{row:02d}.png" for row in range(rows)] for step in steps}
    files = {step: [name if name in there else "" for name in row] for step, row in names.items()}
    return {step: row for step, row in files.items() if any(row)}


def content(out: Path, prompts: list[str], facts: dict) -> dict:
    """What the page shows. prompts: of the pictures; facts: of card.py."""
    prompts = prompts[:ROWS]
    found = columns(out / "samples", len(prompts))
    names = ["start" if step == 0 else f"step {step:,}" for step in found]
    recipe = [[key, str(value)] for key, value in facts["recipe"].items() if value is not None]
    one = {
        "name": "samples",
        "title": "Samples",
        "words": f"{facts['method']}, {facts['pairs']:,} pairs, start {facts['base_model']}",
        "columns": names,
        "prompts": prompts,
        "images": [[row, row] for row in range(len(prompts))],  # the seed is the row
        "categories": None,
        "files": [
            [page.address(out / "samples" / file, out) if file else "" for file in row]
            for row in found.values()
        ],
        "scorers": [],
        "scores": [],
        "people": None,
        "rates": [],
        "tables": judged(out),
        "note": None,
    }
    about = [["Settings", ["flag", "value"], recipe]]
    curves = "curves.png" if (out / "curves.png").is_file() else None
    return {"kind": "run", "title": facts["title"], "about": about, "curves": curves, "sets": [one]}


def judged(out: Path) -> list[list]:
    """The table of scores.jsonl, if there is one."""
    rows = [
        [
            f"{line['step']:,}",
            str(line["scorer"]),
            f"{line['mean']:.4g}",
            *(tables.cell(line[key], None, None, form, unit) if line.get(key) is not None else ""
              for key, form, unit in (("start", ".4g", 1), ("win_rate", ".1f", 100))),
        ]
        for line in read_log(out / "scores.jsonl", is_score)
    ]  # fmt: skip
    head = ["step", "judge", "mean", "the start's", "wins over the start, %"]
    return [["Scores of the judge", head, rows]] if rows else []


def write_samples(out: Path, prompts: list[str], facts: dict):
    """Write samples.html, where there are pictures. What fails here is raised: the caller warns."""
    if any((out / "samples").glob("*.png")):
        write(out / NAME, page.render(content(out, prompts, facts)))
