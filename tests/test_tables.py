"""Laws of published.py and tables.py: published numbers, and the table for people."""

import json

import numpy as np

from evaluation import published, tables, winrate


def info(models, prompts=40, prompt_set="set", architecture=None, size=None) -> dict:
    about = {"architecture": architecture, "size": size}
    drawn = {"prompts": prompts, "images": prompts, "steps": 50}
    drawn["guidance"] = published.GUIDANCE.get(architecture)
    return {"models": {name: about for name in models}, "sets": {prompt_set: drawn}}


# --------------------------------------------------------------------------------------------------
# Published numbers.


def rate(architecture, against, prompt_set, scorer, name="inpo", size=None, prompts=None):
    size = size or published.NATIVE.get(architecture)
    prompts = prompts or published.PUBLISHED_PROMPTS.get(prompt_set, 100)
    about = info((name, against), prompts, prompt_set, architecture, size)
    return published.published_rate(name, against, prompt_set, scorer, about)


def test_published_rates_are_those_of_the_paper():
    """Each is a count of 3200 or 1632, printed with two digits: a mistyped digit would show. Two of
    them are none as they were printed."""
    found = {
        (*models, prompt_set, scorer): (rate(*models, prompt_set, scorer), n)
        for models in published.PUBLISHED
        for prompt_set, n in published.PUBLISHED_PROMPTS.items()
        for scorer in published.PUBLISHED_SCORERS
    }
    odd = [x for x, n in found.values() if abs(round(x * n / 100) / n * 100 - x) > 0.0051]
    assert len(found) == 56 and odd == [72.89, 69.70]
    assert found["sdxl", "base", "hpdv2", "pickscore"][0] == 79.25
    assert found["sdxl", "dpo", "parti", "clip"][0] == 42.28
    assert found["sd15", "kto", "hpdv2", "aesthetic"][0] == 59.81
    assert rate("sd15", "SFT", "parti", "hps", name="InPO") == 58.03


def test_published_rates_are_shown_for_nothing_else():
    right = ("sdxl", "base", "hpdv2", "hps")
    assert rate(*right) == 85.38
    for other in (("sdxl", "kto", *right[2:]), ("sdxl", "base", "toy", "hps"), (None, *right[1:])):
        assert rate(*other) is None
    assert rate(*right[:3], "hps-v2.0") is None
    assert rate(*right, name="mine") is None
    assert rate(*right, size=512) is None  # not its native size, such as the tiny model
    assert rate(*right, prompts=400) is None  # a part of the set
    about = info(("inpo", "base"), 3200, "hpdv2", "sdxl", 1024)
    for other in ({"steps": 25}, {"guidance": 7.5}, {"guidance": None}, {"images": 6400}):
        drawn = about | {"sets": {"hpdv2": about["sets"]["hpdv2"] | other}}
        assert published.published_rate("inpo", "base", "hpdv2", "hps", drawn) is None
    about["models"]["base"] = {"architecture": "sd15", "size": 512}
    assert published.published_rate("inpo", "base", "hpdv2", "hps", about) is None


# --------------------------------------------------------------------------------------------------
# The table.

ABOUT = {"prompts": 1200, "images": 1200, "steps": 50, "guidance": 5.0, "dtype": "float16"}
RATE = {"category": None, "wins": 793, "losses": 207, "ties": 0, "n": 1000, "rate": 0.793}
RATE |= {"low": 0.7781, "high": 0.8059, "published": None}


def judged(scores: dict, categories=None, **changes) -> dict:
    """results.json of scores {set: {model: {scorer: numbers}}}, a number per prompt."""
    names = list(next(iter(scores.values())))
    results = info(names) | {"sets": dict.fromkeys(scores, ABOUT | {"first_seed": 7})}
    results |= {"costs": {}, "scores": [], "win_rates": []} | changes
    for key, rows in scores.items():
        n = len(next(iter(rows[names[0]].values())))
        found = winrate.summarize(key, rows, [str(i) for i in range(n)], categories, results)
        results["scores"] += found[0]
        results["win_rates"] += found[1]
    return json.loads(json.dumps(results))  # as it is read back


def test_a_cell_shows_interval_and_published_rate_and_ties_only_where_there_are_some():
    assert tables.rate_cell(RATE) == "79.3 [77.8, 80.6]"
    assert tables.rate_cell(RATE | {"published": 79.25}) == "79.3 [77.8, 80.6] (79.25)"
    assert tables.rate_cell(RATE | {"ties": 3}) == "79.3 [77.8, 80.6], ties 0.3"
    both = tables.rate_cell(RATE | {"ties": 1, "n": 3200, "published": 79.0})
    assert both == "79.3 [77.8, 80.6] (79.00), ties < 0.1"


