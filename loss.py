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


def smpo_loss(
    err: Tensor, err_ref: Tensor, beta: float, probability: Tensor, gamma: float = 10.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """SmPO's pairwise loss, weighted by a smoothed label (2506.02698, eq. 8 and 9; JaydenLyh/SmPO,
    train.py at 61105a1, lines 1046 to 1064).

    weight = gamma (2 p - 1)                      2 alpha - gamma in the paper, alpha = gamma p
    loss   = -log sigmoid(weight (reward_w - reward_l))            the rewards are those of InPO

    1. The script weights its whole batch by its first pair's p. Here each pair has its own.
    2. Eq. 9 has beta and a log-ratio, the script beta/2 and mean errors. Here as in the script,
       whose launch files pass the published beta.

    err, err_ref: (2P,). probability: (P,), p of each pair: how likely a reward model prefers the
    winner, 0.5 to 1 if it also chose it. gamma: 10; beta: SDXL 5000, SD1.5 2000 (paper, release).
    Returns losses (P,) and `_diagnostics`, not weighted, with the mean weight. Raises ValueError
    for another shape. Limits: p = 1/2 gives log 2 and no gradient; p = 1 and gamma = 1 is
    inpo_loss; swapping a pair and taking 1 - p for p changes nothing."""
    _check(err, err_ref)
    if probability.shape != err_ref[::2].shape:
        shape = tuple(probability.shape)
        raise ValueError(f"probability holds one number per pair, (P,); got shape {shape}.")
    weight = gamma * (2 * probability.detach().to(err) - 1)
    gain_w, gain_l = (err_ref - err).chunk(2)
    losses = -F.logsigmoid(0.5 * beta * weight * (gain_w - gain_l))
    return losses, {**_diagnostics(err, err_ref, 0.5 * beta), "weight": weight.mean()}


# -------------------------------------------------------------------------------------------------
# Diffusion-SDPO, a switch beside any pairwise objective: the loser's gradient times lambda.
#     objective(scaled_gradient(err, safe_share(pred, target, mu)), err_ref, ...)


@torch.no_grad()
def safe_share(pred: Tensor, target: Tensor, mu: float = 0.6) -> Tensor:
    """lambda, the share of a loser's gradient that cannot raise its winner's error (2511.03317, eq.
    15 to 17; AIDC-AI/Diffusion-SDPO, train.py at 1c83c65, lines 84 to 124).

    r      = pred - target                               d err / d pred = 2 r / (C H W)
    lambda = min(1, (1 - mu) |r_w|^2 / <r_w, r_l>)       1 where <r_w, r_l> <= 0

    It is the largest up to 1 with <r_w, -r_w + lambda r_l> <= -mu |r_w|^2: to first order, err_w
    falls at least mu times as fast as without the loser, if a step moves all predictions alike.

    1. The script has one lambda for all pairs on a device, its ratio of sums over them. Here each
       pair has its own, which then depends on neither the micro-batch nor the ranks.
    2. The script adds 1e-9 to <2 r_w/N, 2 r_l/N>, N the count of all its r_w. Here it does not.

    pred, target: (2P, C, H, W), winners first; cast to fp32. mu: 0 to 1; SDXL 0.6, SD1.5 0.9.
    Returns (P,) fp32, detached. Raises ValueError for another mu or shape.
    Limits: r_l = r_w gives 1 - mu; orthogonal residuals give 1."""
    if not 0 <= mu <= 1:
        raise ValueError(f"mu lies in 0..1; got {mu}.")
    if pred.shape != target.shape or len(pred) % 2:
        got = f"{tuple(pred.shape)} and {tuple(target.shape)}"
        raise ValueError(f"pred and target are (2P, C, H, W), winners first; got shapes {got}.")
    r_w, r_l = (pred.float() - target.float()).flatten(1).chunk(2)
    along = (r_w * r_l).sum(1)
    share = (1 - mu) * r_w.square().sum(1) / along
    return share.clamp(max=1).where(along > 0, 1)


def scaled_gradient(err: Tensor, share: Tensor) -> Tensor:
    """The same errors, whose losers pass on only this share of their gradient (the same script,
    line 1192).

    err_l -> detach(err_l) + share (err_l - detach(err_l))

    err: (2P,). share: (P,), `safe_share`. Returns (2P,). Limits: share = 1 changes nothing, share =
    0 trains on winners alone."""
    err_w, err_l = err.chunk(2)
    fixed = err_l.detach()
    return torch.cat([err_w, fixed + share.to(err) * (err_l - fixed)])


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
