"""The pages in a real browser: headless Chromium sorts, filters, walks, judges blind and saves.

Skipped where there is no Chromium: apt-get install chromium chromium-driver."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from judgements import MODELS, NASTY, draw, judge
from PIL import Image

from evaluation import page
from training import pages

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium, or no driver of it"),
]


class Browser:
    """Headless Chromium. At the end: nothing was asked of a network, and no script failed."""

    def __init__(self, downloads: Path, width: int, height: int, phone: bool):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("headless=new", "no-sandbox", f"window-size={width},{height}"):
            options.add_argument(f"--{flag}")
        if phone:
            metrics = {"width": width, "height": height, "pixelRatio": 2.0}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.chrome.service.Service(DRIVER)
        self.driver, self.downloads = webdriver.Chrome(options=options, service=service), downloads

    def open(self, path: Path, mark: str = ""):
        self.driver.get(path.resolve().as_uri() + mark)

    def run(self, script: str, *given):
        return self.driver.execute_script(script, *given)

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((x) => x.textContent)"
        return self.run(script, selector)

    def press(self, *keys: str):
        for key in keys:
            webdriver.ActionChains(self.driver).send_keys(key).perform()

    def choose(self, **values: str):
        for name, value in values.items():
            script = (
                "const [id, value] = arguments, x = document.getElementById(id); x.value = value;"
            )
            for kind in ("input", "change"):
                script += f"x.dispatchEvent(new Event('{kind}', {{bubbles: true}}));"
            self.run(script, name, value)

    def until(self, holds, what: str):
        end = time.monotonic() + 60
        while not (found := holds()):
            assert time.monotonic() < end, f"waited in vain for {what}"
            time.sleep(0.02)
        return found

    def close(self):
        entries = [
            json.loads(line["message"])["message"] for line in self.driver.get_log("performance")
        ]
        said = [line for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
        self.driver.quit()
        asked = [e["params"] for e in entries if e["method"] == "Network.requestWillBeSent"]
        addresses = {one["request"]["url"] for one in asked}
        assert addresses and all(re.match("file:|blob:|data:", a) for a in addresses), addresses
        assert not said, said


@pytest.fixture
def browser(tmp_path):
    opened = []

    def start(width: int = 1280, height: int = 900, phone: bool = False) -> Browser:
        opened.append(Browser(tmp_path / "downloads", width, height, phone))
        return opened[-1]

    (tmp_path / "downloads").mkdir()
    yield start
    for one in opened:
        one.close()


@pytest.fixture
def root(tmp_path):
    (tmp_path / "judged").mkdir()
    draw(tmp_path / "judged")
    judge(tmp_path / "judged")
    return tmp_path / "judged"


def scores_of(root: Path) -> dict[str, np.ndarray]:
    """{scorer: numbers, a row per model}."""
    kept = json.loads((root / "out/scores.json").read_text())["prompts"]["scores"]
    return {scorer: np.array([kept[name][scorer] for name in MODELS]) for scorer in kept["zebra"]}


# --------------------------------------------------------------------------------------------------
# The judgement.


def numbers(view: Browser) -> list[int]:
    """Of the images that are shown, from 0, in their order."""
    return [int(text.split(" · ")[0]) - 1 for text in view.texts(".prompt + p")]


def test_prompts_are_shown_as_text_and_pictures_beside_each_other(browser, root):
    view = browser()
    view.open(root / "out/index.html")
    assert view.driver.title == " · ".join(MODELS)
    assert view.texts(".prompt") == NASTY * 2 and numbers(view) == list(range(12))
    assert view.texts(".row:first-child .cell p") == list(MODELS)
    widths = (
        "return [...document.querySelectorAll('.row:first-child img')].map((x) => x.naturalWidth)"
    )
    view.until(lambda: view.run(widths) == [16, 16, 32], "the pictures")
    assert view.texts("#summary th")[:4] == ["model", "against", "mine.py:glow", "mine.py:gloom"]
    view.all("#about summary")[0].click()
    shown = view.all("#facts")[0].text
    assert "2 steps, guidance 1" in shown and f"{MODELS['lemur']:016x}" in shown


def test_rows_are_sorted_by_any_difference_and_filtered(browser, root):
    view, scores = browser(), scores_of(root)
    view.open(root / "out/index.html")
    glow, gloom = scores["mine.py:glow"], scores["mine.py:gloom"]
    view.choose(order="mine.py:glow", a="1", b="0")
    assert numbers(view) == sorted(range(12), key=lambda k: -(glow[1] - glow[0])[k])
    view.all("#swap")[0].click()
    assert numbers(view) == sorted(range(12), key=lambda k: -(glow[0] - glow[1])[k])
    view.all("#summary td button")[2].click()  # lemur against zebra, by glow
    assert numbers(view) == sorted(range(12), key=lambda k: -(glow[2] - glow[0])[k])
    better = view.texts(".row:first-child .cell.better p")
    assert better == [f"lemur {glow[2][numbers(view)[0]]:.2f}"]

    view.choose(order="", text="FOX a")
    assert numbers(view) == [2, 8] and view.texts("#count") == ["2 of 12"]
    view.choose(text="", category="odd")
    assert numbers(view) == list(range(0, 12, 2)) and "in odd" in view.texts("#summary h2")[0]
    view.choose(category="", wins="mine.py:glow", loses="mine.py:gloom", a="2", b="1")
    expected = (glow[2] > glow[1]) & (gloom[2] < gloom[1])
    assert numbers(view) == np.flatnonzero(expected).tolist() and expected.any()


def test_keys_walk_open_and_flip_at_one_place(browser, root):
    view = browser()
    view.open(root / "out/index.html")
    view.press("j", "j", "j", "k")
    here = "return [...document.querySelectorAll('.row')].findIndex((x) => x.matches('.here'))"
    assert view.run(here) == 1
    view.press(Keys.ENTER)
    view.until(
        lambda: view.run("return document.getElementById('large').open"), "the large picture"
    )
    places = []
    shown = (
        "const x = document.querySelector('#stage .shown'), r = x.getBoundingClientRect();"
        "return [x.alt, r.x, r.y, r.width, r.height]"
    )
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, "2"):
        name, *place = view.run(shown)
        places.append(place)
        assert view.texts("#tabs [aria-pressed=true]")[0].startswith(name)
        view.press(key)
    assert places[0] == places[1] == places[2] and view.run(shown)[0] == "walrus"
    view.press(Keys.ARROW_DOWN)
    assert view.texts("#large-prompt") == [NASTY[2]] and view.run(shown)[0] == "walrus"
    view.press(Keys.ESCAPE)
    assert not view.run("return document.getElementById('large').open") and view.run(here) == 2
    view.press("/", "r", "e", "d")
    assert numbers(view) == [5, 11]


def test_of_3200_prompts_those_in_view_are_drawn(browser, tmp_path):
    """Rows come as one scrolls; no picture is there, so that none can be waited for."""
    rng, n = np.random.default_rng(0), 3200
    one = {"name": "big", "title": "big", "words": "", "columns": list(MODELS), "tables": []}
    one |= {"prompts": [f"prompt {k}" for k in range(n)], "images": [[k, k] for k in range(n)]}
    one |= {"categories": None, "files": [[""] * n] * 3, "people": None, "rates": [], "note": None}
    one |= {"scorers": [["clip", "CLIP"]], "scores": [rng.normal(size=(3, n)).tolist()]}
    data = {"kind": "judgement", "title": "big", "about": [], "sets": [one]}
    (tmp_path / "index.html").write_text(page.render(data))
    view = browser()
    view.open(tmp_path / "index.html")
    drawn = len(view.all(".row"))
    assert 3 < drawn < 400 and view.texts("#count") == ["3,200 of 3,200"]
    view.run("scrollTo(0, document.body.scrollHeight)")
    view.until(lambda: len(view.all(".row")) > drawn, "more rows")
    view.run("walk(3199)")
    assert numbers(view) == list(range(n))
    view.choose(order="clip")
    first = one["scores"][0]
    assert numbers(view)[0] == int(np.argmax(np.subtract(first[2], first[0])))


def test_nothing_is_wider_than_a_phone(browser, root):
    view = browser(390, 844, phone=True)
    for file in ("index.html", "blind/index.html"):
        view.open(root / "out" / file)
        assert view.run("return document.documentElement.scrollWidth <= innerWidth")
    view.all("#start")[0].click()
    tall = "return document.getElementById('save').getBoundingClientRect().bottom <= innerHeight"
    view.until(
        lambda: len(view.all("#pair img")) == 2 and view.run(tall), "two pictures and buttons"
    )


# --------------------------------------------------------------------------------------------------
# Blind.

COUNTS = """
window.counts = [];
new MutationObserver(() => counts.push(document.querySelectorAll('#pair img').length))
  .observe(document.getElementById('pair'), {childList: true});
