"""Laws of votes.py and people.py: what people say becomes a scorer, or one sentence."""

import itertools
import json
import sys

import numpy as np
import pytest
from conftest import refusal

from evaluation import people, tables, votes, winrate
from evaluation.votes import Vote

NAMES = ["base", "dpo", "inpo"]
IDENTITIES = {"base": "aa", "dpo": "bb", "inpo": None}
IMAGES = [{"prompt": f"prompt {k % 4}", "seed": k} for k in range(8)]
SETS = {"toy": IMAGES, "theirs": [{"prompt": "one", "seed": None}] * 2}
ROW = {"set": "toy", "image": 3, "prompt": "prompt 3", "seed": 3, "models": ["inpo", "base"]}
ROW |= {"choice": "left", "time": "2026-11-29T10:31:06.000Z"}


@pytest.fixture
def saved(tmp_path):
    """saved(name, *rows, key=value, ...) -> a file of votes."""

    def save(name: str, *rows, **keys):
        content = {"judge": "anna", "models": IDENTITIES, "votes": list(rows)} | keys
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    return save


def read(*paths) -> list[Vote]:
    return votes.read(list(paths), SETS, IDENTITIES)


# --------------------------------------------------------------------------------------------------
# Files.


def test_a_vote_is_of_the_picture_wherever_it_stood(saved):
    sides = [ROW, ROW | {"models": ["base", "inpo"], "choice": "right", "seed": 2, "image": 2}]
    sides[1]["prompt"] = "prompt 2"
    one, two = read(saved("a.json", *sides))
    assert one == Vote("anna", "toy", 3, "base", "inpo", -1, False)
    assert two == Vote("anna", "toy", 2, "base", "inpo", -1, True)
    (tie,) = read(saved("b.json", ROW | {"choice": "tie"}))
    assert tie.value == 0


def test_votes_find_their_picture_by_seed_or_by_number_where_nobody_knows_the_seed(saved):
    limited = {"toy": IMAGES[1::2], "theirs": SETS["theirs"]}  # as --limit leaves them
    number = {"set": "theirs", "image": 1, "prompt": "one", "seed": None}
    path = saved("a.json", ROW, ROW | number)
    assert [v.image for v in votes.read([path], limited, IDENTITIES)] == [1, 1]
    assert [v.image for v in read(path)] == [3, 1]


def test_judges_without_a_name_are_called_by_their_file(saved):
    paths = saved("a.json", ROW, judge=""), saved("b.json", ROW | {"choice": "tie"}, judge=" ")
    assert [vote.judge for vote in read(*paths)] == ["a.json", "b.json"]


WRONG = {
    "vote 1: is no object; save it again": [3],
    "vote 2: judges the same pair as vote 1": [ROW, ROW | {"models": ["base", "inpo"]}],
    "vote 1: 'mine' is none of --models, which are base, dpo, inpo": [
        ROW | {"models": ["mine", "base"]},
    ],
    "vote 1: models is no list of two names": [ROW | {"models": ["base"]}],
    "vote 1: compares 'base' with itself": [ROW | {"models": ["base", "base"]}],
    "vote 1: choice is 'both', not left, right or tie": [ROW | {"choice": "both"}],
    "vote 1: choice is ['left'], not": [ROW | {"choice": ["left"]}],
    "vote 1: its prompt set 'parti' is none of those judged, toy, theirs": [ROW | {"set": "parti"}],
    "vote 1: its prompt set [] is none": [ROW | {"set": []}],
    "vote 1: toy has no picture of the prompt 'a dog' and seed 3": [ROW | {"prompt": "a dog"}],
    "vote 1: toy has no picture of the prompt 'prompt 3' and seed 99": [ROW | {"seed": 99}],
    "vote 1: toy has no picture of the prompt 'None' and seed '3'": [
        ROW | {"prompt": None, "seed": "3"},
    ],
    "vote 1: theirs has no picture of the prompt 'one' and image 2": [
        ROW | {"set": "theirs", "prompt": "one", "seed": None, "image": 2},
    ],
    "holds no votes; leave it out.": [],
}  # fmt: skip


@pytest.mark.parametrize("sentence", WRONG)
def test_each_wrong_row_is_one_sentence_with_file_and_row(sentence, saved):
    path = saved("a.json", *WRONG[sentence])
    said = refusal(read, path)
    assert said.startswith(str(path)) and sentence in said


def test_each_wrong_file_is_one_sentence(saved, tmp_path):
    (tmp_path / "bad.json").write_text('{"votes": [')
    (tmp_path / "list.json").write_text("[]")
    for name, words in {
        "bad.json": "cannot be read (Expecting",
        "list.json": "no JSON object",
    }.items():
        assert words in refusal(read, tmp_path / name)
    assert "no.json cannot be read (No such file or directory)" in refusal(
        read, tmp_path / "no.json"
    )
    for keys in ({"votes": {}}, {"judge": 3}, {"models": ["base"]}):
        assert "is no file of votes, with judge, models and votes" in refusal(
            read, saved("a.json", ROW, **keys)
        )
    other = refusal(read, saved("a.json", ROW, models={"base": "cc"}))
    assert "its votes are on other weights of 'base' (cc there, aa now)" in other
    read(saved("a.json", ROW, models={"inpo": "cc", "dpo": None}))  # nobody knows


