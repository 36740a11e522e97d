"""Laws of loss.py, against formulas written out in float64 and differentiated by autograd."""

import math

import pytest
import torch

from loss import dpo_loss, inpo_loss, kto_loss, sft_loss, squared_error

torch.set_num_threads(1)

PAIRS = 5
SHAPE = (2 * PAIRS, 3, 4, 4)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def errors(seed):
    """Errors as they come: near one another, (2P,) fp32."""
    return 1 + 0.1 * normal(2 * PAIRS, seed=seed).tanh()


def swap(err):
    return err.roll(len(err) // 2)


def gradient(loss, wrt):
    """d loss(wrt) / d wrt, of a function that returns a scalar."""
    wrt = wrt.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(wrt), wrt)[0]


def mse64(pred, target):
    return ((pred - target) ** 2).mean(dim=(1, 2, 3))


def inpo64(err, err_ref, beta):
    """log(1 + exp((beta/2) [(err_w - err_ref_w) - (err_l - err_ref_l)])), pair by pair."""
    logits = [
        -beta / 2 * ((err[p] - err_ref[p]) - (err[p + PAIRS] - err_ref[p + PAIRS]))
        for p in range(PAIRS)
    ]
    return torch.stack([torch.log1p(torch.exp(-logit)) for logit in logits])


def kto64(err, err_ref, beta, liked, kl, weights):
    """w (1 - h) with 1 - h = 1 / (1 + exp(beta s (g - kl))), image by image."""
    return torch.stack(
        [
            weights[not like] / (1 + torch.exp(beta * (1 if like else -1) * (r - e - kl)))
            for e, r, like in zip(err, err_ref, liked.tolist(), strict=True)
        ]
    )


# --------------------------------------------------------------------------------------------------
# The error.


def test_squared_error_is_one_mean_per_image():
    pred, target = normal(*SHAPE), normal(*SHAPE, seed=1)
    err = squared_error(pred, target)
    assert err.shape == (2 * PAIRS,)
    torch.testing.assert_close(err.double(), mse64(pred.double(), target.double()))
    assert torch.equal(squared_error(pred, pred), torch.zeros(2 * PAIRS))


@pytest.mark.parametrize(
    "pred, target, dtypes, err",
    [
        (256, 0.5, (torch.bfloat16, torch.bfloat16), 255.5**2),  # bfloat16 has 256 - 0.5 = 256
        (300, -300, (torch.float16, torch.float16), 600**2),  # overflows float16
        (1, 1 + 2**-12, (torch.bfloat16, torch.float32), 2**-24),  # the target is 1 in bfloat16
    ],
)
def test_squared_error_subtracts_in_fp32(pred, target, dtypes, err):
    pred, target = (
        torch.full((1, 1, 2, 2), value, dtype=dtype)
        for value, dtype in zip((pred, target), dtypes, strict=True)
    )
    actual = squared_error(pred, target)
    assert actual.dtype == torch.float32 and actual.item() == err


# --------------------------------------------------------------------------------------------------
# Pairwise.


@pytest.mark.parametrize("beta", [1.0, 5000.0])
def test_loss_is_log2_when_policy_equals_reference(beta):
    losses, stats = inpo_loss(errors(0), errors(0), beta)
    assert losses.shape == (PAIRS,)
    assert torch.equal(losses, torch.full((PAIRS,), math.log(2)))
    assert stats["margin"] == 0 and stats["implicit_accuracy"] == 0.5
    assert torch.allclose(inpo_loss(errors(0), errors(1), 1e-6)[0], losses)  # beta -> 0


def test_gradient_is_beta_over_4_per_pair_when_policy_equals_reference():
    actual = gradient(lambda err: inpo_loss(err, errors(0), 5000.0)[0].mean(), errors(0))
    winners = torch.full((PAIRS,), 5000 / 4 / PAIRS)
    torch.testing.assert_close(actual, torch.cat([winners, -winners]))


@pytest.mark.parametrize("beta", [10.0, 5000.0])
def test_loss_and_gradient_equal_the_formula(beta):
    tau = normal(*SHAPE)
    eps, eps_ref = tau + 0.1 * normal(*SHAPE, seed=1), tau + 0.1 * normal(*SHAPE, seed=2)

    def ours(eps):
        return inpo_loss(squared_error(eps, tau), squared_error(eps_ref, tau), beta)[0].mean()

    def formula(eps):
        err_ref = mse64(eps_ref.double(), tau.double())
        return inpo64(mse64(eps, tau.double()), err_ref, beta).mean()

    torch.testing.assert_close(ours(eps).double(), formula(eps.double()), rtol=1e-4, atol=0)
    expected = gradient(formula, eps.double())
    torch.testing.assert_close(
        gradient(ours, eps).double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
    )


