"""From scores to win rates: 95 % intervals over prompts, changes, categories.

A score is a number per image, higher is better; images of two models pair up by prompt and seed.
`summarize` turns the scores of a prompt set into records, flat dictionaries of which results.json
holds lists.
"""

import math
from itertools import combinations

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from evaluation.published import PERCENT, published_rate

# --------------------------------------------------------------------------------------------------
# Statistics. Prompts are the independent unit: all images of a prompt stay together.


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
        return wilson(mean, G, float(ndtri(0.975))) if share else (None, None)
    t = float(stdtrit(G - 1, 0.975))
    if share:
        var = G / (G - 1) * ((total - mean * count) ** 2).sum() / n**2
        return wilson(mean, min(n, mean * (1 - mean) / var), t)
    rng, means = np.random.default_rng(0), []
    for block in np.array_split(np.arange(resamples), math.ceil(resamples * G / 4e6)):  # memory
        drawn = rng.integers(G, size=(len(block), G))
        means.append(total[drawn].sum(1) / count[drawn].sum(1))
    tail = ndtr(-t * math.sqrt(G / (G - 1)))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


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
# Scores of a prompt set -> records.


def summarize(
    prompt_set: str, scores: dict, prompts: list[str], categories: list | None, info: dict
) -> tuple[list[dict], list[dict]]:
    """(scores, win_rates): records of a prompt set, as results.json has them.

    scores: {model: {scorer: (n,) numbers}}, the baseline first; prompts, and categories if there
    are any: (n,). Every model is compared with each one named before it, over all prompts and
    within each category, and its mean with the first one's, pair by pair (change). PERCENT scorers
    are shares, and get no win rate. info: see `published_rate`."""
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
                known = (
                    None if category else published_rate(name, against, prompt_set, scorer, info)
                )
                pair = {"category": category, "model": name, "against": against}
                rates.append(key | pair | rate | {"published": known})
    return averages, rates


def sorted_pairs(names: list[str]) -> list[tuple[str, str]]:
    """(earlier, later) of all names, sorted by the later one: a row of the table each."""
    return sorted(combinations(names, 2), key=lambda pair: names.index(pair[1]))
