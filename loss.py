"""The objectives: preference losses on squared errors of predicted noise.

Needs torch alone; copy this file into any trainer. No model and no configuration enters: a loss is
a function of beta and of one error per image, of the policy and of the frozen reference,

    err_i     = mean over (C, H, W) of (tau_i - eps_theta(xt_i, t_i))^2
    err_ref_i = the same, with the eps of the reference

where xt_i is image i at timestep t_i, tau_i the noise that explains it, and eps_theta the policy:
the symbols of invert.py. xt comes from inversion for InPO, from forward noise for the others. A
batch of P pairs has 2P errors, (2P,) fp32: the P winners (_w), then their P losers (_l); it is
split here and nowhere else, and an odd number raises ValueError. Losses come back one per pair (or
image), diagnostics detached; the caller takes the mean. The released script has fp32 errors too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """err = mean over all but dim 0 of (pred - target)^2, in fp32 (the one place that casts).

    pred, target: (B, C, H, W), any floating dtype. Returns (B,) fp32. Since ||x0 - x0(t)||^2 =
    sigma_t^2 ||tau - eps||^2 (InPO, Step 1), it is the negative log-likelihood of x0 given xt, up
    to a weight. Limit: pred = target gives 0."""
    return (pred.float() - target.float()).square().flatten(1).mean(1)


# -------------------------------------------------------------------------------------------------
# Pairwise: loss = -log sigmoid(-(beta/2) [(err_w - err_ref_w) - (err_l - err_ref_l)]).


def inpo_loss(err: Tensor, err_ref: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Joint-distribution DPO (InPO, Step 3; the objective of Diffusion-DPO, 2311.12908, eq. 14).

    reward = (beta/2) (err_ref - err)    implicit reward of an image
    margin = reward_w - reward_l         of a pair
    loss   = -log sigmoid(margin)

    err, err_ref: (2P,). beta > 0 holds the policy to the reference: a larger one moves it less
    (SDXL 5000, SD1.5 2000). Returns losses (P,) and `_diagnostics`.
    Limits: policy == reference gives log 2; swapping a pair negates its margin."""
    _check(err, err_ref)
    reward_w, reward_l = (0.5 * beta * (err_ref - err)).chunk(2)
    margin = reward_w - reward_l
    return -F.logsigmoid(margin), _diagnostics(err, err_ref, 0.5 * beta)


dpo_loss = inpo_loss  # the same function, of latents with forward noise instead of inverted ones


# -------------------------------------------------------------------------------------------------
# Per image: KTO needs no pairs, SFT no losers.


def kto_loss(
    err: Tensor, err_ref: Tensor, beta: float, liked: Tensor | None = None,
    kl: Tensor | float | None = None, weight_liked: float = 1.0, weight_disliked: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Diffusion-KTO with the sigmoid utility, as released (2404.04465).

    g    = err_ref - err                 by how much the policy explains the image better
    h    = sigmoid(beta s (g - kl))      its utility; s = +1 for a liked, -1 for a disliked image
    loss = weight (1 - h)                weight_liked or weight_disliked

    err, err_ref: (2P,), or (B,) in any order with liked, (B,) bool. kl: a constant, clamp(mean of g
    over the images of all ranks, 0); if not given, that of this batch. Returns one loss per image,
    and `_diagnostics` with kl, whose reward is beta g. Raises ValueError for another kind of liked.
    Limit: policy == reference and kl = 0 gives weight / 2."""
    _check(err, err_ref, pairs=liked is None)
    if liked is not None and (liked.dtype != torch.bool or liked.shape != err.shape):
        raise ValueError(f"liked holds one bool per image; got {liked.dtype} {tuple(liked.shape)}.")
    stats = _diagnostics(err, err_ref, beta, liked)
    g = err_ref - err
    if liked is None:
        liked = torch.arange(len(g), device=g.device) < len(g) // 2
    kl = g.mean().clamp(min=0) if kl is None else kl
    kl = kl.detach() if isinstance(kl, Tensor) else g.new_full((), kl)
    sign = torch.full_like(g, -1).masked_fill(liked, 1)
    weight = torch.full_like(g, weight_disliked).masked_fill(liked, weight_liked)
    losses = weight * torch.sigmoid(-beta * sign * (g - kl))  # 1 - h, without cancellation
    return losses, {**stats, "kl": kl}


def sft_loss(err: Tensor) -> Tensor:
    """Supervised fine-tuning: loss = err, the denoising error itself (Diffusion-DPO's --sft).

    err, losses: one per image to imitate, (P,) for winners alone. Limit: eps = tau gives 0."""
    return err


def _check(err: Tensor, err_ref: Tensor, pairs: bool = True):
    if err.ndim != 1 or err.shape != err_ref.shape or (pairs and len(err) % 2):
        shape = "(2P,), winners first" if pairs else "(B,)"
        got = f"{tuple(err.shape)} and {tuple(err_ref.shape)}"
        raise ValueError(f"err and err_ref hold one error per image, {shape}; got shapes {got}.")


def _diagnostics(err, err_ref, scale: float, liked: Tensor | None = None) -> dict[str, Tensor]:
    """Means over the pairs, detached scalars; reward = scale (err_ref - err).

    implicit_accuracy: the share of pairs whose winner has the larger reward; a tie counts half.
    With liked, each liked image makes a pair with each disliked one. A mean over none is NaN."""
    err, err_ref = err.detach(), err_ref.detach()
    reward = scale * (err_ref - err)
    if liked is None:
        half = len(err) // 2
        winner, loser, pair = slice(half), slice(half, None), slice(None)
        margin = reward[winner] - reward[loser]
    else:
        winner, loser, pair = liked, ~liked, liked[:, None] & ~liked
        margin = reward[:, None] - reward
    accuracy = 0.5 * (margin.sign() + 1)
    stats = {"implicit_accuracy": _mean(accuracy, pair), "margin": _mean(margin, pair)}
    for name, value in {"reward": reward, "err": err, "err_ref": err_ref}.items():
        stats[f"{name}_winner"], stats[f"{name}_loser"] = _mean(value, winner), _mean(value, loser)
    return stats


def _mean(value: Tensor, where: slice | Tensor) -> Tensor:
    """Over a slice, or over a mask: picking by a mask would wait for the device."""
    if isinstance(where, slice):
        return value[where].mean()
    return value.masked_fill(~where, 0).sum() / where.sum()
