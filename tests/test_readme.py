"""The README and the pages beside it: the programs understand the commands, the files are there."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.launcher import runner
from safetensors.torch import save_file
from torch.distributed import run as torchrun

import loss
from invert import ddim_invert
from lab import studies
from system.files import ROOT
from system.hub import PICKAPIC
from system.single import PARTS, UNET

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "configs" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of each command in the bash blocks of a page."""
    lines = re.split(r"\n| && |; do |; done", "".join(blocks(text, "bash")).replace("\\\n", " "))
    words = [shlex.split(line.replace("$seed", "0"), comments=True) for line in lines]
    return [one for one in words if one]


COMMANDS = {shlex.join(words): words for page in PAGES for words in commands(page.read_text())}
OTHERS = {"make", "for", "mkdir", "hf", "tensorboard"}
PROGRAMS = [words for words in COMMANDS.values() if words[0] not in OTHERS]


def started(words: list[str]) -> tuple[str, list[str], int]:
    """(program, its flags, ranks) of a command, as its launcher understands it."""
    if words[0] == "deepspeed":
        given = runner.parse_args(words[1:])
        ranks = 16 if given.hostfile == "hosts" else max(given.num_gpus, 0) or 8
        return given.user_script, given.user_args, ranks
    if words[0] == "torchrun":
        given = torchrun.parse_args(words[1:])
        ranks = int(given.nnodes.split(":")[-1]) * int(given.nproc_per_node)
        return given.training_script, given.training_script_args, ranks
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:], 1
    at = next(i for i, word in enumerate(words) if word.endswith((".py", "slurm.sh")))
    return words[at].replace("docs/slurm.sh", "train_inpo.py"), words[at + 1 :], 1


class Understood(Exception):
    """Raised where a program has read its flags and would begin to work."""


@pytest.mark.parametrize("words", PROGRAMS, ids=shlex.join)
def test_a_command_is_understood_and_names_data_that_exist(words, monkeypatch, tmp_path):
    program, flags, ranks = started(words)
    for file in [word for word in flags if word.endswith(".safetensors") and "=" not in word]:
        monkeypatch.chdir(tmp_path)
        Path(file).parent.mkdir()
        names = [f"{prefix}x" for prefix in PARTS["sdxl"].values()]
        first = {f"{UNET}input_blocks.0.0.weight": torch.zeros(1, 4, 1, 1)}
        save_file({name: torch.zeros(1) for name in names} | first, file)
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, *given):
        raise Understood(parse_args(parser, *given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr("sys.argv", [program, *flags])
    monkeypatch.delitem(sys.modules, program, raising=False)
    with pytest.raises(Understood) as understood:
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
    if program == "train_inpo.py":
        args = understood.value.args[0]
        assert args.data != PICKAPIC and (ROOT / args.ds_config).is_file()
        assert ranks == 1 or args.batch % (args.micro_batch * ranks) == 0


def test_make_targets_exist():
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"\bmake ([a-z][a-z-]*)", "".join(page.read_text() for page in PAGES))
    assert {"demo", "leaderboard"} <= set(named) <= set(" ".join(rules).split())


def test_the_first_screen_says_what_to_type_and_what_is_not_known():
    assert len(README.splitlines()) <= 200
    top = README.split("\n## ")[0]
    assert "make demo" in top and "not been trained at full size yet" in top
    assert ["deepspeed", "train_inpo.py", "--model", "sdxl"] in [w[:4] for w in commands(README)]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)]*)\)|<img src=\"([^\"]*)\"", text):
        link = "".join(link)
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), link
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in map(slug, headings), link


def rows_of(page: str, *headings: str) -> dict[str, list[str]]:
    """The first table after headings that follow one another, {first cell: the others}; no bold, no
    spread of seeds."""
    text = (ROOT / "docs" / page).read_text()
    for heading in headings:
        text = text.partition(f"\n{heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    plain = [re.sub(r" \(.*?\)|\*", "", line).strip("|").split("|") for line in lines]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in plain}


def test_the_results_repeat_what_the_leaderboard_measured():
    told = rows_of("results.md", "## The paper's table in miniature, and what came after it")
    ranks = rows_of("leaderboard.md", "## The task of the demo")
    scores = rows_of("leaderboard.md", "At equal compute:")
    names = list(told)[1:]  # the first is the base
    assert {*names} == {*studies.ON_TASKS, *studies.PRESETS}
    assert names == [name for name in ranks if name in names]
    for name in names:
        wins, preference, *gain, faithful = told[name]
        assert wins == scores[name][2] and faithful == scores[name][5].partition(" ")[0], name
        assert preference == ranks[name][1].partition(" ")[0], name
        assert gain == [ranks[name][3]], name


def test_the_table_of_the_three_tasks_repeats_theirs():
    told = rows_of("leaderboard.md", "## What came out")
    tasks = "## The task of the demo", "## Every fourth label is wrong", "## The judge likes red"
    ranks = [rows_of("leaderboard.md", heading) for heading in tasks]
    scores = [rows_of("leaderboard.md", heading, "At equal compute:") for heading in tasks]
    *starts, faithful = told.pop("base")
    assert starts == [found["base"][3].partition(" ")[0] for found in scores]
    assert {*told} == {*studies.ON_TASKS} and faithful == "100.0"
    for name, (*preferences, faithful) in told.items():
        assert preferences == [found[name][1].partition(" ")[0] for found in ranks], name
        assert faithful == scores[2][name][5].partition(" ")[0], name


def test_the_map_is_complete():
    (text,) = (block for block in blocks(README, "text") if "train_inpo.py" in block)
    named = set(re.findall(r"(?<!\S)([\w/]+(?:\.py|\.json|/))(?!\S)", text))
    files = {path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("*.json")]}
    folders = {f"{path.parent.name}/" for path in ROOT.glob("[a-z]*/*")} - {"out/"}
    assert named >= files | folders and all((ROOT / name).exists() for name in named)
    modules = re.findall(r"python -m ([\w.]+)", text)
    assert {f"{module.replace('.', '/')}.py" for module in modules} <= named


def test_what_the_text_names_in_the_code_is_there():
    names = re.findall(r"`(\w+)\.(\w+)`", README)
    names = [
        (file, name) for file, name in names if (ROOT / f"{file}.py").exists() and name != "py"
    ]
    assert len(names) >= 4
    for file, name in names:
        source = (ROOT / f"{file}.py").read_text()
        assert re.search(rf"^(def|class) {name}\b|^{name} = ", source, re.MULTILINE), (file, name)
    for file in re.findall(r"`([\w/]+\.py)`", README):
        assert (ROOT / file).is_file(), file


def test_the_lines_to_copy_run():
    (lines,) = (text for text in blocks(README, "python") if "ddim_invert(" in text)
    policy = torch.nn.Conv2d(4, 4, 1)
    names = {
        "policy": lambda x, t: policy(x),
        "reference": lambda x, t: policy(x).detach(),
        "x0": torch.randn(4, 4, 8, 8),
        "t": torch.tensor([40, 700, 40, 700]),
        "abar": torch.linspace(0.999, 0.005, 1000),
        "ddim_invert": ddim_invert,
        "squared_error": loss.squared_error,
        "inpo_loss": loss.inpo_loss,
    }
    exec(lines, names)
    assert torch.allclose(names["losses"], torch.full((2,), 2.0).log())