def test_swapping_the_pair_negates_the_logit():
    err, err_ref = errors(0), errors(1)
    losses, stats = inpo_loss(err, err_ref, 10.0)
    swapped, stats_swapped = inpo_loss(swap(err), swap(err_ref), 10.0)
    logit, logit_swapped = (-torch.expm1(x).log() for x in (losses, swapped))  # -log(e^loss - 1)
    torch.testing.assert_close(logit_swapped, -logit, rtol=1e-4, atol=1e-5)
    assert stats_swapped["margin"] == -stats["margin"]
    accuracy, accuracy_swapped = (s["implicit_accuracy"].item() for s in (stats, stats_swapped))
    assert accuracy != 0.5 and accuracy_swapped == pytest.approx(1 - accuracy)
    assert stats_swapped["reward_winner"] == stats["reward_loser"]


def test_statistics_are_those_worked_out_by_hand():
    err = torch.tensor([1.0, 2.0, 3.0, 4.0, 2.0, 2.0, 5.0, 1.0])  # four winners, four losers
    err_ref = torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    # beta/2 = 3; rewards: winners 3, 0, -3, -6, losers 0, 0, -9, 3; so a win, tie, win and loss
    losses, stats = inpo_loss(err, err_ref, 6.0)
    expected = {
        "implicit_accuracy": 2.5 / 4,
        "margin": 0.0,  # mean of 3, 0, 6, -9
        "reward_winner": -1.5,
        "reward_loser": -1.5,
        "err_winner": 2.5,
        "err_loser": 2.5,
        "err_ref_winner": 2.0,
        "err_ref_loser": 2.0,
    }
    assert {name: value.item() for name, value in stats.items()} == expected
    by_hand = [math.log1p(math.exp(-margin)) for margin in (3, 0, 6, -9)]
    torch.testing.assert_close(losses, torch.tensor(by_hand))


def test_statistics_tell_winners_losers_policy_and_reference_apart():
    err, err_ref = torch.tensor([1.0, 3.0, 4.0, 8.0]), torch.tensor([16.0, 18.0, 32.0, 64.0])
    for loss, scale in ((inpo_loss, 0.5), (kto_loss, 1.0)):
        stats = loss(err, err_ref, 1.0)[1]
        names = ["err_winner", "err_loser", "err_ref_winner", "err_ref_loser"]
        assert [stats[name].item() for name in names] == [2, 6, 17, 48]
        names = ["reward_winner", "reward_loser", "margin", "implicit_accuracy"]
        assert [stats[name].item() for name in names] == [15 * scale, 42 * scale, -27 * scale, 0]


@pytest.mark.parametrize(
    "loss, more", [(inpo_loss, ()), (kto_loss, ()), (kto_loss, (torch.arange(10) < 3, 0.1))]
)
def test_statistics_are_detached_scalars(loss, more):
    stats = loss(errors(0).requires_grad_(), errors(1).requires_grad_(), 10.0, *more)[1]
    assert all(value.ndim == 0 and not value.requires_grad for value in stats.values())


def test_loss_and_gradient_are_finite_at_a_margin_of_ten_thousand():
    err, err_ref = torch.tensor([1e4, 0.0, 0.0, 1e4]), torch.zeros(4)  # margins -1e4 and 1e4
    assert inpo_loss(err, err_ref, 2.0)[0].tolist() == [1e4, 0.0]
    actual = gradient(lambda err: inpo_loss(err, err_ref, 2.0)[0].sum(), err)
    assert actual.tolist() == [1.0, 0.0, -1.0, 0.0]


def test_dpo_is_the_same_function_as_inpo():
    assert dpo_loss is inpo_loss


# --------------------------------------------------------------------------------------------------
# Per image.

LIKED = torch.arange(2 * PAIRS) % 3 == 0


