"""ZeRO-1, -2 and -3 on 1, 2 and 4 processes, full and LoRA: all are the loop written by hand."""

import json

import diffusers
import pytest
import torch
from by_hand import steps
from launch import launch

from training.folder import read_metrics

STAGES, WORLDS = (1, 2, 3), (1, 2, 4)


def weights(out, base) -> dict[str, torch.Tensor]:
    if (out / "unet").exists():
        return diffusers.UNet2DConditionModel.from_pretrained(out / "unet").state_dict()
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.load_lora_weights(out)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline.unet.state_dict()


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture
def base(checkpoint):
    """One level: under ZeRO-3 time goes with the number of layers."""
    return checkpoint(channels=(16,))


@pytest.fixture
def flags(argv, ds_config, tmp_path, base):
    """flags(kind, stage, world) -> the command of a run of 10 steps of 4 pairs.

    One cell of timesteps: a cell belongs to a micro-step, and the ranks share these out."""

    def build(kind: str, stage: int = 2, world: int = 1) -> list[str]:
        adapters = {"lora_rank": 4, "lora_alpha": 8} if kind == "lora" else {}
        return argv(
            model=base, ds_config=ds_config(stage), out=tmp_path / f"{kind}-{stage}-{world}",
            batch=4, micro_batch=max(1, 2 // world), steps=10, lr=3e-3, eta=0, inversion_steps=1,
            **adapters,
        )  # fmt: skip

    return build


def test_every_stage_and_number_of_processes_is_the_loop_by_hand(flags, tmp_path, base):
    kinds, start = ("full", "lora"), weights(base, base)
    for world in WORLDS:
        commands = [flags(kind, stage, world) for kind in kinds for stage in STAGES]
        if world == 2:  # ranks with different numbers of UNet calls would wait for ever here
            cells = tmp_path / "cells"
            many = ["--inversion-steps=10", "--eta=1", "--steps=3"]
            commands.append([*flags("full", 3, 2), f"--out={cells}", *many])
        (tmp_path / "commands.json").write_text(json.dumps(commands))
        launch([str(tmp_path / "commands.json")], world, "tests/many.py")
    assert len(read_metrics(cells)) == 3
    for kind in kinds:
        expected, losses = steps(flags(kind))
        moved = distance(expected, start)
        assert moved > 1e-3 and abs(losses[9] - losses[0]) > 1e-4  # nothing was left out unseen
        for stage in STAGES:
            for world in WORLDS:
                out = tmp_path / f"{kind}-{stage}-{world}"
                away = distance(weights(out, base), expected)
                assert away < 1e-3 * moved, (kind, stage, world)
                assert [x["loss"] for x in read_metrics(out)] == pytest.approx(losses, rel=1e-3)
