"""Laws of invert.py, against diffusers, closed forms and float64."""

import ast
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

import invert
import model
from invert import (
    add_noise,
    ddim_invert,
    ddim_step,
    implied_noise,
    path,
    predict_x0,
)
from loss import squared_error

torch.set_num_threads(1)

SDXL = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ABAR = (1 - BETAS).cumprod(0)
EVERY_T = torch.arange(1000)


def gen(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=gen(seed), dtype=dtype)


def level(t, batch=2):
    """abar of a timestep for each image of a batch; -1 stands for the clean image."""
    return (ABAR[t] if t >= 0 else torch.ones_like(ABAR[0])).expand(batch)


def column(abar):
    return abar.reshape(-1, 1, 1, 1)


def noised(x0, noise, t):
    return column(ABAR[t].sqrt()) * x0 + column((1 - ABAR[t]).sqrt()) * noise


def curved(x, t):
    """A nonlinear model: depends on x, on the neighbouring pixel and on t."""
    t = column(t) / 1000
    return torch.tanh(x * (0.5 + t)) + 0.3 * torch.sin(2 * x.roll(1, -1) + 5 * t).to(x)


class Always:
    """A model that always predicts the same noise, and remembers what it was shown."""

    def __init__(self, e):
        self.e, self.x, self.t = e, [], []

    def __call__(self, x, t):
        self.x.append(x)
        self.t.append(t)
        return self.e


# --------------------------------------------------------------------------------------------------
# Single steps.

MOVES = [(501, 401), (999, 989), (700, 200), (99, -1), (401, 501), (989, 999), (200, 700), (-1, 99)]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t_from, t_to", MOVES)
def test_step_equals_diffusers(t_from, t_to, kind):
    x, out = normal(2, 2, 4, 8, 8)
    down = t_from > t_to
    scheduler = (DDIMScheduler if down else DDIMInverseScheduler)(**SDXL, prediction_type=kind)
    scheduler.set_timesteps(1000 // abs(t_from - t_to))
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), ABAR, rtol=1e-4, atol=0)
    scheduler.alphas_cumprod = ABAR  # in double precision, as x
    expected = scheduler.step(out, t_from if down else t_to, x).prev_sample

    a = column(level(t_from))
    eps = out if kind == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * x
    actual = ddim_step(x, eps, level(t_from), level(t_to))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_step_as_the_poster_prints_it_is_no_ddim_step():
    x, eps = normal(2, 2, 4, 16, 16, dtype=torch.float32)
    a, b = level(501).float(), level(401).float()
    scheduler = DDIMScheduler(**SDXL)
    scheduler.set_timesteps(10)
    expected = scheduler.step(eps, 501, x).prev_sample
    sigma_a, sigma_b = ((1 - a) / a).sqrt(), ((1 - b) / b).sqrt()
    printed = column((b / a).sqrt()) * x + column(sigma_b - sigma_a) * eps
    assert (ddim_step(x, eps, a, b) - expected).abs().max() < 5e-6
    assert (printed - expected).abs().max() > 0.3