@pytest.mark.parametrize("kl", [None, 0.03])
def test_kto_loss_and_gradient_equal_the_formula(kl):
    err, err_ref, weights = errors(0), errors(0) + 0.1 * normal(2 * PAIRS).abs(), (1.25, 0.5)
    point = (err_ref.double() - err.double()).mean() if kl is None else kl
    given = None if kl is None else torch.tensor(kl)

    def ours(err):
        return kto_loss(err, err_ref, 10.0, LIKED, given, *weights)[0]

    def formula(err):
        return kto64(err, err_ref.double(), 10.0, LIKED, point, weights)  # point: a constant

    torch.testing.assert_close(ours(err).double(), formula(err.double()), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient(lambda err: ours(err).mean(), err).double(),
        gradient(lambda err: formula(err).mean(), err.double()),
        rtol=1e-4,
        atol=1e-7,
    )


def test_kto_kl_is_the_batch_mean_clamped_at_zero_unless_given():
    err, better = errors(0), errors(0) - torch.linspace(0.0, 0.2, 2 * PAIRS)
    torch.testing.assert_close(kto_loss(better, err, 10.0)[1]["kl"], torch.tensor(0.1))
    assert kto_loss(err, better, 10.0)[1]["kl"] == 0
    assert kto_loss(better, err, 10.0, kl=torch.tensor(0.7))[1]["kl"] == torch.tensor(0.7)
    assert torch.equal(
        kto_loss(better, err, 10.0)[0],
        kto_loss(better, err, 10.0, kl=(err - better).mean())[0],
    )


def test_kto_gradient_does_not_flow_through_a_given_kl():
    def loss(err, kl):
        losses, stats = kto_loss(err, errors(1), 10.0, kl=kl)
        assert not stats["kl"].requires_grad
        return losses.mean()

    attached = gradient(lambda err: loss(err, err.mean()), errors(0))
    assert torch.equal(attached, gradient(lambda err: loss(err, err.mean().detach()), errors(0)))


def test_kto_likes_the_first_half_by_default():
    first_half = torch.tensor([True] * PAIRS + [False] * PAIRS)
    ours, told = (kto_loss(errors(0), errors(1), 10.0, x)[0] for x in (None, first_half))
    assert ours.shape == (2 * PAIRS,) and torch.equal(ours, told)
    assert not torch.equal(ours, kto_loss(errors(0), errors(1), 10.0, ~first_half)[0])


LIKED_5 = torch.tensor([True, False, True, False, False])


def test_kto_statistics_follow_liked():
    err, err_ref = torch.ones(4), torch.tensor([2.0, 0.5, 2.0, 0.5])
    stats = kto_loss(err, err_ref, 1.0, torch.tensor([True, False, True, False]))[1]
    assert {name: value.item() for name, value in stats.items()} == {
        "implicit_accuracy": 1.0,
        "margin": 1.5,
        "reward_winner": 1.0,
        "reward_loser": -0.5,
        "err_winner": 1.0,
        "err_loser": 1.0,
        "err_ref_winner": 2.0,
        "err_ref_loser": 0.5,
        "kl": 0.25,
    }


def test_kto_accuracy_by_liked_is_over_every_liked_and_disliked_image():
    err, err_ref = torch.tensor([3.0, 1.0, 1.0, 3.0, 0.0]), torch.full((5,), 3.0)
    # rewards: liked 0 and 2, the others 2, 0, 3; so 0 loses, ties, loses and 2 ties, wins, loses
    stats = kto_loss(err, err_ref, 1.0, LIKED_5)[1]
    assert stats["implicit_accuracy"] == torch.tensor(2 / 6)
    assert stats["margin"].item() == pytest.approx(1 - 5 / 3)


def test_kto_by_liked_knows_no_order():
    err, err_ref, order = errors(0)[:5], errors(1)[:5], torch.tensor([3, 0, 4, 2, 1])
    losses, stats = kto_loss(err, err_ref, 10.0, LIKED_5)
    mixed, stats_mixed = kto_loss(err[order], err_ref[order], 10.0, LIKED_5[order])
    torch.testing.assert_close(mixed, losses[order])
    torch.testing.assert_close(stats_mixed, stats)


def test_kto_statistics_of_pairs_are_those_by_liked_apart_from_the_accuracy():
    first_half = torch.arange(2 * PAIRS) < PAIRS
    pairs, by_liked = (kto_loss(errors(0), errors(1), 10.0, x)[1] for x in (None, first_half))
    accuracy = pairs.pop("implicit_accuracy"), by_liked.pop("implicit_accuracy")
    torch.testing.assert_close(by_liked, pairs)
    margin = (errors(1) - errors(0)).chunk(2)
    assert accuracy[0] == ((margin[0] - margin[1]) > 0).float().mean()
    assert accuracy[1] == ((margin[0][:, None] - margin[1]) > 0).float().mean()


