"""Laws of loss.mapo_loss, and its numbers beside those of its release."""

import math

import pytest
import torch
from releases import FIELDS, PAIRS, draw, mse64, outcome, rows

from loss import inpo_loss, mapo_loss, sft_loss


def errors(seed: int) -> torch.Tensor:
    pred, target, _ = draw(seed)
    return mse64(pred, target)


def mapo64(err, beta, snr, timesteps):
    """Pair by pair: err_w + beta log(1 + exp(-timesteps (score_w - score_l)))."""
    score = [snr * e / (torch.exp(snr * e) - 1) for e in err]
    return torch.stack(
        [
            err[p] + beta * torch.log1p(torch.exp(-timesteps * (score[p] - score[p + PAIRS])))
            for p in range(PAIRS)
        ]
    )


@pytest.mark.parametrize("row", rows("mapo"))
def test_mapo_gives_the_numbers_of_its_release(row):
    pred, target, _ = draw(row["seed"])
    ours = outcome(
        lambda pred: mapo_loss(mse64(pred, target), row["beta"], row["snr"])[0].mean(), pred
    )
    assert ours == pytest.approx({name: row[name] for name in FIELDS}, rel=1e-9)


@pytest.mark.parametrize("beta, snr, timesteps", [(0.1, 0.5, 1000), (2.0, 3.0, 10)])
def test_mapo_loss_and_gradient_equal_the_formula(beta, snr, timesteps):
    err = errors(11).requires_grad_()
    expected = mapo64(err, beta, snr, timesteps)
    losses, _ = mapo_loss(err.float(), beta, snr, timesteps)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=0)
    for ours, theirs in zip(losses, expected, strict=True):
        actual, gradient = (
            torch.autograd.grad(x, err, retain_graph=True)[0] for x in (ours, theirs)
        )
        torch.testing.assert_close(actual, gradient, rtol=1e-3, atol=1e-5)


def test_mapo_without_a_margin_term_is_sft_on_winners():
    err = errors(0)
    assert torch.equal(mapo_loss(err, beta=0.0)[0], sft_loss(err[:PAIRS]))


def test_mapo_of_a_tie_is_the_error_and_beta_log2():
    err = errors(0)[:PAIRS].repeat(2)
    losses, stats = mapo_loss(err, 0.3)
    torch.testing.assert_close(losses, err[:PAIRS] + 0.3 * math.log(2))
    assert stats["margin"] == 0 and stats["implicit_accuracy"] == 0.5


def test_mapo_with_a_small_snr_is_dpo_with_a_reference_equally_good_at_both():
    err, one = errors(1), torch.ones(2 * PAIRS, dtype=torch.float64)
    losses, _ = mapo_loss(err, 1.0, snr=1e-6, timesteps=50_000_000)
    torch.testing.assert_close(
        losses - err[:PAIRS], inpo_loss(err, one, 50.0)[0], rtol=1e-5, atol=0
    )


def test_mapo_swapping_the_pair_negates_the_margin():
    err = errors(2)
    stats, swapped = (mapo_loss(x)[1] for x in (err, err.roll(PAIRS)))
    assert stats["margin"] == -swapped["margin"] != 0
    assert stats["reward_winner"] == swapped["reward_loser"]


def test_mapo_score_falls_from_one_to_zero():
    err = torch.tensor([1e-6, 1e4], dtype=torch.float64).requires_grad_()
    losses, stats = mapo_loss(err, timesteps=1)
    assert stats["reward_winner"].item() == pytest.approx(1) and stats["reward_loser"] == 0
    assert torch.autograd.grad(losses.sum(), err)[0].isfinite().all()  # exp(5000) overflows


def test_mapo_in_fp32_keeps_the_digits_of_a_small_error():
    err = torch.tensor([1.0e-3, 1.1e-3])
    margin, exact = (mapo_loss(x)[1]["margin"].item() for x in (err, err.double()))
    assert margin == pytest.approx(exact, abs=2e-4)  # exp - 1 is off by 0.1


def test_mapo_statistics_have_no_reference():
    names = {f"{name}_{side}" for name in ("reward", "err") for side in ("winner", "loser")}
    stats = mapo_loss(errors(0).requires_grad_())[1]
    assert stats.keys() == names | {"margin", "implicit_accuracy"}
    assert not any(value.requires_grad or value.ndim for value in stats.values())


def test_mapo_of_an_odd_number_raises():
    with pytest.raises(ValueError, match="one error per image"):
        mapo_loss(torch.ones(5))


def test_mapo_never_waits_for_the_device():
    assert mapo_loss(torch.ones(4, device="meta"))[0].is_meta
