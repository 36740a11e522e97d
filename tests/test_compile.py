"""Laws of --compile: whole graphs, few of them, the same result; pictures are drawn without it."""

import pytest
import torch
from conftest import distance, metrics, refuse, weights
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import train_inpo
from training import preview


@pytest.mark.slow  # dynamo traces for half a minute
@pytest.mark.parametrize("flags", [{}, {"lora_rank": 2}], ids=["full", "lora"])
def test_a_compiled_run_is_the_plain_one_in_a_few_whole_graphs(flags, argv, tmp_path, monkeypatch):
    """With dynamo's eager backend: graphs are those of a real run, arithmetic is that of none."""
    found, true = CompileCounterWithBackend("eager"), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda unet: true(unet, backend=found))
    monkeypatch.setattr(preview, "STEPS", 2)
    torch._dynamo.reset()
    counters.clear()
    drawing = flags | {"sample_every": 1, "inversion_spacing": "log-sigma", "inversion_steps": 3}
    train_inpo.main([*argv(**drawing, out=tmp_path / "compiled"), "--compile"])
    # Of the policy one without gradients and one with them, and of the reference one.
    assert 0 < found.frame_count <= 4 and not counters["graph_break"]
    train_inpo.main(argv(**drawing, out=tmp_path / "plain"))
    lines = [metrics(tmp_path / name) for name in ("compiled", "plain")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    if not flags:
        assert distance(*(weights(tmp_path / name) for name in ("compiled", "plain"))) == 0


def test_compile_is_refused_under_zero_3(argv, capsys):
    said = refuse([*argv(ds_config="configs/zero3.json"), "--compile"], capsys)
    assert said.endswith("leave it out, or take another --ds-config.")
