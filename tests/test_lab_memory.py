"""lab/memory.py: the page is the one in docs, measuring is the job, mistakes are said."""

import json

import deepspeed
import pytest
import torch
from test_budget import SMALL, small_ds_config

from lab import memory
from system.files import ROOT
from training.lora import AdapterOff

SMALLEST = SMALL | {  # one level without a middle: ZeRO-3 takes its time with each module
    "block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None,
    "transformer_layers_per_block": 1,
}  # fmt: skip


@pytest.mark.slow
def test_the_page_is_the_one_in_docs(tmp_path, capsys, monkeypatch):
    memory.main([])
    assert capsys.readouterr().out == (ROOT / "docs" / "memory.md").read_text()
    monkeypatch.setattr(memory, "page", lambda: "the page")
    memory.main([f"--out={tmp_path / 'memory.md'}"])
    assert (tmp_path / "memory.md").read_text() == "the page"


def test_each_row_fits_its_card_and_its_parts_are_those_of_its_configuration():
    for row in memory.ROWS:
        parts = row.memory()
        assert sum(parts.values()) <= (1 - memory.FREE) * row.card, row
        assert (parts["optimizer"] == 0) == ("offload" in row.ds_config), row
        assert (parts["reference"] == 0) == bool(row.lora_rank), row
        assert sum(row.memory(training_alone=True).values()) < sum(parts.values())


@pytest.mark.parametrize("stage, rank", [(2, None), (3, None), (1, 4)])
def test_measuring_takes_two_steps_of_the_job(stage, rank, monkeypatch):
    engines, references = [], []
    start, switch = deepspeed.initialize, AdapterOff.__call__

    def initialize(**given):
        out = start(**given)
        engines.append(out[0])
        return out

    def switched_off(*given, **named):
        references.append(1)
        return switch(*given, **named)

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    monkeypatch.setattr(AdapterOff, "__call__", switched_off)
    engine = memory.two_steps(SMALLEST, small_ds_config(stage), 1, rank, "cpu")
    assert engine is engines[0] and engine.global_steps == 2
    assert len(engines) == (2 if stage == 3 else 1) and len(references) == (4 if rank else 0)
    names = [name for name, weight in engine.module.named_parameters() if weight.requires_grad]
    assert all("lora" in name for name in names) == bool(rank)
    assert engine.zero_optimization_stage() == stage


def test_a_measurement_is_a_line_of_json_beside_the_estimate(monkeypatch, capsys):
    def too_large(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(memory, "CONFIGS", {"sdxl": SMALL})
    monkeypatch.setattr(memory, "hardware", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    for two_steps, peak in ((lambda *_: None, 3.0), (too_large, None)):
        monkeypatch.setattr(memory, "two_steps", two_steps)
        memory.main(["--measure=3"])
        found = json.loads(capsys.readouterr().out)
        assert (found["row"], found["device"], found["measured_gib"]) == (3, "a GPU", peak)
        assert found["flags"].startswith("--model sdxl --micro-batch 1 --lora-rank 64 ")
        assert found["computed_gib"] == sum(memory.ROWS[2].memory(training_alone=True).values())


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--out=no/x.md"], "--out no/x.md: must be a file in a folder that exists."),
        (["--measure=11"], "--measure 11: the rows are 1 to 10."),
        (["--measure=8"], "--measure 8: needs 8 GPUs; rows of one can be measured."),
        (["--measure=1"], "--measure: needs a GPU, and CUDA sees none."),
    ],
)
def test_mistakes_are_said_in_one_sentence(argv, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        memory.main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"lab.memory: error: {sentence}\n"
