"""Which columns of a table hold a pair: known by their names, or named by --columns.

    columns = recognise(["prompt", "chosen", "rejected", "id"], "pairs.csv")
    given = asked(["image_0=a", "image_1=b", "label_0=choice", "first=left", "second=right"])
    columns = recognise(["a", "b", "text", "choice"], "pairs.csv", given)
    labels = columns.labels(table)      # 1, 0, 0.5, or nan where a cell says something else

A pair is a row with two pictures (image_0 and image_1 with label_0, or with shares of votes; or
winner and loser), a row with a list of two pictures and a list of their labels, or two of the rows
of a group of ranked pictures.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from system.files import UserError

if TYPE_CHECKING:  # imported where it is used, since it takes a second
    import pyarrow

ROLES = {  # what the name before = in --columns means
    "caption": "the prompt",
    "image_0": "the first picture",
    "image_1": "the second picture",
    "label_0": "1 where image_0 won, 0 where image_1 won, 0.5 for a tie; or a word",
    "preference_0": "votes, or their share, for image_0",
    "preference_1": "votes, or their share, for image_1",
    "winner": "the preferred picture",
    "loser": "the other one",
    "images": "a list of two pictures",
    "labels": "their labels, [1, 0] or [0, 1]",
    "image": "the picture, where each row has one",
    "group": "equal for the pictures of one prompt",
    "rank": "1 for the best of its group",
    "strength": "probability, 0 to 1, that the winner wins",
    "labelled": "false where a row has no judgement, and is left out",
}
WORDS = {  # and of those that name no column
    "first": "what label_0 says where image_0 won",
    "second": "what label_0 says where image_1 won",
    "tie": "what label_0 says of a tie",
    "pairs": "of a group: 'best' against worst, or 'all' whose ranks differ",
}
FORMS = (  # the roles that make a pair, with the caption
    ("image_0", "image_1", "label_0"),
    ("image_0", "image_1", "preference_0", "preference_1"),
    ("winner", "loser"),
    ("images", "labels"),
    ("image", "group", "rank"),
)
SCHEMAS = {  # columns of published sets: the first that fits is taken
    "Pick-a-Pic": "image_0=jpg_0 image_1=jpg_1 label_0=label_0 caption=caption",
    "chosen and rejected": "winner=chosen loser=rejected caption=prompt",
    "winner and loser": "winner=winner loser=loser caption=caption",
    "Rapidata": "image_0=image1 image_1=image2 caption=prompt"
    " preference_0=weighted_results_image1_preference"
    " preference_1=weighted_results_image2_preference",
    "Rapidata's votes": "image_0=image1 image_1=image2 caption=prompt"
    " preference_0=votes_image1 preference_1=votes_image2",
    "HPDv3": "winner=path1 loser=path2 caption=prompt",
    "HPDv2": "images=file_path labels=human_preference caption=prompt",
    "ImageRewardDB": "image=image group=prompt_id rank=rank caption=prompt",
    "ImageRewardDB's paths": "image=image_path group=prompt_id rank=rank caption=prompt",
}
CAPTIONS = ("caption", "prompt", "text")  # where a schema's own is not there
ALSO = {"labelled": "has_label", "strength": "strength"}  # taken where they are there
JUDGED = re.compile(r"label|prefer|winner|choice$|better|vote|score", re.I)  # names of judgements
KNOWN = {"choice_dist", "confidence"}  # HPDv3's own
PICTURE_ROLES = ("image_0", "image_1", "winner", "loser", "images", "image")


def asked(words: Iterable[str]) -> dict[str, str]:
    """--columns as {role: column}. Raises UserError for a word that is not ROLE=NAME."""
    found = {}
    for word in words:
        role, equals, name = word.partition("=")
        if not equals or not name or role not in {**ROLES, **WORDS}:
            raise UserError(
                f"--columns {word}: give ROLE=NAME, where ROLE is one of "
                f"{', '.join([*ROLES, *WORDS])}."
            )
        if role in found:
            raise UserError(f"--columns names {role} twice, {found[role]} and {name}.")
        found[role] = name
    if found.get("pairs", "best") not in ("best", "all"):
        raise UserError(f"--columns pairs={found['pairs']}: must be best or all.")
    return found


@dataclass(frozen=True)
class Columns:
    """{role: column} of a table, and the schema's name."""

    of: dict[str, str]
    schema: str
    where: str = ""  # the source, for messages

    @property
    def form(self) -> tuple[str, ...]:
        return next(form for form in FORMS if all(role in self.of for role in form))

    @property
    def grouped(self) -> bool:
        return "group" in self.form

    @property
    def pictures(self) -> tuple[str, ...]:
        """The columns of pictures: two, or one."""
        return tuple(self.of[role] for role in self.form if role in PICTURE_ROLES)

    @property
    def judged(self) -> list[str]:
        """The columns that labels, strengths and groups are made of."""
        roles = [role for role in self.form if role not in PICTURE_ROLES] + list(ALSO)
        return list(dict.fromkeys(self.of[role] for role in roles if role in self.of))

    @property
    def read(self) -> list[str]:
        """The columns that are read later, a row at a time."""
        return list(dict.fromkeys([*self.pictures, self.of["caption"]]))

    @property
    def copied(self) -> list[str]:
        """The columns of a copy: those that are read, and what judges them."""
        *pictures, caption = self.read
        judges = [self.of[role] for role in self.form if role not in PICTURE_ROLES]
        return list(dict.fromkeys([*pictures, *judges, caption]))

    def in_words(self) -> str:
        """What was found: "Pick-a-Pic (image_0=jpg_0 ...)"."""
        return f"{self.schema} ({' '.join(f'{role}={name}' for role, name in self.of.items())})"

    # ---------------------------------------------------------------------------------------------
    # What the cells say.

    def labels(self, table: "pyarrow.Table") -> np.ndarray:
        """float64: 1, 0 or 0.5 a row, nan where its cell says something else. Not of groups."""
        form = self.form
        if "winner" in form:
            return np.ones(len(table))
        if "preference_0" in form:
            first, second = (numbers(table[self.of[f"preference_{i}"]]) for i in (0, 1))
            known = (first >= 0) & (second >= 0) & (first + second > 0)
            return np.where(known, (1 + np.sign(first - second)) / 2, np.nan)
        if "labels" in form:
            said = [str(one) for one in table[self.of["labels"]].to_pylist()]
            known = {"[1, 0]": 1.0, "[0, 1]": 0.0, "[1.0, 0.0]": 1.0, "[0.0, 1.0]": 0.0}
            return np.array([known.get(one, np.nan) for one in said])
        words = {self.of["image_0"]: 1.0, self.of["image_1"]: 0.0}
        if "first" in self.of or "second" in self.of:
            meant = {"first": 1.0, "second": 0.0, "tie": 0.5}
            words = {
                plain(self.of[word]): label for word, label in meant.items() if word in self.of
            }
            return numbers(table[self.of["label_0"]], words, only=True)
        labels = numbers(table[self.of["label_0"]], words)
        return np.where(np.isin(labels, (0.0, 0.5, 1.0)), labels, np.nan)

    def strengths(self, table: "pyarrow.Table") -> np.ndarray | None:
        """float64: the probability that the winner wins, nan where it is unknown; or None."""
        if "preference_0" in self.form:
            first, second = (numbers(table[self.of[f"preference_{i}"]]) for i in (0, 1))
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.maximum(first, second) / (first + second)
        if "strength" not in self.of:
            return None
        values = numbers(table[self.of["strength"]])
        return np.where((values >= 0) & (values <= 1), values, np.nan)

    def kept(self, table: "pyarrow.Table") -> np.ndarray:
        """bool: the rows that have a judgement."""
        if "labelled" not in self.of:
            return np.ones(len(table), bool)
        return numbers(table[self.of["labelled"]]) == 1

    def pairs_of_groups(self, table: "pyarrow.Table") -> np.ndarray:
        """(P, 2) rows, the better one first: best against worst of each group, or all whose ranks
        differ. Among equal ranks the first row counts."""
        ranks, groups = numbers(table[self.of["rank"]]), {}
        for row, group in enumerate(table[self.of["group"]].to_pylist()):
            if np.isfinite(ranks[row]) and group is not None:
                groups.setdefault(group, []).append(row)
        found = []
        for rows in groups.values():
            rows = sorted(rows, key=lambda row: ranks[row])
            some = combinations(rows, 2)
            if self.of.get("pairs", "best") == "best":
                worst = next(row for row in rows if ranks[row] == ranks[rows[-1]])
                some = [(rows[0], worst)]
            found += [(a, b) for a, b in some if ranks[a] < ranks[b]]
        return np.array(found, dtype=np.int64).reshape(-1, 2)


