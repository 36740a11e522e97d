"""A study's results: who wins, at what cost, and what is left where all have moved equally far.

A study judges its runs at several steps; here the judgements of a variant's training seeds are put
together. Intervals are 95 %, over prompts, with the images of all training seeds kept together
(winrate.interval): they tell what other prompts would show. Parentheses hold the lowest and the
highest training seed, a range that another seed often exceeds."""

from pathlib import Path

import numpy as np

from evaluation import figures, tables, winrate
from evaluation.gallery import open_image

# -------------------------------------------------------------------------------------------------
# Judgements as arrays.


class Results:
    """Judgements, each {variant, seed, step, calls, preference, faithfulness, grain, drift}.

    The base's judgement has the variant "base". prompts: the prompt of each image. equal: {variant:
    step} at equal compute, of those whose last judgement comes later."""

    def __init__(
        self, judgements: list[dict], prompts: list[str], equal: dict[str, int] | None = None
    ):
        self.prompts = prompts
        self.equal = equal or {}
        self.base = next(j for j in judgements if j["variant"] == "base")
        trained = [j for j in judgements if j is not self.base]
        self.variants = list(dict.fromkeys(j["variant"] for j in trained))
        self.seeds = sorted({j["seed"] for j in trained})
        self._at = {(j["variant"], j["seed"], j["step"]): j for j in trained}

    def steps(self, variant: str) -> list[int]:
        return sorted({step for name, _, step in self._at if name == variant})

    def get(self, variant: str, step: int, key: str) -> np.ndarray:
        """Scores, a row for each training seed; step -1 is that of equal compute, mostly the last.
        All rows of "base" agree."""
        if variant == "base":
            return np.array([self.base[key]] * len(self.seeds))
        step = self.equal.get(variant, self.steps(variant)[-1]) if step == -1 else step
        return np.array([self._at[variant, seed, step][key] for seed in self.seeds])

    def wins(self, variant: str, against: str, step: int = -1) -> dict:
        """winrate.win_rate on the preference, over all training seeds; `seeds` has each one's rate.

        A seed of one variant meets the same seed of the other."""
        a, b = (self.get(name, step, "preference") for name in (variant, against))
        rate = winrate.win_rate(a.ravel(), b.ravel(), self.prompts * len(self.seeds))
        return rate | {"seeds": (a > b).mean(1).tolist()}

    def gain(self, variant: str, against: str, step: int = -1) -> dict:
        """winrate.average of the difference in preference, image by image; `seeds` as in `wins`."""
        a, b = (self.get(name, step, "preference") for name in (variant, against))
        return stats_of(self, a - b)

    def mean(self, variant: str, key: str, step: int = -1) -> dict:
        """winrate.average of a score over images and training seeds; `seeds` as in `wins`."""
        values = self.get(variant, step, key)
        share = key == "faithfulness"
        stats = winrate.average(values.ravel(), self.prompts * len(self.seeds), share)
        return stats | {"seeds": values.mean(1).tolist()}

    def path(self, variant: str, seed: int, key: str) -> np.ndarray:
        """A quantity along a run, the base first: step, calls, drift, the mean of preference or
        faithfulness, or wins, the share of images better than the base's.

        A tie counts half, so that a run starts at one half."""
        points = self._points(variant, seed)
        if key == "wins":
            base = np.array(self.base["preference"])
            wins = [np.array(p["preference"]) - base for p in points]
            return np.array([((w > 0) + 0.5 * (w == 0)).mean() for w in wins])
        return np.array([np.mean(p[key]) for p in points])

    def _points(self, variant: str, seed: int) -> list[dict]:
        runs = [self._at[variant, seed, step] for step in self.steps(variant)]
        return [self.base | {"step": 0, "calls": 0, "drift": 0.0}, *runs]

    def at_drift(self, variant: str, key: str, level: float) -> np.ndarray:
        """Scores where each seed's run has moved that far, (seeds, images); see `at_drift`."""
        images = [np.array([p[key] for p in self._points(variant, seed)]) for seed in self.seeds]
        drifts = [self.path(variant, seed, "drift") for seed in self.seeds]
        return np.array([at_drift(*run, level) for run in zip(drifts, images, strict=True)])

    def paths(self, variant: str, x: str, y: str) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(self.path(variant, s, x), self.path(variant, s, y)) for s in self.seeds]


def at_drift(drift: np.ndarray, values: np.ndarray, level: float) -> np.ndarray | float:
    """The value where a run has first moved as far as `level`; the first point is the base.

    drift: (points,). values: a number or a row of numbers a point.

    NaN where it never has, and where it had done so before its first judgement. Between judgements
    the value is linear in the root of the drift, which grows evenly along a straight way."""
    reached = np.flatnonzero(drift >= level)
    if not len(reached) or 0 < level < drift[1]:
        return np.full(values.shape[1:], np.nan)[()]
    j = reached[0]
    if j == 0:
        return values[0]
    a, b = np.sqrt(drift[j - 1]), np.sqrt(drift[j])
    share = (np.sqrt(level) - a) / (b - a)
    return values[j - 1] + share * (values[j] - values[j - 1])


