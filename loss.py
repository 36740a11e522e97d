"""The objectives: preference losses on squared errors of predicted noise.

Needs torch alone; copy this file into any trainer. No model and no configuration enters: a loss is
a function of the errors of the policy and of the frozen reference,

    err_i = mean over (C, H, W) of (tau_i - eps_theta(xt_i, t_i))^2    one number per image, fp32

and of beta. A batch of P pairs has 2P images, the P winners first, then the P losers in the same
order; it is split here and nowhere else. Losses come back per pair (or per image), the diagnostics
detached; the caller takes the mean.

Where (xt, tau) come from is the other half of a method: DDIM inversion for InPO (invert.py),
forward noise with tau = n for Diffusion-DPO, Diffusion-KTO and SFT.

Where this departs from the released InPO script, and why: the errors are formed in fp32, since a
preference is a difference of errors that agree to two or three digits, more than half precision
keeps of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """err = mean over all but dim 0 of (pred - target)^2, in fp32 (the one place that casts).

    pred, target: (B, C, H, W), any floating dtype. Returns (B,) fp32. By Step 1 of InPO,
    ||x0 - x0(t)||^2 = sigma_t^2 ||tau - eps||^2: it is the log-likelihood of x0 given xt up to its
    constant weight."""
    return (pred.float() - target.float()).square().flatten(1).mean(1)


# -------------------------------------------------------------------------------------------------
# Pairwise: loss = -log sigmoid(-(beta/2) [(err_w - err_ref_w) - (err_l - err_ref_l)]).


def inpo_loss(err: Tensor, err_ref: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Joint-distribution DPO (InPO, Step 3; the objective of Diffusion-DPO, 2311.12908, eq. 14).

    reward = (beta/2) (err_ref - err)           implicit reward of an image
    loss   = -log sigmoid(reward_w - reward_l)

    err, err_ref: (2P,), winners first. beta > 0, per mean over the latent (not per sum): 5000 for
    SDXL, 2000 for SD1.5. Returns losses (P,) and detached scalars, see `_diagnostics`. Raises
    ValueError for an odd number of images.
    Limits: policy == reference gives log 2; beta -> 0 gives log 2 everywhere; swapping a pair
    negates its margin."""
    _check(err, err_ref)
    reward_w, reward_l = (0.5 * beta * (err_ref - err)).chunk(2)
    margin = reward_w - reward_l
    return -F.logsigmoid(margin), _diagnostics(err, err_ref, 0.5 * beta)


dpo_loss = inpo_loss  # the same function, of latents with forward noise instead of inverted ones


# -------------------------------------------------------------------------------------------------
# Per image: KTO needs no pairs, SFT no losers.


def kto_loss(
    err: Tensor,
    err_ref: Tensor,
    beta: float,
    liked: Tensor | None = None,
    kl: Tensor | None = None,
    weight_liked: float = 1.0,
    weight_disliked: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Diffusion-KTO with the sigmoid utility, as released (2404.04465).

    g = err_ref - err,   h = sigmoid(beta s (g - kl)),   loss = w (1 - h)
    with s = +1 for a liked and -1 for a disliked image

    err, err_ref: (2P,). liked: (2P,) bool; without it the first half is liked, the second is not.
    kl: scalar reference point, clamp(mean of g over the images of all ranks, 0), detached. Without
    it the mean is over this batch alone, so a distributed caller passes the global one. Returns
    losses (2P,) and the diagnostics. Limit: policy == reference and kl = 0 gives w / 2."""
    _check(err, err_ref)
    g = err_ref - err
    if kl is None:
        kl = g.detach().mean().clamp(min=0)
    if liked is not None and liked.shape != err.shape:
        raise ValueError(
            f"liked holds one bool per image, {tuple(err.shape)}; got {tuple(liked.shape)}."
        )
    if liked is None:
        liked = torch.arange(len(g), device=g.device) < len(g) // 2
    sign = liked.to(g.dtype) * 2 - 1
    weight = torch.where(liked, weight_liked, weight_disliked)
    losses = weight * torch.sigmoid(-beta * sign * (g - kl.detach()))  # 1 - h, without cancellation
    return losses, {**_diagnostics(err, err_ref, beta), "kl": kl.detach()}


def sft_loss(err: Tensor) -> Tensor:
    """Supervised fine-tuning on the winners: loss = err_w, the plain denoising error.

    err: (2P,). Returns (P,). Raises ValueError for an odd number of images."""
    _check(err, err)
    return err.chunk(2)[0]


# -------------------------------------------------------------------------------------------------
# Checks and diagnostics.


def _check(err: Tensor, err_ref: Tensor):
    if err.ndim != 1 or err.shape != err_ref.shape or len(err) % 2:
        raise ValueError(
            "err and err_ref hold one error per image, (2P,), winners first; "
            f"got shapes {tuple(err.shape)} and {tuple(err_ref.shape)}."
        )


def _diagnostics(err: Tensor, err_ref: Tensor, scale: float) -> dict[str, Tensor]:
    """Means over the pairs, detached: implicit accuracy (share of pairs whose winner has the larger
    reward, a tie counts half), margin reward_w - reward_l, both rewards, and the errors of policy
    and reference, winner and loser apart: a margin that grows while both errors grow is a model
    falling apart."""
    err, err_ref = err.detach(), err_ref.detach()
    winner, loser = (scale * (err_ref - err)).chunk(2)
    margin = winner - loser
    return {
        "implicit_accuracy": (0.5 * (margin.sign() + 1)).mean(),
        "margin": margin.mean(),
        "reward_winner": winner.mean(),
        "reward_loser": loser.mean(),
        "err_winner": err.chunk(2)[0].mean(),
        "err_loser": err.chunk(2)[1].mean(),
        "err_ref_winner": err_ref.chunk(2)[0].mean(),
        "err_ref_loser": err_ref.chunk(2)[1].mean(),
    }
