"""Laws of text.py, and that what others wrote passes through it wherever it is shown."""

import ast
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image, ImageFont

from evaluation import figures, tables
from system import processes
from system.files import UserError, warn_once
from system.program import Parser, reported
from system.text import code, markdown, printable
from training import card

TERMINAL = ["\x1b[2J", "\x1b]0;title\x07", "a\rb", "a\nb", "\x9b31m", "\x00", "\x7f", "a\x08b"]
TERMINAL += ["\u202eflow\u202c", "\u2066x\u2069", "\u200f", "a\u2028b", "\ud800", "a\x85b"]
PLAIN = [
    "",
    "a fox",
    "ein grüner Fuchs",
    "狐",
    "狐\u3000",
    "👨\u200d👩\u200d👧",
    "~/a_b/c-1.png",
    "\u200c",
]


@pytest.mark.parametrize("text", TERMINAL, ids=ascii)
def test_nothing_that_a_terminal_obeys_is_printable(text):
    shown = printable(text)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", shown)
    assert shown.encode() and printable(shown) == shown != text
    assert printable(text, kept="\n") == (text if text == "a\nb" else shown)


@pytest.mark.parametrize("text", PLAIN, ids=ascii)
def test_other_text_stays_as_it_is(text):
    assert printable(text) == text


MARKUP = ["<script>alert(1)</script>", "<img src=x onerror=y>", "</td></table>", "<!-- x", "<?php"]
MARKUP += [
    "a|b",
    "a\\|b",
    "![x](http://x/y.png)",
    "[x](javascript:y)",
    "[x][y]",
    "`x`",
    "**x**",
    "*x*",
]
MARKUP += ["~~x~~", "a\n\n# b", "a\n- b", "&lt;b&gt;", "&#60;b&#62;", "<https://x.y>", "\\`x\\`"]
MARKUP += ["ok & 1 < 2", "a\u202eb", "x\\", "Style & Format"]


