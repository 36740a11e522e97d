"""Scorers of a user's own: what they are given, what they may return, where a changed one is
noticed, and evaluate.py without any scorer."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import test_evaluate
import test_pairs_make
from conftest import refusal
from conftest import refuse as refuse_training
from PIL import Image
from test_evaluate import refused, run
from test_preview import settings

import pairs
import toy
from evaluation import own, scorers
from system import hub
from system.files import ROOT
from training.preview import Preview

stub, making = test_evaluate.stub, test_pairs_make.stub  # fixtures
BRIGHT = "[sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]"


def write(path, body: str, top: str = "", name: str = "score") -> str:
    """FILE:FUNCTION of a new file, which another process would import."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(f"{top}\n\n\ndef {name}(images, prompts):\n    {body}\n")
    own._module.cache_clear()
    return f"{path}:{name}"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)


def brightness(image: Image.Image) -> float:
    return sum(image.convert("RGB").resize((1, 1)).getpixel((0, 0))) / 765


# -------------------------------------------------------------------------------------------------
# What it is given, and what it may return.


def test_it_gets_rgb_pictures_and_their_prompts_and_no_gradients(tmp_path):
    top = "import torch\nseen = []"
    body = "seen.append((images, prompts, torch.is_grad_enabled())); return [0.5] * len(images)"
    text = write(tmp_path / "mine.py", body, top)
    grey, clear = Image.new("L", (5, 7)), Image.new("RGBA", (9, 3))
    assert scorers.load(text)([grey, clear], ["a", "b"]) == [0.5, 0.5]
    ((images, prompts, gradients),) = own.imported(text).function.__globals__["seen"]
    assert [(image.mode, image.size) for image in images] == [("RGB", (5, 7)), ("RGB", (9, 3))]
    assert prompts == ["a", "b"] and not gradients
    assert scorers.load(text)([], []) == []


@pytest.mark.parametrize(
    "returned",
    ["[1, 2.5, True]", "(1, 2.5, 1)", "numpy.array([1, 2.5, 1], 'float32')",
     "torch.tensor([1, 2.5, 1], requires_grad=True)", "torch.tensor([1, 2.5, 1]).bfloat16()",
     "[numpy.float32(1), torch.tensor(2.5), 1]"],
)  # fmt: skip
def test_lists_arrays_and_tensors_are_the_same_floats(returned, tmp_path):
    text = write(tmp_path / "mine.py", f"return {returned}", "import numpy, torch")
    found = scorers.load(text)([Image.new("RGB", (4, 4))] * 3, ["a"] * 3)
    assert found == [1.0, 2.5, 1.0] and all(type(value) is float for value in found)


def test_a_file_is_imported_once_with_its_folder_on_the_path_and_a_package_by_its_name(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "beside_mine.py").write_text("LEVEL = 0.25\n")
    top = "import beside_mine\nfrom pathlib import Path\nPath('log').open('a').write('x')"
    text = write(tmp_path / "there" / "mine.py", "return [beside_mine.LEVEL] * len(images)", top)
    for _ in range(2):
        scorers.check(text, [])
        assert scorers.load(text)([Image.new("RGB", (4, 4))], ["a"]) == [0.25]
    assert Path("log").read_text() == "x"
    (tmp_path / "there" / "some_package.py").write_text("def f(images, prompts): return [7]\n")
    assert scorers.load("some_package:f")([Image.new("RGB", (4, 4))], ["a"]) == [7.0]


