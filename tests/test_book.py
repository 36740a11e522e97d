"""The book: its cells run, its figures are those of its cells, and it builds."""

import re

import jupytext
import nbformat
import pytest
from conftest import refusal

from lab import book
from system.files import ROOT

CHAPTERS = book.CHAPTERS[1:]
QUICK = [name for name in CHAPTERS if name[0] in "126"]  # the others train policies


def cells(name: str) -> list[str]:
    notebook = jupytext.read(book.BOOK / f"{name}.md", fmt="md")
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", QUICK)
def test_the_cells_of_a_chapter_run_and_its_solutions_hold(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in cells(name):
        exec(compile(cell, name, "exec"), names)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == set(re.findall(r"\((.*?\.png)\)", (book.BOOK / f"{name}.md").read_text()))


def test_the_book_has_six_chapters():
    assert [name[0] for name in CHAPTERS] == list("123456")
    links = re.findall(r"^\d\. \[(.*)\]\((.*)\.md\)$", (book.BOOK / "README.md").read_text(), re.M)
    for number, (title, name) in enumerate(links, 1):
        first = (book.BOOK / f"{name}.md").read_text().splitlines()[0]
        assert first == f"# {number}. {title}"
    assert [name for _, name in links] == CHAPTERS


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_is_short_and_has_an_idea_a_figure_and_three_solved_exercises(name):
    text = (book.BOOK / f"{name}.md").read_text()
    assert 80 <= len(text.splitlines()) <= 160 and "\n**The idea: " in text
    body, exercises, solutions = re.split(r"\n## Exercises\n|\n### Solutions\n", text)
    assert re.findall(r"^(\d)\. ", exercises, re.M) == ["1", "2", "3"]
    solved = [cell for cell in cells(name) if cell in solutions]
    assert len(solved) == 3 and all("assert " in cell for cell in solved)
    drawn = re.findall(r'savefig\("(.*?)"', text)
    assert drawn == re.findall(r"^!\[.+\]\((.*)\)$", body, re.M) and drawn
    assert not re.findall(r"^```(?!python$|text$|$)", text, re.M)  # a bash block would be a cell
    assert max(len(line) for cell in cells(name) for line in cell.splitlines()) <= 100


def test_the_committed_figures_are_those_of_the_chapters_and_small():
    drawn = {
        picture
        for name in CHAPTERS
        for picture in re.findall(r'savefig\("(.*?)"', (book.BOOK / f"{name}.md").read_text())
    }
    committed = list(book.BOOK.glob("*.png"))
    assert {path.name for path in committed} == drawn
    assert sum(path.stat().st_size for path in committed) < 1e6


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_text_names_functions_that_exist(name):
    found = 0
    for words in re.findall(r"`(\w+(?:\.\w+)+)`", (book.BOOK / f"{name}.md").read_text()):
        parts = words.split(".")
        for at in range(len(parts) - 1, 0, -1):
            file = ROOT / f"{'/'.join(parts[:at])}.py"
            if file.is_file() and parts[at] != "py":
                source = file.read_text()
                assert re.search(rf"^(def|class) {parts[at]}\b|^{parts[at]} = ", source, re.M), (
                    words
                )
                found += 1
    assert found or name == "5-drift"


def notebook(*sources: tuple[str, str]) -> nbformat.NotebookNode:
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    return nbformat.v4.new_notebook(cells=[make[kind](source) for kind, source in sources])


def test_a_page_holds_its_pictures_and_loads_nothing(tmp_path):
    (tmp_path / "a.png").write_bytes((book.BOOK / "1-one-step.png").read_bytes())
    text = book.page(
        notebook(
            ("markdown", "# A title\n\n![words](a.png) [next](2-inversion.md#its-error) [x](y.md)"),
            ("code", "1 < 2"),
        ),
        tmp_path,
    )
    assert "data:image/png;base64," in text and "a.png" not in text
    assert "<title>A title</title>" in text and not re.findall(r"<script|<link|@import", text)
    assert 'href="2-inversion.html#its-error"' in text and 'href="y.md"' in text


def test_an_unknown_chapter_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        book.main(["7-nothing"])
    assert stop.value.code == 2
    assert "there is no chapter 7-nothing; they are: README, 1-" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cell_that_fails_is_named(tmp_path):
    chapter = tmp_path / "9-broken.md"
    chapter.write_text(
        "# Broken\n\n```python\nfrom invert import path\nassert path is None, 1\n```\n"
    )
    said = refusal(book.run, chapter, tmp_path)
    assert said.startswith(f"{chapter}: a cell raises AssertionError (1); mend it")


@pytest.mark.slow
def test_make_book_builds_notebooks_pages_and_figures(tmp_path, capsys):
    (line,) = re.findall(r"^book: .*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert line == "$(BIN)/python -m lab.book"
    book.main(["--out", str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == 7
    for name in book.CHAPTERS:
        page = (tmp_path / f"{name}.html").read_text()
        assert not re.findall(r"<script|<link|@import", page)
        done = nbformat.read(tmp_path / f"{name}.ipynb", as_version=4)
        nbformat.validate(done)
        assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code")
    made, committed = ({path.name for path in at.glob("*.png")} for at in (tmp_path, book.BOOK))
    assert made == committed
