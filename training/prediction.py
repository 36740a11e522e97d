"""Does the UNet predict what its model says? One forward pass before the first step tells.

Where a file says nothing, or a scheduler_config.json is wrong, a model that predicts v is taken for
one that predicts epsilon, or the other way round, and training would spoil it without an error. At
a high noise level the two cannot be confused. With the right reading, one-step generation

    x0(t) = xt / sqrt(abar) - sigma eps                                (Step 1, invert.predict_x0)

from a noised picture of the data lies nearer to that picture than x0(t) = 0 does, which is no
prediction at all; for relative errors of mean (x0(t) - x0)^2 / mean x0^2 that is below 1. With the
other reading it lies farther off. For a perfect model and abar -> 0 the errors of the wrong reading
go to 2 (epsilon read as v) and to infinity (v read as epsilon)."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

import model
from invert import add_noise, predict_x0, randn_like
from system.files import UserError
from system.processes import print0
from training.latents import generators

SIGNAL = 0.04  # abar of the noised pictures: t = 790 of SDXL and SD1.5
TYPES = "epsilon", "v_prediction"


def errors(unet, x0: Tensor, noise: Tensor, cond: dict, abar: Tensor) -> Tensor:
    """The relative error of x0(t) for each of TYPES, (2,) fp32, at the t whose abar is nearest to
    SIGNAL. x0, noise: (B, C, h, w) fp32. abar: (T,)."""
    t = (abar - SIGNAL).abs().argmin().repeat(len(x0))
    xt = add_noise(x0, noise, abar[t])
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        out = model.predict_noise(unet, xt, t, cond, abar)  # as it is, of either type
    signal = abar[t].reshape(-1, 1, 1, 1).to(out.device)
    read = out, signal.sqrt() * out + (1 - signal).sqrt() * xt
    missed = [(predict_x0(xt, eps, abar[t]) - x0).square().mean() for eps in read]
    return torch.stack(missed) / x0.square().mean()


def checked(
    batches: Iterator[dict], args: Namespace, plan, run, encoder, unet, abar: Tensor, predicts: str
) -> Iterator[dict]:
    """The batches, once `errors` were taken on the first of them (collective). Raises UserError
    where the type that is not `predicts` is right; warns where none is, or --prediction-type
    insists."""
    batch = next(batches)
    with run.aside():
        noise = generators(args.seed, batch["n"])[: plan.images_per_pair * len(batch["n"])]
        x0 = encoder.images(batch["pixels"][: len(noise)], noise)
        cond = model.repeat(encoder.prompts(batch["captions"]), plan.images_per_pair)
        cond = model.tell_sizes(cond, batch["sizes"][: len(noise)])
        found = errors(unet, x0, randn_like(x0, noise), cond, abar)
        dist.all_reduce(found)
    try:
        judge(args, dict(zip(TYPES, (found / plan.world).tolist(), strict=True)), predicts)
    except UserError:
        run.bar.close()  # which ends its line
        raise
    return chain([batch], batches)


def judge(args: Namespace, found: dict[str, float], predicts: str):
    """Raises UserError or warns by the errors found, if those of `predicts` are not below 1."""
    if found[predicts] < 1:
        return
    (other,) = set(TYPES) - {predicts}
    said = (
        f"one step of {args.unet or args.model} from noised pictures of the data is off by "
        f"{found[predicts]:.3g} times what no prediction would be"
    )
    if not found[other] < 1:
        print0(
            f"Warning: {said}, and as {other} by {found[other]:.3g} times: its weights may be "
            "untrained, damaged, or of another VAE.",
            file=sys.stderr,
        )
    elif args.prediction_type:
        print0(
            f"Warning: {said} as --prediction-type {predicts}, and by {found[other]:.3g} times as "
            f"{other}, which it probably is.",
            file=sys.stderr,
        )
    else:
        raise UserError(
            f"--model {args.model}: {said} as {predicts}, and by {found[other]:.3g} times as "
            f"{other}; give --prediction-type {other}, or to insist --prediction-type {predicts}."
        )
