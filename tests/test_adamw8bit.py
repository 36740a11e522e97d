"""Laws of AdamW8bit: training/adamw8bit.py, a run of full fine-tuning on a random checkpoint."""

import sys

import pytest
import torch
from conftest import ADAMW, distance, refuse, untimed, weights
from launch import launch

import train_inpo
from training import budget

EIGHT = {"type": "AdamW8bit", "params": ADAMW | {"eps": 1e-2}}


@pytest.mark.slow
@pytest.mark.parametrize("stage, bf16", [(1, False), (2, True), (1, True)])
def test_a_run_with_moments_in_8_bits_is_near_that_in_32_and_resumes_bitwise(
    argv, ds_config, tmp_path, checkpoint, monkeypatch, half, stage, bf16
):
    """bf16 under ZeRO-1 is another optimizer of DeepSpeed's, BF16_Optimizer."""
    pytest.importorskip("bitsandbytes")
    keys = {} if bf16 else {"bf16": {"enabled": False}}
    flags = {"checkpoint_every": 2, "lr": 1e-3, "warmup": 0}
    eight = ds_config(stage, optimizer=EIGHT, **keys)
    whole, parts, plain = (tmp_path / name for name in ("whole", "parts", "plain"))
    train_inpo.main(argv(out=whole, steps=4, ds_config=eight, **flags))
    for steps in (2, 4):
        train_inpo.main(argv(out=parts, steps=steps, ds_config=eight, **flags))
    assert untimed(parts) == untimed(whole) and distance(weights(parts), weights(whole)) == 0
    train_inpo.main(argv(out=plain, steps=4, ds_config=ds_config(stage, **keys), **flags))

    def length(a, b):
        return sum((a[name] - b[name]).square().sum() for name in a).sqrt()

    start, found, expected = weights(checkpoint()), weights(whole), weights(plain)
    moved = length(expected, start)
    assert 0 < length(found, expected) < 0.1 * moved


@pytest.mark.slow
def test_on_other_ranks_it_is_refused(argv, ds_config, capsys):
    pytest.importorskip("bitsandbytes")
    flags = {"checkpoint_every": 1, "ds_config": ds_config(2, optimizer=EIGHT)}
    launch(argv(steps=1, micro_batch=1, **flags), 2)
    sentence = refuse(argv(steps=2, **flags), capsys)
    assert "step_000001: was written by 2 rank(s) with ZeRO-2" in sentence
    assert "AdamW8bit's moments cannot be converted for 1 with ZeRO-2; resume as it was" in sentence


def test_it_goes_with_neither_zero_3_nor_offload_and_needs_its_library(
    argv, ds_config, capsys, monkeypatch
):
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    for config in (
        ds_config(3, optimizer=EIGHT),
        ds_config(optimizer=EIGHT, zero_optimization=offload),
    ):
        sentence = refuse([*argv(ds_config=config), "--dry-run"], capsys)
        assert "AdamW8bit goes with ZeRO-1 and ZeRO-2 on the GPU alone" in sentence
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    sentence = refuse([*argv(ds_config=ds_config(2, optimizer=EIGHT)), "--dry-run"], capsys)
    assert "AdamW8bit does not work on this cpu (it takes a library: pip install" in sentence


def test_the_plan_counts_6_bytes_a_weight_for_it():
    config = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {}}}
    parts = budget.state(2**30, config, torch.bfloat16, 1)
    assert (parts["optimizer"], parts["step"]) == (12, 8)
    parts = budget.state(2**30, config | {"optimizer": EIGHT}, torch.bfloat16, 1)
    assert parts["optimizer"] == 4 + 2 + 2 * 4 / 256 and parts["step"] == 4
