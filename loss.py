"""The objectives: preference losses on squared errors of predicted noise.

Needs torch alone; copy this file into any trainer. No model and no configuration enters: a loss is
a function of beta and, but for DSPO's, of one error per image, of policy and frozen reference,

    err_i     = mean over (C, H, W) of (tau_i - eps_theta(xt_i, t_i))^2
    err_ref_i = the same, with the eps of the reference

where xt_i is image i at timestep t_i, tau_i the noise that explains it, and eps_theta the policy:
the symbols of invert.py. xt comes from inversion for InPO and SmPO, else from forward noise. A
batch of P pairs has 2P errors, (2P,) fp32: the P winners (_w), then their P losers (_l); it is
split here and nowhere else, and an odd number raises ValueError. Losses come back one per pair (or
image), diagnostics detached; the caller takes the mean. The released script has fp32 errors too.
DSPO needs the predictions themselves, MaPO no reference. For these and DMPO the public code was
read, not the papers' equations: docs/objectives.md, with the recipes.
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
    margin = _margin(err, err_ref, beta)
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


def scaled_gradient(x: Tensor, share: Tensor) -> Tensor:
    """The same numbers, whose losers pass on only this share of their gradient (the same script,
    line 1192).

    x_l -> detach(x_l) + share (x_l - detach(x_l))

    x: errors (2P,), or predictions (2P, C, H, W), whose errors it then holds for. share: (P,),
    `safe_share`. Returns x's shape. Limits: share = 1 changes nothing, share = 0 trains on winners
    alone."""
    x_w, x_l = x.chunk(2)
    fixed, share = x_l.detach(), share.to(x).view(-1, *[1] * (x.ndim - 1))
    return torch.cat([x_w, fixed + share * (x_l - fixed)])


# -------------------------------------------------------------------------------------------------
# Pairwise: other functions of the same margin.


def dmpo_loss(
    err: Tensor, err_ref: Tensor, beta: float, alpha: float = 0.01
) -> tuple[Tensor, dict[str, Tensor]]:
    """DMPO (2507.07510): a reverse KL divergence, of the policy's preference from a given one.

    p    = sigmoid(margin)                      how surely the policy prefers the winner
    loss = p log(p / (1 - alpha)) + (1 - p) log((1 - p) / alpha)
         = KL(Bernoulli(p) || Bernoulli(1 - alpha))

    err, err_ref, margin and what returns: as in inpo_loss. alpha: the share of preferences that are
    the other way round, in (0, 1), else ValueError. No code of the authors was found: these are
    lines 1182-1235 of train.py in AIDC-AI/Diffusion-SDPO at 84fb241, whose scripts have alpha 0.01,
    beta 6000 (SDXL) and 2000 (SD1.5). Departures: 1. no clamp of alpha to 1e-6; 2. 1 - p is
    sigmoid(-margin), exact for a sure policy.
    Limits: 0 where margin = log((1 - alpha) / alpha), to which it pulls every pair; so policy ==
    reference and alpha = 1/2 gives 0. For a small alpha it is log(1/alpha) (1 - p)."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1; got {alpha}.")
    _check(err, err_ref)
    margin = _margin(err, err_ref, beta)
    share = margin.new_full((), alpha)
    losses = torch.sigmoid(margin) * (F.logsigmoid(margin) - torch.log1p(-share))
    losses = losses + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - share.log())
    return losses, _diagnostics(err, err_ref, 0.5 * beta)


