"""Laws of Diffusion-SDPO's switch, against its formula in float64 and the released numbers."""

import json
from pathlib import Path

import pytest
import torch

from loss import inpo_loss, kto_loss, safe_share, scaled_gradient, squared_error

PUBLISHED = json.loads((Path(__file__).parent / "published" / "safe.json").read_text())
PAIRS, SHAPE = 6, (6, 3, 4, 4)


def normal(seed, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pairs(dtype=torch.float32):
    """Residuals whose losers lie along, against and across their winners'; and what they are of."""
    r_w, other = normal(0, dtype), normal(1, dtype)
    along = torch.tensor([4, 2, 1, 0.5, -2, 0]).reshape(-1, 1, 1, 1)
    r_l = along * r_w + 0.3 * other
    target = torch.cat([normal(2, dtype), normal(3, dtype)])
    return target + torch.cat([r_w, r_l]), target


def share64(pred, target, mu):
    r = pred.double() - target.double()
    found = []
    for w, loser in zip(*r.chunk(2), strict=True):
        along = (w * loser).sum()
        found.append(1.0 if along <= 0 else min(1.0, ((1 - mu) * (w * w).sum() / along).item()))
    return torch.tensor(found)


@pytest.mark.parametrize("mu", [0, 0.2, 0.6, 0.9, 1])
def test_the_share_equals_the_formula(mu):
    share = safe_share(*pairs(), mu)
    assert share.shape == (PAIRS,) and share.dtype == torch.float32
    torch.testing.assert_close(share, share64(*pairs(), mu))
    if 0 < mu < 1:
        assert (share < 1).sum() >= 2 and (share == 1).sum() >= 1  # both branches are seen


def test_limits_of_the_share():
    target = torch.zeros(2, 1, 1, 2)
    for loser, mu, share in [
        ([3, 4], 0.25, 0.75),  # the winner's own residual
        ([-4, 3], 0.25, 1),  # orthogonal
        ([-3, -4], 1, 1),  # opposite
        ([3, 4], 1, 0),
        ([0.3, 0.4], 0.25, 1),  # a tenth of it would allow 7.5
        ([6, 8], 0, 0.5),
    ]:
        pred = torch.tensor([[3.0, 4.0], loser]).reshape(2, 1, 1, 2)
        assert safe_share(pred, target, mu).item() == pytest.approx(share)
    assert safe_share(target, target, 0.5) == 1  # no error at all
    pred = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).reshape(2, 1, 1, 2)
    assert (
        safe_share(pred, target, 0.5) == 1
    )  # a winner without error has nothing to lose to first order


def test_the_share_is_taken_in_fp32_and_detached():
    pred, target = pairs()
    half = pred.to(torch.bfloat16).requires_grad_()
    share = safe_share(half, target, 0.6)
    assert share.dtype == torch.float32 and not share.requires_grad
    torch.testing.assert_close(share, share64(half.detach(), target, 0.6))


def test_wrong_arguments_are_refused():
    pred, target = pairs()
    for mu in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="mu lies in 0..1"):
            safe_share(pred, target, mu)
    for bad in ((pred[1:], target[1:]), (pred[2:], target)):
        with pytest.raises(ValueError, match="winners first"):
            safe_share(*bad)


def test_values_stay_and_the_losers_pass_on_their_share_of_the_gradient():
    err = squared_error(*pairs()).requires_grad_()
    share = safe_share(*pairs(), 0.6)
    scaled = scaled_gradient(err, share)
    assert torch.equal(scaled, err)
    weights = torch.arange(1.0, 2 * PAIRS + 1)
    (scaled * weights).sum().backward()
    assert torch.equal(err.grad, weights * torch.cat([torch.ones(PAIRS), share]))


@pytest.mark.parametrize("objective", [inpo_loss, kto_loss])
def test_any_objective_of_errors_keeps_its_losses_and_its_winners_gradients(objective):
    pred, target = pairs(torch.float64)
    ref, share = squared_error(pred + 0.01, target).double(), safe_share(pred, target, 0.6)

    def run(switch):
        wrt = pred.clone().requires_grad_()
        err = (wrt - target).square().flatten(1).mean(1)
        losses, _ = objective(scaled_gradient(err, share) if switch else err, ref, 20.0)
        return losses.detach(), torch.autograd.grad(losses.sum(), wrt)[0].chunk(2)

    losses, (winners, losers) = run(False)
    safe_losses, (safe_winners, safe_losers) = run(True)
    assert torch.equal(safe_losses, losses) and torch.equal(safe_winners, winners)
    torch.testing.assert_close(safe_losers, share.double().reshape(-1, 1, 1, 1) * losers)
    assert losers.abs().amax(dim=(1, 2, 3)).min() > 0


@pytest.mark.parametrize("mu", [0, 0.6])
def test_where_a_step_moves_both_predictions_alike_no_winner_gets_worse(mu):
    """The paper's assumption, exactly: each pair's weights are a shift of both its predictions."""
    pred, target = pairs(torch.float64)
    ref = squared_error(pred + 0.01, target).double()

    def fall(share):
        """First-order fall of each err_w by a step against the loss, over that without a loser."""
        shift = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
        err = (pred + torch.cat([shift, shift]) - target).square().flatten(1).mean(1)
        (of_winner,) = torch.autograd.grad(err[:PAIRS].sum(), shift, retain_graph=True)

        def step(share):
            loss = inpo_loss(scaled_gradient(err, share), ref, 20.0)[0].sum()
            return torch.autograd.grad(loss, shift, retain_graph=True)[0]

        falls = [(of_winner * step(x)).flatten(1).sum(1) for x in (share, torch.zeros(PAIRS))]
        return falls[0] / falls[1]

    assert (fall(safe_share(pred, target, mu)) >= mu - 1e-6).all()
    assert fall(torch.ones(PAIRS)).min() < 0  # without the switch


# --------------------------------------------------------------------------------------------------
# What the released lines give.


def inputs(case):
    generator = torch.Generator().manual_seed(case["seed"])
    target, u, v = (
        torch.randint(-512, 513, (2, 4, 8, 8), generator=generator) / 512 for _ in range(3)
    )
    residual = u / 2
    residual[1] += case["along"] * residual[0]
    return target + residual, target, target + residual + v / 32


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: str(case["seed"]))
def test_each_pair_gets_the_released_share_loss_and_gradient(case):
    pred, target, ref = inputs(case)
    share = safe_share(pred, target, case["mu"])
    assert share.item() == pytest.approx(case["share"], rel=1e-5)
    for value, name in ((pred, "err"), (ref, "err_ref")):
        torch.testing.assert_close(
            squared_error(value, target).tolist(), case[name], rtol=1e-5, atol=0
        )
    err = torch.tensor(case["err"], dtype=torch.float64).requires_grad_()
    err_ref = torch.tensor(case["err_ref"], dtype=torch.float64)
    losses, _ = inpo_loss(scaled_gradient(err, share), err_ref, case["beta"])
    losses.mean().backward()
    assert losses.item() == pytest.approx(case["loss"], rel=1e-5)
    torch.testing.assert_close(err.grad.tolist(), case["gradient"], rtol=1e-5, atol=0)


def test_the_released_share_of_a_batch_is_that_of_the_batch_as_one_pair():
    pred, target, _ = (
        torch.stack(x, 1) for x in zip(*map(inputs, PUBLISHED["cases"]), strict=True)
    )
    batch = PUBLISHED["batch"]
    share = safe_share(pred, target, batch["mu"])  # (2, 8, 4, 8, 8): one pair of eight-fold size
    assert share.item() == pytest.approx(batch["share"], rel=1e-5)
