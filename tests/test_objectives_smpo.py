"""Laws of SmPO's loss, against its formula in float64 and the numbers of the released lines."""

import json
import math
from pathlib import Path

import pytest
import torch

from loss import inpo_loss, smpo_loss, squared_error
from preparing.score import strength

PUBLISHED = json.loads((Path(__file__).parent / "published" / "smpo.json").read_text())
P = torch.tensor([0.5, 0.52, 0.7, 1.0, 0.3])
PAIRS = len(P)


def errors(seed):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 + 0.01 * torch.rand(2 * PAIRS, generator=generator, dtype=torch.float64)


def smpo64(err, err_ref, beta, probability, gamma):
    """log(1 + exp(gamma (2p - 1) (beta/2) [(err_w - err_ref_w) - (err_l - err_ref_l)]))."""
    return torch.stack(
        [
            torch.log1p(
                torch.exp(
                    gamma * (2 * p - 1) * beta / 2
                    * ((err[i] - err_ref[i]) - (err[i + PAIRS] - err_ref[i + PAIRS]))
                )
            )
            for i, p in enumerate(probability.tolist())
        ]
    )  # fmt: skip


@pytest.mark.parametrize("gamma", [1.0, 10.0])
def test_loss_and_gradient_equal_the_formula(gamma):
    ours, formula = (errors(0).requires_grad_() for _ in range(2))
    losses, stats = smpo_loss(ours, errors(1), 300.0, P, gamma)
    expected = smpo64(formula, errors(1), 300.0, P.double(), gamma)
    torch.testing.assert_close(losses, expected)
    weights = torch.arange(1.0, PAIRS + 1)  # so that a gradient of another pair shows
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, formula.grad)
    assert stats["weight"].item() == pytest.approx(gamma * (2 * P - 1).mean().item())
    assert not any(value.requires_grad for value in stats.values())


def test_policy_equal_to_reference_or_an_undecided_label_gives_log2():
    same, _ = smpo_loss(errors(0), errors(0), 5000.0, P)
    assert torch.allclose(same, torch.full_like(same, math.log(2)))
    err = errors(0).requires_grad_()
    losses, _ = smpo_loss(err, errors(1), 5000.0, torch.full((PAIRS,), 0.5))
    assert torch.equal(losses, torch.full_like(losses, math.log(2)))
    losses.sum().backward()
    assert not err.grad.any()


def test_a_sure_label_of_gamma_1_is_inpo():
    losses, stats = smpo_loss(errors(0), errors(1), 300.0, torch.ones(PAIRS), gamma=1.0)
    expected, expected_stats = inpo_loss(errors(0), errors(1), 300.0)
    torch.testing.assert_close(losses, expected)
    assert stats.pop("weight") == 1 and stats == expected_stats


def test_swapping_a_pair_and_its_label_changes_nothing():
    swapped = [x.roll(PAIRS) for x in (errors(0), errors(1))]
    losses, _ = smpo_loss(errors(0), errors(1), 300.0, P)
    torch.testing.assert_close(smpo_loss(*swapped, 300.0, 1 - P)[0], losses, rtol=1e-6, atol=0)
    assert not torch.allclose(smpo_loss(*swapped, 300.0, P)[0], losses)


def test_no_gradient_reaches_the_label():
    probability = P.clone().requires_grad_()
    losses, _ = smpo_loss(errors(0).requires_grad_(), errors(1), 300.0, probability)
    losses.sum().backward()
    assert probability.grad is None


@pytest.mark.parametrize("shape", [(PAIRS, 1), (2 * PAIRS,), (1,), ()])
def test_another_number_of_labels_is_refused(shape):
    with pytest.raises(ValueError, match="one number per pair"):
        smpo_loss(errors(0), errors(1), 300.0, torch.ones(shape))


# --------------------------------------------------------------------------------------------------
# What the released lines give.


def published(name):
    """(2P,), winners first, of a field that holds [winner, loser] per pair."""
    return torch.tensor([case[name] for case in PUBLISHED["cases"]], dtype=torch.float64).T.ravel()


def field(name):
    return torch.tensor([case[name] for case in PUBLISHED["cases"]], dtype=torch.float64)


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: str(case["seed"]))
def test_each_pair_gets_the_released_loss_and_gradient(case):
    err = torch.tensor(case["err"], dtype=torch.float64).requires_grad_()
    err_ref = torch.tensor(case["err_ref"], dtype=torch.float64)
    probability = torch.tensor([case["probability"]], dtype=torch.float64)
    losses, stats = smpo_loss(err, err_ref, case["beta"], probability)
    losses.mean().backward()
    assert losses.item() == pytest.approx(case["loss"], rel=1e-5)
    torch.testing.assert_close(err.grad.tolist(), case["gradient"], rtol=1e-5, atol=0)
    if case["probability"] > 0.5:
        assert stats["implicit_accuracy"] == case["accuracy"]  # theirs counts no tie


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: str(case["seed"]))
def test_the_released_errors_are_ours(case):
    generator = torch.Generator().manual_seed(case["seed"])
    target, u, v = (
        torch.randint(-512, 513, (2, 4, 8, 8), generator=generator) / 512 for _ in range(3)
    )
    pred = target + u / 16
    for value, name in ((pred, "err"), (pred + v / 32, "err_ref")):
        torch.testing.assert_close(
            squared_error(value, target).tolist(), case[name], rtol=1e-5, atol=0
        )


def test_the_released_batch_has_the_label_of_its_first_pair():
    err, err_ref = published("err").requires_grad_(), published("err_ref")
    batch, p = PUBLISHED["batch"], field("probability")
    smpo_loss(err, err_ref, batch["beta"], p[:1].expand(8))[0].mean().backward()
    torch.testing.assert_close(err.grad.tolist(), batch["gradient"], rtol=1e-5, atol=0)
    ours = smpo_loss(err, err_ref, batch["beta"], p)[0].mean().item()
    assert ours != pytest.approx(batch["loss"], rel=0.01)


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: str(case["seed"]))
def test_pairs_score_gives_the_released_probability(case):
    """By --log-odds 0.06, of a PickScore that is a hundred times the cosine."""
    odds = 0.01 / (0.28201571106910706 - 0.11543526500463486)
    assert odds == pytest.approx(0.06, rel=1e-3)
    scores = [100 * case["score_loser"], 100 * case["score_winner"]]
    given = strength("pickscore", scores, 0, odds)
    assert given == pytest.approx(case["probability"], rel=1e-6)