def test_a_judge_counts_once(saved):
    tie = ROW | {"choice": "tie"}
    said = refusal(read, saved("a.json", ROW), saved("b.json", tie))
    assert "a.json and" in said and "b.json are both of judge 'anna'; leave out the older" in said
    said = refusal(read, saved("a.json", ROW), saved("b.json", ROW, judge="ben"))
    assert "hold the same votes" in said
    assert len(read(saved("a.json", ROW), saved("b.json", tie, judge="ben"))) == 2


def test_a_library_that_is_not_installed_is_told_of_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "krippendorff", None)  # an import fails
    votes.needs_library(["a.json"])
    said = refusal(votes.needs_library, ["a.json", "b.json"])
    assert "pip install krippendorff" in said


# --------------------------------------------------------------------------------------------------
# Statistics.


def cast(values, judge: str = "anna", pair=("base", "inpo"), start: int = 0) -> list[Vote]:
    """A judge's votes on images start, start + 1, ...; None: no vote."""
    seen = [(k, value) for k, value in enumerate(values, start) if value is not None]
    return [Vote(judge, "toy", k, *pair, value, k % 2 == 0) for k, value in seen]


def test_alpha_is_that_of_krippendorffs_own_example():
    """Meg's and Owen's ten articles (Computing Krippendorff's alpha-reliability, 2011, example A):
    4 of 10 differ, 14 zeros and 6 ones, alpha = 1 - 19 * 4 / (14 * 6) = 0.095. An article that one
    of them alone has seen changes nothing."""
    meg, owen = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    for other in (0, -1):  # of the two values, which are names alone
        said = [[1 if one else other for one in row] for row in (meg, owen)]
        given = cast([*said[0], 1], "meg") + cast(said[1], "owen")
        assert (
            people.alpha(given)
            == pytest.approx(1 - 19 * 4 / (14 * 6))
            == pytest.approx(0.0952, abs=1e-4)
        )


def test_alpha_equals_the_formula_where_judges_miss_pairs():
    """1 - observed over expected disagreement, counted vote by vote."""
    rng = np.random.default_rng(3)
    table = rng.choice([1, 0, -1], (4, 30), p=[0.6, 0.1, 0.3])
    table[1:3] = np.where(rng.random((2, 30)) < 0.6, table[0], table[1:3])
    missing = rng.random((4, 30)) < 0.4
    rows = [
        [None if m else int(v) for v, m in zip(*pair, strict=True)]
        for pair in zip(table, missing, strict=True)
    ]
    given = [vote for k, row in enumerate(rows) for vote in cast(row, f"judge {k}")]
    units = [[row[u] for row in rows if row[u] is not None] for u in range(30)]
    units = [unit for unit in units if len(unit) > 1]
    every = [value for unit in units for value in unit]
    n = len(every)
    differ = sum(sum(a != b for a, b in itertools.permutations(u, 2)) / (len(u) - 1) for u in units)
    by_chance = sum(a != b for a, b in itertools.permutations(every, 2)) / (n - 1)
    assert (
        people.alpha(given) == pytest.approx(1 - differ / by_chance) and 0 < people.alpha(given) < 1
    )


def test_limits_of_alpha():
    same = [1, -1, 0, 1, -1]
    assert people.alpha(cast(same, "a") + cast(same, "b")) == 1
    assert people.alpha(cast([1, -1], "a") + cast([-1, 1], "b")) < 0
    assert people.alpha(cast(same)) is None  # nobody to agree with
    assert people.alpha(cast([1, 1], "a") + cast([1, 1], "b")) is None  # 0 / 0
    assert people.alpha(cast([1, -1], "a") + cast([1, -1], "b", start=2)) is None  # no pair of both
    other = cast([1, -1], "b", pair=("base", "dpo"))
    assert people.alpha(cast([1, -1], "a") + other) is None


def test_win_rates_are_shares_of_votes_and_swap_with_the_models():
    prompts = [f"p{k % 5}" for k in range(20)]
    rng = np.random.default_rng(0)
    given = cast(rng.choice([1, 0, -1], 20).tolist(), "a") + cast(
        rng.choice([1, 0, -1], 9).tolist(), "b"
    )
    (one,) = people.records("toy", given, NAMES, prompts, None)
    turned = [v._replace(first=v.second, second=v.first, value=-v.value) for v in given]
    (two,) = people.records("toy", turned, NAMES[::-1], prompts, None)
    assert (one["model"], one["against"], one["n"]) == ("inpo", "base", 29)
    assert one["wins"] == sum(v.value == -1 for v in given) == two["losses"]
    assert one["wins"] + one["losses"] + one["ties"] == 29 and two["wins"] == one["losses"]
    assert one["rate"] + two["rate"] + one["ties"] / 29 == pytest.approx(1)
    assert one["low"] <= one["rate"] <= one["high"]
    assert list(one) == [*winrate_keys(), "published"]


