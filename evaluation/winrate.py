"""From scores to the table: win rates, 95 % intervals, categories, published numbers, cost.

A score is a number per image, higher is better; images of two models pair up by prompt and seed.
The statistics need NumPy alone. `summarize` turns the scores of a prompt set into records, flat
dictionaries of which results.json holds lists, and `table` turns results.json into Markdown.
"""

import math
from itertools import combinations
from statistics import NormalDist

import numpy as np

from evaluation.scorers import PERCENT, TITLES

# --------------------------------------------------------------------------------------------------
# Statistics. Prompts are the independent unit: all images of a prompt stay together.


Z = NormalDist().inv_cdf(0.975)


def interval(values, prompts: list[str], share: bool = False, resamples: int = 10_000):
    """95 % interval (low, high) of the mean of values, which vary between prompts.

    values: (n,) numbers; prompts: (n,), the prompt of each; G of them are different, and t is the
    97.5 % point of Student's t with G - 1 degrees of freedom.

    By bootstrap over prompts: a resample draws G of them with replacement and averages all their
    values; low and high are percentiles. Plain percentiles are too narrow for few prompts, so the
    2.5 % are replaced by Phi(-t sqrt(G / (G - 1))): the expanded percentile interval of Hesterberg
    (arXiv 1411.5279), 1.5 % at G = 18. (None, None) where prompts do not differ.

    share: values are 0 or 1. Near 0 and 1 percentiles miss the truth too often, at 18 prompts and
    a rate of 0.97 one time in eight. So a share p gets Wilson's interval, with t in the place of z
    and the effective number of values of clustered samples (Korn and Graubard 1998),

        n_eff = p (1 - p) / var,   var = G / (G - 1) sum_g (sum_g values - p n_g)^2 / n^2

    at most n, where var is the variance that the bootstrap over prompts has. Where all prompts have
    the same mean, such as 0 or 1, var is 0 and says nothing: then it is Wilson's with z and n = G.

    The bootstrap's seed is fixed: equal values give an equal interval."""
    _, group = np.unique(np.asarray(prompts), return_inverse=True)
    count = np.bincount(group)
    total = np.bincount(group, weights=np.asarray(values, dtype=float))
    G, n, mean = len(count), count.sum(), float(total.sum() / count.sum())
    alike = np.ptp(total / count) < 1e-12
    if alike:
        return wilson(mean, G, Z) if share else (None, None)
    t = student(G - 1)
    if share:
        var = G / (G - 1) * ((total - mean * count) ** 2).sum() / n**2
        return wilson(mean, min(n, mean * (1 - mean) / var), t)
    rng, means = np.random.default_rng(0), []
    for block in np.array_split(np.arange(resamples), math.ceil(resamples * G / 4e6)):  # memory
        drawn = rng.integers(G, size=(len(block), G))
        means.append(total[drawn].sum(1) / count[drawn].sum(1))
    tail = NormalDist().cdf(-t * math.sqrt(G / (G - 1)))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def student(nu: int) -> float:
    """97.5 % point of Student's t with nu degrees of freedom, expanded in 1 / nu; 0.3 % too low at
    nu = 4, 3 % at 2."""
    z = Z + (Z**3 + Z) / (4 * nu) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * nu**2)
    return z + (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / (384 * nu**3)


def wilson(p: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's score interval of a share p of n values; it always contains p."""
    center, spread = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (center - spread) / (1 + z**2 / n), (center + spread) / (1 + z**2 / n)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # but for rounding


def win_rate(a, b, prompts: list[str]) -> dict[str, float]:
    """{wins, losses, ties, n, rate, low, high} of a over b; rate = share of pairs where a > b.

    a, b: (n,) scores, pair by pair; prompts: (n,). Ties count for neither, so that
    rate(a, b) + rate(b, a) + ties / n = 1, and a model against itself has rate 0. low, high: 95 %
    interval of the rate, all pairs of a prompt together; see `interval`. Raises ValueError for a
    score that is not finite."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if not np.isfinite([a, b]).all():
        raise ValueError("a score is not a finite number, so its pair has no winner.")
    wins, losses = int((a > b).sum()), int((a < b).sum())
    low, high = interval(a > b, prompts, share=True)
    counts = {"wins": wins, "losses": losses, "ties": len(a) - wins - losses, "n": len(a)}
    return counts | {"rate": wins / len(a), "low": low, "high": high}


def average(values, prompts: list[str], share: bool = False) -> dict[str, float]:
    """{mean, median, low, high} of values (n,), with the interval of the mean; see `interval`."""
    low, high = interval(values, prompts, share)
    return {"mean": np.mean(values), "median": np.median(values), "low": low, "high": high}


# --------------------------------------------------------------------------------------------------
# Published win rates of InPO in %, and how their images were drawn: one a prompt.

SOURCE = "Lu et al., CVPR 2025, arXiv 2503.18454"
NATIVE = {"sdxl": 1024, "sd15": 512}  # pixels
STEPS, GUIDANCE = 50, {"sdxl": 5.0, "sd15": 7.5}
PUBLISHED_PROMPTS = {"hpdv2": 3200, "parti": 1632}
PUBLISHED_SCORERS = ("aesthetic", "pickscore", "hps", "clip")
PUBLISHED = {  # model, against:  HPDv2                    Parti-Prompts
    ("sdxl", "base"): (56.37, 79.25, 85.38, 53.37, 61.70, 72.89, 78.31, 50.55),
    ("sdxl", "sft"): (66.66, 88.31, 89.91, 59.00, 69.70, 88.54, 88.91, 56.99),
    ("sdxl", "dpo"): (55.87, 59.28, 65.81, 46.91, 57.17, 56.92, 60.11, 42.28),
    ("sd15", "base"): (80.19, 85.84, 90.22, 66.44, 74.63, 73.16, 81.86, 61.89),
    ("sd15", "sft"): (56.63, 66.84, 58.91, 57.87, 52.27, 62.50, 58.03, 57.54),
    ("sd15", "dpo"): (70.50, 74.94, 84.06, 61.09, 68.01, 63.54, 75.31, 57.54),
    ("sd15", "kto"): (59.81, 67.41, 60.94, 60.03, 59.01, 62.25, 58.76, 57.60),
}


def published(model: str, against: str, prompt_set: str, scorer: str, info: dict) -> float | None:
    """The published rate in % of a model named inpo against one named base, sft, dpo or kto.

    info: {"models": {name: {architecture, size}}, "sets": {name: {prompts, images, steps,
    guidance}}}. None unless both models have the same architecture at its native size, the prompt
    set is complete, and the images were drawn as the published ones."""
    (kind, size), other = (
        (info["models"][name]["architecture"], info["models"][name]["size"])
        for name in (model, against)
    )
    drawn, n = info["sets"][prompt_set], PUBLISHED_PROMPTS.get(prompt_set)
    theirs = {"prompts": n, "images": n, "steps": STEPS, "guidance": GUIDANCE.get(kind)}
    if other != (kind, size) or NATIVE.get(kind, 0) != size:
        return None
    if any(drawn.get(key) != value for key, value in theirs.items()):
        return None
    rates = PUBLISHED.get((kind, against.casefold()))
    if model.casefold() != "inpo" or rates is None or scorer not in PUBLISHED_SCORERS:
        return None
    column = len(PUBLISHED_SCORERS) * list(PUBLISHED_PROMPTS).index(prompt_set)
    return rates[column + PUBLISHED_SCORERS.index(scorer)]


# --------------------------------------------------------------------------------------------------
# Scores of a prompt set -> records.


def summarize(
    prompt_set: str, scores: dict, prompts: list[str], categories: list | None, info: dict
) -> tuple[list[dict], list[dict]]:
    """(scores, win_rates): records of a prompt set, as results.json has them.

    scores: {model: {scorer: (n,) numbers}}, the baseline first; prompts, and categories if there
    are any: (n,). Every model is compared with each one named before it, over all prompts and
    within each category, and its mean with the first one's, pair by pair (change). PERCENT scorers
    are shares, and get no win rate. info: see `published`."""
    averages, rates = [], []
    baseline, *_ = scores
    groups = {None: np.arange(len(prompts))}
    for category in dict.fromkeys(categories or ()):
        groups[category] = np.flatnonzero([c == category for c in categories])
    for scorer in scores[baseline]:
        values = {name: np.asarray(row[scorer], dtype=float) for name, row in scores.items()}
        key = {"set": prompt_set, "scorer": scorer}
        for name, mine in values.items():
            stats = {"n": len(mine)} | average(mine, prompts, scorer in PERCENT)
            change = {} if name == baseline else average(mine - values[baseline], prompts)
            stats |= {"change": change.get("mean")}
            stats |= {f"change_{end}": change.get(end) for end in ("low", "high")}
            averages.append(key | {"model": name} | stats)
        if scorer in PERCENT:
            continue
        for against, name in sorted_pairs(list(values)):
            for category, rows in groups.items():
                some = [prompts[row] for row in rows]
                rate = win_rate(values[name][rows], values[against][rows], some)
                known = published(name, against, prompt_set, scorer, info) if not category else None
                pair = {"category": category, "model": name, "against": against}
                rates.append(key | pair | rate | {"published": known})
    return averages, rates


def sorted_pairs(names: list[str]) -> list[tuple[str, str]]:
    """(earlier, later) of all names, sorted by the later one: a row of the table each."""
    return sorted(combinations(names, 2), key=lambda pair: names.index(pair[1]))


# --------------------------------------------------------------------------------------------------
# Records -> Markdown.

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


def cost_row(cost: dict) -> list[str]:
    """The cells of a cost.json; KeyError, TypeError or ValueError where it is damaged."""
    return [write(cost) for write in COST.values()]


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def cell(value: float, low: float | None, high: float | None, form: str, unit: float = 1) -> str:
    """ "79.3 [77.8, 80.6]"; without brackets where there is no interval."""
    brackets = "" if low is None else f" [{unit * low:{form}}, {unit * high:{form}}]"
    return f"{unit * value:{form}}{brackets}"


def rate_cell(record: dict) -> str:
    """ "79.3 [77.8, 80.6] (79.25), ties 0.3": rate, interval, published rate, ties if any, in %."""
    text = cell(record["rate"], record["low"], record["high"], ".1f", 100)
    if record["published"] is not None:
        text += f" ({record['published']:.2f})"
    if ties := 100 * record["ties"] / record["n"]:
        text += f", ties {ties:.1f}" if ties >= 0.05 else ", ties < 0.1"
    return text


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a "|" inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(
        "| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines
    )


def table(results: dict) -> str:
    """results.json as Markdown: win rates, scores, categories, training cost; intervals in []."""
    names, titles = list(results["models"]), {s: SET_TITLES.get(s, s) for s in results["sets"]}
    rates, parts = results["win_rates"], [f"# {', '.join(names)}\n"]
    for key, about in results["sets"].items():
        parts.append(f"{titles[key]}: {describe(about)}.\n")
    parts.append("In brackets: 95 % intervals, over prompts.\n")

    def rows(records: list[dict], columns: list[tuple]) -> list[list[str]]:
        found = {
            (r["model"], r["against"], r["set"], r["scorer"], r["category"]): r for r in records
        }
        pairs = [(later, earlier) for earlier, later in sorted_pairs(names)]
        cells = [[found.get((*pair, *column)) for column in columns] for pair in pairs]
        return [
            [*pair, *("" if r is None else rate_cell(r) for r in line)]
            for pair, line in zip(pairs, cells, strict=True)
        ]

    if rates:
        columns = list(dict.fromkeys((r["set"], r["scorer"], None) for r in rates))
        head = [f"{titles[s]}: {TITLES[scorer]}" for s, scorer, _ in columns]
        parts += ["## Win rates\n", "Images that score higher than the other model's, in %.\n"]
        parts.append(markdown(["model", "against", *head], rows(rates, columns)))
        if any(r["published"] is not None for r in rates):
            parts.append(
                f"In parentheses: published ({SOURCE}; {STEPS} steps, one image a prompt).\n"
            )

    parts.append("## Scores\n")
    for key, title in titles.items():
        parts += [f"### {title}\n"] if len(titles) > 1 else []
        parts.append(score_table([r for r in results["scores"] if r["set"] == key], names))

    grouped = [r for r in rates if r["category"] is not None]
    if grouped:
        parts.append("## Win rates by category\n")
        for key, scorer in dict.fromkeys((r["set"], r["scorer"]) for r in grouped):
            some = [r for r in grouped if (r["set"], r["scorer"]) == (key, scorer)]
            sizes = {r["category"]: r["n"] for r in some}
            head = [f"{category} ({n})" for category, n in sizes.items()]
            parts.append(f"### {titles[key]}: {TITLES[scorer]}\n")
            columns = [(key, scorer, category) for category in sizes]
            parts.append(markdown(["model", "against", *head], rows(some, columns)))
        parts.append("In parentheses behind a category: its images.\n")

    if results["costs"]:
        parts += [
            "## Training cost\n",
            "A UNet call is the forward of one image; a backward is two.\n",
        ]
        lines = [[name, *cost_row(cost)] for name, cost in results["costs"].items()]
        parts.append(markdown(["model", *COST], lines))
    return "\n".join(parts)


def describe(about: dict) -> str:
    """The settings of a prompt set in words; what is not known of all models is left out."""
    words = f"{about['prompts']:,} prompts, {about['images']:,} images per model"
    known = ("steps", "{} steps"), ("guidance", "guidance {:g}"), ("dtype", "{}")
    words += "".join(
        f", {form.format(about[key])}" for key, form in known if about[key] is not None
    )
    if about["first_seed"] is None:
        return words + ", seeds not known for all models"
    return words + f", seeds from {about['first_seed']}, the same for all models"


def score_table(records: list[dict], names: list[str]) -> str:
    """A row per model: mean, interval and median of each scorer; PERCENT as share and change."""
    head, rows = ["model"], {name: [name] for name in names}
    for scorer in dict.fromkeys(r["scorer"] for r in records):
        some = [r for r in records if r["scorer"] == scorer]
        largest = max(abs(r["mean"]) for r in some)
        form = ".2f" if largest >= 10 else ".3f" if largest >= 1 else ".4f"
        percent, title = scorer in PERCENT, TITLES[scorer]
        head += [f"{title}, %", "change, points"] if percent else [f"{title}, mean", "median"]
        for r in some:
            ends = r["low"], r["high"]
            if percent:
                change = r["change"], r["change_low"], r["change_high"]
                moved = "" if r["change"] is None else cell(*change, "+.1f", 100)
                rows[r["model"]] += [cell(r["mean"], *ends, ".1f", 100), moved]
            else:
                rows[r["model"]] += [cell(r["mean"], *ends, form), f"{r['median']:{form}}"]
    return markdown(head, list(rows.values()))
