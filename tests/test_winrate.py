"""Laws of winrate.py: win rates, intervals, categories, published numbers, tables."""

import json
import math

import numpy as np
import pytest

from evaluation import winrate

Z2 = 1.959963984540054**2  # squared 97.5 % point of the normal distribution


# --------------------------------------------------------------------------------------------------
# Win rates and intervals.


def test_a_model_against_itself_has_only_ties():
    scores, prompts = np.random.default_rng(0).normal(size=36), [str(i % 18) for i in range(36)]
    rate = winrate.win_rate(scores, scores, prompts)
    assert (rate["wins"], rate["losses"], rate["ties"], rate["n"]) == (0, 0, 36, 36)
    assert rate["rate"] == rate["low"] == 0


def test_rate_of_a_over_b_plus_b_over_a_plus_ties_is_one():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, 300), rng.integers(1, 6, 300)
    prompts = [str(i % 30) for i in range(300)]
    ab, ba = winrate.win_rate(a, b, prompts), winrate.win_rate(b, a, prompts)
    assert ab["ties"] == ba["ties"] > 20
    assert ab["rate"] + ba["rate"] + ab["ties"] / 300 == pytest.approx(1, abs=1e-12)
    assert (ab["wins"], ab["losses"]) == (ba["losses"], ba["wins"]) == (sum(a > b), sum(a < b))
    assert ab["rate"] < ba["rate"]
    assert ab["low"] < ab["rate"] < ab["high"]


@pytest.mark.parametrize(
    "prompts, seeds, mean, spread",
    [(100, 1, 1, 1), (18, 16, 1, 1), (18, 16, 4, 1), (18, 16, 6, 2), (8, 4, 1, 1), (8, 4, 3, 1)],
)
def test_interval_of_a_share_covers_the_truth_at_its_stated_rate(prompts, seeds, mean, spread):
    """Each prompt has its own chance of a win, sigmoid(N(mean, spread)), whose mean is the truth,
    here from 0.70 to 0.99: so high that percentiles of a bootstrap cover it 87 times of 100."""
    rng = np.random.default_rng(2)

    def chance(n):
        return 1 / (1 + np.exp(-rng.normal(mean, spread, size=n)))

    truth, labels = chance(10**6).mean(), np.repeat(np.arange(prompts), seeds)
    below = above = 0
    for _ in range(1000):
        a = rng.random(prompts * seeds) < np.repeat(chance(prompts), seeds)
        rate = winrate.win_rate(a, np.full(len(a), 0.5), labels)
        below += truth < rate["low"]
        above += rate["high"] < truth
    assert 10 <= below + above <= 80 and max(below, above) <= 60


@pytest.mark.parametrize("prompts, seeds", [(100, 1), (18, 16), (8, 4)])
def test_interval_of_a_mean_covers_the_truth_at_its_stated_rate(prompts, seeds):
    """Scores of a prompt are N(m, 1) around its own m, which is N(0.3, 0.5)."""
    rng, labels, hits = np.random.default_rng(2), np.repeat(np.arange(prompts), seeds), 0
    for _ in range(300):
        values = rng.normal(0.3, 0.5, prompts)[labels] + rng.normal(size=prompts * seeds)
        low, high = winrate.interval(values, labels, resamples=1000)
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / 300 <= 0.99


@pytest.mark.parametrize("nu, t", [(2, 4.302653), (4, 2.776445), (17, 2.109816), (99, 1.984217)])
def test_student_is_the_tabulated_quantile(nu, t):
    assert winrate.student(nu) == pytest.approx(t, rel={2: 0.04, 4: 0.003}.get(nu, 2e-5))