def winrate_keys() -> list[str]:
    rows = {name: {"clip": [0.0, 1.0]} for name in ("x", "y")}
    about = {"models": dict.fromkeys("xy", {"architecture": None, "size": None}), "sets": {"s": {}}}
    return [
        k for k in winrate.summarize("s", rows, ["a", "b"], None, about)[1][0] if k != "published"
    ]


def test_categories_are_judged_apart_and_what_nobody_judged_has_no_record():
    categories = ["warm", "cold"] * 3 + ["odd"] * 2
    prompts = [str(k) for k in range(8)]
    found = people.records("toy", cast([1, -1, 1, -1, 1, -1]), NAMES, prompts, categories)
    rates = {r["category"]: (r["rate"], r["n"]) for r in found}
    assert rates == {None: (0.5, 6), "warm": (0, 3), "cold": (1, 3)}
    assert people.records("other", cast([1]), NAMES, prompts, None) == []


def test_the_interval_of_one_judge_is_that_of_a_share_over_prompts():
    rng = np.random.default_rng(1)
    prompts = [f"p{k}" for k in rng.integers(12, size=60)]
    values = rng.random(60) < 0.7
    ours = people.interval(values, prompts, ["anna"] * 60)
    assert ours == pytest.approx(winrate.interval(values, prompts, share=True))
    assert people.interval([1.0] * 60, prompts, ["anna"] * 60) == pytest.approx(
        winrate.interval([1.0] * 60, prompts, share=True)
    )


def test_judges_who_differ_widen_the_interval_and_those_who_agree_hardly():
    prompts = [f"p{k}" for k in range(40)] * 2
    judges = ["a"] * 40 + ["b"] * 40

    def width(values, judges=judges) -> float:
        low, high = people.interval(values, prompts, judges)
        return high - low

    agree = [k % 4 > 0 for k in range(40)] * 2
    differ = [True] * 40 + [k % 2 == 0 for k in range(40)]  # the same rate, 3/4
    assert np.mean(agree) == np.mean(differ) == 0.75
    assert width(differ) > 2 * width(agree)
    assert width(agree) == pytest.approx(width(agree, ["a"] * 80), rel=0.02)


def test_agreement_of_a_scorer_is_the_share_of_votes_on_its_side():
    scores = {name: {"right": [k * 1.0] * 8, "wrong": [-k] * 8, "tied": [0] * 8}
              for k, name in enumerate(NAMES)}  # fmt: skip
    prompts = [str(k) for k in range(8)]
    given = cast(
        [-1, -1, -1, 1, 0, None, -1, -1]
    )  # inpo, the second, wins 5 of 6; a tie is left out
    found = {r["scorer"]: r for r in people.agreement("toy", given, scores, prompts)}
    assert {name: r["share"] for name, r in found.items()} == {
        "right": pytest.approx(5 / 6), "wrong": pytest.approx(1 / 6), "tied": 0.5,
    }  # fmt: skip
    assert all(r["n"] == 6 and r["low"] <= r["share"] <= r["high"] for r in found.values())
    assert people.agreement("toy", [], scores, prompts) == []


def test_what_is_said_of_votes_names_judges_alpha_and_sides():
    given = cast([1, -1, 1, 1], "anna") + cast([1, -1, -1], "ben")
    found = people.about("toy", given, {name: {} for name in NAMES}, [str(k) for k in range(4)])
    assert (found["judges"], found["pairs"], found["shared"]) == ({"anna": 4, "ben": 3}, 4, 3)
    assert found["left"] == pytest.approx(5 / 7)  # on even images first is left, on odd ones right
    said = people.words(found)
    assert "7 votes of 2 judges (anna 4, ben 3) on 4 pairs of pictures, 3 of them judged by" in said
    assert f"is {people.alpha(given):.2f}. The left picture won 71 %" in said
    alone = people.words(people.about("toy", cast([1]), {name: {} for name in NAMES}, ["p"]))
    assert alone.startswith("1 vote of 1 judge (anna 1) on 1 pair of pictures. The interval of a")


def test_the_table_has_a_column_and_a_section_of_people():
    prompts = [str(k) for k in range(4)]
    given = cast([-1, -1, -1, 1]) + cast([-1], pair=("base", "dpo"))
    about = {
        "prompts": 4,
        "images": 4,
        "steps": 2,
        "guidance": 1.0,
        "dtype": "float32",
        "first_seed": 0,
    }
    results = {"models": dict.fromkeys(NAMES), "sets": {"toy": about}, "scores": [], "costs": {}}
    scores = {name: {"clip": [float(k)] * 4} for k, name in enumerate(NAMES)}
    results["win_rates"] = people.records("toy", given, NAMES, prompts, ["x", "x", "y", "y"])
    results["people"] = {"toy": people.about("toy", given, scores, prompts)}
    text = tables.table(results)
    assert "| model | against | toy: people |" in text and "## People\n\n5 votes of 1 judge" in text
    assert "| inpo | base | 75.0 [" in text and "| inpo | dpo |  |" in text
    assert "| CLIP | 80.0 [" in text and "| model | against | x | y (2) |" in text
    assert "over prompts; of people, over prompts and judges." in text
