"""How near an inversion comes to a fine one, by its path and its UNet calls.

    python -m lab.inversion --report docs/inversion.md     # the tiny model, on pairs that are drawn
    python -m lab.inversion --model sdxl --data PAIRS      # another model

Measured are the errors of tau and xt, where the first move should end, and what noise eta adds. For
the tiny model also, with an aligned one as the policy, the gradient of the loss, and several t on
one path. lab/paths.py has it all. In fp32, on a GPU if there is one.
"""

import argparse
import shlex
import sys
from pathlib import Path

from system.files import UserError, write_section
from system.program import Parser, reported

PAIRS = 6  # whose error is measured
GROUPS, OF = 2, 16  # of pairs, whose gradients are measured
REUSED = 48  # pairs, for several t on one path
ALIGNED = "out/demo/aligned"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.inversion", __doc__)
    add = parser.add_argument
    add("--model", default="tiny", help="sdxl, sd15, tiny, a hub id, or a folder")
    add("--data", default="toy", metavar="PATH", help="pairs, as of train_inpo.py")
    add("--aligned", default=ALIGNED, metavar="PATH",
        help="aligned tiny model, or its UNet, for the gradients")  # fmt: skip
    add("--out", type=Path, default=Path("out/inversion.png"), metavar="FILE", help="the picture")
    add("--report", type=Path, metavar="FILE", help="Markdown file, whose sections are replaced")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "-m", "lab.inversion", *(argv or sys.argv[1:])])
    return args


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import time
from datetime import date

import numpy as np
import torch

import model
import toy
from evaluation import figures, tables
from lab import paths
from lab.bench import hardware
from lab.paths import EULER, OURS, PAPER, RELEASED, TIMESTEPS, Images, Inversion
from training.recipes import recipe_of
from weights import loading

ERRORS = [
    *(Inversion(PAPER, n) for n in (2, 5, 10, 20, 50)),
    Inversion(RELEASED, 10),
    *(Inversion(EULER, n) for n in (2, 3, 4, 5, 6, 8)),
    *(Inversion(OURS, n) for n in (2, 3, 4, 5, 6, 8, 16)),
]
GRADIENTS = [
    *(Inversion(PAPER, n) for n in (5, 10)),
    Inversion(RELEASED, 10),
    *(Inversion(kind, n) for kind in (EULER, OURS) for n in (2, 3, 4, 5, 6)),
]
FIRSTS, FIRST_CALLS = (0, 1, 2, 5, 10, 20, 50), (3, 4)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ETA, NOISY = 0.1, [Inversion(PAPER, 10), *(Inversion(OURS, n) for n in (3, 4))]

# -------------------------------------------------------------------------------------------------
# The sections. Each returns (heading, text).


def named(one: Inversion) -> list[str]:
    return [one.kind, f"{one.steps}", f"{one.calls():.3g}"]


NAMED = ["path", "steps", "UNet calls, mean"]
AT = [f"t = {t}" for t in TIMESTEPS]


def errors_section(rows: list[dict], apart: list[float], images: int, few: int):
    def three(values):
        return [f"{value:.3f}" for value in values]

    body = [named(row["path"]) + three([*row["tau"], np.mean(row["tau"])]) for row in rows]
    latents = [named(row["path"]) + three([*row["xt"], np.mean(row["xt"])]) for row in rows]
    shown = [line for line, row in zip(latents, rows, strict=True) if row["path"].steps in (3, 10)]
    text = (
        f"The norm of the difference of tau from that of a fine path, {paths.FINE} calls of the "
        f"two-step rule, over the norm of the latter; mean over {images} images:\n\n"
        f"{tables.markdown([*NAMED, *AT, 'mean'], body)}\n"
    )
    if apart:
        text += (
            f"Euler's rule in {paths.EULER_MOVES} moves, at timesteps that need not be whole, "
            "shares nothing with the fine path but its first move. Their tau differ by "
            f"{', '.join(three(apart))} at these t ({few} of the images): smaller errors than that "
            "say nothing.\n\n"
        )
    text += (
        "The error of what a path adds to the image, xt - sqrt(abar) x0, is the same number, since "
        "that is sqrt(1 - abar) tau. The error of xt itself, over the norm of xt, is smaller where "
        f"t is small:\n\n{tables.markdown([*NAMED, *AT, 'mean'], shown)}"
    )
    return "Error of tau and xt", text


def first_section(rows: list[dict]) -> tuple[str, str]:
    head = ["the first move ends on t =", *(f"{n} calls" for n in FIRST_CALLS)]
    head += [f"{cell}, other reference" for cell in head[1:]]
    body = [
        [f"{row['first']}", *(f"{row[n][i]:.3f}" for i in (0, 1) for n in FIRST_CALLS)]
        for row in rows
    ]
    text = (
        "Error of tau of the two-step rule, mean over the same t. The fine path's own first move "
        "ends on 1; that of the other reference, as fine, ends on 0:\n\n"
        f"{tables.markdown(head, body)}"
    )
    return "Where the first move ends", text


def gradient_section(rows: list[dict], beta: float) -> tuple[str, str]:
    def cell(values, form):
        return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    head = [*NAMED, "cosine", "ratio of norms"]
    body = [named(r["path"]) + [cell(r["cosine"], ".3f"), cell(r["ratio"], ".2f")] for r in rows]
    text = (
        f"The gradient of InPO's loss in all parameters of the UNet, mean over {OF} pairs whose t "
        f"is uniform, against that of {paths.FINE_GRADIENT} calls of the two-step rule. The "
        "aligned model is the policy and inverts, the start is the reference; beta "
        f"{beta:g}, eta 0. Mean of {GROUPS} groups of pairs, least and largest in brackets:\n\n"
        f"{tables.markdown(head, body)}"
    )
    return "The gradient of the loss", text