def test_table_has_the_published_layout(monkeypatch):
    """A row per pair; columns are the scorers within each prompt set."""
    monkeypatch.setitem(published.PUBLISHED_PROMPTS, "hpdv2", 1200)
    monkeypatch.setitem(published.PUBLISHED_PROMPTS, "parti", 16)
    names, rng = ("base", "dpo", "inpo"), np.random.default_rng(6)
    sets = {"hpdv2": ABOUT | {"first_seed": 7}, "parti": ABOUT | {"first_seed": None}}
    sets["parti"] |= {"prompts": 16, "images": 16}
    scorers = ("pickscore", "hps")
    scores = {
        key: {name: {scorer: rng.normal(size=16) for scorer in scorers} for name in names}
        for key in sets
    }
    models = info(names, architecture="sdxl", size=1024)["models"]
    results = judged(scores, models=models, sets=sets)
    text = tables.table(results)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    titles = (
        "HPDv2: PickScore | HPDv2: HPS v2.1 | Parti-Prompts: PickScore | Parti-Prompts: HPS v2.1"
    )
    assert lines[0] == f"| model | against | {titles} |"
    rows = [line.split(" | ") for line in lines[2:5]]
    assert [row[:2] for row in rows] == [["| dpo", "base"], ["| inpo", "base"], ["| inpo", "dpo"]]
    assert [[cell.partition(" (")[2][:5] for cell in row[2:]] for row in rows] == [
        [""] * 4, ["79.25", "85.38", "72.89", "78.31"], ["59.28", "65.81", "56.92", "60.11"],
    ]  # fmt: skip
    record = next(r for r in results["win_rates"] if (r["model"], r["against"]) == ("inpo", "dpo"))
    assert rows[2][2] == tables.rate_cell(record)
    assert "In parentheses: published (Lu et al., CVPR 2025, arXiv 2503.18454;" in text
    assert "HPDv2: 1,200 prompts, 1,200 images per model, 50 steps, guidance 5, float16" in text
    assert text.count("seeds from 7, the same for all models") == 1
    assert text.count("seeds not known for all models") == 1
    assert "category" not in text and "cost" not in text
    guess = "ours is v2.1, a guess"
    assert guess in text
    other = [r for r in results["win_rates"] if r["scorer"] == "pickscore"]
    text = tables.table(results | {"win_rates": other})
    assert "published" in text and guess not in text
    other = [r for r in results["win_rates"] if r["model"] == "dpo"]
    assert "published" not in tables.table(results | {"win_rates": other})


def test_categories_have_a_column_each():
    categories = ["people"] * 2 + ["food | drink"] * 3
    scores = {name: {"clip": np.arange(5.0) * k} for k, name in enumerate(("one", "two"))}
    results = judged({"set": scores}, categories)
    head, _, row = tables.table(results).splitlines()[-5:-2]
    assert head == r"| model | against | people (2) | food \| drink (3) |"
    cells = [tables.rate_cell(r) for r in results["win_rates"][1:]]
    assert row == f"| two | one | {' | '.join(cells)} |" and "### set: CLIP" in tables.table(
        results
    )


def test_scores_have_the_digits_their_size_needs_and_shares_are_percent():
    rng = np.random.default_rng(7)
    of = {"pickscore": 22, "aesthetic": 6, "clip": 0.3}
    scores = {
        name: {s: rng.normal(mean, 0.01, 50) for s, mean in of.items()}
        | {"faithfulness": np.arange(50) < right}
        for name, right in (("base", 45), ("new", 47))
    }
    results = judged({"set": scores})
    text, of_base = tables.table(results), scores["base"]
    base, new = text.splitlines()[-2:]
    cells = base.split(" | ")
    assert [cells[k].partition(" ")[0] for k in (1, 3, 5, 7)] == [
        f"{of_base['pickscore'].mean():.2f}", f"{of_base['aesthetic'].mean():.3f}",
        f"{of_base['clip'].mean():.4f}", "90.0",
    ]  # fmt: skip
    assert cells[2] == f"{np.median(of_base['pickscore']):.2f}" and cells[8] == " |"
    assert new.split(" | ")[8].startswith("+4.0 [+0.0, +")
    assert "faithfulness, % | change, points |" in text
    assert "faithfulness" not in str(results["win_rates"])


COSTS = {"method": "inpo", "steps": 400, "pairs": 409600, "unet_calls": 7782400, "flops": 5.262e19}
COSTS |= {"seconds": 93784.4, "devices": 8, "device": "H200", "device_hours": 208.41}
COSTS |= {"peak_memory": 3 * 2**34}


def test_table_has_the_cost_of_training():
    results = judged({"set": {name: {"clip": np.arange(4.0)} for name in ("base", "new")}})
    assert "cost" not in tables.table(results)
    text = tables.table(results | {"costs": {"new": COSTS}})
    assert text.rstrip().endswith(
        "| new | inpo | 400 | 409,600 | 7,782,400 | 5.26e+19 | 26:03:04 | 208 (8 x H200) | 48.00 |"
    )
    assert [tables.clock(s) for s in (0.4, 59.6, 3599.6)] == ["0:00:00", "0:01:00", "1:00:00"]
