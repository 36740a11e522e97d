"""lab/inversion.py and lab/paths.py: errors, gradients and variances are what they are called."""

import shutil

import numpy as np
import pytest
import torch

import model
import toy
from invert import path
from lab import inversion, paths
from lab.paths import EULER, OURS, PAPER, RELEASED, Images, Inversion
from loss import squared_error
from system.hub import PRESETS
from weights import loading

ABAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def curved(x, t):
    return torch.tanh(x * (0.5 + t.reshape(-1, 1, 1, 1) / 1000))


def normal(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture
def small(monkeypatch):
    """A run of seconds."""
    monkeypatch.setattr(paths, "TIMESTEPS", (3, 9))
    monkeypatch.setattr(inversion, "TIMESTEPS", (3, 9))
    monkeypatch.setattr(paths, "FINE", 4)
    monkeypatch.setattr(paths, "FINE_GRADIENT", 4)
    monkeypatch.setattr(paths, "EULER_MOVES", 10)
    for name, value in {"PAIRS": 2, "GROUPS": 2, "OF": 2, "REUSED": 3, "FIRSTS": (0, 1)}.items():
        monkeypatch.setattr(inversion, name, value)


# -------------------------------------------------------------------------------------------------
# Paths.


def test_eulers_rule_is_the_two_step_rule_up_to_its_third_move():
    x0, t = normal(6, 1, 4, 4), torch.tensor([0, 1, 5, 49, 549, 949])
    for steps in (2, 3):
        found = Inversion(EULER, steps)(curved, x0, t, ABAR)
        ours = Inversion(OURS, steps)(curved, x0, t, ABAR)
        for a, b in zip(found, ours, strict=True):
            assert torch.allclose(a[1:], b[1:], rtol=0, atol=1e-9) == (steps == 2)


@pytest.mark.parametrize("one", [Inversion(PAPER, 5), Inversion(PAPER, 10), Inversion(OURS, 3)])
def test_mean_calls_are_those_that_all_timesteps_take(one):
    taken = []
    for t in range(5, 1000, 10):
        one(lambda x, t: taken.append(t) or x, torch.ones(1, 1, 1, 1), torch.tensor([t]), ABAR)
    assert len(taken) / 100 == one.calls()


def test_the_released_script_goes_to_the_first_of_1_101_and_so_on_that_is_not_below_t():
    stops = np.arange(1, 1000, 100)
    assert Inversion(RELEASED, 10).calls() == np.mean(
        [1 + min(np.count_nonzero(stops < t), 9) for t in range(1000)]
    )


def test_a_first_move_to_1_is_the_log_sigma_path_and_others_end_elsewhere():
    t = torch.arange(1000)
    for steps in (2, 3, 4, 6):
        ours = path(t, steps, ABAR, "log-sigma")
        assert all(map(torch.equal, paths.starting_at(1, t, steps, ABAR), ours))
        assert torch.equal(paths.starting_at(20, t, steps, ABAR)[0], t.clamp(max=20))
    seen = []
    with paths.points(lambda t, steps, abar: [torch.tensor([7]), t]):
        Inversion(OURS, 2)(
            lambda x, t: seen.append(int(t)) or x, torch.ones(1, 1, 1, 1), torch.tensor([30]), ABAR
        )
    assert seen == [0, 7]


# -------------------------------------------------------------------------------------------------
# Errors.


def test_the_error_is_relative_and_that_of_xt_follows_from_that_of_tau(small, monkeypatch):
    x0 = normal(3, 1, 4, 4)
    monkeypatch.setattr(Images, "denoiser", lambda self, unet: unet)
    images = Images(x0, {}, ABAR, "epsilon")
    fine = paths.fine_results(curved, images)
    same, scaled = (
        paths.errors(curved, images, fine, [lambda *given, k=k: by(k, *given)])[0] for k in (1, 1.5)
    )
    assert same["tau"] == [0, 0]
    np.testing.assert_allclose(scaled["tau"], [0.5, 0.5])
    for t, found in zip((3, 9), scaled["xt"], strict=True):
        tau, xt = fine[t][1].flatten(1).norm(dim=1), fine[t][0].flatten(1).norm(dim=1)
        expected = 0.5 * (1 - ABAR[t]).sqrt() * tau / xt
        assert found == pytest.approx(expected.mean().item())


def by(factor, eps_fn, x0, t, abar):
    """The fine path's result with tau scaled."""
    tau = factor * Inversion(OURS, paths.FINE)(eps_fn, x0, t, abar)[1]
    a = abar[t].reshape(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * tau, tau


def test_eulers_rule_in_many_moves_comes_to_the_fine_path_and_in_few_does_not(monkeypatch):
    x0 = normal(3, 1, 4, 4)
    monkeypatch.setattr(Images, "denoiser", lambda self, unet: unet)
    images = Images(x0, {}, ABAR, "epsilon")
    fine = paths.fine_results(curved, images)
    near, far = (max(paths.from_euler(curved, images, fine, moves)) for moves in (900, 90))
    assert near < 0.004 and 7 < far / near < 13  # of order one
    fine = paths.fine_results(steady, images)
    assert max(paths.from_euler(steady, images, fine, 9)) < 1e-12


def steady(x, t):
    return torch.full_like(x, 0.7)


# -------------------------------------------------------------------------------------------------
# Gradients.


@pytest.fixture(scope="module")
def tiny():
    pipeline = loading.load_pipeline("tiny")
    x0, xt, tau = torch.randn(3, 4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    cond = model.repeat(model.encode_prompts(pipeline, ["a", "b"], 64))
    abar = model.alphas_cumprod(pipeline)
    return pipeline.unet.requires_grad_(True), Images(x0, cond, abar, "epsilon"), xt, tau


def test_where_policy_is_reference_the_gradient_is_that_of_the_errors(tiny):
    unet, images, xt, tau = tiny
    t = torch.tensor([30, 700, 30, 700])
    found = paths.gradient(unet, unet, images, t, 800.0, xt, tau)
    winner, loser = squared_error(images.denoiser(unet)(xt, t), tau).chunk(2)
    gap = 800 / 4 * (winner - loser).mean()  # -log sigmoid has the slope -1/2 at margin 0
    expected = torch.autograd.grad(gap, list(unet.parameters()))
    expected = torch.cat([grad.flatten() for grad in expected])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_fine_path_has_the_gradient_of_a_fine_path(tiny, small):
    unet, images, *_ = tiny
    given = [Inversion(OURS, paths.FINE), Inversion(PAPER, 10)]
    same, other = paths.gradients(unet, unet, images, 800.0, given, pairs=1)
    assert same["cosine"] == pytest.approx([1, 1]) and same["ratio"] == pytest.approx([1, 1])
    assert max(other["cosine"]) < 0.999 and len(other["ratio"]) == 2


@pytest.mark.parametrize("alike, expected", [(True, (11 / 7, 16 / 7)), (False, (11 / 14, 16 / 21))])
def test_reuse_costs_more_where_gradients_of_a_pair_are_equal_and_less_where_independent(
    alike, expected, monkeypatch
):
    pairs = 600
    draws = torch.randint(1000, (3, pairs), generator=torch.Generator().manual_seed(0))
    draws = draws[:1].repeat(3, 1) if alike else draws
    monkeypatch.setattr(paths, "uniform_t", lambda images, times: list(draws.repeat(1, 2)))
    monkeypatch.setattr(Images, "denoiser", lambda self, unet: lambda x, t: x)
    monkeypatch.setattr(
        paths, "gradient", lambda a, b, images, t, *_: t.double().mean().reshape(1)
    )  # of one number, so that only t decides
    images = Images(torch.ones(2 * pairs, 1, 1, 1), {}, ABAR, "epsilon")
    for row, ratio in zip(paths.reuse(None, None, images, 1.0), expected, strict=True):
        assert row["ratio"] == pytest.approx(ratio, rel=1e-9 if alike else 0.1)
        assert row["low"] <= row["ratio"] + 1e-9 and row["ratio"] <= row["high"] + 1e-9


def test_latents_of_a_shared_path_are_those_that_it_passes_through(monkeypatch):
    draws = torch.tensor([[600], [40], [200]])  # of both pairs
    monkeypatch.setattr(paths, "uniform_t", lambda images, times: list(draws.repeat(1, 4)))
    passed, trained = {}, {}

    def eps(x, t):
        passed[int(t[0])] = x[0]
        return curved(x, t)

    def gradient(policy, reference, images, t, beta, xt, tau):
        if len(t) == 6:  # three t of one pair, winner and loser
            trained.update(zip(t[:3].tolist(), xt[:3], strict=True))
        return torch.randn(1)

    monkeypatch.setattr(Images, "denoiser", lambda self, unet: eps)
    monkeypatch.setattr(paths, "gradient", gradient)
    x0 = torch.ones(4, 1, 1, 1, dtype=torch.float64)
    paths.reuse(None, None, Images(x0, {}, ABAR, "epsilon"), 1.0)
    assert list(trained) == [40, 200, 600]
    for t in (40, 200):
        torch.testing.assert_close(trained[t], passed[t])


# -------------------------------------------------------------------------------------------------
# What eta adds, and the program.


@pytest.mark.parametrize("one", [Inversion(PAPER, 10), Inversion(OURS, 3), Inversion(OURS, 4)])
def test_the_variance_that_eta_adds_is_that_of_a_simulation(one):
    for t in (49, 349, 949):
        computed, drawn = (
            f(one, t, ABAR.float(), 0.1) for f in (paths.added_variance, paths.simulated_variance)
        )
        assert drawn == pytest.approx(computed, rel=0.015) or computed == drawn == 0, t


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    table = part[part.index("\n| ") :].strip().split("\n\n")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in table[2:]]


@pytest.mark.slow
def test_the_page_has_every_section_and_the_fine_path_no_error(small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fine = Inversion(OURS, paths.FINE)
    monkeypatch.setattr(inversion, "ERRORS", [Inversion(PAPER, 10), Inversion(RELEASED, 10), fine])
    monkeypatch.setattr(inversion, "GRADIENTS", [Inversion(PAPER, 10), fine])
    inversion.main(["--aligned", PRESETS["tiny"], "--out", "a.png", "--report", "a.md"])
    assert (tmp_path / "a.png").stat().st_size > 10_000
    page = (tmp_path / "a.md").read_text()
    errors = rows(page, "Error of tau and xt")
    assert [row[2] for row in errors] == ["5.5", "6.38", "4"]
    assert [float(row[-1]) > 0.005 for row in errors] == [True, True, False]
    zero, one = rows(page, "Where the first move ends")  # with 3 and 4 calls, of 4 of a fine path
    assert zero[0] == "0" and zero[4] == "0.000" and float(zero[2]) > 0
    assert one[0] == "1" and one[2] == "0.000" and float(one[4]) > 0
    assert rows(page, "The gradient of the loss")[-1][-2] == "1.000 (1.000 to 1.000)"
    assert [row[1] for row in rows(page, "Several t on one path")] == ["11", "16"]
    assert len(rows(page, "The noise that eta adds")) == 3
    assert page.count("python -m lab.inversion --aligned") == 5


def test_any_model_and_pairs_get_the_same_table_of_errors(small, monkeypatch, tmp_path):
    folder, pairs = tmp_path / "copy", toy.write_pairs(tmp_path / "pairs.parquet", 4)
    shutil.copytree(PRESETS["tiny"], folder)
    monkeypatch.setattr(inversion, "ERRORS", [Inversion(PAPER, 10), Inversion(OURS, paths.FINE)])
    out = ["--out", str(tmp_path / "a.png"), "--report", str(tmp_path / "a.md")]
    inversion.main(["--model", str(folder), "--data", str(pairs), *out])
    page = (tmp_path / "a.md").read_text()
    errors = rows(page, f"Error of tau and xt: {folder}")
    assert float(errors[0][-1]) > 0.005 and float(errors[1][-1]) == 0
    assert "gradient" not in page


def test_without_an_aligned_model_it_says_how_to_make_one(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        inversion.main([])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "python train_inpo.py --model tiny --out out/demo/al" in said
