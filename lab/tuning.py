"""The settings that were tried for each entry of the leaderboard, and the one that it takes.

`python -m lab.study tune --report docs/tune.md` trains and judges them. docs/settings.json holds
{group, flags, steps, seed, wins, preference, faithfulness, drift} of each; wins, preference and
faithfulness are [mean, low, high]. Of each group the setting with the highest mean preference is
taken, among those whose faithfulness is at most 3 points below the base's."""

import json
from pathlib import Path

from evaluation.tables import cell, markdown
from system.files import ROOT, UserError, read_json, write

FILE = ROOT / "docs" / "settings.json"
LOST = 0.03  # of faithfulness, at most
KEYS = {"group", "flags", "steps", "seed", "wins", "preference", "faithfulness", "drift"}
FIX = "delete it, and run the study tune again"
BASE = "base"  # the group of the model that all start from


def read(file: Path = FILE) -> list[dict]:
    """The settings of a file, none where there is no file. Raises UserError for another content."""
    if not file.exists():
        return []
    found = read_json(file, FIX).get("settings")
    if not isinstance(found, list) or not all(isinstance(s, dict) and KEYS <= {*s} for s in found):
        raise UserError(f"{file} holds no list of settings; {FIX}.")
    return found


def merge(file: Path, settings: list[dict]) -> list[dict]:
    """Put these settings where the same ones stand in the file, others at its end; return all."""
    found = {(setting["group"], setting["flags"]): setting for setting in [*read(file), *settings]}
    rows = ",\n".join(json.dumps(setting) for setting in found.values())
    write(file, f'{{"settings": [\n{rows}\n]}}\n')
    return list(found.values())


def faithful(settings: list[dict], group: str) -> list[dict]:
    """The settings of this group that may be chosen."""
    start = [s["faithfulness"][0] for s in settings if s["group"] == BASE]
    return [s for s in settings if s["group"] == group and s["faithfulness"][0] >= start[0] - LOST]


def chosen(settings: list[dict], group: str) -> dict:
    """The setting that this group takes. Raises UserError where none was tried, or none is left."""
    if not {BASE, group} <= {s["group"] for s in settings}:
        raise UserError(f"{group} has not been tuned: python -m lab.study tune --only '{group}'.")
    if not (left := faithful(settings, group)):
        raise UserError(f"{group}: every setting has lost more than 3 points of faithfulness.")
    return max(left, key=lambda s: s["preference"][0])


def gains(settings: list[dict], group: str) -> bool:
    """Whether the setting that this group takes is preferred to the base at all."""
    base = next(s["preference"][0] for s in settings if s["group"] == BASE)
    return chosen(settings, group)["preference"][0] > base


def tables_of(settings: list[dict]) -> str:
    """A table for each group, its chosen setting marked, if one is left to choose."""
    text, groups = "", dict.fromkeys(s["group"] for s in settings if s["group"] != BASE)
    heads = ["", "flags", "steps", "wins over base, %", "mean preference", "faithfulness, %"]
    heads.append("drift")
    for group in groups:
        rows, taken = [], chosen(settings, group) if faithful(settings, group) else None
        for s in [s for part in (BASE, group) for s in settings if s["group"] == part]:
            row = ["chosen" if s is taken else "", s["flags"] or BASE, str(s["steps"] or "")]
            row.append("" if s["group"] == BASE else cell(*s["wins"], ".1f", 100))
            row += [cell(*s["preference"], ".3f"), cell(*s["faithfulness"], ".1f", 100)]
            rows.append([*row, f"{s['drift']:.5f}"])
        text += f"## {group}\n\n{markdown(heads, rows)}\n"
    return text


def panels(settings: list[dict]) -> list[dict]:
    """A panel of figures.trajectories for each group: preference by learning rate, a line for each
    beta. All have one y axis, around the base's preference and the best; what falls far below the
    base is left out."""
    base = next(s["preference"][0] for s in settings if s["group"] == BASE)
    best = max(s["preference"][0] for s in settings)
    limits = base - 0.5 * (best - base), best + 0.1 * (best - base)
    found = []
    for group in dict.fromkeys(s["group"] for s in settings if s["group"] != BASE):
        lines: dict[str, list] = {}
        for s in [s for s in settings if s["group"] == group]:
            words = s["flags"].split()
            value = {key: words[words.index(key) + 1] for key in ("--lr", "--beta") if key in words}
            name = f"beta {value['--beta']}" if "--beta" in value else "no beta"
            lines.setdefault(name, []).append((float(value["--lr"]), s["preference"][0]))
        axes = {"title": group, "x": "learning rate", "y": "mean preference", "log": True}
        axes |= {"limits": limits, "line": base}
        drawn = {name: [tuple(zip(*sorted(points), strict=True))] for name, points in lines.items()}
        found.append(axes | {"lines": drawn})
    return found


def flags_of(group: str) -> str:
    """The flags of train_inpo.py that docs/settings.json chooses for a group."""
    return chosen(read(), group)["flags"]
