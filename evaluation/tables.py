"""Markdown: the table of results.json, and the cells that studies share with it.

79.3 [77.8, 80.6] (79.25), ties 0.3    rate, 95 % interval, published rate and ties, in %
"""

from pathlib import Path

from evaluation import people
from evaluation.published import HPS_CAVEAT, PERCENT, SOURCE, STEPS, TITLES
from evaluation.winrate import sorted_pairs
from system import text
from system.files import UserError, is_number, read_json

SET_TITLES = {"hpdv2": "HPDv2", "hpdv2-test": "HPDv2 test", "parti": "Parti-Prompts"}
COST = {  # column: what to write of a cost.json
    "method": lambda c: c["method"],
    "steps": lambda c: f"{c['steps']:,}",
    "pairs": lambda c: f"{c['pairs']:,}",
    "UNet calls": lambda c: f"{c['unet_calls']:,.0f}",
    "FLOPs": lambda c: f"{c['flops']:.2e}",
    "time, h:mm:ss": lambda c: clock(c["seconds"]),
    "device hours": lambda c: f"{c['device_hours']:.3g} ({c['devices']} x {c['device']})",
    "peak memory, GiB": lambda c: f"{c['peak_memory'] / 2**30:.2f}",
}


NUMBERS = ("steps", "pairs", "unet_calls", "flops", "seconds", "devices", "device_hours")


def read_cost(folder: Path, fix: str = "delete it, or train again") -> dict | None:
    """cost.json of a model's folder, None where there is none; UserError where it is damaged."""
    file = folder / "cost.json"
    if not file.exists():
        return None
    cost = read_json(file, fix)
    numbers = all(is_number(cost.get(key)) for key in (*NUMBERS, "peak_memory"))
    if not numbers or not all(isinstance(cost.get(key), str) for key in ("method", "device")):
        raise UserError(f"{file} is damaged; {fix}.")
    return cost


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def cell(value: float, low: float | None, high: float | None, form: str, unit: float = 1) -> str:
    """ "79.3 [77.8, 80.6]"; without brackets where there is no interval."""
    brackets = "" if low is None else f" [{unit * low:{form}}, {unit * high:{form}}]"
    return f"{unit * value:{form}}{brackets}"


def rate_cell(record: dict) -> str:
    """ "79.3 [77.8, 80.6] (79.25), ties 0.3": rate, interval, published rate, ties if any, in %."""
    said = cell(record["rate"], record["low"], record["high"], ".1f", 100)
    if record["published"] is not None:
        said += f" ({record['published']:.2f})"
    if ties := 100 * record["ties"] / record["n"]:
        said += f", ties {ties:.1f}" if ties >= 0.05 else ", ties < 0.1"
    return said


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; what would be more than text in a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(text.markdown, line)) + " |\n" for line in lines)


