"""Killed at random instants, a run ends with the weights of an undisturbed one."""

import shutil

from safetensors.torch import load_file, save_file

from lab import chaos
from training.folder import read_metrics


def test_three_kills_change_nothing(argv, tmp_path):
    flags = argv(out=None, steps=24, checkpoint_every=1)
    done = chaos.chaos(flags, tmp_path, kills=3, span=0.3)
    assert sorted(one["kind"] for one in done) == sorted(chaos.KINDS)
    assert all(
        before["step"] <= after["step"] for before, after in zip(done, done[1:], strict=False)
    )

    # The comparison would see one bit, or a step that was logged twice.
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    assert chaos.equal(calm, storm)
    file = storm / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, tmp_path / "kept")
    weights = load_file(file)
    weights["conv_in.bias"][0] += 1e-7
    save_file(weights, file)
    assert not chaos.equal(calm, storm)
    shutil.copy(tmp_path / "kept", file)
    lines = (storm / "metrics.jsonl").read_text().splitlines(keepends=True)
    (storm / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))
    assert not chaos.equal(calm, storm) and len(read_metrics(calm)) == 24
