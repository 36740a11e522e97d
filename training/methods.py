"""What a method is: a latent source (latents.py) and an objective (loss.py), a row of a table each.

    --method inpo     latents by inversion, objective dpo: the pairwise loss      (InPO, 2503.18454)
    --method dpo      latents by noise, objective dpo                    (Diffusion-DPO, 2311.12908)
    --method kto      latents by noise, objective kto                    (Diffusion-KTO, 2404.04465)
    --method sft      latents by noise, objective sft
    --method smpo     latents by renoise, objective smpo                          (SmPO, 2506.02698)
    --method dmpo     latents by noise, objective dmpo                            (DMPO, 2507.07510)
    --method mapo     latents by noise, objective mapo                            (MaPO, 2406.06424)
    --method dspo     latents by noise, objective dspo                             (DSPO, ICLR 2025)

A method is no more than a preset of the two, with a recipe; --latents and --objective override
either. A new objective takes a function in loss.py, a row of OBJECTIVES, and its test. Nothing here
takes long to import: flags are read with it.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Errors:
    """What an objective sees of a micro-step, winners first; SFT sees winners alone.

    err, err_ref: squared errors of policy and reference, one an image; err_ref is None for an
    objective without a reference. pred, target, pred_ref: what they are the errors of. probability:
    an array, of each pair that its winner is preferred. Of held-out pairs these four are not known.
    """

    err: Any
    err_ref: Any
    pred: Any = None
    target: Any = None
    pred_ref: Any = None
    probability: Any = None


def errors_of(args: Namespace, pred, pred_ref, target, probability=None) -> Errors:
    """Errors of predictions (images, C, H, W); pred_ref may be None. Under --safe-loser the losers
    pass on only a share of their gradient."""
    from loss import safe_share, scaled_gradient, squared_error

    if args.safe_loser is not None:
        pred = scaled_gradient(pred, safe_share(pred, target, args.safe_loser))
    err_ref = None if pred_ref is None else squared_error(pred_ref, target)
    return Errors(squared_error(pred, target), err_ref, pred, target, pred_ref, probability)


@dataclass(frozen=True)
class Objective:
    """A row of OBJECTIVES. A new one takes its function in loss.py, this row, and a test.

    title: for the plan. loss(args, errors) -> (losses, diagnostics), by the names of loss.py,
    "err_winner" at least. flags: its own. method: the one whose recipe has them. unit: of the loss.
    start: the loss where policy == reference, by value and in words. images: of a pair that it
    trains on. pairwise: the images of a pair share their noise, where latents are noise, and
    --safe-loser has a meaning. errors_alone: err and err_ref are all that it needs."""

    title: str
    loss: Callable[[Namespace, Errors], tuple[Any, dict[str, Any]]]
    flags: tuple[str, ...]
    method: str
    unit: str
    start: tuple[float, str] | None = None
    images: int = 2
    reference: bool = True
    pairwise: bool = False
    errors_alone: bool = True


def _dpo(args: Namespace, errors: Errors):
    from loss import dpo_loss

    return dpo_loss(errors.err, errors.err_ref, args.beta)


def _kto(args: Namespace, errors: Errors):
    from loss import kto_loss

    liked, disliked = 2 * args.liked_share, 2 * (1 - args.liked_share)  # their mean is 1
    kl = reference_point(errors.err_ref - errors.err, liked, disliked)
    return kto_loss(errors.err, errors.err_ref, args.beta, None, kl, liked, disliked)


def reference_point(g, liked: float, disliked: float):
    """KTO's kl: the weighted mean of g = err_ref - err over the images of all ranks, at least 0."""
    import torch.distributed as dist

    winner, loser = g.detach().chunk(2)
    kl = (liked * winner + disliked * loser).mean() / 2
    dist.all_reduce(kl)
    return (kl / dist.get_world_size()).clamp(min=0)


