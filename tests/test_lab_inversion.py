"""lab/inversion.py: its own rule, and that its error is one."""

import torch

from invert import ddim_invert
from lab import inversion

ABAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def curved(x, t):
    return torch.tanh(x * (0.5 + t.reshape(-1, 1, 1, 1) / 1000))


def test_eulers_rule_is_the_two_step_rule_up_to_its_third_move():
    x0 = torch.randn(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 5, 49, 549, 949])
    for steps in (2, 3):
        found = inversion.euler(curved, x0, t, ABAR, steps)[1:]
        tau = ddim_invert(curved, x0, t, ABAR, steps, 0, None, "log-sigma")[1][1:]
        assert torch.allclose(found, tau, rtol=0, atol=1e-9) == (steps == 2)


def test_the_error_of_the_fine_path_is_0_and_others_are_written(monkeypatch, tmp_path):
    monkeypatch.setattr(inversion, "PICTURES", 2)
    monkeypatch.setattr(inversion, "TIMESTEPS", (49, 749))
    monkeypatch.setattr(inversion, "FINE", 4)
    paths = {name: (spacing, (2, 4)) for name, (spacing, _) in inversion.PATHS.items()}
    monkeypatch.setattr(inversion, "PATHS", paths)
    inversion.main(["--out", str(tmp_path / "a.png"), "--report", str(tmp_path / "a.md")])
    assert (tmp_path / "a.png").stat().st_size > 10_000
    lines = (tmp_path / "a.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][2:]
    assert [row[2] for row in rows] == ["1.5", "2.5", "2", "4", "2", "4"]  # mean UNet calls
    errors = [float(row[-1].rstrip(" |")) for row in rows]
    assert errors[-1] == 0 and min(errors[:-1]) > 0.005
