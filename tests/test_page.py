"""Laws of page.py, blind.py, written.py and pages.py: what a browser gets.

test_browser.py opens it."""

import base64
import json
import os
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from judgements import MODELS, NASTY, draw, judge
from PIL import Image

from evaluation import blind, own, page
from training import pages
from training.run import Run


class Elements(HTMLParser):
    """Tags with their attributes, and the text inside each script."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts = [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        last = dict(self.tags[-1][1]) if self.tags else {}
        if self.tags and self.tags[-1][0] == "script":
            self.texts.setdefault(last.get("id", "program"), "")
            self.texts[last.get("id", "program")] += data


def data_of(path: Path) -> dict:
    return json.loads(Elements(path.read_text("utf-8")).texts["data"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("judged")
    draw(root)
    judge(root)
    return root


@pytest.fixture
def root(whole, tmp_path):
    """A copy of a judgement."""
    shutil.copytree(whole, tmp_path / "copy")  # with its dates
    return tmp_path / "copy"


# --------------------------------------------------------------------------------------------------
# The page.


def test_the_page_shows_what_the_files_say_and_its_pictures_are_there(whole):
    data, out = data_of(whole / "out/index.html"), whole / "out"
    kept = json.loads((out / "scores.json").read_text())["prompts"]
    results = json.loads((out / "results.json").read_text())
    (one,) = data["sets"]
    assert one["columns"] == list(MODELS) and one["prompts"] == NASTY
    assert [one["prompts"][text] for text, _ in one["images"]] == [
        e["prompt"] for e in kept["images"]
    ]
    assert [seed for _, seed in one["images"]] == list(range(12))
    assert one["categories"] == ["odd", "even"] * 6
    for name, files in zip(MODELS, one["files"], strict=True):
        places = [Path(out, unquote(file)).resolve() for file in files]
        assert places == [whole / name / file for file in kept["files"][name]]
    for (scorer, _), columns in zip(one["scorers"], one["scores"], strict=True):
        assert columns == [kept["scores"][name][scorer] for name in MODELS]
    rates = {(r[0], r[2], r[3], r[4]): r[6:] for r in one["rates"]}
    assert len(rates) == 2 * 3 * 3  # scorers, pairs, categories and all
    for r in results["win_rates"]:
        key = r["scorer"], r["category"], r["model"], r["against"]
        assert rates[key] == [r["rate"], r["low"], r["high"]]
    assert "2 steps, guidance 1" in one["words"] and one["people"] is None
    assert [row[-1] for row in data["about"][0][2]] == [f"{v:016x}" for v in MODELS.values()]


def test_prompts_are_text_whatever_they_hold(whole):
    for file in ("index.html", "blind/index.html"):
        text = (whole / "out" / file).read_text("utf-8")
        found = Elements(text)
        assert [tag for tag, _ in found.tags].count("script") == 2 and text.count("</script>") == 2
        assert all(tag != "img" or "src" not in given for tag, given in found.tags)
        assert not any(name.startswith("on") for _, given in found.tags for name in given)
        embedded = found.texts["data"]
        assert embedded.isascii() and "<" not in embedded and ">" not in embedded
        data = json.loads(embedded)
        shown = data["prompts"] if "prompts" in data else data["sets"][0]["prompts"]
        assert shown == NASTY


def test_the_page_asks_for_nothing_outside_its_folder(whole):
    for file in ("index.html", "blind/index.html"):
        text = (whole / "out" / file).read_text("utf-8")
        found = Elements(text)
        (policy,) = [given["content"] for tag, given in found.tags if "http-equiv" in given]
        assert policy.startswith("default-src 'none'; img-src 'self' file:; ")
        assert not re.search(
            r"https?:|//[a-z]|fetch\(|XMLHttpRequest|@import|url\(", remove_notes(text)
        )
        addresses = {given[k] for _, given in found.tags for k in ("src", "href") if k in given}
        assert addresses <= {"blind/index.html#results", "../index.html"}


def remove_notes(text: str) -> str:
    return re.sub(r"(?m)(^|\s)//.*$", "", Elements(text).texts["program"])


def test_an_address_is_relative_and_quoted(tmp_path):
    place = tmp_path / "a b#c?" / "\u00fc%20.png"
    assert page.address(place, tmp_path / "out") == "../a%20b%23c%3F/%C3%BC%2520.png"


def test_a_page_that_cannot_be_written_leaves_the_results_and_a_warning(root, capsys, monkeypatch):
    def full(*how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write_all", full)
    shutil.rmtree(root / "out")
    results = judge(root)
    assert json.loads((root / "out/results.json").read_text()) == results
    said = capsys.readouterr().err
    assert "out/index.html or the folder blind was not written" in said and "Traceback" not in said


# --------------------------------------------------------------------------------------------------
# Blind.


def key_of(out: Path) -> dict:
    return json.loads(base64.b64decode(data_of(out / "blind/index.html")["key"]))


def test_nothing_that_is_read_or_shown_while_judging_names_a_model_or_a_score(whole):
    text = (whole / "out/blind/index.html").read_text("utf-8")
    words = [*MODELS, "glow", "gloom", "mine.py", "runs/", whole.name]
    words += [f"{level:016x}" for level in MODELS.values()]
    assert not [word for word in words if word in text]
    names = [path.name for path in (whole / "out/blind").iterdir()]
    assert len(names) == 1 + 3 * 12
    assert all(blind.NAME.fullmatch(name) for name in names if name != "index.html")
    body = text[text.index("<body>") : text.index("<script")]
    assert "title=" not in body and "<img" not in body


def test_every_pair_is_there_once_and_its_pictures_are_those_of_the_key(whole):
    out = whole / "out"
    pairs, key = data_of(out / "blind/index.html")["pairs"], key_of(out)
    assert key["models"] == {name: f"{level:016x}" for name, level in MODELS.items()}
    wanted = Counter((k, frozenset(two)) for k in range(12) for two in combinations(MODELS, 2))
    assert Counter((who[1], frozenset(who[3:])) for who in key["pairs"]) == wanted
    for (text, *names), (set_, image, seed, *models) in zip(pairs, key["pairs"], strict=True):
        assert (set_, seed, NASTY[text]) == ("prompts", image, NASTY[image % 6])
        for name, model in zip(names, models, strict=True):
            assert os.path.samefile(out / "blind" / name, whole / model / f"{image:05d}.png")


def test_order_sides_and_names_tell_nothing_of_the_model(tmp_path):
    """Of 1,200 pairs: each model stands first in about half of its own, neighbours are of the same
    models as often as by chance, and names sort the models into no order."""
    images = [{"prompt": f"p{k}", "seed": k} for k in range(400)]
    files = {name: [f"{k}.png" for k in range(400)] for name in MODELS}
    shown, names = blind.content({"set": {"images": images, "files": files}}, MODELS)
    pairs = json.loads(base64.b64decode(shown["key"]))["pairs"]
    for name in MODELS:
        assert 0.44 < sum(who[3] == name for who in pairs) / 800 < 0.56
    same = sum(set(a[3:]) == set(b[3:]) for a, b in zip(pairs, pairs[1:], strict=False))
    near = sum(abs(a[1] - b[1]) <= 1 for a, b in zip(pairs, pairs[1:], strict=False))
    assert 0.28 < same / 1199 < 0.39 and near < 40
    owners = [names[name][1] for name in sorted(names)]
    assert 0.28 < sum(a == b for a, b in zip(owners, owners[1:], strict=False)) / 1199 < 0.39


def test_the_same_models_give_the_same_names_and_other_weights_others(root, whole):
    files = sorted(path.name for path in (whole / "out/blind").iterdir())
    before = (whole / "out/blind/index.html").read_bytes()
    judge(root)
    assert sorted(path.name for path in (root / "out/blind").iterdir()) == files
    assert (root / "out/blind/index.html").read_bytes() == before
    manifest = root / "zebra/manifest.json"
    manifest.write_text(manifest.read_text().replace(f"{100:016x}", "f00d"))
    judge(root)
    now = {path.name for path in (root / "out/blind").iterdir()}
    assert now & set(files) == {"index.html"} and len(now) == len(files)  # the old ones are gone


def test_formats_do_not_show_and_files_of_others_stay(root):
    for path in sorted((root / "zebra").glob("*.png")):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    manifest = root / "zebra/manifest.json"
    manifest.write_text(manifest.read_text().replace(".png", ".jpg"))
    (root / "out/blind/votes.json").write_text("{}")
    judge(root)
    names = {path.name for path in (root / "out/blind").iterdir()} - {"index.html", "votes.json"}
    assert len(names) == 36 and all(name.endswith(".png") for name in names)
    assert (root / "out/blind/votes.json").read_text() == "{}"


def test_where_there_are_no_links_there_are_copies_and_a_changed_picture_is_taken_anew(
    root, monkeypatch
):
    def refuse(*how, **more):
        raise OSError(18, "Invalid cross-device link")

    shutil.rmtree(root / "out")
    monkeypatch.setattr(os, "link", refuse)
    judge(root)
    (name,) = [n for n, who in names_of(root).items() if who == ("walrus", 3)]
    place, picture = root / "out/blind" / name, root / "walrus/00003.png"
    assert place.read_bytes() == picture.read_bytes() and not os.path.samefile(place, picture)
    Image.new("RGB", (17, 17), "red").save(picture)
    judge(root)
    assert place.read_bytes() == picture.read_bytes()
    monkeypatch.undo()
    picture.unlink()
    Image.new("RGB", (18, 18), "blue").save(picture)
    judge(root)
    assert os.path.samefile(place, picture)
    assert not list((root / "out").rglob("*.new"))


def names_of(root: Path) -> dict[str, tuple]:
    """{name in blind/: (model, image)}."""
    shown, key = data_of(root / "out/blind/index.html"), key_of(root / "out")
    found = {}
    for (_, *names), (_, image, _, *models) in zip(shown["pairs"], key["pairs"], strict=True):
        found |= {name: (model, image) for name, model in zip(names, models, strict=True)}
    return found


# --------------------------------------------------------------------------------------------------
# Votes.


def vote_for(root: Path, best: str, judge: str, count: int = 36) -> str:
    """A file of votes of the first pairs, as the page saves them, always for `best`."""
    shown, key = data_of(root / "out/blind/index.html"), key_of(root / "out")
    rows = []
    for (text, *_), (set_, image, seed, *models) in zip(shown["pairs"], key["pairs"], strict=True):
        choice = {0: "left", 1: "right"}[models.index(best)] if best in models else "tie"
        row = {"set": set_, "image": image, "seed": seed, "models": models, "time": ""}
        rows.append(row | {"prompt": shown["prompts"][text], "choice": choice})
    content = {"judge": judge, "models": key["models"], "votes": rows[:count]}
    (root / f"{judge}.json").write_text(json.dumps(content))
    return str(root / f"{judge}.json")


def test_votes_make_people_a_scorer_and_nothing_is_scored_again(root):
    calls, before = root / "calls", json.loads((root / "out/results.json").read_text())
    calls.unlink()
    given = [vote_for(root, "lemur", "anna"), vote_for(root, "zebra", "ben", 20)]
    results = judge(root, "--votes", *given)
    assert calls.read_text() == "xxxx"  # each function was tried on two pictures
    found = {
        (r["model"], r["against"]): r
        for r in results["win_rates"]
        if r["scorer"] == "people" and r["category"] is None
    }
    lemur = found["lemur", "walrus"]
    assert lemur["wins"] == 12 and lemur["losses"] == 0 and lemur["ties"] > 0
    assert sum(r["n"] for r in found.values()) == 56
    about = results["people"]["prompts"]
    assert about["judges"] == {"anna": 36, "ben": 20} and about["shared"] == 20
    assert about["alpha"] < 0.5 and {r["scorer"] for r in about["agreement"]} == {
        "mine.py:glow", "mine.py:gloom",
    }  # fmt: skip
    rest = {k: v for k, v in results.items() if k not in ("people", "win_rates")}
    assert rest == {k: v for k, v in before.items() if k != "win_rates"}
    assert [r for r in results["win_rates"] if r["scorer"] != "people"] == before["win_rates"]
    assert "prompts: people |" in (root / "out/table.md").read_text()
    assert not list((root / "out").glob("*-20*"))  # nothing was set aside

    (one,) = data_of(root / "out/index.html")["sets"]
    cells = one["people"]["0 2"]  # zebra and lemur: ben and anna differ
    assert all(cell in ([0, 1, 0], [1, 1, 0]) for cell in cells.values()) and len(cells) == 12
    assert "56 votes of 2 judges" in one["note"] and one["tables"][1][0] == "People"
    again = judge(root)
    assert again == before and not list((root / "out").glob("*-20*"))


def test_people_can_be_the_only_scorer(root):
    results = judge(root, "--scorers", "none", "--votes", vote_for(root, "lemur", "anna"))
    assert {r["scorer"] for r in results["win_rates"]} == {"people"} and not results["scores"]
    assert results["people"]["prompts"]["agreement"] == []
    assert "people" in (root / "out/table.md").read_text()


def test_changed_pictures_or_a_changed_scorer_are_scored_again(root):
    given = vote_for(root, "lemur", "anna")
    Image.new("RGB", (16, 16), "white").save(root / "zebra/00000.png")
    before = json.loads((root / "out/results.json").read_text())["scores"][0]
    results = judge(root, "--votes", given)
    assert (
        results["scores"][0]["mean"] > before["mean"] + 2 and len((root / "calls").read_text()) > 72
    )
    (root / "calls").unlink()
    (root / "mine.py").write_text(
        (root / "mine.py").read_text().replace("fox - value", "fox - 2 * value")
    )
    own._module.cache_clear()  # as in another process
    judge(root, "--votes", given)
    assert len((root / "calls").read_text()) == 4 + 2 * 36


def test_wrong_votes_are_told_of_before_anything_is_written(root, capsys):
    given = vote_for(root, "lemur", "anna")
    shutil.rmtree(root / "out")
    content = json.loads(Path(given).read_text())
    content["votes"][4]["prompt"] = "a dog"
    Path(given).write_text(json.dumps(content))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        judge(root, "--votes", given)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and not (root / "out").exists()
    assert said.startswith(f"evaluate.py: error: {given}, vote 5: prompts has no picture of the")


# --------------------------------------------------------------------------------------------------
# The page of a run.

FACTS = {"title": "tiny-inpo", "method": "inpo", "pairs": 2048, "base_model": "assets/tiny-sdxl"}
FACTS |= {"recipe": {"lr": 1e-5, "unet": None, "sample-prompts": "<b>"}}


@pytest.fixture
def samples(tmp_path):
    (tmp_path / "samples").mkdir()
    names = [f"start_{i:02d}" for i in range(2)]
    names += [f"model_{step:06d}_{i:02d}" for step in (20, 100, 1234567) for i in range(2)]
    for name in [*names, "step_000000", "step_000020"]:
        (tmp_path / "samples" / f"{name}.png").touch()
    return tmp_path


def test_a_run_shows_its_samples_over_the_steps(samples):
    line = {"step": 20, "scorer": "clip", "mean": 0.31234, "start": 0.3, "win_rate": 0.75}
    (samples / "scores.jsonl").write_text(json.dumps(line) + "\nbroken\n")
    (samples / "samples/model_000100_01.png").unlink()
    pages.write_samples(samples, NASTY[:2], FACTS)
    data = data_of(samples / "samples.html")
    (one,) = data["sets"]
    assert one["columns"] == ["start", "step 20", "step 100", "step 1,234,567"]
    assert one["files"][0] == ["samples/start_00.png", "samples/start_01.png"]
    assert one["files"][2] == ["samples/model_000100_00.png", ""]
    assert all((samples / file).exists() for row in one["files"] for file in row)
    assert one["tables"][0][2] == [["20", "clip", "0.3123", "0.3", "75.0"]]
    assert data["about"] == [
        ["Settings", ["flag", "value"], [["lr", "1e-05"], ["sample-prompts", "<b>"]]]
    ]
    assert data["kind"] == "run" and one["prompts"] == NASTY[:2] and data["curves"] is None
    (samples / "curves.png").touch()
    pages.write_samples(samples, NASTY[:2], FACTS)
    assert data_of(samples / "samples.html")["curves"] == "curves.png"


def test_a_run_without_pictures_has_no_page(tmp_path):
    (tmp_path / "samples").mkdir()
    pages.write_samples(tmp_path, NASTY, FACTS)
    assert not (tmp_path / "samples.html").exists()


def test_a_page_that_fails_stops_no_run(samples, monkeypatch, capsys):
    run = object.__new__(Run)
    run.out, run.facts, run.preview = samples, FACTS, SimpleNamespace(prompts=NASTY[:2])
    run.write_page()
    whole = (samples / "samples.html").read_bytes()
    monkeypatch.setattr(pages.page, "render", lambda *how: 1 / 0)
    run.write_page()
    assert "samples.html was not written (division by zero)" in capsys.readouterr().err
    assert (samples / "samples.html").read_bytes() == whole
