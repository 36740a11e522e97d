"""Pictures while a run trains: fixed prompts and seeds, the start beside the current model, and
how a scorer likes them. Prompts are captions of the data unless others are given.

    samples/step_000050.png     one row per prompt, columns for the start and the current model
    samples/model_000050_00.png ...    the current model's pictures of these rows, one by one
    scores.jsonl                {step, scorer, mean, start, win_rate} per line: means over pictures,
                                and the share of them that beat the start's, ties half; function:
                                the digest of the file of a scorer of one's own
    best.json, best/            the line with the highest mean above the start's, and its model

Of --judge held-out, mean and start are minus the loss on the held-out pairs, win_rate its accuracy.

One picture per prompt shows the trend of a run; evaluate.py judges the result. A toy picture that
does not show its caption counts 0, whatever its colours. After a crash, lines and pictures of lost
steps are replaced when these steps are taken again; until then best/ may hold a model of such a
step, with the score that best.json says.
"""

import argparse
import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import model
import toy
from evaluation import figures, own, prompts, scorers
from evaluation.gallery import open_image
from evaluation.published import TOY
from system.files import (
    UserError,
    is_number,
    is_step,
    read_json,
    read_log,
    replacing,
    warn_once,
    write,
)
from system.processes import is_main, print0, share

PROMPTS = (
    "a photo of an old fisherman mending a net, golden hour",
    "a watercolor of a fox in a snowy forest",
    "an astronaut riding a horse on the moon, cinematic",
    "a bowl of ramen with steam rising, studio light",
)
ROWS, STEPS, TOY_STEPS = 6, 25, 12  # of the picture; of sampling, of the tiny model's
STREAM, TRIES = 108, 64  # keeps the random streams of one seed apart; rows that are read


def given_prompts(args: argparse.Namespace) -> list[str] | None:
    """--sample-prompts, or the toy's held-out captions; None where there are neither. Raises
    UserError."""
    if args.sample_prompts:
        return prompts.read(args.sample_prompts).prompts
    return toy.prompts("heldout") if args.data == "toy" else None


def choose_prompts(args: argparse.Namespace, pairs) -> list[str]:
    """Those that the run in --out began with; else those that are given; else captions of `pairs`,
    a function of them and the seed; else PROMPTS. Raises UserError."""
    try:
        record = read_json(args.out / "run.json")
    except UserError:  # there is none, or it is damaged
        record = {}
    if recorded := record.get("prompts"):
        return recorded
    given = given_prompts(args)
    if given is None and not record:  # runs of before, which recorded none, began with PROMPTS
        given = captions(pairs, args.seed)
    return given or list(PROMPTS)


def captions(pairs, seed: int) -> list[str]:
    """As many different ones as PROMPTS has, or fewer, from TRIES random rows."""
    found = []
    for row in np.random.default_rng([seed, STREAM]).permutation(len(pairs))[:TRIES].tolist():
        with contextlib.suppress(Exception):  # as in data.Pairs: such a row is left out
            found.append(" ".join(pairs[row]["caption"].split()))
    return list(dict.fromkeys(filter(None, found)))[: len(PROMPTS)]


def is_score(line: dict) -> bool:
    """Whether this can be a line of scores.jsonl."""
    named = isinstance(line.get("scorer"), str)
    return named and is_step(line.get("step")) and is_number(line.get("mean"))