# --------------------------------------------------------------------------------------------------
# Which columns.


def recognise(names: list[str], where: str, given: dict[str, str] | None = None) -> Columns:
    """The columns of a source that has these names. given: as of `asked`; where it makes no pair by
    itself, it changes a known schema. Raises UserError with the --columns that would fit."""
    given = given or {}
    if absent := [name for role, name in given.items() if role in ROLES and name not in names]:
        raise UserError(
            f"--columns: {where} has no column '{absent[0]}', it has {', '.join(names)}."
        )
    whole = any(all(role in given for role in form) for form in FORMS)
    schemas = {"--columns": ""} if whole else SCHEMAS
    for schema, words in schemas.items():
        of = asked(words.split()) | given
        if of.get("caption") not in names:
            of["caption"] = next((name for name in CAPTIONS if name in names), "")
        of |= {role: name for role, name in ALSO.items() if name in names and role not in of}
        if all(name in names for role, name in of.items() if role in ROLES):
            columns = Columns(of, schema, where)
            _refuse_doubt(columns, names)
            return columns
    raise UserError(f"{where} has the columns {', '.join(names)}: {_advice(names)}")


def _refuse_doubt(columns: Columns, names: list[str]):
    """Raises UserError where path1 and path2 stand beside a judgement that HPDv3 does not have."""
    if columns.schema != "HPDv3":
        return
    used = {*columns.of.values(), *KNOWN}
    if odd := [name for name in names if name not in used and JUDGED.search(name)]:
        raise UserError(
            f"{columns.where} has path1 and path2, of which HPDv3 prefers path1, but also "
            f"'{odd[0]}': say by --columns which picture won (winner=path1 loser=path2, or "
            f"image_0=path1 image_1=path2 label_0={odd[0]})."
        )


