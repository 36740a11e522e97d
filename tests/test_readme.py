"""What README.md says is there, is there, and its commands are understood."""

import re
import shlex

import pytest
import torch

import evaluate
import loss
from invert import ddim_invert
from system.files import ROOT
from training import export, plan
from training.flags import parse

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line.replace("$seed", "0"), comments=True)
    for language, text in BLOCKS
    if language == "bash"
    for line in re.split(r"\n|; ", text.replace("\\\n", " "))
    if line.strip()
]


def words_after(script: str) -> list[list[str]]:
    return [words[words.index(script) + 1 :] for words in COMMANDS if script in words]


def test_commands_of_the_job_are_understood_and_their_batches_fit_a_node_of_eight():
    commands = [words for words in COMMANDS if "train_inpo.py" in words]
    assert len(commands) >= 2
    for words in commands:
        launcher = words[: words.index("train_inpo.py")]
        args = parse("", words[len(launcher) + 1 :])
        plan.read_ds_config(args.ds_config)
        ranks = 1 if "python" in launcher else 2 * 8 if "--hostfile" in launcher else 8
        if "--num_gpus" in launcher:
            ranks = int(launcher[launcher.index("--num_gpus") + 1])
        assert args.batch % (args.micro_batch * ranks) == 0, words


@pytest.mark.parametrize("program, action", [(evaluate, "check"), (export, "export")])
def test_commands_of_evaluation_and_export_are_understood(program, action, monkeypatch):
    class Understood(Exception):
        """Nothing is to be drawn or written."""

    def stop(*given):
        raise Understood

    monkeypatch.setattr(program, action, stop)
    commands = words_after(f"{program.__name__}.py")
    assert commands
    for words in commands:
        with pytest.raises(Understood):
            program.main(words)


def test_make_targets_exist():
    rules = re.findall(r"^([\w ]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = " ".join(rules).split()
    named = [words[1] for words in COMMANDS if words[0] == "make"]
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_no_command_is_of_another_kind():
    known = {"make", "deepspeed", "torchrun", "python", "for", "do", "done"}
    assert {words[0] for words in COMMANDS} <= known


def test_file_map_and_pictures_are_complete():
    files = {path.name for path in ROOT.glob("*.py")} | {"ds_config.json"}
    mapped = set(re.findall(r"^(\w+\.(?:py|json))  ", README, re.MULTILINE))
    assert mapped == files
    pictures = re.findall(r"(?:!\[.*?\]\(|<img src=\")([^)\"]*)", README)
    assert len(pictures) >= 2
    for picture in pictures:
        assert (ROOT / picture).is_file(), picture


def test_the_lines_to_copy_run():
    (lines,) = (text for language, text in BLOCKS if "ddim_invert(" in text)
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