class Preview:
    def __init__(self, args: argparse.Namespace, prompts: list[str]):
        self.out, self.guidance, self.batch = args.out, args.guidance, args.micro_batch
        self.name, self.scorer_folder, self.judge = args.judge, args.scorer_folder, None
        self.name = None if self.name == "held-out" else self.name  # which judges no pictures
        self.prompts = prompts
        self.steps = TOY_STEPS if args.data == "toy" else STEPS

    def draw(self, pipeline, step: int, pause: Callable[[], None]) -> tuple[dict | None, bool]:
        """(scores, or None without a judge; whether they are the best so far), on all ranks.

        All ranks draw, since under ZeRO-3 a forward is collective; rank 0 saves and judges. With
        guidance, a micro-batch of prompts has as many images for the UNet as one of pairs. pause()
        is called by all ranks before each micro-batch; what it raises ends the drawing."""
        images, found, failed = [], (None, False), None
        for i in range(0, len(self.prompts), self.batch):
            pause()
            some = self.prompts[i : i + self.batch]
            seeds = list(range(i, i + len(some)))
            try:
                images += model.sample(pipeline, some, seeds, self.steps, self.guidance, self.batch)
            except UserError as error:  # NaN; the other ranks draw on, so this one must, too
                failed = error
        if is_main():
            try:
                if failed:
                    raise failed
                self.save(step, images)
                found = self.compare(step, images)
            except (OSError, UserError) as error:
                said = f"Warning: step {step} lacks pictures or scores ({error})."
                print0(said, file=sys.stderr)
        return share(found)

    def starts(self) -> list[Path]:
        return [self.out / "samples" / f"start_{i:02d}.png" for i in range(len(self.prompts))]

    def save(self, step: int, images: list[Image.Image]):
        columns = {f"step {step}": images}
        if step == 0:
            for image, path in zip(images, self.starts(), strict=True):
                with replacing(path) as scratch:
                    image.save(scratch, "PNG")
        if all(path.exists() for path in self.starts()):  # pictures may have been off at first
            columns = {"start": [open_image(path) for path in self.starts()], **columns}
        rows = [list(row) for row in zip(*columns.values(), strict=True)][:ROWS]
        picture = figures.grid(rows, self.prompts[:ROWS], list(columns))
        picture.save(self.out / "samples" / f"step_{step:06d}.png")
        for i, image in enumerate(images[:ROWS] if step else []):
            with replacing(self.out / "samples" / f"model_{step:06d}_{i:02d}.png") as scratch:
                image.save(scratch, "PNG")

    def compare(self, step: int, images: list[Image.Image]) -> tuple[dict | None, bool]:
        """Score the pictures and the start's, see `add`."""
        if not self.name or not all(path.exists() for path in self.starts()):
            return None, False
        now, start = self.score(images), self.score([open_image(path) for path in self.starts()])
        wins = (now > start).mean() + (now == start).mean() / 2
        means = {"mean": now.mean(), "start": start.mean(), "win_rate": wins}
        means = {name: float(value) for name, value in means.items()}
        line = {"step": step, "scorer": own.title(self.name), **means}
        if own.is_own(self.name):
            line["function"] = own.imported(self.name).digest
        return self.add(line)

    def add(self, line: dict) -> tuple[dict, bool]:
        """Add a line to scores.jsonl. Returns it, and whether it is the best so far; rank 0."""
        file, step = self.out / "scores.jsonl", line["step"]
        lines = [one for one in read_log(file, is_score) if one["step"] < step]  # none of a crash
        write(file, "".join(json.dumps(one) + "\n" for one in [*lines, line]))
        who = [line.get(key) for key in ("scorer", "function")]  # it may change
        rivals = [one["mean"] for one in lines if [one.get("scorer"), one.get("function")] == who]
        rivals += [line["start"]] if line["start"] is not None else []  # SFT has no reference
        return line, line["mean"] > max(rivals, default=-math.inf)

    def keep(self, line: dict, write_model: Callable[[Path], None]):
        """Let write_model(folder) write best/, and `line` be best.json; rank 0.

        A kill leaves a best/ that fits best.json, or no best.json."""
        folder, file = self.out / "best", self.out / "best.json"
        with replacing(folder) as scratch:
            write_model(scratch)
            file.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        write(file, json.dumps(line, indent=2) + "\n")

    def best(self) -> dict | None:
        """What best.json says of best/, where there is one; None, with a warning, where it is
        damaged."""
        file = self.out / "best.json"
        try:
            best = read_json(file) if file.exists() else None
            if best is None or is_score(best):
                return best
            warn_once(f"{file} names no step and scorer.")
        except UserError as error:
            warn_once(str(error))

    def score(self, images: list[Image.Image]) -> np.ndarray:
        self.judge = self.judge or scorers.load(self.name, self.scorer_folder)  # on the CPU
        scores = np.array(self.judge(images, self.prompts))
        if self.name in TOY:
            scores *= [toy.faithfulness(*pair) for pair in zip(images, self.prompts, strict=True)]
        return scores
