"""memory_table.py: measuring is the job, the table has every line, mistakes are said."""

import json
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from test_memory import SMALL, small_ds_config

from lab import memory_table
from training import memory, plan


@pytest.mark.parametrize("stage, rank", [(2, None), (3, None), (1, 4)])
def test_measuring_takes_two_steps_of_the_job(stage, rank, monkeypatch):
    engines, start = [], deepspeed.initialize

    def initialize(**given):
        out = start(**given)
        engines.append(out[0])
        return out

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    found = memory_table.measure(
        SMALL, small_ds_config(stage), 1, rank, "cpu", lambda: engines[0].global_steps
    )
    assert found == 2 and len(engines) == (2 if stage == 3 else 1)
    names = [name for name, weight in engines[0].module.named_parameters() if weight.requires_grad]
    assert all("lora" in name for name in names) == bool(rank)
    assert engines[0].zero_optimization_stage() == stage


def test_measuring_runs_each_line_in_its_own_process_and_records_what_did_not_fit(
    tmp_path, monkeypatch, capsys
):
    def child(command, **_):
        out = "null" if "--stage=3" in command else f"note of DeepSpeed\n{2**31}"
        return memory_table.subprocess.CompletedProcess(command, 0, out, "")

    monkeypatch.setattr(memory_table.subprocess, "run", child)
    monkeypatch.setattr(memory_table, "hardware", lambda device: "a GPU")
    memory_table.measure_all(tmp_path / "measured.json")
    found = json.loads((tmp_path / "measured.json").read_text())
    assert found["device"] == "a GPU" and found["torch"] == torch.__version__
    assert len(found["peaks"]) == 2 * (3 * 2 + 3) and "out of memory" in capsys.readouterr().out
    line = memory_table.lines()[0]
    assert memory_table.measured(line | {"stage": 3}, found) == "out of memory"
    rest = 2 * (memory.VAE + memory.CLIP_L + memory.BIG_G) / 2**30
    assert memory_table.measured(line, found) == f"{2 + rest:.1f}"
    assert memory_table.measured(line | {"gpus": 8}, found) == "not measured"


def test_command_line_prints_every_part(capsys):
    memory_table.main(["--model=sd15", "--lora-rank=8", "--stage=1", "--micro-batch=1"])
    text = capsys.readouterr().out
    assert all(f"\n  {part} " in text for part in memory_table.PARTS)
    assert "LoRA, rank 8, ZeRO-1" in text and "a card of 16 GB" in text


def test_table_has_every_line_under_the_card_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_table, "CONFIGS", {"sdxl": SMALL, "sd15": SMALL})
    grown = {"activations": 1.0, "total": 20.0}
    monkeypatch.setattr(
        memory_table, "estimate", lambda *_, **flags: dict.fromkeys(memory_table.PARTS, 0.5) | grown
    )
    memory_table.main(["--table", f"--out={tmp_path / 'memory.md'}"])
    text = (tmp_path / "memory.md").read_text()
    table = [line for line in text.splitlines() if line.startswith(("| sdxl", "| sd15"))]
    assert len(table) == len(memory_table.lines()) == 2 * (24 + 4 + 3)
    head = text[: text.index("## One card of 24 GB")]
    assert "| sdxl" not in head and "Computed, not measured: no GPU was at hand." in head
    assert [memory_table.card(size) for size in (14.4, 14.5, 72, 73)] == [16, 24, 80, None]


def test_the_page_is_the_one_in_docs(tmp_path):
    program, out = Path(memory_table.__file__), tmp_path / "memory.md"
    # In a process of its own: a ZeRO-3 engine replaces torch's linear layer by one that keeps more.
    subprocess.run([sys.executable, program, "--table", "--out", out], check=True)
    assert out.read_text() == (program.parent / "docs" / "memory.md").read_text()


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--model=sd3"], "--model sd3: must be sdxl or sd15."),
        (["--gpus=0"], "--gpus 0: must be at least 1."),
        (["--stage=1", "--offload"], "--offload: needs --stage 2 or 3."),
        (["--table"], "--table: needs --out FILE."),
        (["--out=x.md"], "--out: goes with --table or --measure."),
        (["--table", "--out=no/x.md"], "--out no/x.md: must be a file in a folder that exists."),
        (["--measure"], "--measure: needs a GPU, and CUDA sees none."),
    ],
)
def test_mistakes_are_said_in_one_sentence(argv, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        memory_table.main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"memory_table.py: error: {sentence}\n"


def test_settings_are_read_as_deepspeed_reads_them():
    assert memory.settings({"zero_optimization": {"stage": 3}}) == {
        "stage": 3, "offload": False, "bucket": 500_000_000, "grad_accum_fp32": False,
        "reduce_fp32": False,
    }  # fmt: skip
    for (stage, offload), file in memory_table.DS_CONFIGS.items():
        found = memory.settings(plan.read_ds_config(file))
        assert (found["stage"], found["offload"]) == (stage, offload), file
        assert found["grad_accum_fp32"]
