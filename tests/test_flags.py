"""What every program does with its flags."""

import argparse
import errno
import importlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refusal, refuse

import train_inpo
from system.files import ROOT
from system.program import Parser, reported
from system.workers import check_open_files

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
    assert flags["evaluate"] == {"guidance"}


MISTYPED = {
    "evaluate.py": ["--models", "base=tiny", "x=no/such/folder"],
    "train_inpo.py": ["--model", "tiny", "--unet", "./nowhere"],
    "pairs.py": "make --prompts a.txt --judge hps --out a.pq --model no/such/folder".split(),
}


@pytest.mark.parametrize("program", MISTYPED)
def test_a_mistyped_folder_is_named_before_the_slow_imports(program):
    command = [sys.executable, "-X", "importtime", str(ROOT / program), *MISTYPED[program]]
    ended = subprocess.run(command, capture_output=True, text=True)
    imported = {line.split("|")[-1].strip() for line in ended.stderr.splitlines()}
    said = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2 and not imported & {"torch", "transformers", "diffusers"}
    name = MISTYPED[program][-1].removeprefix("x=")
    assert said.startswith(f"{program}: error: Unknown model '{name}': there is no folder of that")


def test_every_model_that_is_named_may_be_mistyped_and_a_prompt_is_no_path(argv, capsys):
    for flag in ("model", "unet", "vae", "lora"):
        for name in ("./nowhere", "no/such/folder", "a fox in the snow " * 20):
            assert f"'{name}': there is no folder of that" in refuse(argv(**{flag: name}), capsys)
    assert "there is no file or folder" in refuse(argv(data="a fox in the snow " * 20), capsys)


# --------------------------------------------------------------------------------------------------
# Open files.


@pytest.fixture
def limited(monkeypatch):
    """limited(n): as after `ulimit -n n`, of which this process notices nothing."""
    soft, set_to = [], []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: soft[-1])
    return lambda *limits: soft.append(limits) or set_to


def test_the_limit_of_open_files_is_raised_or_named_with_its_flag(limited):
    assert limited(64, 10**6) == [] and check_open_files(4) is None
    assert limited(64, resource.RLIM_INFINITY)[-1] == (10**6, 10**6)
    assert check_open_files(4) is None
    limited(40, 40)
    told = refusal(check_open_files, 4)
    assert (
        told.startswith("--workers 4: about ") and "the limit is 40: raise it (ulimit -n)" in told
    )


def test_a_run_whose_files_are_too_many_for_the_limit_is_refused_before_it_starts(
    argv, capsys, limited
):
    limited(40, 40)
    assert "ulimit -n" in refuse(argv(workers=4), capsys)


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_too_many_open_files_later_on_are_one_sentence(kind, capsys):
    gloo = "[enforce fail at device.cc:186] rv != -1. -1 vs -1. Too many open files"
    error = OSError(errno.EMFILE, "Too many open files") if kind is OSError else kind(gloo)
    with pytest.raises(SystemExit) as stop, reported("x"):
        raise error
    assert stop.value.code == 1 and "ulimit -n" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError), reported("x"):
        raise FileNotFoundError(errno.ENOENT, "no such file")


def test_a_working_folder_that_cannot_be_written_is_named_with_the_ways_out(
    argv, capsys, tmp_path, monkeypatch
):
    """The toy's pairs are all that is written there; --out may lie elsewhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("out").touch()  # as a folder that is read-only, also for root
    told = refuse(argv(data="toy", out=tmp_path / "run"), capsys)
    assert "--data toy: its pairs cannot be drawn into" in told and "toy.py pairs --out" in told
    train_inpo.main([*argv(out=tmp_path / "run"), "--dry-run"])
    assert [path.name for path in Path().iterdir()] == ["out"]