def reuse_section(rows: list[dict]) -> tuple[str, str]:
    head = ["t on one path", "UNet calls an image", "variance x calls, against one t a path"]
    body = [[f"{row['t']}", f"{row['calls']}"] for row in rows]
    for line, row in zip(body, rows, strict=True):
        line.append(f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]")
    text = (
        "A path to the largest of several t passes through the others, and each point can be "
        "trained on. That saves calls, but the gradients of one pair at several t are alike. "
        "Compared is the variance of the gradient of a pair (trace of its covariance) times its "
        "UNet calls, with one t on a path of 3 calls, 7 in all; less than 1 would be a gain. t "
        f"are independent, the path goes to 1, then to each t in order; {REUSED} pairs, 95 % "
        f"bootstrap intervals, policy and reference as above:\n\n{tables.markdown(head, body)}"
    )
    return "Several t on one path", text


def eta_section(abar) -> tuple[str, str]:
    body = []
    for path in NOISY:
        cells = []
        for t in TIMESTEPS:
            computed = 100 * paths.added_variance(path, t, abar, ETA)
            drawn = 100 * paths.simulated_variance(path, t, abar, ETA)
            cells.append(f"{computed:.3f} ({drawn:.3f})")
        body.append(named(path) + cells)
    text = (
        f"The variance that --eta {ETA} adds to tau, in % of the 1 that tau of true noise has, if "
        "eps does not answer to it: by formula (and simulated with a constant eps, 2^18 draws):"
        f"\n\n{tables.markdown([*NAMED, *AT], body)}"
    )
    return "The noise that eta adds", text


# -------------------------------------------------------------------------------------------------
# The program.


def picture(errors: list[dict], gradients: list[dict], file: Path, title: str):
    def panel(title, y, rows, key):
        lines = {}
        for row in rows:
            lines.setdefault(row["path"].kind, []).append((row["path"].calls(), row[key]))
        calls = {kind: [x for x, _ in points] for kind, points in lines.items()}
        runs = {kind: zip(*(y for _, y in points), strict=True) for kind, points in lines.items()}
        runs = {kind: [(calls[kind], list(run)) for run in every] for kind, every in runs.items()}
        x = "UNet calls to invert an image, mean over t"
        return {"title": title, "x": x, "y": y, "lines": runs}

    means = [row | {"tau": [np.mean(row["tau"])]} for row in errors if row["path"].calls() < 12]
    panels = [panel("Error of tau", "mean relative error of tau", means, "tau")]
    if gradients:
        words = "cosine with a fine path's gradient"
        heading = f"Gradient of the loss (faint: groups of {OF} pairs)"
        panels.append(panel(heading, words, gradients, "cosine"))
    figures.trajectories(panels, file, title, columns=len(panels))


def load_policy(args: argparse.Namespace):
    """The aligned UNet, or None where gradients are not measured. Raises UserError."""
    if args.model != "tiny":
        return None
    if args.aligned == ALIGNED and not Path(ALIGNED).exists():
        raise UserError(
            f"There is no aligned model in {ALIGNED}; name one with --aligned, or make it in two "
            f"minutes: python train_inpo.py --model tiny --out {ALIGNED} --sample-every 0."
        )
    return loading.load_unet(args.aligned)


def sections(args: argparse.Namespace):
    """Measure; yields (heading, text) as they come. Draws the picture at the end."""
    policy, pipeline = load_policy(args), loading.load_pipeline(args.model)
    if len(model.alphas_cumprod(pipeline)) != 1000:
        raise UserError(f"--model {args.model}: its schedule does not have 1000 timesteps.")
    source, pipeline = args.data, pipeline.to(DEVICE)
    if source == "toy":
        source = str(toy.write_pairs_once("out/toy", 128, paths.SEED))
    unet, images = pipeline.unet, Images.read(pipeline, source, PAIRS)

    fine = paths.fine_results(unet, images)
    errors, few = paths.errors(unet, images, fine, ERRORS), images[torch.arange(4)]
    apart = []
    if args.model == "tiny":
        apart = paths.from_euler(unet, few, fine, paths.EULER_MOVES)
    yield errors_section(errors, apart, len(images), len(few))
    yield first_section(paths.first_points(unet, images, fine, FIRSTS, FIRST_CALLS))
    gradients = []
    if policy is not None:
        models = policy.to(DEVICE).requires_grad_(True), unet
        beta, dropout = (recipe_of("tiny")[flag] for flag in ("beta", "caption_dropout"))
        images = Images.read(pipeline, source, GROUPS * OF, dropout)
        gradients = paths.gradients(*models, images, beta, GRADIENTS, OF)
        yield gradient_section(gradients, beta)
        images = Images.read(pipeline, source, REUSED, dropout)
        yield reuse_section(paths.reuse(*models, images, beta))
    yield eta_section(images.abar.cpu())
    picture(errors, gradients, args.out, f"Inversion of {args.model}")


def main(argv: list[str] | None = None):
    args, since = parse(argv), time.process_time()
    with reported("lab.inversion"):
        for heading, text in sections(args):
            now = time.process_time()
            about = f"{date.today()}, {hardware(DEVICE)}, torch {torch.__version__}"
            about = f"{about}, {now - since:.0f} s of CPU time"
            text = f"```\n{args.command}\n```\n\n{about}. {text}"
            heading, since = heading if args.model == "tiny" else f"{heading}: {args.model}", now
            print(f"\n## {heading}\n\n{text}", flush=True)
            if args.report:
                write_section(args.report, heading, text)
        print(f"Look at {args.out}.")


if __name__ == "__main__":
    main()
