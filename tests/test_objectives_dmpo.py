"""Laws of loss.dmpo_loss, and its numbers beside those of its public code."""

import math

import pytest
import torch
from releases import FIELDS, PAIRS, draw, mse64, outcome, rows

from loss import dmpo_loss


def errors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    pred, target, pred_ref = draw(seed)
    return mse64(pred, target), mse64(pred_ref, target)


def of_margins(*margins: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """err, err_ref and beta of pairs with these margins, all of it from the winner."""
    err_ref = torch.zeros(2 * len(margins), dtype=torch.float64)
    err_ref[: len(margins)] = torch.tensor(margins, dtype=torch.float64)
    return torch.zeros_like(err_ref), err_ref, 2.0


def dmpo64(err, err_ref, beta, alpha):
    """Pair by pair: the KL divergence of two coins."""
    losses = []
    for p in range(PAIRS):
        margin = beta / 2 * ((err_ref[p] - err[p]) - (err_ref[p + PAIRS] - err[p + PAIRS]))
        q = 1 / (1 + torch.exp(-margin))
        losses.append(q * torch.log(q / (1 - alpha)) + (1 - q) * torch.log((1 - q) / alpha))
    return torch.stack(losses)


@pytest.mark.parametrize("row", rows("dmpo"))
def test_dmpo_gives_the_numbers_of_its_public_code(row):
    pred, target, pred_ref = draw(row["seed"])

    def loss(pred):
        err, err_ref = mse64(pred, target), mse64(pred_ref, target)
        return dmpo_loss(err, err_ref, row["beta"], row["alpha"])[0].mean()

    assert outcome(loss, pred) == pytest.approx({name: row[name] for name in FIELDS}, rel=1e-9)


@pytest.mark.parametrize("beta, alpha", [(20.0, 0.01), (50.0, 0.3)])
def test_dmpo_loss_and_gradient_equal_the_formula(beta, alpha):
    err, err_ref = errors(11)
    err.requires_grad_()
    expected = dmpo64(err, err_ref, beta, alpha)
    losses, _ = dmpo_loss(err.float(), err_ref.float(), beta, alpha)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=0)
    for ours, theirs in zip(losses, expected, strict=True):
        actual, gradient = (
            torch.autograd.grad(x, err, retain_graph=True)[0] for x in (ours, theirs)
        )
        torch.testing.assert_close(actual, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.8])
def test_dmpo_pulls_every_margin_to_the_log_odds_of_alpha(alpha):
    goal = math.log((1 - alpha) / alpha)
    err, err_ref, beta = of_margins(goal - 1, goal, goal + 1)
    losses, _ = dmpo_loss(err.requires_grad_(), err_ref, beta, alpha)
    grad = torch.autograd.grad(losses.sum(), err)[0][:3]
    p = torch.sigmoid(err_ref[:3])
    torch.testing.assert_close(grad, p * (1 - p) * torch.tensor([1.0, 0.0, -1.0]))
    assert losses[1].item() == pytest.approx(0, abs=1e-12) and losses[[0, 2]].min() > 0


def test_dmpo_at_policy_equals_reference():
    same, _ = errors(0)
    losses = dmpo_loss(same, same, 2000.0, 0.01)[0]
    torch.testing.assert_close(losses, torch.full_like(losses, -math.log(2 * math.sqrt(0.0099))))
    assert dmpo_loss(same, same, 2000.0, 0.5)[0].abs().max() < 1e-15


def test_dmpo_swapping_the_pair_is_swapping_alpha():
    (err, err_ref), alpha = errors(1), 0.1
    losses, stats = dmpo_loss(err, err_ref, 20.0, alpha)
    swapped, stats_swapped = dmpo_loss(err.roll(PAIRS), err_ref.roll(PAIRS), 20.0, 1 - alpha)
    torch.testing.assert_close(swapped, losses)
    assert stats["margin"] == -stats_swapped["margin"] != 0


def test_dmpo_with_a_small_alpha_is_the_doubt_of_the_winner():
    margins = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    losses, _ = dmpo_loss(*of_margins(*margins.tolist()), 1e-300)
    torch.testing.assert_close(
        losses / (300 * math.log(10)), torch.sigmoid(-margins), rtol=0, atol=2e-3
    )


def test_dmpo_is_finite_far_from_the_reference():
    err = torch.tensor([1e4, 0.0, 0.0, 1e4], requires_grad=True)
    losses, _ = dmpo_loss(err, torch.zeros(4), 2.0)  # margins -1e4 and 1e4
    torch.testing.assert_close(losses, torch.tensor([-math.log(0.01), -math.log(0.99)]))
    assert torch.autograd.grad(losses.sum(), err)[0].tolist() == [0.0] * 4


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, float("nan")])
def test_dmpo_alpha_lies_between_zero_and_one(alpha):
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        dmpo_loss(torch.ones(4), torch.ones(4), 1.0, alpha)


def test_dmpo_of_an_odd_number_raises():
    with pytest.raises(ValueError, match="one error per image"):
        dmpo_loss(torch.ones(5), torch.ones(5), 1.0)


def test_dmpo_statistics_are_detached_and_it_never_waits_for_the_device():
    err = torch.ones(4, device="meta", requires_grad=True)
    losses, stats = dmpo_loss(err, torch.ones(4, device="meta"), 10.0)
    assert losses.is_meta and losses.requires_grad
    assert not any(value.requires_grad or value.ndim for value in stats.values())
