"""Inputs of an objective, and what the lines of its release made of them (published/NAME.json).

A release's lines were copied out of its repository and run once, unchanged, in float64: on what
`draw` returns for each row's seed, with the row's hyper-parameters. Where the lines cast to fp32,
Tensor.float was a no-op meanwhile. A row holds their loss, the mean over the pairs, and the norm of
its gradient in the policy's predictions of the winners and of the losers.
"""

import json
from pathlib import Path

import pytest
import torch

PAIRS = 3
FIELDS = ("loss", "grad_norm_winner", "grad_norm_loser")


def draw(seed: int) -> tuple[torch.Tensor, ...]:
    """pred, target, pred_ref: (6, 2, 3, 3) float64, multiples of 1/1024, so exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(3, 2 * PAIRS, 2, 3, 3, generator=generator, dtype=torch.float64)
    target, pred, pred_ref = (1024 * normal).round() / 1024
    return target + pred / 4, target, target + pred_ref / 4


def rows(name: str) -> list:
    data = json.loads((Path(__file__).parent / "published" / f"{name}.json").read_text())
    return [pytest.param(row, id=f"seed{row['seed']}") for row in data["rows"]]


def mse64(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """squared_error without its cast to fp32."""
    return ((pred - target) ** 2).mean(dim=(1, 2, 3))


def outcome(loss, pred: torch.Tensor) -> dict[str, float]:
    """The fields of a row, for loss(pred), a scalar."""
    pred = pred.clone().requires_grad_()
    value = loss(pred)
    winner, loser = torch.autograd.grad(value, pred)[0].chunk(2)
    numbers = (value.item(), winner.norm().item(), loser.norm().item())
    return dict(zip(FIELDS, numbers, strict=True))
