"""People as a scorer: win rates, how far judges agree, how far scorers agree with them.

Votes are not independent: those on a prompt are alike, and so are those of a judge. An interval is
over both: another day has other prompts and other judges.
"""

import math
from collections import Counter

import numpy as np
from scipy.special import ndtri, stdtrit

from evaluation.votes import Vote
from evaluation.winrate import sorted_pairs, wilson

SCORER = "people"


def interval(values, prompts: list, judges: list) -> tuple[float, float]:
    """95 % interval (low, high) of the mean of n votes, numbers in [0, 1], over prompts and judges.

    prompts, judges: (n,), the prompt and the judge of each. Wilson's interval with n_eff votes,

        n_eff = p (1 - p) / V,   V = V_prompts + V_judges
        V_groups = G / (G - 1) sum_g (sum_g values - p n_g)^2 / n^2

    at most n, where G is the number of groups, and V_groups 0 of a single one: of one judge it is
    `winrate.interval` of a share, over prompts alone. In the place of z comes Student's t with
    Satterthwaite's degrees of freedom, V^2 / sum V_groups^2 / (G - 1): few judges who differ make
    it wide. Where V is 0 it says nothing: then z, and n is the number of prompts.

    The sum of both counts the variance of single votes twice, so that the interval is rather too
    wide, as with the pigeonhole bootstrap (Owen, Ann. Appl. Stat. 1, 2007). In simulations it held
    the truth in 94 to 99 %, but in 88 to 90 % for two or three judges of very different taste
    (logits that vary between judges as much as between prompts, with a standard deviation of 1).
    """
    values = np.asarray(values, dtype=float)
    n, p = len(values), float(values.mean())
    variances, freedom = [], []
    for groups in (prompts, judges):
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        count, total = np.bincount(group), np.bincount(group, weights=values)
        if (G := len(count)) > 1:
            variances.append(G / (G - 1) * ((total - p * count) ** 2).sum() / n**2)
            freedom.append(G - 1)
    V = sum(variances)
    if V < 1e-12:
        return wilson(p, len(set(prompts)), float(ndtri(0.975)))
    df = V**2 / sum(v**2 / f for v, f in zip(variances, freedom, strict=True))
    return wilson(p, min(n, p * (1 - p) / V), float(stdtrit(df, 0.975)))


def records(
    key: str, votes: list[Vote], names: list[str], prompts: list[str], categories: list | None
) -> list[dict]:
    """Win rates as `winrate.summarize` has them, of people: a pair counts once for each judge.

    prompts, and categories if there are any: of the images of the set. Pairs and categories without
    a vote have no record."""
    found = []
    for against, name in sorted_pairs(names):
        mine = [v for v in votes if (v.set, v.first, v.second) == (key, against, name)]
        for category in [None, *dict.fromkeys(categories or ())]:
            some = [v for v in mine if category in (None, categories and categories[v.image])]
            if not some:
                continue
            counts = Counter(v.value for v in some)
            wins, losses, n = counts[-1], counts[1], len(some)  # of `name`, which is second
            low, high = interval(
                [v.value == -1 for v in some],
                [prompts[v.image] for v in some],
                [v.judge for v in some],
            )
            record = {"set": key, "scorer": SCORER, "category": category, "model": name}
            record |= {"against": against, "wins": wins, "losses": losses, "ties": counts[0]}
            found.append(record | {"n": n, "rate": wins / n, "low": low, "high": high})
            found[-1]["published"] = None
    return found


def alpha(votes: list[Vote]) -> float | None:
    """Krippendorff's alpha of the judges, nominal: first, second or tie, on pairs of pictures that
    two or more of them judged. 1: they always agree; 0: no more than by chance. None without such a
    pair, or where all their votes on them are the same, which is 0 / 0."""
    units = {}
    for vote in votes:
        units.setdefault(vote[1:5], Counter())[vote.value] += 1
    counts = [[unit[value] for value in (1, 0, -1)] for unit in units.values()]
    counts = np.array([row for row in counts if sum(row) > 1])
    if not len(counts) or (counts.sum(0) > 0).sum() < 2:
        return None
    import krippendorff  # a library that nothing else needs

    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def agreement(key: str, votes: list[Vote], scores: dict, prompts: list[str]) -> list[dict]:
    """[{scorer, n, share, low, high}]: the share of a set's votes, but for ties, whose picture the
    scorer prefers, too; where it has a tie, half. scores: {model: {scorer: numbers}}."""
    votes, found = [v for v in votes if v.set == key and v.value], []
    for scorer in next(iter(scores.values())) if votes else ():
        same = []
        for vote in votes:
            gap = scores[vote.first][scorer][vote.image] - scores[vote.second][scorer][vote.image]
            same.append((1 + math.copysign(1, gap) * vote.value) / 2 if gap else 0.5)
        low, high = interval(same, [prompts[v.image] for v in votes], [v.judge for v in votes])
        ends = {"share": float(np.mean(same)), "low": low, "high": high}
        found.append({"scorer": scorer, "n": len(votes)} | ends)
    return found


def about(key: str, votes: list[Vote], scores: dict, prompts: list[str]) -> dict:
    """What results.json says of the votes on a set: {judges: {name: votes}, pairs, shared (by two
    or more judges), alpha, left (share of the votes but for ties that took the left picture),
    agreement}."""
    mine = [vote for vote in votes if vote.set == key]
    pairs = Counter(vote[1:5] for vote in mine)
    decided = [vote for vote in mine if vote.value]
    left = [(vote.value == 1) == vote.left for vote in decided]
    return {
        "judges": dict(Counter(vote.judge for vote in mine)),
        "pairs": len(pairs),
        "shared": sum(count > 1 for count in pairs.values()),
        "alpha": alpha(mine),
        "left": sum(left) / len(left) if left else None,
        "agreement": agreement(key, mine, scores, prompts),
    }


def words(found: dict) -> str:
    """Of `about`, in words."""
    judges, votes = found["judges"], sum(found["judges"].values())
    said = f"{votes:,} {plural('vote', votes)} of {len(judges)} {plural('judge', len(judges))}"
    said += f" ({', '.join(f'{name} {n:,}' for name, n in judges.items())})" if judges else ""
    said += f" on {found['pairs']:,} {plural('pair', found['pairs'])} of pictures"
    if len(judges) > 1:
        said += f", {found['shared']:,} of them judged by two or more. Krippendorff's alpha of the "
        alike = found["alpha"]
        said += "judges (nominal; 1: they always agree, 0: no more than by chance) "
        said += "is not defined" if alike is None else f"is {alike:.2f}"
    else:
        said += ". The interval of a single judge is over prompts alone"
    if found["left"] is not None:
        said += f". The left picture won {100 * found['left']:.0f} % of the votes that were no ties"
    return said + "."


def plural(word: str, n: int) -> str:
    return word if n == 1 else f"{word}s"
