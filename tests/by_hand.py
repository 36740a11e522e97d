"""Optimizer steps by hand: no DeepSpeed, no peft, no invert.py and loss.py (eta 0)."""

import copy
import json
from pathlib import Path

import diffusers
import torch
from torch import Tensor
from torch.func import functional_call

import data
from training import lora
from training.flags import parse
from training.latents import draw_timesteps, generators


def merged(weights: dict[str, Tensor], factors: dict[str, Tensor], scale: float) -> dict:
    """W + scale B A in the place of W; factors: by lora.py's names."""
    weights = dict(weights)
    for name, a in factors.items():
        if ".lora_A." in name:
            place = name.split(".lora_A.")[0] + ".weight"
            weights[place] = weights[place] + scale * factors[name.replace("lora_A", "lora_B")] @ a
    return weights


class ByHand:
    """What train_inpo.py should give: after each step the UNet's weights (B A added) and the loss;
    KTO's reference points, and the UNet calls.

    ranks: of the run. kl_ranks: how many of them share KTO's reference point; it must be all."""

    def __init__(self, argv: list[str], ranks: int = 1, kl_ranks: int | None = None):
        self.args = args = parse("", argv)
        self.pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(args.model)
        self.abar = self.pipe.scheduler.alphas_cumprod
        self.sigma = ((1 - self.abar) / self.abar).sqrt()
        rows = data.read_pairs(args.data)
        self.strengths = rows.strengths
        self.pairs = data.Pairs(rows, 16, args.seed, "center", args.flip, args.caption_dropout)
        self.start = {name: w.detach() for name, w in self.pipe.unet.named_parameters()}
        trained = self.start
        if args.lora_rank:
            adapted = copy.deepcopy(self.pipe.unet)  # for A's random values alone
            lora.attach(adapted, args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
            trained = lora.trainable(adapted)
        self.trained = {name: w.detach().clone().requires_grad_() for name, w in trained.items()}
        self.weights, self.losses, self.kls, self.calls = [], [], [], 0

        config = json.loads(Path(args.ds_config).read_text())
        eps, clipping = config["optimizer"]["params"]["eps"], config["gradient_clipping"]
        adamw = torch.optim.AdamW(
            self.trained.values(), args.lr, (0.9, 0.999), eps, 0.01, fused=True
        )
        micro, together = args.micro_batch * ranks, args.micro_batch * (kl_ranks or ranks)
        for step in range(args.steps):
            adamw.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / args.warmup)
            adamw.zero_grad()
            self.losses.append(0)
            for first in range(step * args.batch, (step + 1) * args.batch, together):
                policy = self.policy()
                errors = [self.errors(policy, n, micro) for n in range(first, first + together)]
                loss = sum(self.pair_losses(errors)) / args.batch
                loss.backward()
                self.losses[-1] += loss.item()
            if clipping:
                torch.nn.utils.clip_grad_norm_(self.trained.values(), clipping)
            adamw.step()
            self.weights.append({name: w.detach().clone() for name, w in self.policy().items()})

    def policy(self) -> dict[str, Tensor]:
        if not self.args.lora_rank:
            return self.trained
        return merged(self.start, self.trained, self.args.lora_alpha / self.args.lora_rank)

    def errors(self, policy: dict[str, Tensor], n: int, at_once: int) -> list[tuple]:
        """(err, err_ref, pred, tau, pred_ref, row) of winner and loser of pair n; for SFT of the
        winner alone. MaPO's err_ref is None."""
        args, pair = self.args, self.pairs[n]
        free = args.inversion_spacing == "log-sigma"
        cells = 1 if free else args.inversion_steps or args.strata
        t = draw_timesteps(args.seed, [n], at_once, cells, 1000)
        text, _, pooled, _ = self.pipe.encode_prompt(
            pair["caption"], do_classifier_free_guidance=False
        )
        keep, size = float(pair["caption"] != ""), 2.0 * torch.tensor([[8, 8, 0, 0, 8, 8]])
        given = {"added_cond_kwargs": {"text_embeds": pooled * keep, "time_ids": size}}

        def predict(weights, x, t):
            self.calls += 3 if torch.is_grad_enabled() else 1
            return functional_call(self.pipe.unet, weights, (x, t, text * keep), given).sample

        noises, errors, pred_ref = [], [], None
        for side, generator in zip(("winner", "loser"), generators(args.seed, [n]), strict=True):
            with torch.no_grad():
                posterior = self.pipe.vae.encode(pair[side][None] / 127.5 - 1).latent_dist
                drawn = torch.randn(1, 4, 8, 8, generator=generator)
                x0 = (posterior.mean + posterior.std * drawn) * self.pipe.vae.config.scaling_factor
                noises.append(torch.randn(1, 4, 8, 8, generator=generator))
                if args.latents != "noise":
                    inverter = policy if args.inverter == "policy" else self.start
                    xt, tau = self.inverted(predict, inverter, x0, t)
                else:
                    tau = noises[-1] if args.objective in ("kto", "sft") else noises[0]
                    xt = self.abar[t].sqrt() * x0 + (1 - self.abar[t]).sqrt() * tau
                if args.objective not in ("sft", "mapo"):
                    pred_ref = predict(self.start, xt, t)
            pred = predict(policy, xt, t)
            if side == "loser" and args.safe_loser is not None:
                r_w, r_l = errors[0][2] - errors[0][3], pred - tau
                along = (r_w * r_l).sum().item()
                share = (1 - args.safe_loser) * (r_w**2).sum().item() / along if along > 0 else 1
                pred = pred.detach() + min(1, share) * (pred - pred.detach())
            err_ref = None if pred_ref is None else ((pred_ref - tau) ** 2).mean()
            errors.append((((pred - tau) ** 2).mean(), err_ref, pred, tau, pred_ref, pair["row"]))
            if args.objective == "sft":
                break
        return errors

    def inverted(self, predict, weights: dict[str, Tensor], x0, t) -> tuple[Tensor, Tensor]:
        xbar, level, shown, moves = x0, torch.zeros(1), torch.zeros_like(t), []
        width, free = 1000 // self.args.inversion_steps, self.args.inversion_spacing == "log-sigma"
        path = [*range(width - 1, int(t), width), int(t)]
        if free:  # even in log sigma from t = 1 on, on the nearest timesteps
            ends = self.sigma[min(1, int(t))].log(), self.sigma[t][0].log()
            levels = torch.linspace(*ends, self.args.inversion_steps).exp()
            path = [int((self.sigma - one).abs().argmin()) for one in levels[:-1]] + [int(t)]
        for to in path:
            move = predict(weights, xbar / (1 + level**2).sqrt(), shown)
            end = self.sigma[to]
            if self.args.latents == "renoise":
                there = (xbar + (end - level) * move) / (1 + end**2).sqrt()
                move = (move + predict(weights, there, torch.tensor([to]))) / 2
            xbar = xbar + (end - level) * move
            if free and len(moves) > 1 and level > moves[-1][0]:
                # eps = move + slope log(s / level), integrated over s from level to end
                slope = (move - moves[-1][1]) / (level / moves[-1][0]).log()
                xbar = xbar + slope * (end * (end / level).log() - end + level)
            moves.append((level, move))
            level, shown = end, torch.tensor([to])
        return xbar * self.abar[t].sqrt(), (xbar - x0) / self.sigma[t]

    def pair_losses(self, errors: list[list[tuple]]) -> list[Tensor]:
        beta, share = self.args.beta, self.args.liked_share
        if self.args.objective == "sft":
            return [one[0] for (one,) in errors]
        if self.args.objective == "mapo":
            x = [[one[0] / 2 for one in pair] for pair in errors]  # snr err
            scores = [[s / (torch.exp(s) - 1) for s in pair] for pair in x]
            odds = [torch.sigmoid(1000 * (w - lose)) for w, lose in scores]
            return [pair[0][0] - beta * odd.log() for pair, odd in zip(errors, odds, strict=True)]
        g = [[one[1] - one[0] for one in pair] for pair in errors]
        margins = [beta / 2 * (g_w - g_l) for g_w, g_l in g]
        if self.args.objective == "smpo":
            sure = [self.strengths[pair[0][5]] for pair in errors]
            scales = [self.args.gamma * (2 * p - 1) for p in sure]
            return [torch.log1p(torch.exp(-s * m)) for s, m in zip(scales, margins, strict=True)]
        if self.args.objective == "dmpo":
            odds, alpha = [torch.sigmoid(m) for m in margins], self.args.alpha
            return [p * (p / (1 - alpha)).log() + (1 - p) * ((1 - p) / alpha).log() for p in odds]
        if self.args.objective == "dspo":
            pulls = [beta * (1 - torch.sigmoid(m)) for m in margins]
            winners = [pair[0] for pair in errors]
            return [
                ((pred - tau - pull * (pred - ref)) ** 2).mean()
                for pull, (_, _, pred, tau, ref, _) in zip(pulls, winners, strict=True)
            ]
        if self.args.objective != "kto":
            return [torch.log1p(torch.exp(-beta / 2 * (g_w - g_l))) for g_w, g_l in g]
        kl = sum(share * g_w.item() + (1 - share) * g_l.item() for g_w, g_l in g) / len(g)
        self.kls.append(kl := max(kl, 0.0))
        return [
            share * (1 - torch.sigmoid(beta * (g_w - kl)))
            + (1 - share) * (1 - torch.sigmoid(-beta * (g_l - kl)))
            for g_w, g_l in g
        ]
