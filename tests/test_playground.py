"""Laws of the plane that the book draws: what is exact there is exact, and the loop learns."""

import copy

import pytest
import torch

from invert import add_noise
from lab.playground import (
    ABAR,
    CLEAN,
    METHODS,
    REFERENCE,
    SIGMA,
    UP,
    Mixture,
    Policy,
    T,
    best,
    draw,
    draw_pairs,
    flow,
    judge,
    latents,
    log_density,
    losses_of,
    reward,
    train,
)
from loss import dpo_loss, kto_loss


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(), dtype=torch.float64)


@pytest.mark.parametrize("t", [0, 300, 999])
def test_eps_is_the_score_of_the_noised_mixture(t):
    """With autograd, of the density of xt = sqrt(abar_t) (x0 + sigma_t n)."""
    x = normal(50, 2).requires_grad_()
    wide = Mixture(REFERENCE.means, REFERENCE.variance + SIGMA[t].item() ** 2, REFERENCE.weights)
    (score,) = torch.autograd.grad(wide.log_density(x / ABAR[t].sqrt()).sum(), x)
    expected = -(1 - ABAR[t]).sqrt() * score
    assert torch.allclose(REFERENCE.eps(x, torch.full((50,), t)), expected, atol=1e-12)


def test_a_density_has_the_integral_1_and_the_means_of_its_samples():
    mixture = Mixture(normal(2, 2), 0.1, torch.tensor([0.3, 0.7], dtype=torch.float64))
    line = torch.linspace(-6, 6, 400, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    share = mixture.log_density(points).exp() * (line[1] - line[0]) ** 2
    assert abs(share.sum() - 1) < 1e-6
    mean = mixture.sample(40_000, rng()).mean(0)
    assert torch.allclose(mean, (share[:, None] * points).sum(0), atol=0.02)


@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_the_best_policy_is_the_tilted_reference_with_the_stated_reward_and_kl(strength):
    p, mean, kl = best(strength)
    x = p.sample(100_000, rng())
    log_ratio = p.log_density(x) - REFERENCE.log_density(x)
    assert (strength * log_ratio - reward(x)).std() < 1e-9
    assert abs(reward(x).mean() - mean) < 0.02 and abs(log_ratio.mean() - kl) < 0.02
    assert best(1e6)[2] < 1e-6


def test_the_better_point_wins_as_often_as_bradley_and_terry_say():
    winner, loser = draw_pairs(50_000, rng()).chunk(2)
    gap = reward(winner) - reward(loser)
    assert abs((gap > 0).double().mean() - torch.sigmoid(gap.abs()).mean()) < 0.01
    assert 0.8 < (gap > 0).double().mean() < 0.97  # neither always nor by chance


def test_the_flow_follows_how_each_step_stretches_the_plane():
    """Of eps = c x each DDIM step is a multiple, known in closed form."""
    x, log_det = flow(lambda x, t: 0.3 * x, normal(5, 2), UP)
    scale, abar = torch.ones((), dtype=torch.float64), torch.cat([ABAR, torch.ones(1)])
    sigma = torch.cat([SIGMA, torch.zeros(1)])
    for a, b in zip(UP, UP[1:], strict=False):
        scale = scale * ((abar[b] / abar[a]).sqrt() + 0.3 * abar[b].sqrt() * (sigma[b] - sigma[a]))
    assert torch.allclose(x, scale * normal(5, 2)) and torch.allclose(log_det, 2 * scale.log())
    assert UP[0] == CLEAN and UP[-1] == T - 1


def test_drawing_from_the_reference_gives_its_density():
    x, log_p = draw(REFERENCE.eps, 2000)
    assert abs((log_p - REFERENCE.log_density(x)).mean()) < 0.05
    inside = REFERENCE.log_density(x) > -3
    up = log_density(REFERENCE.eps, x[inside])
    assert (up - REFERENCE.log_density(x[inside])).abs().mean() < 0.2
    one = judge(REFERENCE.eps)
    assert one.drift == 0 and one.distance < 0.05 and one.faithful > 0.97


def test_a_policy_starts_as_the_reference_whatever_the_seed():
    before = torch.random.get_rng_state()
    x, t = normal(20, 2), torch.arange(0, T, 50)
    for seed in (0, 1):
        policy = train("InPO", seed=seed, steps=0)
        assert torch.equal(policy(x, t), REFERENCE.eps(x, t))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(train("SFT", steps=0).layers[0].weight, policy.layers[0].weight)


@pytest.mark.parametrize("method", METHODS)
def test_tau_explains_xt_and_only_dpo_shares_the_noise_of_a_pair(method):
    x0, t = draw_pairs(6, rng()), torch.arange(0, 960, 160).repeat(2)
    xt, tau = latents(method, REFERENCE.eps, x0, t, rng())
    assert torch.allclose(xt, add_noise(x0, tau, ABAR[t]))
    winner, loser = tau.chunk(2)
    assert torch.equal(winner, loser) == (method == "DPO")


def test_losses_are_those_of_loss_py():
    err, err_ref = torch.rand(2, 8, generator=rng())
    for method, losses in {
        "InPO": dpo_loss(err, err_ref, 20)[0],
        "DPO": dpo_loss(err, err_ref, 20)[0],
        "KTO": kto_loss(err, err_ref, 10)[0],  # its reward is beta (err_ref - err)
        "SFT": err[:4],
    }.items():
        assert torch.equal(losses_of(method, err, err_ref, 20), losses)


@pytest.mark.parametrize("method", METHODS)
def test_a_few_steps_raise_the_reward_and_swapped_pairs_lower_it(method):
    pool = draw_pairs(2000, rng(3))
    start = judge(REFERENCE.eps, 300).reward
    rewards = []
    for pairs in (pool, torch.cat(pool.chunk(2)[::-1])):
        rewards.append(judge(train(method, steps=10, pool=pairs, batch=64), 300).reward)
    assert rewards[0] > start + 0.1 and rewards[1] < start - 0.1


def test_a_run_depends_on_its_seed_alone_and_reports_every_step():
    steps = []

    def report(step: int, policy: Policy):
        steps.append((step, copy.deepcopy(policy.layers[-1].bias.data)))

    one = train("DPO", steps=3, batch=8, report=report)
    torch.randn(5)
    again = train("DPO", steps=3, batch=8)
    assert torch.equal(one.layers[0].weight, again.layers[0].weight)
    assert [step for step, _ in steps] == [1, 2, 3] and not torch.equal(steps[0][1], steps[1][1])
    other = train("DPO", seed=1, steps=3, batch=8)
    assert not torch.equal(one.layers[0].weight, other.layers[0].weight)


def test_the_inverter_can_be_the_reference():
    policies = [train("InPO", steps=3, batch=8, by_reference=by) for by in (False, True)]
    weights = [policy.layers[-1].weight for policy in policies]
    assert not torch.equal(*weights)  # from the second step on the latents differ
    first = [train("InPO", steps=1, batch=8, by_reference=by) for by in (False, True)]
    assert torch.equal(*(policy.layers[-1].weight for policy in first))