"""
PAIR = """
return [...document.querySelectorAll('#pair img')].map((x) => [
  x.getAttribute('src'), x.alt, x.width, x.height, x.className,
  x.getAttributeNames().sort().join()]);
"""
REST = """
const copy = document.documentElement.cloneNode(true);
for (const script of copy.querySelectorAll('script')) script.remove();
const kept = JSON.stringify({...localStorage});
return [copy.outerHTML, kept, document.cookie, location.href].join('\\n');
"""


def start_judging(view: Browser, out: Path, name: str):
    view.open(out / "blind/index.html", "#results")
    view.driver.refresh()  # to the same address a browser only jumps
    view.all("#name")[0].send_keys(name, Keys.ENTER)
    view.run(COUNTS)


def pair(view: Browser, done: int, total: int = 36) -> list:
    """The two pictures that are shown after so many votes."""
    view.until(lambda: view.texts("#done") == [f"{done} of {total}"], f"pair {done}")
    return view.until(lambda: len(found := view.run(PAIR)) == 2 and found, "two pictures")


def brighter(out: Path, both: list) -> str:
    one, two = (np.asarray(Image.open(out / "blind" / src)).mean() for src, *_ in both)
    return "1" if one > two else "2" if two > one else "0"


def test_judging_is_blind_and_its_votes_are_people(browser, root):
    """A judge who takes the brighter picture agrees with `glow` in every vote."""
    view, out = browser(), root / "out"
    words = re.compile(
        "|".join([*MODELS, "glow", "gloom", "mine", *(f"{v:016x}" for v in MODELS.values())])
    )
    start_judging(view, out, "anna")
    seen, keys = [], []
    for done in range(36):
        both = pair(view, done)
        (left, *like_left), (right, *like_right) = both
        assert like_left[0] == "left picture" and like_right[0] == "right picture"
        assert like_left[1:] == like_right[1:] and like_left[1] == like_left[2] > 100  # one size
        assert not words.search(view.run(REST).replace(root.as_uri(), "")), view.run(REST)
        seen.append((left, right))
        if done == 3:  # a slip, and back
            view.press("0" if brighter(out, both) != "0" else "1")
            pair(view, 4)
            view.press("z")
            assert [src for src, *_ in pair(view, 3)] == [left, right]
        if done == 7:
            counts = view.run("return counts")
            start_judging(view, out, "anna")  # the next day
            assert [src for src, *_ in pair(view, 7)] == [left, right]
        keys.append(brighter(out, both))
        view.press(keys[-1])
    assert set(counts + view.run("return counts")) == {0, 2}  # never one picture alone
    view.until(lambda: view.texts("#done") == ["36 of 36"], "the end")
    assert not view.all("#pair img") and "last pair" in view.texts("#prompt")[0]
    assert len(set(map(frozenset, seen))) == 36 and {"1", "2"} <= set(keys)
    view.press("s")
    saved = view.downloads / "votes-anna.json"
    view.until(saved.exists, "the saved votes")

    content = json.loads(saved.read_text())
    choices = {"1": "left", "2": "right", "0": "tie"}
    assert [row["choice"] for row in content["votes"]] == [choices[key] for key in keys]
    assert content["judge"] == "anna" and list(content["models"]) == list(MODELS)
    first = [row["models"][0] for row in content["votes"]]
    assert all(3 < first.count(name) < 21 for name in MODELS)  # of 24 each: drawn, not set
    assert {row["prompt"] for row in content["votes"]} == set(NASTY)
    for row, (left, _) in zip(content["votes"], seen, strict=True):
        assert (out / "blind" / left).samefile(root / row["models"][0] / f"{row['image']:05d}.png")

    start_judging(view, out, "ben")  # another one begins anew, with half of the pairs in common
    other = {frozenset(src for src, *_ in pair(view, 0))}
    view.press("2")
    other.add(frozenset(src for src, *_ in pair(view, 1)))
    assert frozenset(seen[0]) in other

    results = judge(root, "--votes", str(saved))
    found = {
        (r["scorer"], r["category"], r["model"], r["against"]): r for r in results["win_rates"]
    }
    for (scorer, *rest), r in found.items():
        if scorer == "people":
            assert r["wins"] == found["mine.py:glow", *rest]["wins"]
    shares = {r["scorer"]: r["share"] for r in results["people"]["prompts"]["agreement"]}
    assert shares["mine.py:glow"] == 1
    view.open(out / "index.html")
    assert "people" in view.texts("#summary th") and "36 votes of 1 judge" in view.texts("#note")[0]
    view.choose(wins="people", loses="mine.py:gloom")
    scores = scores_of(root)
    expected = [k for k in range(12) if scores["mine.py:glow"][2][k] > scores["mine.py:glow"][0][k]
                and scores["mine.py:gloom"][2][k] < scores["mine.py:gloom"][0][k]]  # fmt: skip
    assert numbers(view) == expected


def test_the_samples_of_a_run_flip_over_the_steps(browser, tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("start_00", "model_000020_00", "model_000040_00"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / "samples" / f"{name}.png")
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "curves.png")
    facts = {"title": "tiny-inpo", "method": "inpo", "pairs": 8, "base_model": "tiny", "recipe": {}}
    pages.write_samples(tmp_path, NASTY[:1], facts)
    view = browser()
    view.open(tmp_path / "samples.html")
    assert view.texts(".cell p") == ["start", "step 20", "step 40"]
    assert not view.all("#judge")[0].is_displayed() and not view.all("#order")[0].is_displayed()
    wide = "return document.getElementById('curves').naturalWidth"
    view.until(lambda: view.run(wide) == 40, "the curves")
    view.all(".cell button")[1].click()
    view.press(Keys.ARROW_RIGHT)
    assert view.texts("#tabs [aria-pressed=true]") == ["step 40"]
