"""Laws of program.py: printing never ends a program."""

import os
import subprocess
import sys

import pytest

from system.files import ROOT

# A program of ours that prints, as print(), a library's progress bar and an error would.
PRINTS = """
import sys
from system.files import UserError
from system.program import reported

with reported("a program"):
    for stream in (sys.stdout, sys.stderr):
        for _ in range(3):
            print("out/\\udcff", "x" * 9000, file=stream, flush=True)
    sys.stderr.writelines(["a", "b"])
    sys.stderr.flush()
with reported("a program"):
    raise UserError("what can be set right.")
"""


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("where", ["a full disk", "a closed pipe", "an ASCII terminal"])
def test_printing_never_ends_a_program_nor_changes_its_exit_code(where, tmp_path):
    places = {
        "a full disk": lambda: os.open("/dev/full", os.O_WRONLY),
        "a closed pipe": closed_pipe,
        "an ASCII terminal": lambda: os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT),
    }
    place = places[where]()
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    child = subprocess.run([sys.executable, "-c", PRINTS], stdout=place, stderr=place, env=env)
    os.close(place)
    assert child.returncode == 2
    if where == "an ASCII terminal":
        said = (tmp_path / "log").read_text()
        assert "out/\\udcff" in said and said.endswith("a program: error: what can be set right.\n")
