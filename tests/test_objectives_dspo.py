"""Laws of loss.dspo_loss, and its numbers beside those of its release."""

import pytest
import torch
from releases import FIELDS, PAIRS, draw, mse64, outcome, rows

from loss import dmpo_loss, dspo_loss, inpo_loss, mapo_loss, sft_loss, squared_error


def dspo64(pred, target, pred_ref, beta):
    """Pair by pair, element by element."""
    err, err_ref = mse64(pred, target), mse64(pred_ref, target)
    losses = []
    for w in range(PAIRS):
        margin = beta / 2 * ((err_ref[w] - err[w]) - (err_ref[w + PAIRS] - err[w + PAIRS]))
        pull = beta * (1 - 1 / (1 + torch.exp(-margin)))
        losses.append((((pred - target) - pull * (pred - pred_ref))[w] ** 2).mean())
    return torch.stack(losses)


def gradient(loss, pred):
    pred = pred.clone().requires_grad_()
    return torch.autograd.grad(loss(pred), pred)[0]


@pytest.mark.parametrize("row", rows("dspo"))
def test_dspo_gives_the_numbers_of_its_release(row):
    pred, target, pred_ref = draw(row["seed"])
    ours = outcome(lambda pred: dspo_loss(pred, target, pred_ref, row["beta"])[0].mean(), pred)
    assert ours["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert ours == pytest.approx({name: row[name] for name in FIELDS}, rel=1e-4, abs=0)


@pytest.mark.parametrize("beta", [0.05, 2.0, 50.0])
def test_dspo_loss_and_gradient_equal_the_formula(beta):
    pred, target, pred_ref = draw(11)
    pred.requires_grad_()
    losses, _ = dspo_loss(pred, target, pred_ref, beta)
    expected = dspo64(pred, target, pred_ref, beta)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=0)
    for ours, theirs in zip(losses, expected, strict=True):
        actual, by_hand = (
            torch.autograd.grad(x, pred, retain_graph=True)[0] for x in (ours, theirs)
        )
        torch.testing.assert_close(
            actual, by_hand, rtol=1e-3, atol=1e-4 * by_hand.abs().max().item()
        )


def test_dspo_with_beta_0_is_sft_on_winners():
    pred, target, pred_ref = draw(0)
    winners = sft_loss(squared_error(pred, target)[:PAIRS])
    assert torch.equal(dspo_loss(pred, target, pred_ref, 0.0)[0], winners)


@pytest.mark.parametrize("beta", [0.001, 1.0, 2.0])
def test_dspo_at_policy_equals_reference_is_sft_with_less_of_its_gradient(beta):
    pred, target, _ = (x.float() for x in draw(0))
    losses, stats = dspo_loss(pred, target, pred, beta)
    assert torch.equal(losses, squared_error(pred, target)[:PAIRS]) and stats["margin"] == 0
    actual = gradient(lambda x: dspo_loss(x, target, pred, beta)[0].sum(), pred)
    sft = gradient(lambda x: squared_error(x, target)[:PAIRS].sum(), pred)
    torch.testing.assert_close(actual, (1 - beta / 2) * sft)
    assert torch.equal(actual[PAIRS:], torch.zeros_like(actual[PAIRS:]))  # none for the losers


def test_dspo_of_a_pair_it_is_sure_of_is_sft_and_of_a_swapped_one_has_all_of_beta():
    pred, target, pred_ref = (x.float() for x in draw(3))
    pred_ref[PAIRS:], pred[PAIRS:] = target[PAIRS:], target[PAIRS:] + 100  # hopeless losers
    losses, stats = dspo_loss(pred, target, pred_ref, 0.5)
    assert stats["margin"] > 100
    torch.testing.assert_close(losses, squared_error(pred, target)[:PAIRS])
    swapped, stats_swapped = dspo_loss(*(x.roll(PAIRS, 0) for x in (pred, target, pred_ref)), 0.5)
    assert stats_swapped["margin"] == -stats["margin"]
    torch.testing.assert_close(swapped, torch.full((PAIRS,), (100 - 0.5 * 100) ** 2.0))


def test_dspo_loser_enters_through_the_pull_alone():
    pred, target, pred_ref = draw(4)
    grad = gradient(lambda x: dspo_loss(x, target, pred_ref, 5.0)[0].sum(), pred)[PAIRS:]
    direction = (pred - target)[PAIRS:]  # of the gradient of the loser's error
    for ours, along in zip(grad, direction, strict=True):
        cosine = torch.nn.functional.cosine_similarity(ours.flatten(), along.flatten(), dim=0)
        assert abs(cosine.item()) == pytest.approx(1, abs=1e-6)


def test_dspo_computes_in_fp32():
    pred = torch.full((2, 1, 2, 2), 256.0, dtype=torch.bfloat16)
    target = torch.full_like(pred, 0.5)  # bfloat16 has 256 - 0.5 = 256
    losses, _ = dspo_loss(pred, target, pred, 1.0)
    assert losses.dtype == torch.float32 and losses.tolist() == [255.5**2]


def test_dspo_statistics_are_those_of_dpo():
    pred, target, pred_ref = draw(5)
    stats = dspo_loss(pred.requires_grad_(), target, pred_ref, 10.0)[1]
    err, err_ref = squared_error(pred, target), squared_error(pred_ref, target)
    assert stats == inpo_loss(err, err_ref, 10.0)[1]
    assert not any(value.requires_grad for value in stats.values())


def test_dspo_of_an_odd_number_raises_and_it_never_waits_for_the_device():
    with pytest.raises(ValueError, match="one error per image"):
        dspo_loss(*[torch.ones(3, 1, 2, 2)] * 3, 1.0)
    assert dspo_loss(*[torch.ones(4, 1, 2, 2, device="meta")] * 3, 1.0)[0].is_meta


def test_dspo_dmpo_and_mapo_compile_without_a_graph_break():
    def step(pred, target, pred_ref):
        err, err_ref = squared_error(pred, target), squared_error(pred_ref, target)
        return dspo_loss(pred, target, pred_ref, 5.0), dmpo_loss(err, err_ref, 5.0), mapo_loss(err)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*draw(0)), step(*draw(0)), rtol=0, atol=0)
