"""How near an inversion comes to a fine one, by its path and its UNet calls.

    python -m lab.inversion --report docs/inversion.md

The error is that of tau, the training target of InPO: the norm of its difference from a fine path's
tau, over the latter's norm, per picture; means over held-out drawings of the tiny model. Without
injected noise (eta 0), without guidance, as in training.
"""

import argparse
import os
import platform
import time
from datetime import date
from pathlib import Path

from system.program import Parser, reported

PICTURES, FINE = 12, 120
TIMESTEPS = 49, 149, 349, 549, 749, 949


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.inversion", __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/inversion.png"), metavar="FILE", help="the picture")
    add("--report", type=Path, metavar="FILE", help="Markdown file, whose section is replaced")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import model
import toy
from evaluation import figures, tables
from invert import ddim_invert, ddim_step, implied_noise, path
from model import Denoiser
from system.files import write_section

EULER = "log sigma, Euler's rule"
PATHS = {  # name: (spacing, steps)
    "uniform cells, Euler's rule (the paper's: 10)": ("uniform", (2, 5, 10, 20, 50)),
    EULER: ("log-sigma", (2, 3, 4, 5, 6, 8)),
    "log sigma, two steps (ours)": ("log-sigma", (2, 3, 4, 5, 6, 8, 16)),
}


def euler(eps_fn, x0: Tensor, t: Tensor, abar: Tensor, steps: int) -> Tensor:
    """tau by Euler's rule on the points of the log-sigma path."""
    x, t_from, abar_from = x0, torch.zeros_like(t), torch.ones_like(abar[t])
    for t_to in path(t, steps, abar, "log-sigma"):
        x = ddim_step(x, eps_fn(x, t_from), abar_from, abar[t_to])
        t_from, abar_from = t_to, abar[t_to]
    return implied_noise(x0, x, abar[t])


def drawings(pipeline) -> tuple[Tensor, list[str]]:
    """Latents of held-out drawings of all qualities, and their captions."""
    rng, captions = np.random.default_rng(7), toy.prompts("heldout")[:PICTURES]
    pixels = np.stack([np.asarray(toy.draw(caption, rng)) for caption in captions])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    seeds = [torch.Generator().manual_seed(k) for k in range(PICTURES)]
    return model.encode_images(pipeline, pixels, seeds), captions


@torch.no_grad()
def measure(pipeline) -> list[dict]:
    """[{path, steps, calls: mean over t, errors: of tau, at TIMESTEPS}]."""
    (x0, captions), abar = drawings(pipeline), model.alphas_cumprod(pipeline)
    cond = model.encode_prompts(pipeline, captions, toy.SIZE)
    eps_fn = Denoiser(pipeline.unet, cond, abar, pipeline.scheduler.config.prediction_type)
    found = []
    rows = [(name, steps) for name, (_, every) in PATHS.items() for steps in every]
    bar = tqdm(total=len(TIMESTEPS) * (1 + len(rows)), desc="paths", unit="path")
    fine = {}
    for number in TIMESTEPS:
        t = torch.full((PICTURES,), number)
        fine[number] = ddim_invert(eps_fn, x0, t, abar, FINE, 0, None, "log-sigma")[1]
        bar.update()
    for name, steps in rows:
        spacing, errors = PATHS[name][0], []
        for number in TIMESTEPS:
            t = torch.full((PICTURES,), number)
            if name == EULER:
                tau = euler(eps_fn, x0, t, abar, steps)
            else:
                tau = ddim_invert(eps_fn, x0, t, abar, steps, 0, None, spacing)[1]
            off = (tau - fine[number]).flatten(1).norm(dim=1) / fine[number].flatten(1).norm(dim=1)
            errors.append(off.mean().item())
            bar.update()
        mean = (steps + 1) / 2 if spacing == "uniform" else steps  # over all t
        found.append({"path": name, "steps": steps, "calls": mean, "errors": errors})
    bar.close()
    return found


def report(found: list[dict], seconds: float) -> str:
    """The section of docs/inversion.md."""
    head = ["path", "steps", "UNet calls, mean", *(f"t = {t}" for t in TIMESTEPS), "mean"]
    rows = [
        [one["path"], f"{one['steps']}", f"{one['calls']:g}"]
        + [f"{error:.3f}" for error in (*one["errors"], np.mean(one["errors"]))]
        for one in found
    ]
    return (
        f"```\npython -m lab.inversion\n```\n\n{date.today()}, {os.cpu_count()} cores "
        f"({platform.machine()}), torch {torch.__version__}, {seconds:.0f} s. Relative error of "
        f"tau against {FINE} calls of the two-step rule, {PICTURES} held-out drawings, eta 0:\n\n"
        f"{tables.markdown(head, rows)}"
    )


def picture(found: list[dict], file: Path):
    names = list(PATHS)
    lines = {n: [one for one in found if one["path"] == n] for n in names}
    panel = {
        "title": "error of tau",
        "x": "UNet calls to invert an image, mean over t",
        "y": "mean relative error of tau",
        "lines": {
            name: [([one["calls"] for one in ones], [np.mean(one["errors"]) for one in ones])]
            for name, ones in lines.items()
        },
    }
    figures.trajectories([panel], file, "The tiny model", columns=1)


def main(argv: list[str] | None = None):
    args, since = parse(argv), time.monotonic()
    with reported("lab.inversion"):
        found = measure(model.load_pipeline("tiny"))
        text = report(found, time.monotonic() - since)
        picture(found, args.out)
        if args.report:
            write_section(args.report, "Error of tau, by path and calls", text)
        print(f"\n{text}\nLook at {args.out}.")


if __name__ == "__main__":
    main()