def common_levels(results: Results, variants: list[str]) -> list[float]:
    """A quarter, half and all of the way that every run has gone.

    Drift is quadratic: these are a sixteenth, a quarter and all of the largest common drift."""
    farthest = min(results.path(v, s, "drift").max() for v in variants for s in results.seeds)
    return [farthest / 16, farthest / 4, farthest]


def all_wins(results: Results) -> list[dict]:
    """Every variant against the base and each before it: {model, against, rate, low, high}."""
    names = ["base", *results.variants]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i]]
    kept = [{"model": a, "against": b} | results.wins(a, b) for a, b in pairs]
    return [{k: w[k] for k in ("model", "against", "rate", "low", "high")} for w in kept]


def compare(wins: list[dict], committed: list[dict], name: str) -> str:
    """How many of these win rates lie in the intervals of the committed ones."""
    there = {(w["model"], w["against"]): w for w in committed}
    pairs = [
        (w, there[w["model"], w["against"]]) for w in wins if (w["model"], w["against"]) in there
    ]
    inside = sum(old["low"] <= new["rate"] <= old["high"] for new, old in pairs)
    same = sum(old["rate"] == new["rate"] for new, old in pairs)
    return f"{inside} of {len(pairs)} win rates lie in the intervals of {name}; {same} are equal."


# -------------------------------------------------------------------------------------------------
# Tables.


def cell(stats: dict, key: str, unit: float = 100, form: str = ".1f") -> str:
    """`value [low, high] (lowest seed to highest)`."""
    text = tables.cell(stats[key], stats["low"], stats["high"], form, unit)
    if len(set(stats["seeds"])) > 1:
        seeds = [unit * value for value in stats["seeds"]]
        text += f" ({min(seeds):{form}} to {max(seeds):{form}})"
    return text


def wins_table(results: Results, columns: dict[str, int]) -> str:
    """All against all: a row for each pair, with wins and gain in preference at each step.

    columns: {heading: step}."""
    names = ["base", *results.variants]
    rows = []
    for a, b in [(a, b) for i, a in enumerate(names) for b in names[:i]]:
        rows.append([a, b])
        for step in columns.values():
            gain = cell(results.gain(a, b, step), "mean", 1, "+.3f")
            rows[-1] += [cell(results.wins(a, b, step), "rate"), gain]
    what = "wins, %,", "gain in preference"
    heads = [f"{one} {heading}" for heading in columns for one in what]
    return tables.markdown(["model", "against", *heads], rows)


def scores_table(
    results: Results,
    step: int = -1,
    variants: list[str] = (),
    grain: bool = False,
    settings: dict[str, list[str]] | None = None,
) -> str:
    """A row for the base and one for each variant; () means all of them. grain: show it as well.
    settings: more cells of each variant, before the others."""
    rows = []
    for name in ["base", *(variants or results.variants)]:
        base, drift = name == "base", results.get(name, step, "drift").mean()
        row = [name, "" if base else cell(results.wins(name, "base", step), "rate")]
        row.append(cell(results.mean(name, "preference", step), "mean", 1, ".3f"))
        row.append(f"{np.median(results.get(name, step, 'preference')):.3f}")
        row.append(cell(results.mean(name, "faithfulness", step), "mean"))
        row.append("0" if base else f"{drift:.5f}")
        row += [f"{results.get(name, step, 'grain').mean():.4f}"] if grain else []
        if settings:
            row[1:1] = settings.get(name, ["", ""])
        rows.append(row)
    heads = ["flags", "steps"] if settings else []
    heads += ["wins over base, %", "mean preference", "median", "faithfulness, %", "drift"]
    heads += ["grain"] if grain else []
    return tables.markdown(["model", *heads], rows)


def matched_table(results: Results, variants: list[str]) -> str:
    """Preference and faithfulness where all have moved equally far: mean and range of the seeds.

    "not measured" where a seed had moved that far before its first judgement."""
    levels, rows = common_levels(results, variants), []
    for variant in variants:
        row = [variant]
        for level in levels:
            for key, unit, form in (("preference", 1, ".3f"), ("faithfulness", 100, ".1f")):
                paths = results.paths(variant, "drift", key)
                values = [unit * at_drift(drift, y, level) for drift, y in paths]
                text = f"{np.mean(values):{form}}"
                if len(values) > 1:
                    text += f" ({min(values):{form}} to {max(values):{form}})"
                row.append("not measured" if np.isnan(values).any() else text)
        rows.append(row)
    keys = ("preference", "faithfulness, %,")
    return tables.markdown(
        ["model", *(f"{key} at drift {d:.2g}" for d in levels for key in keys)], rows
    )


def equal_drift(results: Results) -> float | None:
    """All of the way that every run has gone; None where some went past it before their first
    judgement."""
    level = common_levels(results, results.variants)[-1]
    scores = [results.at_drift(name, "preference", level) for name in results.variants]
    return None if np.isnan(scores).any() else level