MISTAKES = {
    "a wrong count": ("return [1.0]", "returned 1 numbers for 2 pictures"),
    "one number": ("return 1.0", "returned a float, not a list of 2 numbers"),
    "nothing": ("pass", "returned a NoneType, not a list"),
    "nan": ("return [0.0, float('nan')]", "returned nan for 'a dog', picture 2 of 2, no finite"),
    "infinity": ("return [float('inf')] * 2", "returned inf for 'a cat', picture 1 of 2"),
    "texts": ("return ['1'] * 2", "returned '1' for 'a cat'"),
    "a column": ("return [[1.0], [2.0]]", "returned [1.0] for 'a cat'"),
    "an exception": (
        "return [1 / 0]",
        "line 5 of {file}, `return [1 / 0]`: ZeroDivisionError: div",
    ),
    "lines": ("raise KeyError('a\\nb')", "line 5 of {file}"),
    "no text": ("assert False", "line 5 of {file}, `assert False`: AssertionError."),
    "it ends": ("exit(3)", "line 5 of {file}, `exit(3)`: SystemExit: 3."),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_wrong_with_a_function_is_one_sentence_before_anything_is_drawn(name, tmp_path):
    body, words = MISTAKES[name]
    text = write(tmp_path / "mine.py", body)
    said = refusal(scorers.check, text, ["a cat", "a dog", "a bird"])
    assert said.startswith("scorer mine.py:score: ")
    assert words.format(file=tmp_path / "mine.py") in said


def test_a_file_that_cannot_be_taken_is_one_sentence(tmp_path):
    mine = tmp_path / "mine.py"
    text = write(mine, "return []", "import json as other\nlimit = 3")
    (tmp_path / "half.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "lost.py").write_text("x = 1\nimport no_such_package\n")
    (tmp_path / "over.py").write_text("def f(images):\n    return [1.0] * len(images)\n")
    for given, words in {
        f"{tmp_path}/none.py:score": [f"there is no file '{tmp_path}/none.py'"],
        text.replace("score", "sharp"): ["has no function 'sharp'; it has score."],
        f"{mine}:limit": ["'limit' in", "is no function"],
        f"{tmp_path}/half.py:f": ["line 2 of", "`def f(:`: SyntaxError"],
        f"{tmp_path}/lost.py:f": ["line 2 of", "`import no_such_package`: ModuleNotFoundError"],
        f"{tmp_path}/over.py:f": ["TypeError: f() takes 1 positional argument"],
        "no_such_package.module:f": ["cannot be imported", "ModuleNotFoundError"],
    }.items():
        said = refusal(scorers.check, given, [])
        assert all(word in said for word in words), said


def test_flags_take_names_and_functions_alone(stub, capsys):
    for wrong in ("mine.py", "mine.py:", ":score", "a/b:score", "beauty"):
        said = refused(capsys, "--scorers", "clip", wrong)
        assert f"invalid choice: '{wrong}' (choose from 'preference'" in said
    for flags in (["--scorers", "none", "clip"], ["--scorers", "a/m.py:f", "b/m.py:f"]):
        assert refused(capsys, *flags).count(".") and not stub.calls


# -------------------------------------------------------------------------------------------------
# evaluate.py.


def test_without_scorers_there_are_pictures_and_facts_and_no_file(stub, monkeypatch, capsys):
    Path("mine.txt").write_text("a photo of a dog\na lake at night\n")
    monkeypatch.setattr(toy, "draw", lambda *how: Image.new("RGB", (9, 9)))
    asked = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda *given, **more: asked.append(given))
    results = run("--prompts", "mine.txt", "--scorers", "none", "--steps", "7")
    assert results["scores"] == results["win_rates"] == [] and not asked
    assert Image.open("out/mine.png").size > (200, 200)
    text = Path("out/table.md").read_text()
    assert "mine: 2 prompts, 2 images per model, 7 steps" in text
    assert "Scores" not in text and "|" not in text and "95 %" not in text
    assert set(json.loads(Path("out/results.json").read_text())["models"]) == {"base", "vivid"}
    drawn = len(stub.calls)
    monkeypatch.setattr(hub, "hf_hub_download", offline)
    said = refused(capsys, "--prompts", "mine.txt", "--steps", "7")  # the default needs files
    assert said.endswith("; or give --scorers none, for pictures alone.")
    text = write("m.py", f"return {BRIGHT}")
    results = run("--prompts", "mine.txt", "--steps", "7", "--scorers", text)
    assert len(results["scores"]) == 2 and len(stub.calls) == drawn  # judged, not drawn again


def offline(*given, **more):
    raise ConnectionError("no network")


def test_a_function_stands_beside_named_scorers_under_its_own_name(stub):
    text = write("far/away/mine.py", f"return {BRIGHT}")
    results = run("--scorers", text, "preference", "--seeds", "2", "--limit", "3")
    assert {r["scorer"] for r in results["win_rates"]} == {"mine.py:score", "preference"}
    assert results["functions"] == {"mine.py:score": own.imported(text).digest}
    kept = json.loads(Path("out/scores.json").read_text())["toy"]
    for model, files in kept["files"].items():
        expected = [brightness(Image.open(Path("out/images/toy", model, file))) for file in files]
        assert kept["scores"][model]["mine.py:score"] == pytest.approx(expected, abs=1e-9)
    table = Path("out/table.md").read_text()
    assert "| toy: mine.py:score |" in table and "far" not in table


def test_a_changed_function_scores_anew_and_the_earlier_table_is_set_aside(stub, capsys):
    flags = ["--limit", "3", "--scorers"]
    run(*flags, write("mine.py", f"return {BRIGHT}"))
    before, drawn = Path("out/scores.json").read_bytes(), len(stub.calls)
    run(*flags, write("mine.py", f"return {BRIGHT}"))
    assert not list(Path("out").glob("scores-*.json"))
    run(*flags, write("mine.py", f"return {BRIGHT}  # the same numbers, by another text"))
    (aside,) = Path("out").glob("scores-*.json")
    assert aside.read_bytes() == Path("out/scores.json").read_bytes() == before
    run(*flags, write("mine.py", "return [float(len(p)) for p in prompts]"))
    assert Path("out/scores.json").read_bytes() != before and len(stub.calls) == drawn


def test_a_function_that_fails_is_told_of_before_a_model_draws(stub, capsys):
    text = write("mine.py", "return [image.nothing for image in images]")
    said = refused(capsys, "--scorers", text)
    assert "line 5 of" in said and "AttributeError" in said and not stub.calls
    assert not Path("out").exists()


# -------------------------------------------------------------------------------------------------
# train_inpo.py and pairs.py.


def test_a_run_refuses_a_wrong_judge_before_weights_are_loaded(argv, capsys, tmp_path):
    text = write("mine.py", "return [0.0]")
    said = refuse_training([*argv(sample_every=1), f"--judge={text}"], capsys)
    assert "scorer mine.py:score: it returned 1 numbers for 2 pictures." in said
    assert not (tmp_path / "run").exists()
    said = refuse_training([*argv(sample_every=1), "--judge=beauty"], capsys)
    assert "choose from 'preference'" in said and "'held-out', 'none', FILE.py:FUNCTION" in said


def test_previews_are_judged_by_it_and_an_earlier_text_is_no_rival(tmp_path):
    (tmp_path / "samples").mkdir()

    def judged(step: int, text: str) -> tuple[dict, bool]:
        preview = Preview(settings(tmp_path, judge=text), ["a", "b"])
        for path in preview.starts():
            Image.new("RGB", (8, 8), "black").save(path)
        return preview.compare(step, [Image.new("RGB", (8, 8), "gray")] * 2)

    text = write("mine.py", f"return {BRIGHT}")
    line, best = judged(1, text)
    assert line["scorer"] == "mine.py:score" and best
    assert (line["mean"], line["start"]) == (pytest.approx(128 / 255), 0.0)
    assert line["function"] == own.imported(text).digest and not judged(2, text)[1]
    assert judged(3, write("mine.py", f"return [v / 2 for v in {BRIGHT}]"))[1]  # lower, but new


def score(*options):
    pairs.main(["score", "pairs.parquet", "--out", "out.parquet", *options])
    return pq.read_table("out.parquet").to_pylist()


def test_strength_is_the_sigmoid_of_log_odds_times_the_margin(tmp_path, capsys):
    toy.write_pairs(Path("pairs.parquet"), 12, tie=0.05)
    text = write("mine.py", f"return {BRIGHT}")
    with pytest.raises(SystemExit):
        score("--judge", text)
    said = capsys.readouterr().err
    assert "give it one as `score.log_odds = 1.0`, or take one of pickscore" in said
    with open("mine.py", "a") as file:
        file.write("score.log_odds = 3.0\n")
    own._module.cache_clear()
    for row in score("--judge", text):
        values = [brightness(Image.open(io.BytesIO(row[f"jpg_{i}"]))) for i in (0, 1)]
        margin = (values[0] - values[1]) * (1 if row["label_0"] else -1)
        assert row["strength"] == pytest.approx(1 / (1 + np.exp(-3 * margin)), abs=1e-9)
    with open("mine.py", "a") as file:
        file.write("score.log_odds = 4.0\n")
    own._module.cache_clear()
    with pytest.raises(SystemExit):
        score("--judge", text)
    said = capsys.readouterr().err
    assert "another command (mine.py:score: " in said and " there, " in said
    with open("mine.py", "a") as file:
        file.write("score.log_odds = -1\n")
    own._module.cache_clear()
    with pytest.raises(SystemExit):
        score("--judge", text)
    assert "its log_odds is -1, no number above 0." in capsys.readouterr().err


def test_made_pairs_are_chosen_by_it_and_a_changed_one_is_refused(making, capsys):
    made, flags = test_pairs_make, ["--limit", 4]
    text = write("far/mine.py", f"return {BRIGHT}")
    made.run(*flags, judge=[text, "preference"])
    assert "strength" not in made.rows()[0]
    for row in made.rows():
        values = [brightness(Image.open(io.BytesIO(row[f"jpg_{i}"]))) for i in (0, 1)]
        margin = (values[0] - values[1]) * (1 if row["label_0"] else -1)
        assert row["margin_mine.py:score"] == pytest.approx(margin, abs=1e-9) and margin > 0
    made.run(*flags, judge=[text, "preference"])
    assert "is complete" in capsys.readouterr().out
    Path("out.parquet").unlink()
    said = made.refused(capsys, *flags, judge=[write("far/mine.py", f"return {BRIGHT}  # new")])
    assert "holds values of another command (mine.py:score: " in said


def test_the_example_of_the_docs_is_a_judge_of_sharpness_with_odds():
    page = (ROOT / "docs" / "judges.md").read_text()
    Path("mine.py").write_text(page.split("```python\n")[1].split("```")[0])
    scorers.check("mine.py:sharpness", [])
    caption = toy.prompts()[0]
    sharp, soft = (toy.draw(caption, np.random.default_rng(0), 0.9, blur) for blur in (0.3, 3))
    scores = scorers.load("mine.py:sharpness")([sharp, soft], [caption] * 2)
    assert scores[0] > scores[1] and own.log_odds("mine.py:sharpness") == 0.5