def dspo_loss(
    pred: Tensor, target: Tensor, pred_ref: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """DSPO (Zhu et al., ICLR 2025): score matching on the winner, off the reference.

    pull = beta (1 - sigmoid(margin))           one number per pair; margin as in inpo_loss
    loss = mean over (C, H, W) of ((pred_w - target_w) - pull (pred_w - pred_ref_w))^2

    pred, target, pred_ref: (2P, C, H, W), eps of the policy, tau, eps of the reference. Returns as
    inpo_loss. The gradient passes through pull, the only way to the loser. Lines 1141-1169 of
    train.py in the authors' huaishengzhu/DSPO at 8b4e09b, the branch for SD1.5: beta 0.001 (of
    0.001, 0.01, 0.05), per mean, the same in margin and pull. Departures: 1. fp32; 2. the branch
    for SDXL (beta 5000) is another objective, and not taken: (1 - sigmoid(margin))^2, times mean
    (pred_w - pred_ref_w)^2 if that, over a device's batch, is at least 0.1. It has no target, and
    depends on the batch. So this form has no published beta for SDXL.
    Limits: beta = 0 is SFT on winners; policy == reference too, with 1 - beta/2 of its gradient."""
    err, err_ref = squared_error(pred, target), squared_error(pred_ref, target)
    _check(err, err_ref)
    pull = beta * torch.sigmoid(-_margin(err, err_ref, beta)).view(-1, *[1] * (pred.ndim - 1))
    pred_w, target_w, ref_w = (x.chunk(2)[0].float() for x in (pred, target, pred_ref))
    losses = squared_error(pred_w - pull * (pred_w - ref_w), target_w)
    return losses, _diagnostics(err, err_ref, 0.5 * beta)


# -------------------------------------------------------------------------------------------------
# Pairwise without a reference.


def mapo_loss(
    err: Tensor, beta: float = 0.1, snr: float = 0.5, timesteps: int = 1000
) -> tuple[Tensor, dict[str, Tensor]]:
    """MaPO (2406.06424): imitate the winner, and explain it better than the loser.

    score = snr err / (exp(snr err) - 1)        of an image; falls from 1 at err = 0 to 0
    loss  = err_w - beta log sigmoid(timesteps (score_w - score_l))

    err: (2P,), above 0. Returns losses (P,) and `_diagnostics` of the reward timesteps score, none
    of err_ref. Lines 286-301 of utils.py in the authors' mapo-t2i/mapo at 374b3d3; args.py 158-170:
    beta 0.1 (for SDXL), a weight unlike the other betas, and snr 0.5. Departures: 1. expm1: exp - 1
    in fp32 is off by 1e-4 at err 1e-3, so the sigmoid's argument by 0.1; 2. err is that of eps for
    a v-prediction model too, there that of v.
    Limits: beta = 0 is SFT on winners; err_w = err_l gives err_w + beta log 2; for a small snr the
    second term is beta inpo_loss(err, err_ref, timesteps snr), with one err_ref for both images."""
    _check(err, err)
    x = snr * err
    reward = timesteps * (x * torch.exp(-x) / -torch.expm1(-x))  # the score, safe for a large x
    winner, loser = reward.chunk(2)
    losses = err.chunk(2)[0] - beta * F.logsigmoid(winner - loser)
    return losses, _means(reward, {"err": err})


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


def _margin(err: Tensor, err_ref: Tensor, beta: float) -> Tensor:
    """reward_w - reward_l of inpo_loss, (P,)."""
    reward_w, reward_l = (0.5 * beta * (err_ref - err)).chunk(2)
    return reward_w - reward_l


def _diagnostics(err, err_ref, scale: float, liked: Tensor | None = None) -> dict[str, Tensor]:
    """Means over the pairs, detached scalars; reward = scale (err_ref - err).

    implicit_accuracy: the share of pairs whose winner has the larger reward; a tie counts half.
    With liked, each liked image makes a pair with each disliked one. A mean over none is NaN."""
    err, err_ref = err.detach(), err_ref.detach()
    return _means(scale * (err_ref - err), {"err": err, "err_ref": err_ref}, liked)


def _means(reward: Tensor, errors: dict[str, Tensor], liked: Tensor | None = None):
    reward, errors = reward.detach(), {name: err.detach() for name, err in errors.items()}
    if liked is None:
        half = len(reward) // 2
        winner, loser, pair = slice(half), slice(half, None), slice(None)
        margin = reward[winner] - reward[loser]
    else:
        winner, loser, pair = liked, ~liked, liked[:, None] & ~liked
        margin = reward[:, None] - reward
    accuracy = 0.5 * (margin.sign() + 1)
    stats = {"implicit_accuracy": _mean(accuracy, pair), "margin": _mean(margin, pair)}
    for name, value in {"reward": reward, **errors}.items():
        stats[f"{name}_winner"], stats[f"{name}_loser"] = _mean(value, winner), _mean(value, loser)
    return stats


def _mean(value: Tensor, where: slice | Tensor) -> Tensor:
    """Over a slice, or over a mask: picking by a mask would wait for the device."""
    if isinstance(where, slice):
        return value[where].mean()
    return value.masked_fill(~where, 0).sum() / where.sum()