def test_predict_x0_with_the_true_noise_returns_the_true_image():
    x0, noise = normal(2, 1000, 1, 2, 2)
    xt = noised(x0, noise, EVERY_T)
    torch.testing.assert_close(predict_x0(xt, noise, ABAR), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(implied_noise(x0, xt, ABAR), noise, rtol=0, atol=1e-12)


def test_step_to_the_clean_image_equals_predict_x0():
    x, eps = normal(2, 1000, 1, 2, 2)
    clean = torch.ones_like(ABAR)
    torch.testing.assert_close(ddim_step(x, eps, ABAR, clean), predict_x0(x, eps, ABAR))
    assert torch.equal(predict_x0(x, eps, clean), x)


def test_step_to_itself_is_the_identity():
    x, eps = normal(2, 1000, 1, 2, 2)
    assert torch.equal(ddim_step(x, eps, ABAR, ABAR), x)


def test_step_there_and_back_with_the_same_noise_is_the_identity():
    x, eps = normal(2, 1000, 1, 2, 2)
    there = ddim_step(x, eps, ABAR, ABAR.flip(0))
    torch.testing.assert_close(ddim_step(there, eps, ABAR.flip(0), ABAR), x, rtol=0, atol=1e-10)


# --------------------------------------------------------------------------------------------------
# Forward noise.


def test_implied_noise_recovers_the_noise_that_was_added():
    x0, noise = normal(2, 1000, 1, 2, 2)
    xt = add_noise(x0, noise, ABAR)
    torch.testing.assert_close(xt, noised(x0, noise, EVERY_T))
    torch.testing.assert_close(implied_noise(x0, xt, ABAR), noise, rtol=0, atol=1e-12)


def test_added_noise_equals_diffusers_with_a_t_for_each_image():
    x0, noise = normal(2, 1000, 2, 3, 3)
    scheduler = DDIMScheduler(**SDXL)
    scheduler.alphas_cumprod = ABAR
    expected = scheduler.add_noise(x0, noise, EVERY_T)
    torch.testing.assert_close(add_noise(x0, noise, ABAR), expected, rtol=0, atol=1e-14)


def test_no_noise_is_added_at_abar_1():
    x0, noise = normal(2, 3, 4, 8, 8)
    assert torch.equal(add_noise(x0, noise, torch.ones(3)), x0)


# --------------------------------------------------------------------------------------------------
# Single steps in every precision.

HALF = [torch.float16, torch.bfloat16]
STEPS = [predict_x0, implied_noise, add_noise, lambda *args: ddim_step(*args, args[2].flip(0))]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", HALF)
def test_a_step_in_half_precision_is_the_fp32_step_rounded_once(step, dtype):
    abar = torch.cat([ABAR, torch.tensor([2.0**-24])]).float()  # bf16 has 1 for abar[:2]
    images = normal(2, 1001, 1, 2, 2).to(dtype)
    half, full = step(*images, abar), step(*images.float(), abar)
    assert half.dtype == dtype and full.dtype == torch.float32 and half.isfinite().all()
    assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "a, b, both",
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_a_step_of_two_dtypes_returns_what_torch_promotes_them_to(step, a, b, both):
    x, y = normal(2, 3, 4, 8, 8)
    assert step(x.to(a), y.to(b), ABAR[:3].float()).dtype == both


@pytest.mark.parametrize("dtype", HALF)
def test_an_abar_in_half_precision_is_refused(dtype):
    x, abar = normal(2, 3, 4, 8, 8, dtype=torch.float32), ABAR.to(dtype)
    for step in STEPS:
        with pytest.raises(ValueError, match=f"abar is {dtype}, .* pass the schedule's own fp32"):
            step(*x, abar[:3])
    with pytest.raises(ValueError, match=f"abar is {dtype}"):
        ddim_invert(curved, x[0], torch.tensor([0, 500, 999]), abar)


# --------------------------------------------------------------------------------------------------
# Accuracy: data x0 ~ N(mu, s^2), whose best eps and whose path are known exactly:
# eps(x, t) = sqrt(1-abar) (x - sqrt(abar) mu) / (abar s^2 + 1 - abar), and xbar - mu grows like
# sqrt(s^2 + sigma^2). The table has sigma ~ t^2 in 20,000 timesteps from sigma_0 = 1e-5, so that
# showing the clean image as timestep 0 costs nothing and an even grid in t is smooth in sigma.

MU, S = 0.3, 0.5
SIGMA_FINE = 10 * torch.linspace(1e-3, 1, 20_000, dtype=torch.float64) ** 2
FINE = 1 / (1 + SIGMA_FINE**2)
X0 = torch.tensor([-1.0, -0.2, 0.7, 1.4], dtype=torch.float64).reshape(4, 1, 1, 1)


def gaussian(x, t):
    abar = column(FINE[t])
    return (1 - abar).sqrt() * (x - abar.sqrt() * MU) / (abar * S**2 + 1 - abar)


def invert_gaussian(t, steps):
    return ddim_invert(gaussian, X0, torch.full((4,), t), FINE, steps, eta=0)[0]


def assert_first_order(error_of):
    steps = torch.tensor([20, 40, 80, 160, 320])
    logs = torch.stack([error_of(int(n)).abs().max() for n in steps]).log2()
    halvings = logs[:-1] - logs[1:]  # each is the order, once the steps are fine enough
    assert 0.8 < halvings.min() and halvings.max() < 1.3, halvings
    assert logs[-1].exp2() < 0.05


@pytest.mark.parametrize("t", [7_777, 19_999])
def test_inversion_converges_to_the_exact_path_at_first_order(t):
    abar, sigma = FINE[t], SIGMA_FINE[t]
    exact = abar.sqrt() * (MU + (X0 - MU) * (S**2 + sigma**2).sqrt() / S)
    assert_first_order(lambda steps: invert_gaussian(t, steps) - exact)


@pytest.mark.parametrize("t", [7_777, 19_999])
def test_sampling_undoes_inversion_at_first_order(t):
    def round_trip_error(steps):
        x = invert_gaussian(t, steps)
        width = 20_000 // steps
        path = [t, *[s for s in range(20_000 - 1, 0, -width) if s < t]]
        for s, s_next in zip(path, path[1:] + [None], strict=True):
            abar_next = torch.ones(4).double() if s_next is None else FINE[s_next].expand(4)
            x = ddim_step(x, gaussian(x, torch.full((4,), s)), FINE[s].expand(4), abar_next)
        return x - X0

    assert_first_order(round_trip_error)


# --------------------------------------------------------------------------------------------------
# The path.


@pytest.mark.parametrize("steps", [1, 7, 10, 1000])
def test_inversion_lands_on_every_t_by_the_edges_of_the_cells(steps):
    edges = [(k * 1000) // steps - 1 for k in range(1, steps + 1)]
    x0, e = normal(2, 1000, 1, 1, 1)
    model = Always(e)
    xt, _ = ddim_invert(model, x0, EVERY_T, ABAR, steps, eta=0)

    assert [int(p) for p in path(torch.tensor([999]), steps, ABAR, "uniform")] == edges
    assert len(model.t) == steps
    for shown, s in zip(model.t, [0, *edges], strict=False):
        assert torch.equal(shown, EVERY_T.clamp(max=s))
    assert torch.equal(model.x[0], x0)
    torch.testing.assert_close(xt, noised(x0, e, EVERY_T))
    for shown, x in zip(model.t[1:], model.x[1:], strict=True):
        torch.testing.assert_close(x, noised(x0, e, shown))


def test_a_t_in_cell_k_costs_k_plus_1_calls_and_no_move_of_length_zero():
    for t in (t for edge in range(99, 1000, 100) for t in (edge - 99, edge - 57, edge - 1, edge)):
        model = Always(torch.zeros(1, 1, 1, 1))
        ddim_invert(model, model.e, torch.tensor([t]), ABAR, eta=0)
        assert len(model.t) == t // 100 + 1
        path = [-1, *[int(s) for s in model.t[1:]], t]  # -1: the clean image, shown as timestep 0
        assert path == sorted(set(path)) and model.t[0] == 0


@pytest.mark.parametrize("eta", [0, 0.5])
def test_a_schedule_that_ends_on_zero_snr_is_clamped_as_model_does(eta):
    scheduler = DDIMScheduler(**SDXL, rescale_betas_zero_snr=True)
    clamped = model.alphas_cumprod(SimpleNamespace(scheduler=scheduler))
    assert scheduler.alphas_cumprod[-1] == 0 and clamped[-1] > 0
    x0, t = normal(4, 3, 4, 4, dtype=torch.float32), torch.tensor([0, 500, 998, 999])
    (xt, tau), expected = (
        ddim_invert(curved, x0, t, abar, 10, eta, gen(1))
        for abar in (scheduler.alphas_cumprod, clamped)
    )
    assert torch.equal(xt, expected[0]) and torch.equal(tau, expected[1])
    assert tau.isfinite().all()
    torch.testing.assert_close(xt, add_noise(x0, tau, clamped[t]), rtol=0, atol=2e-5)
    if eta == 0:
        assert tau.abs().max() <= 1.3 + 1e-5  # an average of what `curved` predicts


@pytest.mark.parametrize(("place", "value"), [(0, 1), (0, 1 - 1e-9), (-1, -0.1), (5, math.nan)])
def test_a_schedule_outside_0_to_1_is_refused_by_inversion_and_model_alike(place, value):
    abar = ABAR.clone()
    abar[place] = value
    with pytest.raises(ValueError, match=r"abar of a schedule lies in \[0, 1\)"):
        ddim_invert(curved, torch.zeros(1, 1, 1, 1), torch.tensor([500]), abar)
    scheduler = SimpleNamespace(alphas_cumprod=abar)
    with pytest.raises(ValueError, match=r"abar of a schedule lies in \[0, 1\)"):
        model.alphas_cumprod(SimpleNamespace(scheduler=scheduler))


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_steps_out_of_range_raise(steps):
    with pytest.raises(ValueError, match="no 'uniform' path of -?[0-9]+ steps over 1000"):
        ddim_invert(curved, torch.zeros(1, 1, 1, 1), torch.tensor([5]), ABAR, steps)


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_timestep_outside_the_schedule_is_refused(t):
    with pytest.raises(ValueError, match="t must lie in 0..999"):
        ddim_invert(curved, normal(2, 1, 2, 2), torch.tensor([5, t]), ABAR)


# --------------------------------------------------------------------------------------------------
# Batches and randomness.

MIXED_T = torch.tensor([0, 57, 99, 100, 450, 823, 999])


@pytest.mark.parametrize("eta", [0, 0.5])
def test_batch_equals_one_by_one(eta):
    x0 = normal(7, 3, 4, 4)
    batch = ddim_invert(curved, x0, MIXED_T, ABAR, 10, eta, [gen(i) for i in range(7)])
    for i in range(7):
        alone = ddim_invert(curved, x0[i : i + 1], MIXED_T[i : i + 1], ABAR, 10, eta, gen(i))
        for image, expected in zip(batch, alone, strict=True):
            torch.testing.assert_close(image[i : i + 1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0, 0.5])
@pytest.mark.parametrize("count", [0, 1, 6, 8])
def test_a_list_without_one_generator_per_image_raises(count, eta):
    with pytest.raises(ValueError, match=f"7 images need as many generators; got {count}"):
        generators = [gen(i) for i in range(count)]
        ddim_invert(curved, normal(7, 3, 4, 4), MIXED_T, ABAR, 10, eta, generators)


@pytest.mark.parametrize("listed", [False, True])
def test_a_generator_makes_it_reproducible_and_leaves_the_global_state_alone(listed):
    def run(seed):
        generator = [gen(seed + i) for i in range(7)] if listed else gen(seed)
        return ddim_invert(curved, normal(7, 3, 4, 4), MIXED_T, ABAR, 10, 0.5, generator)[0]

    before = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("listed, spacing", [(False, "uniform"), (True, "log-sigma")])
def test_t_abar_and_generator_on_the_cpu_serve_images_on_another_device(listed, spacing):
    """Nothing waits for that device: "meta" tensors hold no numbers, so reading one would raise."""

    def eps_fn(x, t):
        assert t.device == x.device
        return x

    def draw(device):
        generator = gen(3)
        x0 = torch.zeros(7, 3, 4, 4, device=device)
        noise = [generator] * 7 if listed else generator
        xt, tau = ddim_invert(eps_fn, x0, MIXED_T, ABAR, 10, 0.5, noise, spacing)
        assert xt.device.type == tau.device.type == device
        return generator.get_state()  # tells which numbers were taken from it

    elsewhere = "cuda" if torch.cuda.is_available() else "meta"
    assert torch.equal(draw("cpu"), draw(elsewhere))


@pytest.mark.parametrize("t", [199, 350])
def test_injected_noise_has_the_stated_variance(t):
    x0, e = normal(2, 1, 1, 512, 512)
    (pure, _), (noisy, _) = (
        ddim_invert(Always(e), x0, torch.tensor([t]), ABAR, 10, eta, gen(1)) for eta in (0, 0.5)
    )
    scheduler = DDIMScheduler(**SDXL)
    scheduler.alphas_cumprod = ABAR
    path = [s for s in (99, 199, 299) if s < t] + [t]
    var = sum(  # in units of xbar variances add; the first move, from the clean image, has none
        scheduler._get_variance(hi, lo) / ABAR[hi]
        for lo, hi in zip(path[:-1], path[1:], strict=True)
    )
    n = (noisy - pure) / (0.5 * (ABAR[t] * var).sqrt())
    assert abs(n.mean()) < 5 / 512 and abs(n.std() - 1) < 5 / 512 / 2**0.5  # five standard errors
    assert abs((n * e).mean()) < 5 / 512 and abs((n**4).mean() - 3) < 5 * 96**0.5 / 512


def test_first_move_from_the_clean_image_injects_nothing():
    x0, t = normal(100, 1, 2, 2), torch.arange(100)
    pure, noisy = (ddim_invert(curved, x0, t, ABAR, 10, eta, gen(1)) for eta in (0, 1))
    assert torch.equal(pure[0], noisy[0]) and torch.equal(pure[1], noisy[1])


# --------------------------------------------------------------------------------------------------
# The log-sigma path: the same number of calls for every t.

SIGMA = ((1 - ABAR) / ABAR).sqrt()
LOG_T = torch.tensor([*range(11), 49, 349, 949, 999])


def inverted(model, x0, t, calls, eta=0.0, generator=None, abar=ABAR):
    return ddim_invert(model, x0, t, abar, calls, eta, generator, "log-sigma")


@pytest.mark.parametrize("calls", [2, 3, 4, 6])
def test_the_log_sigma_path_takes_as_many_calls_for_every_t_and_ends_on_it(calls):
    x0, e = normal(len(LOG_T), 1, 2, 2), normal(len(LOG_T), 1, 2, 2, seed=1)
    model = Always(e)
    xt, tau = inverted(model, x0, LOG_T, calls)
    assert len(model.t) == calls
    torch.testing.assert_close(tau, e)  # also where some moves have length zero
    torch.testing.assert_close(xt, noised(x0, e, LOG_T))
    xt, tau = inverted(curved, x0.float(), LOG_T, calls, 0.5, gen(1), ABAR.float())
    assert xt.isfinite().all() and tau.isfinite().all()
    torch.testing.assert_close(xt.double(), noised(x0, tau, LOG_T), rtol=0, atol=1e-5)


@pytest.mark.parametrize("calls", [2, 3, 4, 6])
def test_its_points_are_the_timesteps_nearest_to_even_levels_of_log_sigma(calls):
    for t in LOG_T.tolist():
        a, b = SIGMA[min(1, t)].log(), SIGMA[t].log()
        wanted = [(a + (b - a) * j / (calls - 1)).exp() for j in range(calls - 1)]
        nearest = [int((SIGMA - one).abs().argmin()) for one in wanted]
        found = torch.stack(path(torch.tensor([t]), calls, ABAR, "log-sigma")).flatten().tolist()
        assert found == [*nearest, t] and found == sorted(found)


def test_its_moves_from_the_third_on_are_exact_where_eps_is_linear_in_log_sigma():
    t, calls = torch.tensor([949]), 5
    points = [int(point) for point in path(t, calls, ABAR, "log-sigma")]

    def line(s):
        return 0.7 - 0.3 * s.log()

    def integral(s):
        return 0.7 * s - 0.3 * (s * s.log() - s)

    _, tau = inverted(
        lambda x, t: column(line(SIGMA[t])) + 0 * x, torch.zeros(1, 1, 1, 1).double(), t, calls
    )
    s = SIGMA[points]
    expected = s[0] * line(SIGMA[0]) + (s[1] - s[0]) * line(s[0])  # Euler's rule twice
    expected = expected + integral(s[-1]) - integral(s[1])
    torch.testing.assert_close(tau.flatten(), expected[None] / s[-1], rtol=1e-12, atol=0)


def test_it_converges_at_second_order_on_gaussian_data():
    """Data N(m, c^2): eps = sigma (xbar - m) / (c^2 + sigma^2), xbar - m grows as its root.

    The first move, to t = 1, is Euler's for any number of calls: its error, below 0.003 here, is
    what remains."""
    m, c, t = 0.3, 0.5, torch.tensor([949])
    x0 = m + c * normal(1, 1, 8, 8)

    def model(x, t):
        s = column(SIGMA[t])
        return s * (x / column(ABAR[t].sqrt()) - m) / (c**2 + s**2)

    tau = (x0 - m) * ((1 + SIGMA[t] ** 2 / c**2).sqrt() - 1) / SIGMA[t]
    errors = [
        float((inverted(model, x0, t, calls)[1] - tau).norm() / tau.norm()) for calls in (8, 16, 32)
    ]
    assert errors[0] / errors[2] > 10 and errors[2] < 0.01, errors
    assert errors[0] < float((ddim_invert(model, x0, t, ABAR, 10, 0)[1] - tau).norm() / tau.norm())


def test_a_batch_on_the_log_sigma_path_equals_one_by_one():
    x0 = normal(7, 3, 4, 4)
    xt, tau = inverted(curved, x0, MIXED_T, 4, 0.5, [gen(i) for i in range(7)])
    for i in range(7):
        one = inverted(curved, x0[i : i + 1], MIXED_T[i : i + 1], 4, 0.5, [gen(i)])
        torch.testing.assert_close((xt[i : i + 1], tau[i : i + 1]), one, rtol=0, atol=1e-12)


def test_the_log_sigma_path_reaches_the_end_of_zero_terminal_snr():
    abar = DDIMScheduler(**SDXL, rescale_betas_zero_snr=True).alphas_cumprod
    x0, t = normal(3, 3, 4, 4, dtype=torch.float32), torch.tensor([0, 998, 999])
    xt, tau = inverted(curved, x0, t, 4, 0.1, gen(1), abar)
    assert xt.isfinite().all() and tau.isfinite().all()


@pytest.mark.parametrize("spacing, steps", [("uniform", 10), ("log-sigma", 3), ("log-sigma", 4)])
def test_eta_adds_the_stated_variance_to_tau(spacing, steps):
    t = torch.tensor([349])
    points = [int(point) for point in path(t, steps, ABAR, spacing)]
    a, s = ABAR[points], SIGMA[points]
    added = (a[:-1] / a[1:]) * (s[:-1] / s[1:]) ** 2 * (s[1:] ** 2 - s[:-1] ** 2)
    expected = float(0.1**2 * added.sum() / s[-1] ** 2)
    x0 = torch.zeros(1, 1, 512, 512, dtype=torch.float64)
    _, tau = ddim_invert(Always(x0), x0, t, ABAR, steps, 0.1, gen(1), spacing)
    assert expected < 0.006  # 0.56 % at t = 349 on the paper's grid, 0.08 and 0.20 % on the others
    assert abs(float(tau.var()) / expected - 1) < 5 * 2**0.5 / 512


def test_the_log_sigma_path_needs_two_calls_and_a_spacing_a_name():
    x0, t = torch.zeros(1, 1, 1, 1), torch.tensor([5])
    with pytest.raises(ValueError, match="no 'log-sigma' path of 1 steps"):
        inverted(curved, x0, t, 1)
    with pytest.raises(ValueError, match="no 'cosine' path"):
        ddim_invert(curved, x0, t, ABAR, spacing="cosine")


# --------------------------------------------------------------------------------------------------
# tau, precision and gradients.


@pytest.mark.parametrize("eta", [0, 0.5])
def test_accumulated_tau_equals_implied_noise(eta):
    x0 = normal(1000, 1, 2, 2)
    xt, tau = ddim_invert(curved, x0, EVERY_T, ABAR, 10, eta, gen(1))
    torch.testing.assert_close(implied_noise(x0, xt, ABAR), tau, rtol=0, atol=1e-12)

    late = EVERY_T[200:]
    xt, tau = ddim_invert(curved, x0[late].float(), late, ABAR.float(), 10, eta, gen(1))
    recovered = implied_noise(x0[late].float(), xt, ABAR[late].float())
    torch.testing.assert_close(recovered, tau, rtol=0, atol=1e-5)


def test_constant_noise_without_injection_is_tau_and_recovery_loses_digits_at_small_t():
    x0, e = normal(2, 1000, 1, 4, 4, dtype=torch.float32)
    xt, tau = ddim_invert(Always(e), x0, EVERY_T, ABAR.float(), eta=0)
    torch.testing.assert_close(tau, e, rtol=1e-6, atol=1e-7)

    early = slice(0, 20)
    recovered = implied_noise(x0[early], xt[early], ABAR.float()[early])
    lost, kept = (recovered - e[early]).abs().max(), (tau - e)[early].abs().max()
    assert kept < 0.1 * lost, (kept, lost)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_in_gives_fp32_out(dtype):
    seen = []

    def half_model(x, t):
        seen.append(x.dtype)
        return curved(x, t).to(dtype)

    x0, abar = normal(7, 3, 4, 4).to(dtype), ABAR.float()
    half = ddim_invert(half_model, x0, MIXED_T, abar, 10, 0.5, gen(1))
    full = ddim_invert(half_model, x0.float(), MIXED_T, abar, 10, 0.5, gen(1))
    assert set(seen) == {torch.float32}
    for a, b in zip(half, full, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_no_gradient_flows():
    model = torch.nn.Conv2d(3, 3, 3, padding=1)
    x0 = normal(2, 3, 4, 4, dtype=torch.float32).requires_grad_()
    xt, tau = ddim_invert(lambda x, t: model(x), x0, MIXED_T[-2:], ABAR.float())
    assert not xt.requires_grad and not tau.requires_grad
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------------------------
# In another trainer: autocast and torch.compile.


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def test_autocast_around_it_all_equals_autocast_around_the_model_alone():
    policy = torch.nn.Conv2d(3, 3, 3, padding=1)
    x0, abar = normal(7, 3, 4, 4, dtype=torch.float32), ABAR.float()

    def cast(x):
        with bf16():
            return policy(x)

    def step(predict):
        shown = []

        def eps_fn(x, t):
            shown.append(x)
            return predict(x)

        xt, tau = ddim_invert(eps_fn, x0, MIXED_T, abar, 10, 0.5, gen(1))
        err = squared_error(predict(xt), tau)
        (gradient,) = torch.autograd.grad(err.mean(), policy.weight)
        assert {x.dtype for x in (*shown, xt, tau, err)} == {torch.float32}
        return xt, tau, err, gradient

    expected = step(cast)
    assert not torch.equal(step(policy)[1], expected[1])
    with bf16():
        for ours, theirs in zip(step(policy), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_autocast_keeps_no_cast_of_the_weights_from_an_inversion():
    policy = torch.nn.Conv2d(3, 3, 3, padding=1, bias=False)
    x0 = normal(7, 3, 4, 4, dtype=torch.float32)
    with bf16():
        xt, _ = ddim_invert(lambda x, t: policy(x), x0, MIXED_T, ABAR.float())
        policy.weight.data.zero_()
        assert policy(xt).count_nonzero() == 0  # the weight as it is now


def test_a_compiled_model_keeps_to_one_graph():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(curved, fullgraph=True, backend=count)
    x0 = normal(7, 3, 4, 4, dtype=torch.bfloat16)
    for t in (MIXED_T, MIXED_T.flip(0)):
        args = (x0, t, ABAR.float(), 10, 0.5)
        ours, expected = (ddim_invert(f, *args, gen(1)) for f in (compiled, curved))
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert len(graphs) == 1


def test_the_steps_compile_without_a_graph_break():
    def steps(*args):
        return [step(*args) for step in STEPS]

    torch.compiler.reset()
    args = (*normal(2, 3, 4, 8, 8, dtype=torch.bfloat16), ABAR[:3].float())
    compiled = torch.compile(steps, fullgraph=True, backend="eager")
    for ours, expected in zip(compiled(*args), steps(*args), strict=True):
        assert torch.equal(ours, expected)


# --------------------------------------------------------------------------------------------------
# The two files stand alone.

HERE = Path(invert.__file__).parent
ALONE = """
import copy, sys

class Refuse:  # everything this repository uses, apart from torch
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"accelerate", "datasets", "deepspeed", "diffusers", "peft", "PIL",
                                  "safetensors", "transformers", "data", "model", "toy"}:
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import torch
from invert import ddim_invert
from loss import inpo_loss, squared_error

torch.set_num_threads(1)
torch.manual_seed(0)
policy = torch.nn.Conv2d(3, 3, 3, padding=1)
reference = copy.deepcopy(policy)
abar = torch.linspace(0.999, 0.005, 1000)
x0, t = torch.randn(4, 3, 8, 8), torch.tensor([20, 730]).repeat(2)
xt, tau = ddim_invert(lambda x, t: policy(x), x0, t, abar)
with torch.no_grad():
    err_ref = squared_error(reference(xt), tau)
losses = []
for _ in range(2):  # by hand: torch.optim takes seconds to import
    loss = inpo_loss(squared_error(policy(xt), tau), err_ref, 10.0)[0].mean()
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    for weight, gradient in zip(policy.parameters(), gradients, strict=True):
        weight.data -= 1e-3 * gradient
    losses.append(loss.item())
assert abs(losses[0] - 0.6931472) < 1e-6 and losses[1] < losses[0], losses
"""


def test_copied_alone(tmp_path):
    for name in ("invert.py", "loss.py"):
        source = Path(shutil.copy(HERE / name, tmp_path)).read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [getattr(node, "module", None) or alias.name for alias in node.names]
                tops = {module.split(".")[0] for module in modules}
                assert tops <= {"torch", *sys.stdlib_module_names}, tops
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path)]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


# --------------------------------------------------------------------------------------------------
# ReNoise: the mean of the predictions at both ends of a move.


def test_renoise_is_heuns_rule_in_sigma():
    """Written out for x(sigma) = xbar, d xbar / d sigma = eps(x_t, t), in float64."""
    calls = []

    def eps_fn(x, t):
        calls.append(t.clone())
        return torch.tanh(0.3 * x + t.reshape(-1, 1, 1, 1) / 500)

    x0, t = normal(3, 2, 4, 4, seed=2), torch.tensor([20, 399, 399])
    sigma = ((1 - ABAR) / ABAR).sqrt()
    xt, tau = ddim_invert(eps_fn, x0, t, ABAR, 10, 0.0, renoise=True)
    assert len(calls) == 2 * 4
    for k in range(3):
        xbar, s, shown = x0[k : k + 1], torch.zeros(()), torch.tensor([0])
        for to in [*range(99, int(t[k]), 100), int(t[k])]:
            u, new = sigma[to], torch.tensor([to])
            one = eps_fn(xbar / (1 + s**2).sqrt(), shown)
            two = eps_fn((xbar + (u - s) * one) / (1 + u**2).sqrt(), new)
            xbar, s, shown = xbar + (u - s) * (one + two) / 2, u, new
        torch.testing.assert_close(xt[k : k + 1], xbar * ABAR[t[k]].sqrt(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(tau[k : k + 1], (xbar - x0[k : k + 1]) / sigma[t[k]])


def test_renoise_of_a_constant_prediction_is_exact_and_comes_nearer_on_a_smooth_one():
    x0, t = normal(2, 1, 4, 4, seed=3), torch.tensor([700, 700])
    same = normal(2, 1, 4, 4, seed=4)
    torch.testing.assert_close(
        ddim_invert(lambda x, t: same, x0, t, ABAR, 10, 0.0, renoise=True)[1], same
    )

    def smooth(x, t):
        return torch.sin(x) + t.reshape(-1, 1, 1, 1) / 1000

    exact = ddim_invert(smooth, x0, t, ABAR, 1000, 0.0)[1]
    plain = ddim_invert(smooth, x0, t, ABAR, 10, 0.0)[1]
    better = ddim_invert(smooth, x0, t, ABAR, 10, 0.0, renoise=True)[1]
    assert (better - exact).square().mean() < 0.5 * (plain - exact).square().mean()
