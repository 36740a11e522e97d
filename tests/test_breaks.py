"""Laws of breaks.py: its list fits the code, and what it says of a break is what the tests say."""

import re
import subprocess

import pytest

from lab import breaks
from lab.breaks import Break
from system.files import ROOT


def test_every_break_fits_the_code_once_and_names_tests_that_are_there(tmp_path):
    assert len({change.name for change in breaks.BREAKS}) == len(breaks.BREAKS) >= 30
    breaks.copy_tree(tmp_path)
    for change in breaks.BREAKS:
        (file,) = (path for path in tmp_path.rglob(change.file) if path.parent.name != "tests")
        before = file.read_text()
        breaks.apply(change, tmp_path)
        assert compile(after := file.read_text(), file, "exec") and after != before
        file.write_text(before)
        for test in change.tests.split():
            name, _, function = test.partition("::")
            text = (ROOT / "tests" / name).read_text()
            assert re.search(rf"^def {re.escape(function.split('[')[0])}\(", text, re.M), test


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one function and its test, which sees a wrong sign but no wrong zero."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "twice.py").write_text("def double(x):\n    return 2 * x if x else 0\n")
    (tmp_path / "tests" / "test_double.py").write_text(
        "import sys\nsys.path.insert(0, '.')\nfrom twice import double\n\n"
        "def test_double():\n    assert double(3) == 6\n"
    )
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(breaks, "ROOT", tmp_path)
    changes = [
        Break("sign", "twice.py", "2 * x", "-2 * x", "test_double.py::test_double"),
        Break("zero", "twice.py", "else 0", "else 1", "test_double.py::test_double"),
        Break("lost", "twice.py", "3 * x", "4 * x", "test_double.py::test_double"),
        Break("no test", "twice.py", "2 * x", "4 * x", "test_double.py::test_triple"),
    ]
    monkeypatch.setattr(breaks, "BREAKS", changes)


def test_a_break_is_caught_or_survives(project, capsys):
    assert breaks.main(["sign"]) == 0
    assert "| sign | test_double |" in capsys.readouterr().out
    assert breaks.main(["sign", "zero"]) == 1
    said = capsys.readouterr().out
    assert "| zero | SURVIVED |" in said and "1 of 2 breaks were caught." in said


@pytest.mark.parametrize(
    "name, words",
    [
        ("lost", "'lost': twice.py has 0 times: 3 * x"),
        ("no test", "pytest could not run test_double.py::test_triple"),
        ("unknown", "There is no break 'unknown'; they are: sign, zero, lost, no test."),
    ],
)
def test_a_break_that_cannot_be_tried_is_told_apart(name, words, project, capsys):
    with pytest.raises(SystemExit) as stop:
        breaks.main([name])
    assert stop.value.code == 2 and words in capsys.readouterr().err