def _sft(args: Namespace, errors: Errors):
    from loss import sft_loss

    return sft_loss(errors.err), {"err_winner": errors.err.detach().mean()}


def _smpo(args: Namespace, errors: Errors):
    import torch

    from loss import smpo_loss

    sure = torch.from_numpy(errors.probability)
    return smpo_loss(errors.err, errors.err_ref, args.beta, sure, args.gamma)


def _dmpo(args: Namespace, errors: Errors):
    from loss import dmpo_loss

    return dmpo_loss(errors.err, errors.err_ref, args.beta, args.alpha)


def _mapo(args: Namespace, errors: Errors):
    from loss import mapo_loss

    return mapo_loss(errors.err, args.beta)


def _dspo(args: Namespace, errors: Errors):
    from loss import dspo_loss

    return dspo_loss(errors.pred, errors.target, errors.pred_ref, args.beta)


OBJECTIVES = {
    "dpo": Objective(
        "pairwise loss, beta {beta:g}", _dpo, ("beta",), "inpo", "nats per pair",
        (math.log(2), "log 2"), pairwise=True,
    ),
    "kto": Objective(
        "utility of each image, beta {beta:g}, {liked_share:.0%} of the weight on liked images",
        _kto, ("beta", "liked_share"), "kto", "1 - utility per image", (0.5, "1/2"),
    ),
    "sft": Objective(
        "denoising error of the winners", _sft, (), "sft", "squared error of winners",
        images=1, reference=False,
    ),
    "smpo": Objective(
        "pairwise loss weighted by the pairs' probabilities, beta {beta:g}, gamma {gamma:g}",
        _smpo, ("beta", "gamma"), "smpo", "nats per pair", (math.log(2), "log 2"), pairwise=True,
        errors_alone=False,
    ),
    "dmpo": Objective(
        "divergence of the preference from {alpha:g}, beta {beta:g}", _dmpo, ("beta", "alpha"),
        "dmpo", "nats per pair", pairwise=True,
    ),
    "mapo": Objective(
        "error of the winner and margin of scores, weighted {beta:g}", _mapo, ("beta",), "mapo",
        "error and nats per pair", reference=False, pairwise=True,
    ),
    "dspo": Objective(
        "score matching on the winner, beta {beta:g}", _dspo, ("beta",), "dspo",
        "squared error per pair", pairwise=True, errors_alone=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Latents:
    """title: for the plan. flags: its own. method: the one whose recipe has them."""

    title: str
    flags: tuple[str, ...]
    method: str


INVERTED = "inversion_steps", "eta", "inverter"
LATENTS = {
    "inversion": Latents(
        "inversion by the {inverter} on a {inversion_spacing} path of {inversion_steps}, "
        "eta {eta:g}", (*INVERTED, "inversion_spacing"), "inpo",
    ),
    "renoise": Latents(
        "inversion by the {inverter} with two predictions a move, on a path of {inversion_steps}, "
        "eta {eta:g}", INVERTED, "smpo",
    ),
    "released": Latents(
        "inversion by the {inverter} as the released script's, eta {eta:g}", INVERTED, "inpo"
    ),
    "noise": Latents("forward noise", ("strata",), "dpo"),
}  # fmt: skip


def loss_of(record: dict) -> tuple[str, tuple[float, str] | None]:
    """(unit of the loss, its start) of a run by its card's facts or settings; those of before name
    a method alone."""
    name = record.get("objective") or {"inpo": "dpo"}.get(record["method"], record["method"])
    return OBJECTIVES[name].unit, OBJECTIVES[name].start


def describe(args: Namespace) -> str:
    """Objective and latents of a run, in words."""
    values = {key: value or 0 for key, value in vars(args).items()}
    latents, objective = LATENTS[args.latents].title, OBJECTIVES[args.objective].title
    safe = "" if args.safe_loser is None else ", safe for the winner (mu {safe_loser:g})"
    return f"{objective}{safe}, on latents by {latents}".format(**values)