def _advice(names: list[str]) -> str:
    """A sentence with the --columns that would fit, as far as names can tell."""
    caption = next((n for n in names if re.search("caption|prompt|text", n, re.I)), "NAME")
    pictures = [n for n in names if re.search("jpg|png|image|img|picture|path|file", n, re.I)]
    label = next((n for n in names if JUDGED.search(n) and n not in pictures), "NAME")
    first, second = [*pictures, "NAME", "NAME"][:2]
    return (
        "they are none that is known; say what they are, perhaps --columns "
        f"image_0={first} image_1={second} label_0={label} caption={caption}, or with winner=NAME "
        "loser=NAME for pictures that their column judges."
    )


# --------------------------------------------------------------------------------------------------
# Cells as numbers.


def numbers(
    column: "pyarrow.ChunkedArray", words: dict[str, float] | None = None, only: bool = False
) -> np.ndarray:
    """A column as float64; true is 1, false 0, text is read as a number, or looked up in `words`
    (only there: `only`); nan where that cannot be."""
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (text or only):
        try:
            return column.cast("float64", safe=False).to_numpy()
        except (pa.ArrowException, ValueError):
            return np.full(len(column), np.nan)
    cells = [plain(cell) for cell in column.to_pylist()]
    known = {cell: _number(cell, words or {}, only) for cell in set(cells)}
    return np.array([known[cell] for cell in cells], dtype=np.float64)


def _number(text: str, words: dict[str, float], only: bool) -> float:
    if text in words:
        return words[text]
    if only:
        return np.nan
    try:
        return float({"true": "1", "false": "0"}.get(text.lower(), text))
    except ValueError:
        return np.nan


def plain(value) -> str:
    """A cell as text: 1 and 1.0 are the same."""
    text = "" if value is None else str(value).strip()
    try:
        return f"{float(text):g}"
    except ValueError:
        return text
