"""lab/full_size.py on small models: the programs, a kill between them, what the check refuses."""

import os
import shutil
import signal
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from conftest import refusal
from safetensors.torch import load_file, save_file

import evaluate
import train_inpo
from lab import architectures, full_size
from system.files import read_json
from training import budget, export

PROGRAMS = {"lab.full_size": full_size, "training.export": export}
PROGRAMS |= {"train_inpo.py": train_inpo, "evaluate.py": evaluate}


def program(argv: list[str]) -> str:
    return argv[1] if argv[0] == "-m" else argv[0]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a whole run of SDXL's small model. Its programs run in this process, which
    saves the seconds of their imports."""
    scratch = tmp_path_factory.mktemp("scratch")

    def measured(argv):
        PROGRAMS[program(argv)].main(argv[argv.index(program(argv)) + 1 :])
        return {"seconds": 1.0, "cpu": 1.0, "peak": 2e9}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_size, "measured", measured)
        full_size.main(["--small", "--model=sdxl", f"--scratch={scratch}", "--keep"])
    return scratch / "inpo-full-size" / "sdxl-small"


def test_weights_are_those_of_the_published_pipelines():
    text = {"sdxl": budget.CLIP_L + budget.BIG_G, "sd15": budget.CLIP_L}
    for name, unet in {"sdxl": 2_567_463_684, "sd15": 859_520_964}.items():
        assert full_size.weights(name, small=False) == unet + budget.VAE + text[name]


def test_small_models_have_the_kinds_and_levels_of_the_full_ones():
    for name in ("sdxl", "sd15"):
        (unet, vae, texts), (small, tiny, few) = (
            architectures.sizes(*full_size.architecture(name, x)) for x in (False, True)
        )
        assert unet.keys() <= small.keys() and len(texts) == len(few)
        for key in ("down_block_types", "up_block_types"):
            assert unet[key] == small[key] and vae[key] == tiny[key]
        assert len(unet["block_out_channels"]) == len(small["block_out_channels"])


@pytest.mark.slow
def test_every_part_runs_and_what_is_reloaded_is_what_was_trained(kept):
    parts = read_json(kept / "parts.json")["parts"]
    assert [one["part"] for one in parts] == list(full_size.parts("sdxl", kept, True))
    found = read_json(kept / "check.json")
    rank, trained = 4, 0
    for key, weight in load_file(kept / "base/unet/diffusion_pytorch_model.safetensors").items():
        if any(f"{name}.weight" in key for name in ("to_q", "to_k", "to_v", "to_out.0")):
            trained += rank * sum(weight.shape)
    assert found["adapters"] == trained
    assert found["exact"] + found["last_bit"] == full_size.weights("sdxl", small=True)
    assert found["last_bit"] < 1e-3 * found["exact"]
    assert load_file(kept / "base/vae/diffusion_pytorch_model.safetensors").popitem()[1].dtype == (
        torch.float16
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, key, change, said",
    [
        (
            "unet",
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
            1.01,
            "is not what",
        ),
        ("unet", "conv_in.weight", 1.01, "unet.conv_in.weight is not what was trained."),
        ("vae", "decoder.conv_in.weight", 1.01, "vae.decoder.conv_in.weight is not what"),
        (
            "unet",
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
            None,
            "is not what",
        ),
    ],
)
def test_a_weight_that_is_not_what_was_trained_is_refused(kept, tmp_path, part, key, change, said):
    folder = tmp_path / "run"
    shutil.copytree(kept, folder)
    (file,) = (folder / "merged" / part).glob("*.safetensors")
    weights = load_file(file)
    if change:
        weights[key] = weights[key] * change
    else:  # as before the step
        weights[key] = load_file(folder / "base" / part / file.name)[key]
    save_file(weights, file, {"format": "pt"})
    assert said in refusal(full_size.check, folder)


def test_after_a_kill_what_was_finished_is_not_done_again(tmp_path, monkeypatch):
    flags = ["--small", "--model=sd15", f"--scratch={tmp_path}"]
    page, folder, started, killed = tmp_path / "speed.md", tmp_path / "inpo-full-size", [], []
    folder /= "sd15-small"

    def measured(argv):
        started.append(program(argv))
        target = next(out for words, out in full_size.parts("sd15", folder, True).values()
                      if list(map(str, words)) == argv)  # fmt: skip
        assert not (folder / target).exists()
        if target == "check.json":
            (folder / target).write_text('{"adapters": 1, "exact": 2, "last_bit": 3}')
        else:
            (folder / target).mkdir()
        if target == "merged" and not killed:
            killed.append(target)
            os.kill(os.getpid(), signal.SIGTERM)
        return {"seconds": 61.0, "cpu": 50.0, "peak": 2e9}

    monkeypatch.setattr(full_size, "measured", measured)
    with pytest.raises(SystemExit) as stop:
        full_size.main(flags)
    assert stop.value.code == 130 and len(started) == 3
    started.clear()
    full_size.main([*flags, f"--report={page}"])
    assert started == ["training.export", "lab.full_size", "evaluate.py"]
    text = page.read_text()
    assert text.startswith("## The whole architecture without a GPU\n")
    assert text.count("| sd15 |") == 5 and "| 61 | 50 | 2.0 |" in text
    assert "random weights" in text and f"torch {version('torch')}," in text
    assert os.listdir(tmp_path) == ["speed.md"]  # the scratch folder is gone


@pytest.mark.parametrize("short", ["memory", "disk"])
def test_too_little_room_is_said_before_anything_is_made(short, tmp_path, monkeypatch, capsys):
    free = {"memory": 16e9, "disk": 13e9}
    memory = SimpleNamespace(available=free["memory"] if short == "memory" else 1e12)
    monkeypatch.setattr(full_size.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(budget, "room", lambda path: free["disk"] if short == "disk" else 1e12)
    with pytest.raises(SystemExit) as stop:
        full_size.main(["--model=sdxl", f"--scratch={tmp_path}"])
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    assert "This takes 17.9 GB of memory" in out and "14.4 GB of disk" in out
    assert f"of {short} are needed, and {budget.in_words(free[short])} are free" in error


def test_a_part_is_measured_and_its_failure_is_one_sentence():
    one = full_size.measured(["-c", "x = bytearray(300 * 2**20)"])
    assert one["peak"] > 300 * 2**20 and one["cpu"] <= one["seconds"] * (os.cpu_count() + 1)
    said = refusal(full_size.measured, ["-c", "raise SystemExit(3)"])
    assert "ended with code 3" in said and "`python -c" in said
    said = refusal(full_size.measured, ["-c", "import os; os.kill(os.getpid(), 9)"])
    assert "was killed, perhaps for want of memory" in said


@pytest.mark.slow
def test_the_programs_run_as_a_user_starts_them(tmp_path):
    full_size.main(
        ["--small", "--model=sd15", f"--scratch={tmp_path}", f"--report={tmp_path}/x.md"]
    )
    assert os.listdir(tmp_path) == ["x.md"]
