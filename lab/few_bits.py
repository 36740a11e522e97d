"""What a base in few bits costs and saves: bytes, time of a step, error of the margin.

    python train_inpo.py --model tiny --recipe lora --method dpo --lr 2e-4 --steps 20 --data toy \\
        --out out/few-bits
    python -m lab.few_bits out/few-bits                     # two cores, two minutes

The LoRA of a run is put on its model, and the margin of each pair is taken four times: on the
model's own weights in fp32 and in bf16, and on --base-weights int8 and nf4 in bf16. Latents and
timesteps are the same, made once in fp32, with noise added forward. An error is

    RMS over pairs of (margin - margin in fp32) / RMS of the margin in fp32

Time is that of reference, policy and backward of a micro-step, by the median, as a ratio to bf16 in
the same round. It prints a Markdown table, of one device.
"""

import argparse
from pathlib import Path

from system.program import Parser, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.few_bits", __doc__)
    parser.add_argument("run", type=Path, help="folder of a LoRA run that has finished")
    parser.add_argument("--pairs", type=int, default=256, metavar="N", help="that are measured")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of timing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import time
from argparse import Namespace
from statistics import median

import torch
from deepspeed.accelerator import get_accelerator

import data
import model
from invert import add_noise, randn_like
from loss import squared_error
from system import hub
from training import lora, quantized
from training.folder import read_record
from training.latents import generators
from training.plan import read_pairs
from weights import loading

BASES = {"fp32": (torch.float32, None), "bf16": (torch.bfloat16, None)}
BASES |= {kind: (torch.bfloat16, kind) for kind in quantized.KINDS}
BATCH = 16  # pairs


def micro_steps(settings: Namespace, count: int, device) -> tuple[list, str, torch.Tensor]:
    """([(xt, tau, t, cond)] in fp32 of `count` pairs of the data, what is predicted, abar)."""
    pipeline = loading.load_pipeline(settings.model, settings.unet, settings.vae).to(device)
    abar, found = model.alphas_cumprod(pipeline), []
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    rows = read_pairs(Namespace(**vars(settings) | {"dry_run": False}))
    pairs = data.Pairs(rows, side, settings.seed, "center", False, 0.0)
    for first in range(0, count, BATCH):
        numbers = range(first, min(first + BATCH, count))
        batch = data.collate([pairs[n] for n in numbers])
        noise = generators(settings.seed, batch["n"])
        x0 = model.encode_images(pipeline, batch["pixels"].to(device), noise)
        t = torch.randint(len(abar), (len(numbers),), generator=noise[0]).repeat(2)
        tau = randn_like(x0[: len(numbers)], noise[: len(numbers)]).repeat(2, 1, 1, 1)
        cond = model.repeat(model.encode_prompts(pipeline, batch["captions"], side))
        found.append((add_noise(x0, tau, abar[t]), tau, t, cond))
    return found, pipeline.scheduler.config.prediction_type, abar


def adapted(settings: Namespace, run: Path, dtype: torch.dtype, kind: str | None, device):
    """The UNet of the run, with its adapters."""
    unet = loading.load_unet(settings.unet or settings.model, dtype)
    lora.adopt(unet, str(run), settings.model)
    if kind:
        quantized.quantize(unet, kind)
    return unet.to(device)


def margins(unet, reference, steps: list, predicts: str, abar, backward: bool) -> torch.Tensor:
    """err_ref - err of winners less that of losers, of all pairs: the margin over beta / 2."""
    found = []
    for xt, tau, t, cond in steps:
        cond = cast(cond, unet.dtype)
        with torch.no_grad():
            frozen = model.Denoiser(reference, cond, abar, predicts)(xt, t)
            err_ref = squared_error(frozen, tau)
        with torch.set_grad_enabled(backward):
            err = squared_error(model.Denoiser(unet, cond, abar, predicts)(xt, t), tau)
        if backward:
            err.mean().backward()
        winner, loser = (err_ref - err.detach()).chunk(2)
        found.append(winner - loser)
    return torch.cat(found)


def cast(cond: dict, dtype: torch.dtype) -> dict:
    return {k: cast(v, dtype) if isinstance(v, dict) else v.to(dtype) for k, v in cond.items()}


def measure(run: Path, pairs: int, rounds: int) -> str:
    """The table."""
    settings, device = Namespace(**read_record(run)), get_accelerator().current_device_name()
    steps, predicts, abar = micro_steps(settings, pairs, device)
    unets = {name: adapted(settings, run, *base, device) for name, base in BASES.items()}
    off = {name: lora.AdapterOff(unet) for name, unet in unets.items()}
    found = {n: margins(unets[n], off[n], steps, predicts, abar, False) for n in unets}
    seconds = {name: [] for name in unets}
    for _ in range(rounds + 1):  # the first warms up
        for name, unet in unets.items():
            get_accelerator().synchronize()
            clock = time.perf_counter()
            margins(unet, off[name], steps[:1], predicts, abar, True)
            get_accelerator().synchronize()
            seconds[name].append(time.perf_counter() - clock)
    rows = [
        "| base | weights, MB | step's time / bf16 | error of the margin |",
        "|---|---:|---:|---:|",
    ]
    exact = found["fp32"]
    for name, unet in unets.items():
        size = sum(x.nbytes for x in [*unet.parameters(), *unet.buffers()]) / 1e6
        ratios = [a / b for a, b in zip(seconds[name][1:], seconds["bf16"][1:], strict=True)]
        error = ((found[name] - exact).square().mean() / exact.square().mean()).sqrt()
        rows.append(f"| {name} | {size:.1f} | {median(ratios):.2f} | {error:.3f} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None):
    args = parse(argv)
    with reported("lab.few_bits"):
        hub.lora_file(str(args.run))  # or it says what the folder lacks
        for kind in quantized.KINDS:
            quantized.check(kind)
        print(measure(args.run, args.pairs, args.rounds))


if __name__ == "__main__":
    main()
