"""The page of a judgement: index.html under --out, one file that opens without a server or network.

It holds its data, style and program (web/*); pictures lie beside it. What others wrote, such as
prompts, is data: JSON in which no "<" stands, that the program puts into the page as text.
`judgement` and training.pages say what is shown, `render` makes a page of it:

    {"kind": "judgement" or "run", "title", "about": [[heading, head of a table, its rows], ...],
     "curves": address of a picture or null,
     "sets": [{"name", "title", "words", "columns": [names], "prompts",
               "images": [[prompt's number, seed], ...], "categories": [a name per image] or null,
               "files": [[an address per image], ...] of the columns,
               "scorers": [[name, title], ...], "scores": [[numbers of each column], ...] of them,
               "people": {"first second": {image: [wins of first, of second, ties]}} or null,
                   where first and second are numbers of columns,
               "rates": [[scorer, its title, category, model, against, text, rate, low, high], ...],
               "tables": [[heading, head, rows], ...], "note": in words or null}]}
"""

import html
import json
import os
from pathlib import Path
from urllib.parse import quote

from evaluation import blind, tables
from evaluation.people import words
from evaluation.published import TITLES
from evaluation.votes import Vote
from system.files import write

WEB = Path(__file__).parent / "web"
PROGRAMS = {"page": ("shared", "rates", "rows", "large", "page"), "blind": ("shared", "blind")}

# --------------------------------------------------------------------------------------------------
# One file.


def embedded(data: dict) -> str:
    """JSON that is safe inside a <script> of HTML: "<" opens no tag, nor a comment, and all that is
    not ASCII is an escape."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


def render(data: dict, name: str = "page") -> str:
    """The page of `name`, "page" or "blind", with its data."""
    parts = {"TITLE": html.escape(data.get("title", "Blind judging"))}
    parts["STYLE"] = (WEB / "shared.css").read_text("utf-8") + read(f"{name}.css")
    parts["PROGRAM"] = "".join(read(f"{part}.js") for part in PROGRAMS[name])
    parts["DATA"] = embedded(data)
    pieces = read(f"{name}.html").split("%%")  # text, a name, text, ...: what is put in is not read
    return "".join(parts[piece] if k % 2 else piece for k, piece in enumerate(pieces))


def read(file: str) -> str:
    return (WEB / file).read_text("utf-8")


def address(path: Path, page: Path) -> str:
    """Of a file, for a page in the folder `page`: relative, so that both can move together."""
    return quote(os.path.relpath(path, page).replace(os.sep, "/"))


# --------------------------------------------------------------------------------------------------
# What the page of a judgement shows.


def judgement(
    out: Path, results: dict, kept: dict, folders: dict[str, dict[str, Path]], votes: list[Vote]
) -> dict:
    """Of results.json and scores.json; folders: {set: {model: its pictures}}."""
    names = list(results["models"])
    return {
        "kind": "judgement",
        "title": " · ".join(names),
        "about": about(results),
        "curves": None,
        "sets": [one_set(out, key, results, kept[key], folders[key], votes) for key in kept],
    }


def about(results: dict) -> list[list]:
    """The tables in the corner: models, and what their training took."""
    keys = ["model", "base", "architecture", "size", "identity"]
    rows = [
        [name, *("" if of[key] is None else str(of[key]) for key in keys)]
        for name, of in results["models"].items()
    ]
    found = [["Models", ["name", *keys], rows]]
    if results["costs"]:
        found.append(["Training cost", *tables.costs(results["costs"])])
    return found


def one_set(
    out: Path, key: str, results: dict, kept: dict, folders: dict[str, Path], votes: list[Vote]
) -> dict:
    names, images = list(results["models"]), kept["images"]
    texts = {text: k for k, text in enumerate(dict.fromkeys(e["prompt"] for e in images))}
    categories = [entry.get("category") for entry in images]
    scorers = list(kept["scores"][names[0]])
    rates = [r for r in results["win_rates"] if r["set"] == key]
    means = [r for r in results["scores"] if r["set"] == key]
    people = results.get("people", {}).get(key)
    return {
        "name": key,
        "title": tables.SET_TITLES.get(key, key),
        "words": tables.describe(results["sets"][key]),
        "columns": names,
        "prompts": list(texts),
        "images": [[texts[entry["prompt"]], entry.get("seed")] for entry in images],
        "categories": categories if all(categories) else None,
        "files": [
            [address(folders[name] / file, out) for file in kept["files"][name]] for name in names
        ],
        "scorers": [[scorer, TITLES.get(scorer, scorer)] for scorer in scorers],
        "scores": [[kept["scores"][name][scorer] for name in names] for scorer in scorers],
        "people": tally([vote for vote in votes if vote.set == key], names),
        "rates": [
            [r["scorer"], TITLES.get(r["scorer"], r["scorer"]), r["category"], r["model"]]
            + [r["against"], tables.rate_cell(r), r["rate"], r["low"], r["high"]]
            for r in rates
        ],
        "tables": [["Scores", *tables.scores(means, names)]] * bool(means)
        + [["People", *tables.agreement(people["agreement"])] for people in [people] if people],
        "note": words(people) if people else None,
    }


def tally(votes: list[Vote], names: list[str]) -> dict | None:
    """{"0 1": {image: [votes for model 0, for model 1, ties]}}; None without votes."""
    found = {}
    for vote in votes:
        pair = f"{names.index(vote.first)} {names.index(vote.second)}"
        counts = found.setdefault(pair, {}).setdefault(vote.image, [0, 0, 0])
        counts[{1: 0, -1: 1, 0: 2}[vote.value]] += 1
    return found or None


def write_all(
    out: Path, results: dict, kept: dict, folders: dict[str, dict[str, Path]], votes: list[Vote]
):
    """Write index.html and blind/. Raises OSError."""
    write(out / "index.html", render(judgement(out, results, kept, folders, votes)))
    identities = {name: of["identity"] for name, of in results["models"].items()}
    fill = lambda content: render(content, "blind")  # noqa: E731
    blind.write_folder(out / "blind", kept, identities, folders, fill)
