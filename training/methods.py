"""What a method is: a latent source (latents.py) and an objective (loss.py), a row of a table each.

    --method inpo     latents by inversion, objective dpo: the pairwise loss      (InPO, 2503.18454)
    --method dpo      latents by noise, objective dpo                    (Diffusion-DPO, 2311.12908)
    --method kto      latents by noise, objective kto                    (Diffusion-KTO, 2404.04465)
    --method sft      latents by noise, objective sft

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
    objective without a reference."""

    err: Any
    err_ref: Any


@dataclass(frozen=True)
class Objective:
    """title: for the plan. loss(args, errors) -> (losses, diagnostics), by the names of loss.py,
    "err_winner" at least. flags: its own. method: the
    one whose recipe has them. unit: of the loss. start: the loss where policy == reference, by
    value and in words. images: of a pair that it trains on."""

    title: str
    loss: Callable[[Namespace, Errors], tuple[Any, dict[str, Any]]]
    flags: tuple[str, ...]
    method: str
    unit: str
    start: tuple[float, str] | None = None
    images: int = 2
    reference: bool = True
    pairwise: bool = False  # of latents by noise, the images of a pair share one


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
    return f"{objective}, on latents by {latents}".format(**values)
