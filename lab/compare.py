"""The curves of several runs over each other, in one picture.

    python -m lab.compare out/sdxl-inpo out/sdxl-dpo                 # writes out/compare.png
    python -m lab.compare out/tries/* --out tries.png

Read are metrics.jsonl and scores.jsonl of each run's folder, also while the run goes on. A quantity
that no run has is left out, and a run is only where it has one: SFT has no accuracy. Curves are
running means over a tenth of a run. Losses of different methods are different quantities.
"""

import argparse
from pathlib import Path

from system.program import Parser, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.compare", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    add("--out", type=Path, default=Path("out/compare.png"), metavar="FILE", help="the PNG")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import contextlib

from evaluation import figures
from system.files import UserError, read_json, read_log
from training import folder
from training.methods import loss_of
from training.preview import is_score

# Title, y axis and its unit, keys (see figures.series), value of the reference, whether averaged.
PANELS = [
    ("Loss", "loss", "loss", None, True),
    ("Implicit accuracy", "share of pairs", "implicit_accuracy", (0.5, "chance"), True),
    ("Margin", "winner's reward - loser's (nats)", "margin", (0.0, "reference"), True),
    ("Winner's error", "err - err_ref", "err_winner - err_ref_winner", (0.0, "reference"), True),
    ("Loser's error", "err - err_ref", "err_loser - err_ref_loser", (0.0, "reference"), True),
    ("Drift of both errors", "errors / reference's errors", "drift", (1.0, "reference"), True),
    ("Gradient norm", "before clipping", "grad_norm", None, True),
    ("Learning rate", "lr", "lr", None, False),
    ("Held-out loss", "loss", "held_out_loss", None, False),
    ("Held-out accuracy", "share of pairs", "held_out_implicit_accuracy", (0.5, "chance"), False),
    ("Judge's score", "mean over pictures", "judge", None, False),
    ("Judge's win rate", "share of pictures, over the start", "win_rate", (0.5, "start"), False),
]
ERRORS = [f"{kind}_{who}" for kind in ("err", "err_ref") for who in ("winner", "loser")]


def read(run: Path) -> tuple[list[dict], tuple | None, str]:
    """(lines, unit and start of the loss, judge) of a run; a line has a step and the quantities of
    PANELS. Raises UserError."""
    if not run.is_dir():
        raise UserError(f"{run}: is no folder; name the folders of runs, as out/sdxl-inpo.")
    lines, loss = folder.read_metrics(run), None
    scores = read_log(run / "scores.jsonl", is_score)
    if not lines and not scores:
        raise UserError(
            f"{run}: holds no line of metrics.jsonl; it is not the folder of a run, or the run has "
            "not taken its first step."
        )
    with contextlib.suppress(UserError, KeyError):  # only the unit of the loss stands there
        loss = loss_of(read_json(run / "run.json"))
    for line in lines:
        errors = [line.get(key) for key in ERRORS]
        if None not in errors and sum(errors[2:]) > 0:
            line["drift"] = sum(errors[:2]) / sum(errors[2:])
    for one in scores:
        lines.append({"step": one["step"], "judge": one["mean"], "win_rate": one.get("win_rate")})
    named = {one["scorer"] for one in scores}
    return lines, loss, ", ".join(sorted(named))


def names(runs: list[Path]) -> list[str]:
    """The folders' names; where two have one name, as much of their paths as tells them apart."""
    parts, found = [run.parts for run in runs], []
    for part in parts:
        others, count = [other for other in parts if other != part], 1
        while any(other[-count:] == part[-count:] for other in others):
            count += 1
        found.append("/".join(part[-count:]))
    return found


def panels_of(runs: dict[str, tuple[list[dict], tuple | None, str]]) -> list[dict]:
    """The panels that some of the runs have something for, for figures.overlay."""
    losses, judges = {run[1] for run in runs.values()}, {run[2] for run in runs.values()} - {""}
    panels = []
    for title, unit, keys, limit, smooth in PANELS:
        if keys.endswith("loss"):
            (one, *others), unit, limit = losses, "loss, each method's own", None
            if one and not others:
                unit, limit = f"loss ({one[0]})", one[1]
        if keys == "judge":
            unit = f"mean of {judges.pop()}" if len(judges) == 1 else "mean, each run's own judge"
        lines = {name: figures.series(run[0], keys) for name, run in runs.items()}
        lines = {name: (x, y) for name, (x, y) in lines.items() if len(y)}
        log = keys == "grad_norm" and all((y > 0).all() for _, y in lines.values())
        panel = {"title": title, "y": unit, "lines": lines, "limit": limit, "smooth": smooth}
        panels += [panel | {"log": log}] * bool(lines)
    return panels


def compare(runs: list[Path], out: Path):
    """Draw the picture. Raises UserError."""
    if out.suffix != ".png":
        raise UserError(f"--out {out}: is no PNG; let its name end in .png.")
    runs = list(dict.fromkeys(run.absolute() for run in runs))
    found = dict(zip(names(runs), map(read, runs), strict=True))
    panels = panels_of(found)
    if not panels:
        raise UserError(f"{', '.join(found)}: there is no value in metrics.jsonl.")
    try:
        figures.overlay(panels, [*found], out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}).") from error


def main(argv: list[str] | None = None):
    args = parse(argv)
    with reported("lab.compare"):
        compare(args.runs, args.out)
    print(f"Wrote {args.out}.")


if __name__ == "__main__":
    main()