@pytest.mark.parametrize("side", [True, False])
def test_kto_statistics_of_a_side_without_images_are_nan_and_the_losses_are_not(side):
    losses, stats = kto_loss(errors(0), errors(1), 10.0, torch.full((2 * PAIRS,), side))
    absent = {name for name, value in stats.items() if value.isnan()}
    names = {f"{name}_{'loser' if side else 'winner'}" for name in ("reward", "err", "err_ref")}
    assert absent == names | {"implicit_accuracy", "margin"} and losses.isfinite().all()


def test_kto_takes_a_float_kl():
    ours, told = (kto_loss(errors(0), errors(1), 10.0, kl=kl) for kl in (0.3, torch.tensor(0.3)))
    assert torch.equal(ours[0], told[0]) and torch.equal(ours[1]["kl"], told[1]["kl"])


def test_kto_weights_are_as_exact_as_the_errors():
    losses = kto_loss(errors(0).double(), errors(0).double(), 1.0, None, None, 0.8, 0.2)[0]
    assert losses.tolist() == [0.4] * PAIRS + [0.1] * PAIRS


def test_kto_is_half_the_weight_when_policy_equals_reference():
    losses, stats = kto_loss(errors(0), errors(0), 5000.0, weight_liked=3.0, weight_disliked=0.5)
    assert losses.tolist() == [1.5] * PAIRS + [0.25] * PAIRS and stats["kl"] == 0


@pytest.mark.parametrize("images", [1, PAIRS, 2 * PAIRS])
def test_sft_loss_is_the_error_of_the_images_it_is_given(images):
    assert torch.equal(sft_loss(errors(0)[:images]), errors(0)[:images])


# --------------------------------------------------------------------------------------------------
# Shapes.


@pytest.mark.parametrize("loss", [inpo_loss, kto_loss])
@pytest.mark.parametrize("shapes", [((5,), (5,)), ((4,), (6,)), ((4, 1), (4, 1)), ((4,), (1,))])
def test_odd_or_unequal_shapes_raise(loss, shapes):
    with pytest.raises(ValueError, match="one error per image"):
        loss(*[torch.ones(shape) for shape in shapes], 10.0)


def test_unequal_shapes_raise_with_liked_too():
    with pytest.raises(ValueError, match="one error per image"):
        kto_loss(torch.ones(5), torch.ones(1), 10.0, torch.ones(5, dtype=torch.bool))


def test_kto_needs_one_bool_per_image_and_is_exact_far_from_the_reference():
    err, err_ref = torch.tensor([0.0, 0.0]), torch.tensor([20.0, 20.0])
    for liked in (torch.ones(2, 1, dtype=torch.bool), torch.tensor([1, 0]), torch.tensor([1.0, 0])):
        with pytest.raises(ValueError, match="liked holds one bool per image"):
            kto_loss(err, err_ref, 1.0, liked=liked)
    losses, _ = kto_loss(err, err_ref, 1.0, kl=torch.tensor(0.0))
    expected = torch.sigmoid(torch.tensor([-20.0, 20.0], dtype=torch.float64))
    assert torch.allclose(losses.double(), expected, rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------------------
# In another trainer.

CALLS = [(inpo_loss, ()), (kto_loss, ()), (kto_loss, (torch.arange(10) < 3, 0.1, 1.5, 0.5))]


@pytest.mark.parametrize("loss, more", CALLS)
def test_a_loss_never_waits_for_the_device(loss, more):
    elsewhere = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in more]
    losses, _ = loss(errors(0).to("meta"), errors(1).to("meta"), 10.0, *elsewhere)
    assert losses.is_meta  # a tensor without numbers: whoever asks for one raises


def test_errors_and_losses_compile_without_a_graph_break():
    def step(pred, pred_ref, target):
        err, err_ref = squared_error(pred, target), squared_error(pred_ref, target)
        return [loss(err, err_ref, 10.0, *more) for loss, more in CALLS]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    inputs = [normal(*SHAPE, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    torch.testing.assert_close(compiled(*inputs), step(*inputs), rtol=0, atol=0)