def test_share_interval_knows_how_alike_the_images_of_a_prompt_are():
    """400 images of which 3 in 4 win: 399 values, 99 where four agree, and never more than 400."""
    k = np.arange(400)
    alone = winrate.interval(k % 4 > 0, k, share=True)
    assert alone == pytest.approx(winrate.wilson(0.75, 399, winrate.student(399)))
    agreeing = winrate.interval(k // 4 % 4 > 0, k // 4, share=True)
    assert agreeing == pytest.approx(winrate.wilson(0.75, 99, winrate.student(99)))
    even = k % 4 > 0  # 3 of the 4 images of every prompt, but for two prompts
    even[[0, 5]] = True, False
    assert winrate.interval(even, k // 4, share=True) == winrate.wilson(
        0.75, 400, winrate.student(99)
    )


def test_interval_of_many_prompts_is_the_normal_one():
    """Also in blocks, for resamples x prompts above the memory bound."""
    rng = np.random.default_rng(3)
    values = rng.normal(0.3, 2, 1500)
    low, high = winrate.interval(values, np.arange(1500))
    spread = values.std() * math.sqrt(Z2 / 1500)
    assert (low, high) == pytest.approx(
        (values.mean() - spread, values.mean() + spread), abs=0.05 * spread
    )
    labels = np.repeat(np.arange(1000), [1, 2] * 500)  # the mean is over images, not over prompts
    values = np.where(labels % 2 == 0, 1.0, 0.0) + rng.normal(0, 0.01, 1500)
    low, high = winrate.interval(values, labels, resamples=2000)
    assert low < values.mean() < high and high - low < 0.1


def test_interval_is_wilson_where_every_prompt_agrees():
    labels, ones = np.repeat(np.arange(18), 16), np.ones(288)
    won, lost = winrate.win_rate(ones, 0 * ones, labels), winrate.win_rate(0 * ones, ones, labels)
    assert (won["low"], won["high"]) == (pytest.approx(18 / (18 + Z2)), 1.0)
    assert (lost["low"], lost["high"]) == (0.0, pytest.approx(Z2 / (18 + Z2)))
    half = winrate.win_rate([1, 0] * 4, [0, 1] * 4, [0, 0, 1, 1, 2, 2, 3, 3])
    spread = math.sqrt(Z2) / (2 * math.sqrt(4 + Z2))  # Wilson at p = 1/2, n = 4
    assert (half["low"], half["high"]) == pytest.approx((0.5 - spread, 0.5 + spread))
    single = winrate.win_rate([1, 1, 1], [0, 0, 0], ["one prompt"] * 3)
    assert (single["low"], single["high"]) == (pytest.approx(1 / (1 + Z2)), 1.0)


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not a finite number"):
        winrate.win_rate([1.0, math.nan], [0.0, 0.0], ["a", "b"])


# --------------------------------------------------------------------------------------------------
# Records.


def info(models, prompts=40, prompt_set="set", architecture=None, size=None) -> dict:
    about = {"architecture": architecture, "size": size}
    drawn = {"prompts": prompts, "images": prompts, "steps": 50}
    drawn["guidance"] = winrate.GUIDANCE.get(architecture)
    return {"models": {name: about for name in models}, "sets": {prompt_set: drawn}}


def summarize(scores, prompts, categories=None):
    return winrate.summarize("set", scores, prompts, categories, info(scores))


def test_changes_are_paired():
    """Prompts differ by far more than models do: only differences within a pair show the change."""
    rng, prompts = np.random.default_rng(4), [str(i % 40) for i in range(400)]
    base = np.tile(rng.uniform(0, 1, 40), 10)
    better = base + 0.02 + rng.normal(0, 0.02, 400)
    right = (rng.random(400) < 0.9).astype(float)
    averages, rates = summarize(
        {
            "base": {"preference": base, "faithfulness": right},
            "new": {"preference": better, "faithfulness": 1 - 0 * right},
        },
        prompts,
    )
    found = {(r["scorer"], r["model"]): r for r in averages}
    old, new = found["preference", "base"], found["preference", "new"]
    assert old["low"] < new["mean"] < old["high"]
    assert 0.015 < new["change_low"] < new["change"] < new["change_high"] < 0.025
    assert (old["change"], old["change_low"], old["change_high"]) == (None, None, None)
    assert found["faithfulness", "new"]["change"] == pytest.approx(1 - right.mean())
    assert [r["scorer"] for r in rates] == ["preference"]
    same, _ = summarize({"a": {"preference": base}, "b": {"preference": base}}, prompts)
    assert (same[1]["change"], same[1]["change_low"]) == (0, None)


def test_every_model_meets_each_one_named_before_it():
    scores = {name: {"preference": [k, k + 1.0]} for k, name in enumerate("cabd")}
    _, rates = summarize(scores, ["x", "y"])
    assert ["".join((r["model"], r["against"])) for r in rates] == "ac bc ba dc da db".split()
    assert {r["wins"] for r in rates} == {2}


def test_categories_sum_up_to_the_whole():
    rng, prompts = np.random.default_rng(5), [f"prompt {i % 30}" for i in range(90)]
    categories = [["animals", "food | drink", "people"][i % 30 % 3] for i in range(90)]
    categories[0:90:30] = ["people"] * 3
    scores = {name: {"clip": rng.integers(0, 4, 90).astype(float)} for name in ("one", "two")}
    averages, rates = winrate.summarize("set", scores, prompts, categories, info(scores, 30))
    whole, *parts = rates
    assert [r["category"] for r in rates] == [None, "people", "food | drink", "animals"]
    assert [r["n"] for r in parts] == [33, 30, 27]
    for key in ("wins", "losses", "ties", "n"):
        assert sum(part[key] for part in parts) == whole[key] > 0, key
    for part in parts:
        rows = [i for i, category in enumerate(categories) if category == part["category"]]
        two, one = ([scores[name]["clip"][i] for i in rows] for name in ("two", "one"))
        alone = winrate.win_rate(two, one, [prompts[i] for i in rows])
        assert part | alone == part
    text = winrate.table(info(scores, 30) | TABLE | {"scores": averages, "win_rates": rates})
    (head,) = (line for line in text.splitlines() if "animals (27)" in line)
    assert head == r"| model | against | people (33) | food \| drink (30) | animals (27) |"
    people = f"| two | one | {winrate.rate_cell(parts[0])} |"
    assert people in text and "### set: CLIP" in text


# --------------------------------------------------------------------------------------------------
# Published numbers.

KEYS = [
    (model, against, prompt_set, scorer)
    for model, against in winrate.PUBLISHED
    for prompt_set in winrate.PUBLISHED_PROMPTS
    for scorer in winrate.PUBLISHED_SCORERS
]


def published(architecture, against, prompt_set, scorer, name="inpo", size=None, prompts=None):
    size = size or winrate.NATIVE.get(architecture)
    prompts = prompts or winrate.PUBLISHED_PROMPTS.get(prompt_set, 100)
    about = info((name, against), prompts, prompt_set, architecture, size)
    return winrate.published(name, against, prompt_set, scorer, about)


def test_published_rates_are_counts_of_all_prompts():
    """Each is a count of 3200 or 1632, printed with two digits: a mistyped digit would show. Two of
    them are none as they were printed."""
    odd = []
    for architecture, against, prompt_set, scorer in KEYS:
        rate = published(architecture, against, prompt_set, scorer)
        n = winrate.PUBLISHED_PROMPTS[prompt_set]
        if abs(round(rate * n / 100) / n * 100 - rate) > 0.0051:
            odd.append(rate)
    assert len(KEYS) == 56 and odd == [72.89, 69.70]


def test_published_rates_are_those_of_the_paper():
    assert published("sdxl", "base", "hpdv2", "pickscore") == 79.25
    assert published("sdxl", "dpo", "parti", "clip") == 42.28
    assert published("sd15", "kto", "hpdv2", "aesthetic") == 59.81
    assert published("sd15", "SFT", "parti", "hps", name="InPO") == 58.03


def test_published_rates_are_shown_for_nothing_else():
    right = ("sdxl", "base", "hpdv2", "hps")
    assert published(*right) == 85.38
    assert published("sdxl", "kto", "hpdv2", "hps") is None
    assert published("sdxl", "base", "toy", "hps") is None
    assert published("sdxl", "base", "hpdv2", "hps-v2.0") is None
    assert published(None, "base", "hpdv2", "hps") is None
    assert published(*right, name="mine") is None
    assert published(*right, size=512) is None  # not its native size, such as the tiny model
    assert published(*right, prompts=400) is None  # a part of the set
    about = info(("inpo", "base"), 3200, "hpdv2", "sdxl", 1024)
    for other in ({"steps": 25}, {"guidance": 7.5}, {"guidance": None}, {"images": 6400}):
        drawn = about | {"sets": {"hpdv2": about["sets"]["hpdv2"] | other}}
        assert winrate.published("inpo", "base", "hpdv2", "hps", drawn) is None
    about["models"]["base"] = {"architecture": "sd15", "size": 512}
    assert winrate.published("inpo", "base", "hpdv2", "hps", about) is None


# --------------------------------------------------------------------------------------------------
# The table.

ABOUT = {"prompts": 1200, "images": 1200, "steps": 50, "guidance": 5.0, "dtype": "float16"}
TABLE = {"sets": {"set": ABOUT | {"first_seed": 7}}, "costs": {}}
RATE = {"category": None, "wins": 793, "losses": 207, "ties": 0, "n": 1000, "rate": 0.793}
RATE |= {"low": 0.7781, "high": 0.8059, "published": None}


def test_a_cell_shows_interval_and_published_rate_and_ties_only_where_there_are_some():
    assert winrate.rate_cell(RATE) == "79.3 [77.8, 80.6]"
    assert winrate.rate_cell(RATE | {"published": 79.25}) == "79.3 [77.8, 80.6] (79.25)"
    assert winrate.rate_cell(RATE | {"ties": 3}) == "79.3 [77.8, 80.6], ties 0.3"
    both = winrate.rate_cell(RATE | {"ties": 1, "n": 3200, "published": 79.0})
    assert both == "79.3 [77.8, 80.6] (79.00), ties < 0.1"


def test_table_has_the_published_layout(monkeypatch):
    """A row per pair; columns are the scorers within each prompt set."""
    monkeypatch.setitem(winrate.PUBLISHED_PROMPTS, "hpdv2", 1200)
    monkeypatch.setitem(winrate.PUBLISHED_PROMPTS, "parti", 16)
    names, sets = ("base", "dpo", "inpo"), ("hpdv2", "parti")
    results = info(names, architecture="sdxl", size=1024) | TABLE
    results["sets"] = {"hpdv2": TABLE["sets"]["set"], "parti": ABOUT | {"first_seed": None}}
    results["sets"]["parti"] |= {"prompts": 16, "images": 16}
    rng, results["scores"], results["win_rates"] = np.random.default_rng(6), [], []
    for key in sets:
        n = results["sets"][key]["prompts"]
        scores = {name: {s: rng.normal(size=n) for s in ("pickscore", "clip")} for name in names}
        found = winrate.summarize(key, scores, [str(i) for i in range(n)], None, results)
        for records, new in zip(("scores", "win_rates"), found, strict=True):
            results[records] += new
    text = winrate.table(json.loads(json.dumps(results)))  # as it is read back from results.json
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    titles = "HPDv2: PickScore | HPDv2: CLIP | Parti-Prompts: PickScore | Parti-Prompts: CLIP"
    assert lines[0] == f"| model | against | {titles} |"
    rows = [line.split(" | ") for line in lines[2:5]]
    assert [row[:2] for row in rows] == [["| dpo", "base"], ["| inpo", "base"], ["| inpo", "dpo"]]
    assert [[cell.partition(" (")[2][:5] for cell in row[2:]] for row in rows] == [
        [""] * 4, ["79.25", "53.37", "72.89", "50.55"], ["59.28", "46.91", "56.92", "42.28"],
    ]  # fmt: skip
    record = next(r for r in results["win_rates"] if (r["model"], r["against"]) == ("inpo", "dpo"))
    assert rows[2][2] == winrate.rate_cell(record)
    assert "In parentheses: published (Lu et al., CVPR 2025, arXiv 2503.18454;" in text
    assert "HPDv2: 1,200 prompts, 1,200 images per model, 50 steps, guidance 5, float16" in text
    assert text.count("seeds from 7, the same for all models") == 1
    assert text.count("seeds not known for all models") == 1
    assert "category" not in text and "cost" not in text
    alone = [r for r in results["win_rates"] if r["against"] == "base" and r["model"] == "dpo"]
    assert "published" not in winrate.table(results | {"win_rates": alone})


def test_scores_have_the_digits_their_size_needs_and_shares_are_percent():
    rng, prompts = np.random.default_rng(7), [str(i) for i in range(50)]
    of = {"pickscore": 22, "aesthetic": 6, "clip": 0.3}
    scores = {
        name: {s: rng.normal(mean, 0.01, 50) for s, mean in of.items()}
        | {"faithfulness": np.array([1.0] * (45 + extra) + [0.0] * (5 - extra))}
        for name, extra in (("base", 0), ("new", 2))
    }
    averages, rates = summarize(scores, prompts)
    text = winrate.table(info(scores) | TABLE | {"scores": averages, "win_rates": rates})
    base, new = text.splitlines()[-2:]
    cells, of_base = base.split(" | "), scores["base"]
    means = [cells[k].partition(" ")[0] for k in (1, 3, 5, 7)]
    assert means == [
        f"{np.mean(of_base['pickscore']):.2f}",
        f"{np.mean(of_base['aesthetic']):.3f}",
        f"{np.mean(of_base['clip']):.4f}",
        "90.0",
    ]
    assert cells[2] == f"{np.median(of_base['pickscore']):.2f}" and cells[8] == " |"
    assert new.split(" | ")[8].startswith("+4.0 [+0.0, +")
    assert "faithfulness, % | change, points |" in text and "faithfulness" not in str(rates)


COSTS = {"method": "inpo", "steps": 400, "pairs": 409600, "unet_calls": 7782400, "flops": 5.262e19}
COSTS |= {"seconds": 93784.4, "devices": 8, "device": "H200", "device_hours": 208.41}
COSTS |= {"peak_memory": 3 * 2**34}


def test_table_has_the_cost_of_training():
    scores = {name: {"clip": np.arange(4.0)} for name in ("base", "new")}
    averages, rates = summarize(scores, list("abcd"))
    results = info(scores) | TABLE | {"scores": averages, "win_rates": rates}
    assert "cost" not in winrate.table(results)
    text = winrate.table(results | {"costs": {"new": COSTS}})
    assert text.rstrip().endswith(
        "| new | inpo | 400 | 409,600 | 7,782,400 | 5.26e+19 | 26:03:04 | 208 (8 x H200) | 48.00 |"
    )
    assert [winrate.clock(s) for s in (0.4, 59.6, 3599.6)] == ["0:00:00", "0:01:00", "1:00:00"]
