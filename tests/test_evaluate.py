"""Laws of evaluate.py and figures.py, on a stub of model.py that draws where a model samples."""

import json
import math
import types

import numpy as np
import pytest
from PIL import Image, ImageFont

import evaluate
import figures
import toy

Z2 = 1.959963984540054**2  # squared 97.5 % point of the normal distribution


# --------------------------------------------------------------------------------------------------
# Win rates and intervals.


def test_a_model_against_itself_has_only_ties():
    scores, prompts = np.random.default_rng(0).normal(size=36), [str(i % 18) for i in range(36)]
    rate = evaluate.win_rate(scores, scores, prompts)
    assert (rate["wins"], rate["losses"], rate["ties"], rate["n"]) == (0, 0, 36, 36)
    assert rate["rate"] == rate["low"] == 0


def test_rate_of_a_over_b_plus_b_over_a_plus_ties_is_one():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, 300), rng.integers(1, 6, 300)
    prompts = [str(i % 30) for i in range(300)]
    ab, ba = evaluate.win_rate(a, b, prompts), evaluate.win_rate(b, a, prompts)
    assert ab["ties"] == ba["ties"] > 20
    assert ab["rate"] + ba["rate"] + ab["ties"] / 300 == pytest.approx(1, abs=1e-12)
    assert (ab["wins"], ab["losses"]) == (ba["losses"], ba["wins"]) == (sum(a > b), sum(a < b))
    assert ab["rate"] < ba["rate"]
    assert ab["low"] < ab["rate"] < ab["high"]


@pytest.mark.parametrize("prompts, seeds", [(100, 1), (18, 16), (8, 4)])
def test_interval_covers_the_truth_at_its_stated_rate(prompts, seeds):
    """Each prompt has its own chance of a win, sigmoid(1 + N(0, 1)), whose mean is the truth."""
    rng = np.random.default_rng(2)

    def chance(n):
        return 1 / (1 + np.exp(-1 - rng.normal(size=n)))

    truth, labels = chance(10**6).mean(), np.repeat(np.arange(prompts), seeds)
    hits = 0
    for _ in range(300):
        a = rng.random(prompts * seeds) < np.repeat(chance(prompts), seeds)
        rate = evaluate.win_rate(a, np.full(len(a), 0.5), labels, resamples=1000)
        hits += rate["low"] <= truth <= rate["high"]
    assert 0.90 <= hits / 300 <= 0.99


def test_interval_of_many_prompts_is_the_normal_one():
    """Also in blocks, for resamples x prompts above the memory bound."""
    rng = np.random.default_rng(3)
    values = rng.normal(0.3, 2, 1500)
    low, high = evaluate.interval(values, np.arange(1500))
    spread = values.std() * math.sqrt(Z2 / 1500)
    assert (low, high) == pytest.approx(
        (values.mean() - spread, values.mean() + spread), abs=0.05 * spread
    )
    labels = np.repeat(np.arange(1000), [1, 2] * 500)  # the mean is over images, not over prompts
    values = np.where(labels % 2 == 0, 1.0, 0.0) + rng.normal(0, 0.01, 1500)
    low, high = evaluate.interval(values, labels, resamples=2000)
    assert low < values.mean() < high and high - low < 0.1


def test_interval_is_wilson_where_every_prompt_agrees():
    labels, ones = np.repeat(np.arange(18), 16), np.ones(288)
    won, lost = evaluate.win_rate(ones, 0 * ones, labels), evaluate.win_rate(0 * ones, ones, labels)
    assert (won["low"], won["high"]) == (pytest.approx(18 / (18 + Z2)), 1.0)
    assert (lost["low"], lost["high"]) == (0.0, pytest.approx(Z2 / (18 + Z2)))
    half = evaluate.win_rate([1, 0] * 4, [0, 1] * 4, [0, 0, 1, 1, 2, 2, 3, 3])
    spread = math.sqrt(Z2) / (2 * math.sqrt(4 + Z2))  # Wilson at p = 1/2, n = 4
    assert (half["low"], half["high"]) == pytest.approx((0.5 - spread, 0.5 + spread))
    single = evaluate.win_rate([1, 1, 1], [0, 0, 0], ["one prompt"] * 3)
    assert (single["low"], single["high"]) == (pytest.approx(1 / (1 + Z2)), 1.0)


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not a finite number"):
        evaluate.win_rate([1.0, math.nan], [0.0, 0.0], ["a", "b"])