class Read(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


GFM = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@pytest.mark.parametrize("text", MARKUP, ids=ascii)
def test_in_markdown_text_is_text(text):
    said = printable(" ".join(text.split()))
    line = Read(GFM.render(f"# {markdown(text)}"))
    assert line.tags == ["h1"] and line.text.strip() == said.strip()
    table = Read(GFM.render(tables.markdown(["a", text], [[text, "b"]])))
    assert [t for t in table.tags if t in ("tr", "th", "td")] == "tr th th tr td td".split()
    assert set(table.tags) == {"table", "thead", "tbody", "tr", "th", "td"}
    assert table.text.split() == ["a", *said.split(), *said.split(), "b"]


@pytest.mark.parametrize("text", [*MARKUP, "``", "a`", "```\n# x"], ids=ascii)
def test_code_is_shown_as_it_was_written(text):
    line = Read(GFM.render(f"x {code(text)} y"))
    assert line.tags == ["p", "code"] and line.text == f"x {printable(text)} y\n"
    block = Read(GFM.render(f"x\n\n{code(text, '')}\n\ny"))
    assert block.tags == ["p", "pre", "code", "p"]
    assert block.text == f"x\n{printable(text, kept=chr(10))}\n\ny\n"


def test_our_own_cells_stay_readable():
    for text in (
        "79.3 [77.8, 80.6] (79.25), ties < 0.1",
        "FLOPs",
        "a_b",
        "0.017 (1 x CPU)",
        "Style & F",
    ):
        assert markdown(text) == text


# --------------------------------------------------------------------------------------------------
# Where it is shown.

BAD = "a\x1b[2Jb\u202ec"
SHOWN = "a\\x1b[2Jb\\u202ec"


def test_what_is_printed_is_printable(capsys):
    with pytest.raises(SystemExit), reported("x"):
        raise UserError(f"'{BAD}' is no picture.")
    with pytest.raises(SystemExit):
        Parser("x").parse_args([BAD])
    processes.print0(f"1\n{BAD}")
    warn_once(BAD)
    said = "".join(capsys.readouterr())
    assert said.count(SHOWN) == 4 and BAD not in said and f"1\n{SHOWN}\n" in said


def test_what_is_drawn_is_printable_too(monkeypatch, tmp_path):

    font = ImageFont.load_default(14)
    assert figures.wrap(f"x\n{BAD}", font, 500, 3) == [f"x {SHOWN}"]
    images = [[Image.new("RGB", (64, 64))]]
    assert np.array_equal(
        figures.grid(images, [BAD], [BAD]), figures.grid(images, [SHOWN], [SHOWN])
    )
    figures.curves([], tmp_path / "curves.png", f"{BAD}$\\frac{{$ 5$")  # no mathematics
    assert (tmp_path / "curves.png").exists()


def test_categories_and_costs_of_others_are_text_in_the_table():
    nasty = "<b>|x\n|"
    rate = {"rate": 0.5, "low": 0.4, "high": 0.6, "ties": 0, "n": 4, "published": None}
    rate |= {"set": "s", "scorer": "clip", "model": "b", "against": "a"}
    rates = [rate | {"category": None}, rate | {"category": nasty}]
    about = {
        "prompts": 4,
        "images": 4,
        "steps": 1,
        "guidance": 1.0,
        "dtype": nasty,
        "first_seed": 0,
    }
    cost = dict.fromkeys((*tables.NUMBERS, "peak_memory"), 1) | {"method": nasty, "device": nasty}
    results = {"models": {"a": {}, "b": {}}, "sets": {"s": about}, "win_rates": rates}
    results |= {"scores": [], "costs": {"b": cost}}
    page = Read(GFM.render(tables.table(results)))
    assert "b" not in page.tags and page.text.count("<b>|x |") == 4


FACTS = {
    "title": "m-inpo",
    "method": "inpo",
    "base_model": "m",
    "unet": "u",
    "unet_subfolder": None,
}
FACTS |= {"adapters": True, "merged": "l", "data": "d", "pairs": 4, "command": "deepspeed x"}
FACTS |= {"recipe": {"lr": 1.0, "sample-prompts": "p"}, "versions": "torch 1", "local": []}
NASTY = ["`</code><script>x</script>", "a\n---\nb: c", 'a"); import os; ("', "a|b|<i>", "```\n# x"]


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_paths_in_the_model_card_are_text(text):
    named = {key: text for key in ("title", "base_model", "unet", "merged", "data", "versions")}
    record = FACTS | named | {"command": f"deepspeed '{text}'", "recipe": {text: text}}
    plain, nasty = card.render(FACTS, []), card.render(record, [])
    front = re.match(r"---\n(.*?)\n---\n", nasty, re.DOTALL)
    assert yaml.safe_load(front.group(1)) == yaml.safe_load(plain.split("---\n")[1])
    pages = [
        Read(GFM.render(page.split("\n---\n", 1)[1])) for page in (plain, nasty[front.end() - 5 :])
    ]
    rows = [[tag for tag in page.tags if tag not in ("tr", "td")] for page in pages]
    assert rows[0] == rows[1]
    python = re.search(r"`{3,}python\n(.*?)\n```", nasty, re.DOTALL).group(1)
    places = [node for node in ast.walk(ast.parse(python))]
    texts = [node.value for node in places if isinstance(node, ast.Constant)]
    assert texts == [text] * 3


WRONG = [{key: None} for key in ("title", "method", "base_model", "data", "command", "versions")]
WRONG += [
    {"method": "x"},
    {"method": []},
    {"pairs": "4"},
    {"recipe": []},
    {"unet": 5},
    {"merged": {}},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_damaged_card_json_is_one_sentence(wrong, tmp_path):
    file = tmp_path / "card.json"
    file.write_text(json.dumps(FACTS))
    assert card.read(file, "x") == FACTS
    file.write_text(json.dumps(FACTS | wrong))
    with pytest.raises(UserError, match="card.json is damaged; export needs it."):
        card.read(file, "export needs it")
