"""Laws of winrate.py: win rates, intervals, categories."""

import math

import numpy as np
import pytest

from evaluation import winrate

Z2 = 1.959963984540054**2  # squared 97.5 % point of the normal distribution


# --------------------------------------------------------------------------------------------------
# Win rates and intervals.


def test_wins_losses_and_ties_are_all_pairs_and_swap_with_the_models():
    rng, prompts = np.random.default_rng(1), [str(i % 30) for i in range(300)]
    a, b = rng.integers(0, 5, 300), rng.integers(1, 6, 300)
    ab, ba = winrate.win_rate(a, b, prompts), winrate.win_rate(b, a, prompts)
    assert ab["ties"] == ba["ties"] > 20
    assert ab["rate"] + ba["rate"] + ab["ties"] / 300 == pytest.approx(1, abs=1e-12)
    assert (ab["wins"], ab["losses"]) == (ba["losses"], ba["wins"]) == (sum(a > b), sum(a < b))
    assert ab["low"] < ab["rate"] < ab["high"] and ab["rate"] < ba["rate"]
    same = winrate.win_rate(a, a, prompts)
    assert [same[key] for key in ("wins", "losses", "ties", "n")] == [0, 0, 300, 300]
    assert same["rate"] == same["low"] == 0


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


def test_share_interval_knows_how_alike_the_images_of_a_prompt_are():
    """400 images of which 3 in 4 win: 399 values, 99 where four agree, and never more than 400. The
    third number is the tabulated 97.5 % point of Student's t."""
    k = np.arange(400)
    alone = winrate.interval(k % 4 > 0, k, share=True)
    assert alone == pytest.approx(winrate.wilson(0.75, 399, 1.965927))
    agreeing = winrate.interval(k // 4 % 4 > 0, k // 4, share=True)
    assert agreeing == pytest.approx(winrate.wilson(0.75, 99, 1.984217))
    even = k % 4 > 0  # 3 of the 4 images of every prompt, but for two prompts
    even[[0, 5]] = True, False
    capped = winrate.interval(even, k // 4, share=True)
    assert capped == pytest.approx(winrate.wilson(0.75, 400, 1.984217))
    few = winrate.interval([1, 1, 0], list("abc"), share=True)
    assert few == pytest.approx(winrate.wilson(2 / 3, 2, 4.302653))


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


def summarize(scores, prompts, categories=None):
    info = {"models": {name: {"architecture": None, "size": None} for name in scores}}
    info["sets"] = {"set": {}}
    return winrate.summarize("set", scores, prompts, categories, info)


def test_changes_are_paired():
    """Prompts differ by far more than models do: only differences within a pair show the change."""
    rng, prompts = np.random.default_rng(4), [str(i % 40) for i in range(400)]
    base = np.tile(rng.uniform(0, 1, 40), 10)
    better = base + 0.02 + rng.normal(0, 0.02, 400)
    right = (rng.random(400) < 0.9).astype(float)
    old = {"preference": base, "faithfulness": right}
    new = {"preference": better, "faithfulness": 1 - 0 * right}
    averages, rates = summarize({"base": old, "new": new}, prompts)
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
    _, rates = summarize(scores, prompts, categories)
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
