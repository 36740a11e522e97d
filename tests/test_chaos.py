"""Killed at random instants, a run ends with the weights of an undisturbed one."""

import json
import time

import pytest
import torch
from safetensors.torch import save_file

from lab import chaos
from system.files import UserError
from training.folder import read_metrics

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# In the place of train_inpo.py: 150 steps, a line and a checkpoint each, resumed by its lines.
PROGRAM = """
import json, signal, sys, time
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file

flags, out = sys.argv[1:-1], Path(sys.argv[-1].removeprefix("--out="))
if "failing" in flags:
    sys.exit("no data")
(out / "checkpoints").mkdir(parents=True, exist_ok=True)
(out / "unet").mkdir(exist_ok=True)
log, asked = out / "metrics.jsonl", []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
lines = log.read_text().split(chr(10))[:-1] if log.exists() else []
log.write_text("".join(line + chr(10) for line in lines))
first = len(lines)
if lines and "careless" in flags:
    first = first - 1  # this step is logged twice
for step in range(first, 150):
    if asked:
        sys.exit(143)
    partial = out / "checkpoints" / f"step_{step + 1:06d}.partial"
    partial.mkdir(exist_ok=True)
    time.sleep(0.01)
    with open(log, "a") as file:
        file.write(json.dumps({"step": step + 1, "seconds": time.time()}) + chr(10))
    partial.rmdir()
save_file({"w": np.arange(4.0)}, out / "unet/diffusion_pytorch_model.safetensors")
"""


@pytest.fixture
def small(monkeypatch, tmp_path):
    """small(flags) -> what three kills of the program above did."""
    (tmp_path / "train_inpo.py").write_text(PROGRAM)
    monkeypatch.setattr(chaos, "ROOT", tmp_path)
    return lambda *flags: chaos.chaos([*flags], tmp_path, kills=3, ranks=1, span=0.02)


def test_a_run_is_killed_in_every_way_and_started_again(small, tmp_path):
    done = small()
    assert sorted(one["kind"] for one in done) == sorted(chaos.KINDS)
    steps = [one["step"] for one in done]
    assert steps == sorted(steps) and 0 < steps[-1] < 150
    assert len(read_metrics(tmp_path / "storm")) == 150


def test_a_run_that_differs_or_fails_is_told(small):
    with pytest.raises(UserError, match="storm differs from .*calm, which nobody disturbed"):
        small("careless")
    with pytest.raises(UserError, match=r"the undisturbed run failed; see .*calm\.log"):
        small("failing")


def test_the_comparison_sees_one_bit_and_a_step_that_was_logged_twice(tmp_path):
    calm, storm = tmp_path / "calm", tmp_path / "storm"

    def write(out, bit: float = 0.0, steps=(1, 2)):
        (out / "unet").mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.tensor([1.0, bit])}, out / WEIGHTS)
        lines = [json.dumps({"step": step, "seconds": time.time()}) + "\n" for step in steps]
        (out / "metrics.jsonl").write_text("".join(lines))

    assert not chaos.equal(calm, storm)  # neither has weights
    write(calm)
    for different in ({"bit": 1e-38}, {"steps": (1, 2, 2)}, {"steps": (1,)}):
        write(storm)
        assert chaos.equal(calm, storm)
        write(storm, **different)
        assert not chaos.equal(calm, storm), different


@pytest.mark.slow
def test_three_kills_of_a_real_run_change_nothing(argv, tmp_path):
    flags = argv(out=None, steps=24, checkpoint_every=1)
    done = chaos.chaos(flags, tmp_path, kills=3, span=0.3)
    assert sorted(one["kind"] for one in done) == sorted(chaos.KINDS)
    assert len(read_metrics(tmp_path / "calm")) == 24
