"""The objectives: preference losses on squared errors of predicted noise.

Needs torch alone; copy this file into any trainer. No model and no configuration enters: a loss is
a function of the errors of the policy and of the frozen reference,

    err_i = mean over (C, H, W) of (tau_i - eps_theta(xt_i, t_i))^2    one number per image, fp32

(err_ref_i with the reference's eps) and of beta, which holds the policy to the reference: a larger
one moves less. Here xt_i is image i (C channels, H rows, W columns) at timestep t_i, tau_i the
noise that explains it, and eps_theta the model. A batch of P pairs has 2P images, the P winners
(_w) first, then the P losers (_l) in the same order; it is split here and nowhere else. Losses come
back per pair (or per image), the diagnostics detached; the caller takes the mean.

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

    reward = (beta/2) (err_ref - err)    implicit reward of an image
    margin = reward_w - reward_l         of a pair
    loss   = -log sigmoid(margin)

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
    kl: Tensor | float | None = None,
    weight_liked: float = 1.0,
    weight_disliked: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Diffusion-KTO with the sigmoid utility, as released (2404.04465).

    g    = err_ref - err                 by how much the policy explains the image better
    h    = sigmoid(beta s (g - kl))      its utility; s = +1 for a liked, -1 for a disliked image
    loss = weight (1 - h)                weight_liked or weight_disliked

    liked: (B,) bool, for images in any order and number; err, err_ref: (B,). Without it they are
    (2P,), the first half liked. kl: scalar reference point, clamp(mean of g over the images of all
    ranks, 0), taken as a constant. Without it the mean is over this batch alone, so a distributed
    caller passes the global one. Returns losses, one per image, and the diagnostics, whose reward
    is beta g. Raises ValueError for an odd number of images without liked, and for a liked that is
    not one bool per image. Limit: policy == reference and kl = 0 gives weight / 2."""
    _check(err, err_ref, pairs=liked is None)
    if liked is not None and (liked.dtype != torch.bool or liked.shape != err.shape):
        raise ValueError(
            f"liked holds one bool per image, {tuple(err.shape)}; "
            f"got {liked.dtype} {tuple(liked.shape)}."
        )
    stats = _diagnostics(err, err_ref, beta, liked)
    g = err_ref - err
    if liked is None:
        liked = torch.arange(len(g), device=g.device) < len(g) // 2
    if kl is None:
        kl = g.mean().clamp(min=0)
    kl = kl.detach() if isinstance(kl, Tensor) else g.new_full((), kl)
    sign = liked.to(g.dtype) * 2 - 1
    weight = torch.full_like(g, weight_disliked).masked_fill(liked, weight_liked)
    losses = weight * torch.sigmoid(-beta * sign * (g - kl))  # 1 - h, without cancellation
    return losses, {**stats, "kl": kl}


def sft_loss(err: Tensor) -> Tensor:
    """Supervised fine-tuning on the winners: loss = err_w, the plain denoising error.

    err: (P,), of the winners alone. Returns them."""
    _check(err, err, pairs=False)
    return err


# -------------------------------------------------------------------------------------------------
# Checks and diagnostics.


def _check(err: Tensor, err_ref: Tensor, pairs: bool = True):
    if err.ndim != 1 or err.shape != err_ref.shape or (pairs and len(err) % 2):
        shape = "(2P,), winners first" if pairs else "(B,)"
        raise ValueError(
            f"err and err_ref hold one error per image, {shape}; "
            f"got shapes {tuple(err.shape)} and {tuple(err_ref.shape)}."
        )


def _diagnostics(
    err: Tensor, err_ref: Tensor, scale: float, liked: Tensor | None = None
) -> dict[str, Tensor]:
    """Means over the pairs, detached, with reward = scale (err_ref - err): implicit accuracy (share
    of pairs whose winner has the larger reward, a tie counts half), margin reward_w - reward_l,
    both rewards, and the errors of policy and reference, winner and loser apart: a margin that
    grows while both errors grow is a model falling apart.

    With liked, (B,) bool, winners are the liked images, losers the others, and every winner makes a
    pair with every loser. Without one of the two, what is a mean over none is NaN."""
    err, err_ref = err.detach(), err_ref.detach()
    reward = scale * (err_ref - err)
    if liked is None:
        half = len(err) // 2
        winner, loser, pair = slice(half), slice(half, None), slice(None)
        margin = reward[winner] - reward[loser]
    else:  # masks, since picking the images out would wait for the device
        winner, loser, pair = liked, ~liked, liked[:, None] & ~liked
        margin = reward[:, None] - reward
    return {
        "implicit_accuracy": _mean(0.5 * (margin.sign() + 1), pair),
        "margin": _mean(margin, pair),
        "reward_winner": _mean(reward, winner),
        "reward_loser": _mean(reward, loser),
        "err_winner": _mean(err, winner),
        "err_loser": _mean(err, loser),
        "err_ref_winner": _mean(err_ref, winner),
        "err_ref_loser": _mean(err_ref, loser),
    }


def _mean(value: Tensor, where: slice | Tensor) -> Tensor:
    """The mean of value over a slice of it, or over a mask of its shape."""
    if isinstance(where, slice):
        return value[where].mean()
    return value.masked_fill(~where, 0).sum() / where.sum()