def test_changes_are_paired():
    """Prompts differ by far more than models do: only differences within a pair show the change."""
    rng, prompts = np.random.default_rng(4), [str(i % 40) for i in range(400)]
    base = np.tile(rng.uniform(0, 1, 40), 10)
    better = base + 0.02 + rng.normal(0, 0.02, 400)
    right = (rng.random(400) < 0.9).astype(float)
    results = evaluate.summarize(
        {
            "base": {"preference": base, "faithfulness": right},
            "new": {"preference": better, "faithfulness": 1 - 0 * right},
        },
        prompts,
    )
    old, new = results["models"]["base"]["preference"], results["models"]["new"]["preference"]
    assert old["low"] < new["mean"] < old["high"]
    change = results["changes"]["new"]["preference"]
    assert 0.015 < change["low"] < change["mean"] < change["high"] < 0.025
    assert results["changes"]["new"]["faithfulness"]["mean"] == pytest.approx(1 - right.mean())
    assert list(results["win_rates"]["new"]) == ["preference"]
    same = evaluate.summarize({"a": {"preference": base}, "b": {"preference": base}}, prompts)
    assert same["changes"]["b"]["preference"] == dict(mean=0, median=0, low=None, high=None)


# --------------------------------------------------------------------------------------------------
# End to end. A "model" is a folder whose name says how well it draws.

