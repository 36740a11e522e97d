"""Laws of the released script's inversion, against its lines written out in float64."""

from types import SimpleNamespace

import pytest
import torch

from training.latents import inversion_calls, released

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
ABAR = (1 - BETAS).cumprod(0)
SCALE = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def eps_fn(x, t):
    """Another noise for each x and t, so that a wrong state or timestep shows."""
    return torch.tanh(x * SCALE + t.reshape(-1, 1, 1, 1) / 300)


def by_script(x0, t: int, generator, eta=0.1):
    """train.py at a9cfc4d, lines 993 to 1014, and its scheduler's step, for one image."""
    times = [s for s in (-99, 1, 101, 201, 301, 401, 501, 601, 701, 801) if s < t]
    noisy = x0.clone()
    for s in times:
        alpha, alpha_next = ABAR[max(s, 0)], ABAR[s + 100]
        noise_pred = eps_fn(noisy, torch.tensor([s]))
        start = (noisy - (1 - alpha) ** 0.5 * noise_pred) / alpha**0.5
        noisy = alpha_next**0.5 * start + (1 - alpha_next) ** 0.5 * noise_pred
        variance = (1 - alpha) / (1 - alpha_next) * (1 - alpha_next / alpha)
        noise = torch.randn(x0.shape[1:], generator=generator, dtype=x0.dtype)
        noisy = noisy + eta * variance**0.5 * noise
    return noisy, (noisy - x0 * ABAR[t] ** 0.5) / (1 - ABAR[t]) ** 0.5, len(times)


def gen(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("cell", range(10))
def test_each_image_gets_what_the_script_makes_of_it_alone(cell):
    t = torch.tensor([0, 1, 2, 37, 99]) + 100 * cell
    x0 = torch.randn(5, 3, 8, 8, generator=gen(0), dtype=torch.float64)
    xt, tau = released(eps_fn, x0, t, ABAR, 10, 0.1, [gen(k) for k in range(5)])
    for k in range(5):
        wanted_x, wanted_tau, _ = by_script(x0[k : k + 1], int(t[k]), gen(k))
        torch.testing.assert_close(xt[k : k + 1], wanted_x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(tau[k : k + 1], wanted_tau, rtol=1e-9, atol=1e-9)


def test_a_batch_makes_the_calls_of_its_noisiest_image_and_these_are_counted():
    x0 = torch.randn(1, 3, 8, 8, generator=gen(0), dtype=torch.float64)
    args = SimpleNamespace(latents="released", inversion_steps=10)
    made, hit = [], 0
    for t in range(1000):
        calls = by_script(x0, t, gen(0))[2]
        made.append(calls)
        hit += (calls - 1) * 100 + 1 == t
    assert round(sum(made) / 1000, 2) == 6.38 and hit == 10
    for cell in range(10):
        seen = []

        def counted(x, t, seen=seen):
            seen.append(t.tolist())
            return eps_fn(x, t)

        t = torch.tensor([100 * cell + 99])
        released(counted, x0, t, ABAR, 10, 0.0, None)
        assert len(seen) == max(made[100 * cell : 100 * cell + 100])
        assert len(seen) == inversion_calls(args, [cell])[0]
        assert seen[:2] == [[-99], [1]]