def compared(results: Results, variant: str, level: float | None) -> dict[str, np.ndarray]:
    """The preference of a variant's images in each comparison, {heading: (seeds, images)}."""
    found = {
        "after 60 steps": results.get(variant, 60, "preference"),
        "at equal compute": results.get(variant, -1, "preference"),
    }
    if level is not None:
        found[f"at drift {level:.2g}"] = results.at_drift(variant, "preference", level)
    return found


def stats_of(results: Results, values: np.ndarray) -> dict:
    """winrate.average of scores (seeds, images), and each seed's mean."""
    stats = winrate.average(values.ravel(), results.prompts * len(values))
    return stats | {"seeds": values.mean(1).tolist()}


def ranked(results: Results) -> list[str]:
    """The variants, the highest mean preference at equal compute first."""
    return sorted(
        results.variants, key=lambda v: results.get(v, -1, "preference").mean(), reverse=True
    )


def rank_table(results: Results, level: float | None) -> str:
    """The variants in order of their preference, and how much they gain over the first listed."""

    def told(values, form):
        return cell(stats_of(results, values), "mean", 1, form)

    first, rows = results.variants[0], []
    start = compared(results, first, level)
    for name in ranked(results):
        scores = compared(results, name, level)
        gains = [told(scores[key] - start[key], "+.3f") for key in list(scores)[1:]]
        row = [name, *(told(values, ".3f") for values in scores.values())]
        rows.append(row + (gains if name != first else [""] * len(gains)))
    heads = [f"preference {heading}" for heading in start]
    heads += [f"gain over {first}, {heading}" for heading in list(start)[1:]]
    return tables.markdown(["model", *heads], rows)


def rank_panels(results: Results, level: float | None) -> list[dict]:
    """Panels of figures.dots: preference in each comparison, and faithfulness."""
    start, found = results.mean("base", "preference")["mean"], {}
    for name in ranked(results):
        for heading, values in compared(results, name, level).items():
            stats = stats_of(results, values)
            panel = {"title": heading.capitalize(), "x": "mean preference", "line": start}
            ends = stats["mean"], stats["low"], stats["high"]
            found.setdefault(heading, panel | {"rows": {}})["rows"][name] = ends
        stats = results.mean(name, "faithfulness")
        panel = {"title": "Faithful, at equal compute", "x": "share of the images"}
        panel["line"] = results.mean("base", "faithfulness")["mean"]
        ends = stats["mean"], stats["low"], stats["high"]
        found.setdefault("faithful", panel | {"rows": {}})["rows"][name] = ends
    return list(found.values())


def cost_table(costs: dict[str, list[dict]]) -> str:
    """What training cost. costs[variant]: the cost.json of each of its runs."""
    rows = []
    for variant, runs in costs.items():
        mean = {k: np.mean([r[k] for r in runs]) for k in ("unet_calls", "flops", "seconds")}
        hours = sum(r["device_hours"] for r in runs) / len(runs)
        peak = max(r["peak_memory"] for r in runs) / 2**30
        row = [variant, str(runs[0]["steps"]), f"{mean['unet_calls']:,.0f}"]
        row += [f"{mean['flops']:.3g}", f"{mean['seconds']:.0f}", f"{hours:.3f}", f"{peak:.2f}"]
        rows.append(row)
    unit = "CPU" if costs and next(iter(costs.values()))[0]["device"] == "CPU" else "GPU"
    heads = ["model", "steps", "UNet calls", "FLOPs", "seconds", f"{unit}-hours", "peak GiB"]
    return tables.markdown(heads, rows)


# -------------------------------------------------------------------------------------------------
# Pictures.


LABELS = {
    "step": "optimizer step",
    "calls": "UNet calls",
    "drift": "drift (mean squared difference of predicted noise)",
    "wins": "wins over the base (share of images)",
    "preference": "mean hidden preference",
    "faithfulness": "faithful images (share)",
    "grain": "grain (mean absolute Laplacian)",
}


def panels(results: Results, variants: list[str], axes: list[tuple[str, str]]) -> list[dict]:
    """A panel of figures.trajectories for each pair (x, y) of axes; LABELS names what they show."""
    return [
        {
            "title": f"{y.capitalize()} by {x}",
            "x": LABELS[x],
            "y": LABELS[y],
            "lines": {v: results.paths(v, x, y) for v in variants},
        }
        | ({"span": (0.8, 1.01)} if y == "faithfulness" else {})
        for x, y in axes
    ]


def samples(folders: dict[str, Path], prompts: list[str], path: Path, rows: int = 6):
    """A picture whose rows are prompts, evenly spaced, and whose columns are models."""
    chosen = [round(k) for k in np.linspace(0, len(prompts) - 1, rows)]
    pixels = [[open_image(folder / f"{k:05d}.png") for folder in folders.values()] for k in chosen]
    figures.grid(pixels, [prompts[k] for k in chosen], list(folders)).save(path)
