"""Laws of configs/: every file trains, and accumulates gradients in fp32."""

import json
from pathlib import Path

import deepspeed
import pytest
import torch
from conftest import metrics
from deepspeed.utils import safe_get_full_fp32_param

import train_inpo
from system.files import ROOT
from training import plan

FILES = [ROOT / "ds_config.json", *sorted((ROOT / "configs").glob("*.json"))]
HALF = [file for file in FILES if file.stem != "cpu"]


def ids(file: Path) -> str:
    return file.stem


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_every_file_trains_in_its_own_precision(file, argv, tmp_path, half):
    train_inpo.main(argv(ds_config=file, lr=1e-3))
    first, second = metrics(tmp_path / "run")
    assert ("loss_scale" in first) == ("fp16" in json.loads(file.read_text()))
    for side in ("winner", "loser"):  # the policy is the reference; but rounded to 8 or 11 bits ...
        assert first[f"err_{side}"] == pytest.approx(first[f"err_ref_{side}"], rel=2e-2)
    if "fp16" not in json.loads(file.read_text()):  # there the first steps find the loss scale
        assert second["margin"] != 0 and 0 < second["grad_norm"] < 1e6


def accumulated(config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """64 micro-steps' gradients: what the engine applied (SGD, lr 1), and their float64 sum."""
    dtype, scale = plan.compute_dtype(config), config.get("fp16", {}).get("loss_scale", 1)
    torch.manual_seed(0)
    net = torch.nn.Linear(64, 64, bias=False)
    start = net.weight.detach().to(dtype)  # the fp32 master copy starts from these
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=torch.optim.SGD(net.parameters(), lr=1.0), config=config
    )
    wanted = torch.zeros(64, 64, dtype=torch.float64)
    for _ in range(64):
        x, y = (torch.randn(2, 8, 64) + torch.tensor([1.0, 0.0])[:, None, None]).to(dtype)
        engine.backward((engine(x) * y).sum() * 0.01)
        engine.step()
        alone = start.clone().requires_grad_()
        ((torch.nn.functional.linear(x, alone) * y).sum() * 0.01 / 64 * scale).backward()
        wanted += alone.grad.double() / scale
    assert engine.was_step_applied()
    return start.double() - safe_get_full_fp32_param(net.weight).double(), wanted


@pytest.mark.parametrize("file", HALF, ids=ids)
def test_gradients_accumulate_in_fp32(file):
    config = json.loads(file.read_text())
    if "fp16" in config:
        config["fp16"]["loss_scale"] = 1024  # a first step is applied
    config |= {"gradient_accumulation_steps": 64, "train_micro_batch_size_per_gpu": 1}
    config |= {"gradient_clipping": 0.0, "tensorboard": {"enabled": False}}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    applied, wanted = accumulated(config)
    assert (applied - wanted).norm() < 1e-5 * wanted.norm()