def table(results: dict) -> str:
    """results.json as Markdown: win rates, scores, categories, training cost; intervals in []."""
    names, titles = list(results["models"]), {s: SET_TITLES.get(s, s) for s in results["sets"]}
    rates, parts = results["win_rates"], [f"# {', '.join(names)}\n"]
    for key, about in results["sets"].items():
        parts.append(f"{titles[key]}: {describe(about)}.\n")
    if rates or results["scores"]:
        judges = "; of people, over prompts and judges" if "people" in results else ""
        parts.append(f"In brackets: 95 % intervals, over prompts{judges}.\n")

    if rates:
        columns = list(dict.fromkeys((r["set"], r["scorer"], None) for r in rates))
        head = [f"{titles[s]}: {TITLES.get(scorer, scorer)}" for s, scorer, _ in columns]
        parts += ["## Win rates\n", "Images that score higher than the other model's, in %.\n"]
        parts.append(rate_table(rates, names, dict(zip(head, columns, strict=True))))
        compared = [r["scorer"] for r in rates if r["published"] is not None]
        if compared:
            note = f"In parentheses: published ({SOURCE}; {STEPS} steps, one image a prompt)."
            parts.append(f"{note} {HPS_CAVEAT}\n" if "hps" in compared else f"{note}\n")

    for key, found in results.get("people", {}).items():
        parts.append(f"## People{f': {titles[key]}' if len(titles) > 1 else ''}\n")
        parts.append(f"{text.markdown(people.words(found))}\n")
        if found["agreement"]:
            parts.append(markdown(*agreement(found["agreement"])))
            parts.append("Of the votes that were no ties; where a scorer has a tie, half counts.\n")

    parts += ["## Scores\n"] if results["scores"] else []
    for key, title in titles.items() if results["scores"] else []:
        parts += [f"### {title}\n"] if len(titles) > 1 else []
        head, rows = scores([r for r in results["scores"] if r["set"] == key], names)
        parts.append(markdown(head, rows))

    grouped = [r for r in rates if r["category"] is not None]
    if grouped:
        parts.append("## Win rates by category\n")
        for key, scorer in dict.fromkeys((r["set"], r["scorer"]) for r in grouped):
            some = [r for r in grouped if (r["set"], r["scorer"]) == (key, scorer)]
            columns = {}
            for category in dict.fromkeys(r["category"] for r in some):
                sizes = {r["n"] for r in some if r["category"] == category}  # people's may differ
                head = f"{category} ({sizes.pop()})" if len(sizes) == 1 else category
                columns[head] = (key, scorer, category)
            parts.append(f"### {titles[key]}: {TITLES.get(scorer, scorer)}\n")
            parts.append(rate_table(some, names, columns))
        parts.append("In parentheses behind a category: its images.\n")

    if results["costs"]:
        parts.append("## Training cost\n")
        parts.append("A UNet call is the forward of one image; a backward is two.\n")
        parts.append(markdown(*costs(results["costs"])))
    return "\n".join(parts)


def costs(found: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a row per model that was trained here."""
    lines = [[name, *(write(cost) for write in COST.values())] for name, cost in found.items()]
    return ["model", *COST], lines


def agreement(found: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a row per scorer, the share of people's votes that agree with it."""
    shown = [(r, cell(r["share"], r["low"], r["high"], ".1f", 100)) for r in found]
    return ["scorer", "agrees with people, %", "votes"], [
        [TITLES.get(r["scorer"], r["scorer"]), said, f"{r['n']:,}"] for r, said in shown
    ]


def rate_table(records: list[dict], names: list[str], columns: dict[str, tuple]) -> str:
    """A row per pair of models. columns: {heading: (set, scorer, category)}."""
    cells = {
        (r["model"], r["against"], r["set"], r["scorer"], r["category"]): rate_cell(r)
        for r in records
    }
    rows = [
        [model, against, *(cells.get((model, against, *key), "") for key in columns.values())]
        for against, model in sorted_pairs(names)
    ]
    return markdown(["model", "against", *columns], rows)


def describe(about: dict) -> str:
    """The settings of a prompt set in words; what is not known of all models is left out."""
    words = f"{about['prompts']:,} prompts, {about['images']:,} images per model"
    known = ("steps", "{} steps"), ("guidance", "guidance {:g}"), ("dtype", "{}")
    words += "".join(
        f", {text.markdown(form.format(about[key]))}"
        for key, form in known
        if about[key] is not None
    )
    if about["first_seed"] is None:
        return words + ", seeds not known for all models"
    return words + f", seeds from {about['first_seed']}, the same for all models"


def scores(records: list[dict], names: list[str]) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a row per model: mean, interval and median of each scorer; PERCENT as share and
    change."""
    head, rows = ["model"], {name: [name] for name in names}
    for scorer in dict.fromkeys(r["scorer"] for r in records):
        some = [r for r in records if r["scorer"] == scorer]
        largest = max(abs(r["mean"]) for r in some)
        form = ".2f" if largest >= 10 else ".3f" if largest >= 1 else ".4f"
        percent, title = scorer in PERCENT, TITLES.get(scorer, scorer)
        head += [f"{title}, %", "change, points"] if percent else [f"{title}, mean", "median"]
        for r in some:
            ends = r["low"], r["high"]
            if percent:
                change = r["change"], r["change_low"], r["change_high"]
                moved = "" if r["change"] is None else cell(*change, "+.1f", 100)
                rows[r["model"]] += [cell(r["mean"], *ends, ".1f", 100), moved]
            else:
                rows[r["model"]] += [cell(r["mean"], *ends, form), f"{r['median']:{form}}"]
    return head, list(rows.values())
