"""Optimizer steps of InPO by hand: no DeepSpeed, no peft, no invert.py and loss.py (eta 0)."""

import copy
import json
from pathlib import Path

import diffusers
import torch
from torch.func import functional_call

import data
from training import lora
from training.flags import parse
from training.latents import draw_timesteps, generators


def start(args) -> tuple:
    """(pipeline, its UNet's weights, low-rank factors {layer: (A, B)}, the scale of B A)."""
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(args.model)
    if not args.lora_rank:
        return pipe, {k: w.detach() for k, w in pipe.unet.named_parameters()}, {}, 0.0
    adapted = copy.deepcopy(pipe.unet)  # for A's random values alone
    lora.attach(adapted, args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
    drawn = {name: w.detach().clone() for name, w in lora.trainable(adapted).items()}
    layers = {name.split(".lora_A")[0] for name in drawn if ".lora_A" in name}
    factors = {
        layer: tuple(drawn[f"{layer}.lora_{side}.default.weight"] for side in "AB")
        for layer in sorted(layers)
    }
    weights = {k: w.detach() for k, w in pipe.unet.named_parameters()}
    return pipe, weights, factors, args.lora_alpha / args.lora_rank


def steps(argv: list[str], accumulation: int = 2) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The UNet's weights, B A added, and the losses that train_inpo.py should give."""
    args = parse("", argv)
    pipe, frozen, factors, scale = start(args)
    abar, unet = pipe.scheduler.alphas_cumprod, pipe.unet
    trained = [w for pair in factors.values() for w in pair] or list(
        map(torch.clone, frozen.values())
    )
    for weight in trained:
        weight.requires_grad_()

    def policy() -> dict[str, torch.Tensor]:
        if not factors:
            return dict(zip(frozen, trained, strict=True))
        low = {f"{layer}.weight": scale * b @ a for layer, (a, b) in factors.items()}
        return {name: w + low[name] if name in low else w for name, w in frozen.items()}

    config = json.loads(Path(args.ds_config).read_text())
    eps, clipping = config["optimizer"]["params"]["eps"], config["gradient_clipping"]
    adamw = torch.optim.AdamW(trained, args.lr, (0.9, 0.999), eps, 0.01)
    items = data.Pairs(
        data.read_pairs(args.data), 16, args.seed, "center", args.flip, args.caption_dropout
    )
    losses, sigma = [], ((1 - abar) / abar).sqrt()
    width = 1000 // args.inversion_steps
    size = 2.0 * torch.tensor([8, 8, 0, 0, 8, 8])
    for step in range(args.steps):
        adamw.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / args.warmup)
        adamw.zero_grad()
        losses.append(0)
        for n in range(step * args.batch, (step + 1) * args.batch):
            item, now = items[n], policy()
            at_once = args.batch // accumulation
            t = draw_timesteps(args.seed, [n], at_once, args.inversion_steps, 1000)
            text, _, pooled, _ = pipe.encode_prompt(
                item["caption"], do_classifier_free_guidance=False
            )
            keep = float(item["caption"] != "")
            added = {"text_embeds": pooled * keep, "time_ids": size[None]}
            given, errors = {"added_cond_kwargs": added}, []
            for side, noise in zip(("winner", "loser"), generators(args.seed, [n]), strict=True):
                posterior = pipe.vae.encode(item[side][None]).latent_dist
                draw = torch.randn(1, 4, 8, 8, generator=noise)
                x0 = (posterior.mean + posterior.std * draw).detach()
                x0 = x0 * pipe.vae.config.scaling_factor

                def predict(weights, x, t, text=text * keep, given=given):
                    return functional_call(unet, weights, (x, t, text), given).sample

                xbar, level, shown = x0, torch.zeros(1), torch.zeros_like(t)
                for to in [*range(width - 1, int(t), width), int(t)]:
                    with torch.no_grad():
                        move = predict(now, xbar / (1 + level**2).sqrt(), shown)
                    xbar = xbar + (sigma[to] - level) * move
                    level, shown = sigma[to], torch.tensor([to])
                xt, tau = xbar * abar[t].sqrt(), (xbar - x0) / sigma[t]
                with torch.no_grad():
                    err_ref = ((predict(frozen, xt, t) - tau) ** 2).mean()
                errors.append(((predict(now, xt, t) - tau) ** 2).mean() - err_ref)
            loss = torch.log1p(torch.exp(args.beta / 2 * (errors[0] - errors[1]))) / args.batch
            loss.backward()
            losses[-1] += loss.item()
        if clipping:
            torch.nn.utils.clip_grad_norm_(trained, clipping)
        adamw.step()
    return {name: w.detach() for name, w in policy().items()}, losses