QUALITY = {"dull": (0.4, 2.0), "vivid": (0.95, 0.3)}  # saturation, blur


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """model.py as evaluate.py sees it; calls of sample are kept in stub.calls."""
    for name in [*QUALITY, "old", "large"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    stub = types.SimpleNamespace(calls=[], loaded=[], quiet=lambda: None)

    def architecture(name):
        if not (tmp_path / name / "model_index.json").is_file():
            raise ValueError(f"'{name}' is not a diffusers pipeline.")
        return "sd15" if name == "old" else "sdxl"

    def read_config(name, part):
        return {"sample_size": {"large": 128, "old": 64}.get(name, 16)}

    def load_pipeline(name, unet=None, dtype=None):
        stub.loaded.append(name)
        pipeline = types.SimpleNamespace(quality=QUALITY[name.split("/")[-1]])
        pipeline.to = lambda device: pipeline
        return pipeline

    def sample(pipeline, prompts, seeds, steps, guidance, batch=16, progress=None):
        stub.calls.append((len(prompts), steps, guidance, batch))
        rngs = [np.random.default_rng(seed) for seed in seeds]
        return [toy.draw(p, r, *pipeline.quality) for p, r in zip(prompts, rngs, strict=True)]

    stub.architecture, stub.read_config = architecture, read_config
    stub.load_pipeline, stub.sample = load_pipeline, sample
    monkeypatch.setattr(evaluate, "model", stub)
    monkeypatch.chdir(tmp_path)
    return stub


def run(*options, models=("base=dull", "vivid"), out="out"):
    return evaluate.main(["--models", *models, "--seeds", "2", "--out", out, *options])


def test_end_to_end_the_right_model_wins(stub, tmp_path, capsys):
    results = run("--batch", "5")
    rate = results["win_rates"]["vivid"]["preference"]
    assert (rate["wins"], rate["losses"], rate["ties"], rate["n"]) == (36, 0, 0, 36)
    text = (tmp_path / "out/table.md").read_text()
    assert "| vivid | 100.0 [82.4, 100.0] | 0.0 |" in text
    assert "| preference: wins over base, % |" in text
    assert text in capsys.readouterr().out
    assert {n for n, *_ in stub.calls} == {5, 1}
    assert {call[1:] for call in stub.calls} == {(25, 2.0, 5)}

    columns = [len(line.split("|")) for line in text.splitlines() if line.startswith("|")]
    assert columns == [columns[0]] * 4  # head, rule and two models, all equally wide
    assert [results["models"][m]["faithfulness"]["mean"] for m in ("base", "vivid")] == [1, 1]
    assert text.count("100.0 [82.4, 100.0]") == 3 and "| +0.0 |" in text
    mean = results["models"]["base"]["preference"]["mean"]
    images = [
        toy.draw(toy.prompts("heldout")[k % 18], np.random.default_rng(k), *QUALITY["dull"])
        for k in range(36)
    ]
    assert mean == pytest.approx(np.mean([toy.preference(image) for image in images]))
    assert f"{mean:.3f} [" in text
    assert json.loads((tmp_path / "out/results.json").read_text())["win_rates"] == {
        "vivid": {"preference": rate}
    }


def test_in_the_other_order_the_same_model_loses(stub, tmp_path):
    run(models=("vivid", "base=dull"))
    assert "| base | 0.0 [0.0, 17.6] | 0.0 |" in (tmp_path / "out/table.md").read_text()


def test_manifest_says_which_prompt_and_seed_gave_each_image(stub, tmp_path):
    run("--first-seed", "7", "--steps", "3", "--guidance", "4")
    base, vivid = (json.loads((tmp_path / f"out/images/{n}/manifest.json").read_text()) for n in
                   ("base", "vivid"))  # fmt: skip
    assert base["images"] == vivid["images"] and len(base["images"]) == 36
    assert (base["name"], base["model"], vivid["model"]) == ("base", "dull", "vivid")
    assert (base["steps"], base["guidance"]) == (3, 4.0)
    assert {call[1:3] for call in stub.calls} == {(3, 4.0)}
    assert [entry["seed"] for entry in base["images"]] == list(range(7, 43))
    for entry in base["images"]:
        expected = toy.draw(entry["prompt"], np.random.default_rng(entry["seed"]), *QUALITY["dull"])
        image = Image.open(tmp_path / "out/images/base" / entry["file"])
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    kept = json.loads((tmp_path / "out/scores.json").read_text())
    assert kept["images"] == base["images"]
    assert [len(kept["scores"][m][s]) for m in ("base", "vivid") for s in evaluate.SCORERS] == [
        36
    ] * 4


def test_the_same_seed_gives_the_same_file(stub, tmp_path):
    run(out="one")
    run("--batch", "7", out="two")
    run("--first-seed", "1", out="three")
    one, two, three = (
        [path.read_bytes() for path in sorted((tmp_path / out).rglob("images/*/*.png"))]
        for out in ("one", "two", "three")
    )
    assert len(one) == 72 and one == two
    assert not set(one) & set(three) - {one[1]} and one != three
    for file in ("table.md", "scores.json", "before_after.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_picture_shows_prompts_evenly_spaced_and_models_side_by_side(stub, tmp_path):
    run()
    picture = Image.open(tmp_path / "out/before_after.png").convert("RGB")
    x0, y0 = picture.width - 16 - 2 * 128 - 8, picture.height - 16 - 8 * 128 - 7 * 8
    for i, k in enumerate([0, 2, 5, 7, 10, 12, 15, 17]):
        for j, name in enumerate(["base", "vivid"]):
            x, y = x0 + j * 136, y0 + i * 136
            shown = np.asarray(picture.crop((x, y, x + 128, y + 128)))[::2, ::2]
            file = tmp_path / f"out/images/{name}/{k:05d}.png"
            assert np.array_equal(shown, np.asarray(Image.open(file))), (i, j)


def test_a_file_of_toy_captions_is_judged_too(stub, tmp_path):
    lines = "a red circle on a white background\n\n a blue cross on a gray background \n"
    (tmp_path / "some.txt").write_text(lines)
    results = run("--prompts", "some.txt", "--scorers", "preference", "preference")
    assert (results["n"], results["prompts"]) == (4, 2)
    assert list(results["models"]["base"]) == ["preference"]
    assert "faithfulness" not in (tmp_path / "out/table.md").read_text()


def test_guidance_defaults_to_that_of_the_family(stub, tmp_path):
    usual = {"dull": 2, "large": 5, "old": 7.5}
    assert {name: evaluate.default_guidance(name) for name in usual} == usual


MISTAKES = {
    "at least two models": ["--models", "dull"],
    "two models are named 'Dull'": ["--models", "dull", "Dull=vivid"],
    "'nowhere' is not a diffusers pipeline": ["--models", "dull", "nowhere"],
    "'empty' is not a diffusers pipeline": ["--models", "dull", "empty"],
    "'a/b=dull' is not NAME=PATH": ["--models", "a/b=dull", "vivid"],
    "'..' is not NAME=PATH": ["--models", "..", "vivid"],
    "'x=' is not NAME=PATH": ["--models", "x=", "vivid"],
    "unknown scorer 'beauty'": ["--scorers", "preference", "beauty"],
    "'nothing.txt' is neither toy nor": ["--prompts", "nothing.txt"],
    "'blank.txt' holds no prompt": ["--prompts", "blank.txt"],
    "no scorer for 'a photo of a dog' yet": ["--prompts", "dogs.txt"],
    "--out 'blank.txt' is a file": ["--out", "blank.txt"],
    "--out 'blank.txt/out' is a file": ["--out", "blank.txt/out"],
    "--seeds must be at least 1": ["--seeds", "0"],
    "--first-seed must be at least 0": ["--first-seed", "-1"],
    "--steps must be at least 1": ["--steps", "0"],
    "--batch must be at least 1": ["--batch", "0"],
    "--guidance must be a number from 1": ["--guidance", "nan"],
    "differ in their usual guidance (dull 2, old 7.5)": ["--models", "dull", "old"],
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_each_mistake_gives_one_sentence_and_exit_code_2(sentence, stub, tmp_path, capsys):
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "dogs.txt").write_text("a red circle on a white background\na photo of a dog\n")
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--models", "dull", "vivid", "--out", "out", *MISTAKES[sentence]])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("evaluate.py: error: ") and sentence in error
    assert error.endswith(".\n") and error.count("\n") == 1
    assert not stub.loaded and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# Pictures.


def solid(i, j, size=(64, 64)):
    return Image.new("RGB", size, (40 * i + 10, 60 * j + 10, 200))


def test_grid_puts_each_image_at_its_row_and_column():
    images = [[solid(i, j) for j in range(2)] for i in range(3)]
    bare = figures.grid(images)
    assert bare.size == (2 * 16 + 2 * 128 + 8, 2 * 16 + 3 * 128 + 2 * 8)
    long = "a very long prompt that has to be broken into several lines, or else it would not fit"
    labelled = figures.grid(images, [long, "b", "c"], ["base", "aligned"])
    dx, dy = labelled.width - bare.width, labelled.height - bare.height
    assert dx > 100 and dy > 14
    for i in range(3):
        for j in range(2):
            x, y = 16 + j * 136, 16 + i * 136
            for picture, left, top in ((bare, x, y), (labelled, x + dx, y + dy)):
                cell = picture.crop((left, top, left + 128, top + 128))
                assert cell.getcolors() == [(128 * 128, (40 * i + 10, 60 * j + 10, 200))]
    pixels = np.asarray(labelled.convert("L"))
    assert (pixels[:, :16] == 255).all() and (pixels[:, 16 + dx - 6 : 16 + dx] == 255).all()
    for i in range(3):  # something is written beside each row, more where the label is longer
        assert (pixels[16 + dy + i * 136 :][:128, 16 : 16 + dx] < 128).sum() > 5
    assert (pixels[: 16 + dy, 16 + dx : 144 + dx] < 128).any()


def test_grid_enlarges_small_pictures_and_reduces_large_ones():
    def side(size, **options):
        return figures.grid([[solid(1, 1, size)]], **options).width - 2 * 16

    sizes = {10: 130, 64: 128, 100: 200, 128: 128, 300: 300, 512: 512, 1024: 512}
    assert {n: side((n, n)) for n in sizes} == sizes
    assert side((10, 10), scale=3) == 30
    sharp = figures.grid([[Image.fromarray(np.eye(64, dtype=np.uint8) * 255)]])
    assert {color for _, color in sharp.getcolors()} == {(0, 0, 0), (255, 255, 255)}
    tall = figures.grid([[solid(0, 0, (128, 64)), solid(0, 1, (64, 128))]])  # shapes are kept
    assert [tall.getpixel((16 + 136 + x, 80))[1] for x in (10, 64, 118)] == [255, 70, 255]
    mixed = figures.grid([[solid(0, 0, (64, 64)), solid(0, 1, (128, 128))], [solid(1, 0)]])
    assert mixed.size == (2 * 16 + 2 * 128 + 8, 2 * 16 + 2 * 128 + 8)
    assert mixed.getpixel((16, 16)) == (10, 10, 200)
    assert mixed.getpixel((16 + 136 + 64, 16 + 136 + 64)) == (255, 255, 255)


def test_grid_refuses_labels_that_do_not_fit():
    one = [[solid(0, 0)]]
    for images, rows, columns in (([], (), ()), (one, ["a", "b"], ()), (one, (), ["a", "b"])):
        with pytest.raises(ValueError):
            figures.grid(images, rows, columns)


def test_labels_are_wrapped_to_their_width():
    font = ImageFont.load_default(size=14)
    text = "a magenta triangle on a black background, and Supercalifragilisticexpialidocious"
    lines = figures.wrap(text, font, 128, 9)
    assert all(font.getlength(line) <= 128 for line in lines) and 4 <= len(lines) <= 9
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = figures.wrap(text, font, 128, 2)
    assert len(cut) == 2 and cut[-1].endswith("...") and cut[0] in text


def count(path, color):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - rgb).max(-1) < 8).sum())


