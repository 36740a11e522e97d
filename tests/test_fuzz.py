"""lab/fuzz.py: how a case may end, and that it finds what is broken."""

import contextlib
import tempfile
from pathlib import Path

import hypothesis
import pytest

import data
from lab import fuzz, odd_sources
from system.files import UserError, write_section


def refuse():
    raise UserError("This file cannot be read.")


def leave(code):
    raise SystemExit(code)


def print_and_refuse():
    print("Traceback (most recent call last):")
    refuse()


@pytest.mark.parametrize(
    "work, outcome",
    [
        (lambda: "correct", "correct"),
        (refuse, "sentence"),
        (lambda: leave(2), "sentence"),
        (lambda: "mismatch: another picture", "mismatch"),
        (lambda: 1 / 0, "traceback"),
        (lambda: leave(1), "traceback"),
        (print_and_refuse, "traceback"),
        (lambda: fuzz.os.kill(fuzz.os.getpid(), 9), "traceback"),
        (lambda: fuzz.time.sleep(60), "hang"),
        (lambda: "correct" if bytearray(2**27) else "", "memory"),
    ],
)
def test_a_case_ends_in_one_of_six_ways(monkeypatch, work, outcome):
    monkeypatch.setattr(fuzz, "LATE", 2)
    monkeypatch.setattr(fuzz, "OWN", fuzz.isolated(lambda: "correct").memory)
    monkeypatch.setattr(fuzz, "GROWTH", 2**16)
    assert fuzz.isolated(work).outcome == outcome


def test_it_finds_swapped_pictures_and_shows_a_small_case(monkeypatch):
    right = data.Pairs.__getitem__

    def swapped(self, n):
        item = right(self, n)
        return item | {"winner": item["loser"], "loser": item["winner"]}

    monkeypatch.setattr(data.Pairs, "__getitem__", swapped)
    found = fuzz.fuzz("folders", 30, seed=1)
    assert found["outcomes"]["mismatch"] == 1
    assert found["failure"].startswith("mismatch: ") and "has the shades" in found["failure"]


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    file = tmp_path / "page.md"
    for name, text in (("One", "1"), ("Two", "2"), ("One", "3")):
        write_section(file, name, f"{text}\n\n### Sub\n")
    assert file.read_text() == "## One\n\n3\n\n### Sub\n\n## Two\n\n2\n\n### Sub\n"
    file.write_text(f"# Page\n\nHead.\n\n{file.read_text()}")
    write_section(file, "Two", "4")
    assert file.read_text() == "# Page\n\nHead.\n\n## One\n\n3\n\n### Sub\n\n## Two\n\n4\n"
    write_section(file, "Sub", "5")  # no section has that name, only a part of one
    assert file.read_text().endswith("## One\n\n3\n\n### Sub\n\n## Two\n\n4\n\n## Sub\n\n5\n")


@hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
@hypothesis.given(odd_sources.sources)
def test_tables_names_and_tars_give_their_own_pairs_or_a_sentence(case):
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UserError):
        assert odd_sources.run(case, Path(folder)) == "correct"
