"""What every program does with its flags."""

import argparse
import importlib

import pytest

from system.files import ROOT
from system.program import Parser

FOLDERS = (ROOT, ROOT / "training", ROOT / "lab")
PROGRAMS = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for folder in FOLDERS
    for file in sorted(folder.glob("*.py"))
    if "Parser(" in file.read_text()
]


class Asked(Exception):
    """What a program asks its parser for, before it does anything."""


@pytest.fixture
def flags(monkeypatch):
    """flags(program) -> its parser."""

    def parse_args(parser, *_):
        raise Asked(parser)

    monkeypatch.setattr(Parser, "parse_args", parse_args)

    def get(program: str) -> Parser:
        module = importlib.import_module(program)
        parse = getattr(module, "parse", None) or module.main
        with pytest.raises(Asked) as asked:
            parse(*[""] * (program == "training.flags"), [])
        return asked.value.args[0]

    return get


def test_no_flag_of_any_program_accepts_what_is_not_finite(flags, capsys):
    found = {}
    for program in PROGRAMS:
        parser = flags(program)
        found[program] = [action for action in parser._actions if action.type is float]
        for action in found[program]:
            for text in ("inf", "-inf", "nan", "1e999", "Infinity", "much"):
                with pytest.raises(argparse.ArgumentError) as error:
                    parser._get_values(action, [text])
                assert str(error.value).endswith(f": '{text}' is not a finite number.")
            assert parser._get_values(action, ["1e-5"]) == 1e-5
    flags = {program: {action.dest for action in actions} for program, actions in found.items()}
    assert {"beta", "eta", "lr", "guidance", "lora_alpha"} <= flags["training.flags"]
    assert flags["evaluate"] == {"guidance"} and "eta" in flags["lab.bench"]
