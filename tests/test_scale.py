"""ZeRO-1, -2 and -3 on 1, 2 and 4 processes, full and LoRA: all are the loop written by hand."""

import json

import diffusers
import pytest
import torch
from by_hand import ByHand
from conftest import distance, metrics
from launch import launch

STAGES = (1, 2, 3)


def weights(out, base) -> dict[str, torch.Tensor]:
    if (out / "unet").exists():
        return diffusers.UNet2DConditionModel.from_pretrained(out / "unet").state_dict()
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.load_lora_weights(out)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline.unet.state_dict()


@pytest.fixture
def base(checkpoint):
    """One level: under ZeRO-3 time goes with the number of layers."""
    return checkpoint(channels=(16,))


@pytest.fixture
def flags(argv, ds_config, tmp_path, base):
    """flags(kind, stage, world) -> the command of a run of 2 steps of 4 pairs.

    One cell of timesteps: a cell belongs to a micro-step, and the ranks share these out."""

    def build(kind: str, stage: int = 2, world: int = 1) -> list[str]:
        adapters = {"lora_rank": 4, "lora_alpha": 8} if kind == "lora" else {}
        return argv(
            model=base, ds_config=ds_config(stage), out=tmp_path / f"{kind}-{stage}-{world}",
            batch=4, micro_batch=max(1, 2 // world), steps=2, lr=3e-3, eta=0, inversion_steps=1,
            **adapters,
        )  # fmt: skip

    return build


@pytest.mark.parametrize(
    "world", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))], ids=str
)
def test_every_stage_and_number_of_processes_is_the_loop_by_hand(world, flags, tmp_path, base):
    kinds, start = ("full", "lora"), weights(base, base)
    runs = [flags(kind, stage, world) for kind in kinds for stage in STAGES]
    cells = tmp_path / "cells"
    if world == 2:  # ranks with different numbers of UNet calls would wait for ever here
        many = ["--inversion-steps=5", "--eta=1", "--steps=1"]
        runs.append([*flags("full", 3, world), f"--out={cells}", *many])
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    launch([tmp_path / "runs.json"], world, "tests/many.py")
    assert world != 2 or len(metrics(cells)) == 1
    for kind in kinds:
        hand = ByHand(flags(kind))
        expected, losses = hand.weights[-1], hand.losses
        moved = distance(expected, start)
        assert moved > 1e-3 and abs(losses[-1] - losses[0]) > 1e-4  # nothing was left out unseen
        for stage in STAGES:
            out = tmp_path / f"{kind}-{stage}-{world}"
            assert distance(weights(out, base), expected) < 1e-3 * moved, (kind, stage)
            assert [x["loss"] for x in metrics(out)] == pytest.approx(losses, rel=1e-3)