def test_curves_draw_what_was_recorded(tmp_path):
    signs = {"loss": -0.01, "reward_winner": 0.1, "reward_loser": -0.1, "err_winner": -0.01}
    signs |= {"err_loser": 0.01, "err_ref_winner": 0, "err_ref_loser": 0, "implicit_accuracy": 0.01}
    metrics = [
        {"step": i} | {key: 0.5 + i * slope for key, slope in signs.items()} for i in range(40)
    ]
    figures.curves(metrics, tmp_path / "new/all.png", "a title")
    colors = (figures.WINNER, figures.LOSER, figures.BOTH)
    assert Image.open(tmp_path / "new/all.png").size == (1500, 960)
    assert all(count(tmp_path / "new/all.png", color) > 500 for color in colors)
    partial = [{"step": 1, "loss": 0.7, "reward_winner": 0.0}, {"step": 2, "loss": math.nan}]
    partial += [{"step": 3, "loss": None, "reward_winner": 1.0}, {"step": 4, "loss": 0.5}]
    figures.curves(partial, tmp_path / "partial.png")
    assert [count(tmp_path / "partial.png", color) > 500 for color in colors] == [True, False, True]
    for key, drawn in {"reward_loser": [0, 1, 0], "implicit_accuracy": [0, 0, 1]}.items():
        figures.curves([{"step": i, key: i} for i in range(9)], tmp_path / "one.png")
        assert [count(tmp_path / "one.png", color) > 500 for color in colors] == drawn
    figures.curves([], tmp_path / "none.png")
    assert Image.open(tmp_path / "none.png").size == (1500, 960)
    assert [count(tmp_path / "none.png", color) for color in colors] == [0, 0, 0]


def test_series_leave_out_what_is_missing_and_subtract_the_reference():
    metrics = [
        {"step": 5, "err": 0.5, "ref": 0.2},
        {"step": 6, "err": 0.4},
        {"step": 7, "ref": 0.4},
    ]
    metrics += [{"step": 8, "err": 0.1, "ref": 0.3}, {"step": 9, "err": None, "ref": 1}]
    x, y = figures.series(metrics, "err - ref")
    assert x.tolist() == [5, 8] and y == pytest.approx([0.3, -0.2])
    assert figures.series(metrics, "err")[0].tolist() == [5, 6, 8]
    assert figures.running_mean(np.array([1.0, 3, 5, 7]), 2).tolist() == [1, 2, 4, 6]
    assert figures.running_mean(np.array([]), 1).tolist() == []
