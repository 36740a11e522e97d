"""Votes of people: what the blind page saves, read and checked.

    votes.json   {"judge": a name or "",
                  "models": {NAME: identity of its weights, or null},
                  "votes": [{set, image, prompt, seed, models: [left, right],
                             choice: "left", "right" or "tie", time}, ...]}

image: number of the picture in its set, from 0; seed: null where nobody knows it. A vote is of the
picture with its prompt and seed; where the seed is null, of the picture with its number, which must
show its prompt. So votes hold for --limit and more --seeds, too. time: when the vote was cast.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from system.files import UserError, expanded, read_json

FIX = "save it again from the blind page"
CHOICES = {"left": 1, "right": -1, "tie": 0}


class Vote(NamedTuple):
    """of a judge, on image `image` of a set as `first` and `second` drew it: +1, -1, 0 for a tie.

    first is named before second among the models, wherever they stood. left: that was first."""

    judge: str
    set: str
    image: int
    first: str
    second: str
    value: int
    left: bool


def read(paths: list[Path], images: dict[str, list[dict]], identities: dict) -> list[Vote]:
    """The votes of these files, a judge each. Raises UserError.

    images: {set: [{prompt, seed}]} that are judged; identities: {model: identity or None}."""
    votes, owners, same = [], {}, {}
    where = {key: places(entries) for key, entries in images.items()}
    for path in map(expanded, map(str, paths)):
        content = opened(path, identities)
        judge = content["judge"].strip() or path.name
        if other := owners.get(judge):
            raise UserError(
                f"{other} and {path} are both of judge '{judge}'; leave out the older one, or "
                'change "judge" in one of them.'
            )
        text = str(content["votes"])
        if other := same.get(text):
            raise UserError(f"{other} and {path} hold the same votes; leave one of them out.")
        owners[judge] = same[text] = path
        votes += read_rows(path, judge, content["votes"], images, where, list(identities))
    return votes


def opened(path: Path, identities: dict) -> dict:
    """A file of votes, without its rows' checks. Raises UserError."""
    content = read_json(path, FIX)
    rows, judge, models = (content.get(key) for key in ("votes", "judge", "models"))
    if not isinstance(rows, list) or not isinstance(judge, str) or not isinstance(models, dict):
        raise UserError(f"{path} is no file of votes, with judge, models and votes; {FIX}.")
    if not rows:
        raise UserError(f"{path} holds no votes; leave it out.")
    for name, known in models.items():
        now = identities.get(name)
        if None not in (known, now) and known != now:
            raise UserError(
                f"{path}: its votes are on other weights of '{name}' ({known} there, {now} now); "
                "give --models those that people saw."
            )
    return content


def places(entries: list[dict]) -> dict[tuple, int]:
    """{(prompt, seed), or (prompt, None, image) where the seed is not known: image}."""
    return {key(entry["prompt"], entry.get("seed"), k): k for k, entry in enumerate(entries)}


def key(prompt: str, seed: int | None, image: int) -> tuple:
    return (prompt, seed) if seed is not None else (prompt, None, image)


def read_rows(path: Path, judge: str, rows: list, images: dict, where: dict, names: list[str]):
    """The votes of a file's rows. Raises UserError with the row, from 1."""
    found, seen = [], {}
    for number, row in enumerate(rows, 1):
        try:
            vote = read_row(judge, row, images, where, names)
        except UserError as error:
            raise UserError(f"{path}, vote {number}: {error}") from error
        pair = vote[1:5]
        if pair in seen:
            raise UserError(
                f"{path}, vote {number}: judges the same pair as vote {seen[pair]}; delete one."
            )
        seen[pair] = number
        found.append(vote)
    return found


def read_row(judge: str, row, images: dict, where: dict, names: list[str]) -> Vote:
    """Raises UserError, without file and row."""
    if not isinstance(row, dict):
        raise UserError(f"is no object; {FIX}.")
    pair, choice, prompt = (row.get(name) for name in ("models", "choice", "prompt"))
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(n, str) for n in pair):
        raise UserError(f"models is no list of two names; {FIX}.")
    for name in pair:
        if name not in names:
            raise UserError(
                f"'{name}' is none of --models, which are {', '.join(names)}; name it there, or "
                "delete the vote."
            )
    if pair[0] == pair[1]:
        raise UserError(f"compares '{pair[0]}' with itself; delete it.")
    if not isinstance(choice, str) or choice not in CHOICES:
        raise UserError(f"choice is {choice!r}, not left, right or tie; {FIX}.")
    set_, seed, image = (row.get(name) for name in ("set", "seed", "image"))
    if not isinstance(set_, str) or set_ not in where:
        raise UserError(
            f"its prompt set {set_!r} is none of those judged, {', '.join(where)}; give it to "
            "--prompts, or delete the vote."
        )
    numbers = type(image) is int and (seed is None or type(seed) is int)
    k = where[set_].get(key(prompt, seed, image)) if numbers and isinstance(prompt, str) else None
    if k is None:
        of = f"seed {seed!r}" if seed is not None else f"image {image!r}"
        raise UserError(
            f"{set_} has no picture of the prompt {str(prompt)[:80]!r} and {of}; give the "
            "--prompts and --seeds that were judged, or delete the vote."
        )
    left = names.index(pair[0]) < names.index(pair[1])
    first, second = pair if left else pair[::-1]
    value = CHOICES[choice] * (1 if left else -1)
    return Vote(judge, set_, k, first, second, value, left)


def needs_library(paths: Iterable[Path]):
    """UserError where two judges are to be compared and the library for it is not installed."""
    try:
        if len(list(paths)) > 1:
            import krippendorff  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--votes of two judges needs a library for their agreement: pip install krippendorff."
        ) from error
