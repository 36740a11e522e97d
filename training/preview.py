"""Pictures while a run trains: fixed prompts and seeds, the start beside the current model, and
how a scorer likes them.

    samples/step_000050.png     rows prompts, columns start and now
    scores.jsonl                {step, scorer, mean, start, win_rate} a line: means over pictures,
                                the share of them that beat the start's, ties half
    best.json, best/            the line with the highest mean above the start's, and its model

One picture a prompt says where a run is going, no more; evaluate.py says where it has arrived. A
toy picture that does not show its caption counts 0, whatever its colours. Lines and pictures of
steps that a crash undid are replaced as these steps are taken again; what they left in best/ stays
until then, a model of this run with the score that best.json says.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import model
import toy
from evaluation import figures, prompts, scorers
from evaluation.published import TOY
from system.files import UserError, replacing, write
from system.processes import is_main, print0, share

PROMPTS = (
    "a photo of an old fisherman mending a net, golden hour",
    "a watercolor of a fox in a snowy forest",
    "an astronaut riding a horse on the moon, cinematic",
    "a bowl of ramen with steam rising, studio light",
)
ROWS, STEPS = 6, 25  # of the picture; of sampling


def read_prompts(args: argparse.Namespace) -> list[str]:
    """--sample-prompts, the toy's held-out captions, or PROMPTS. Raises UserError."""
    if args.sample_prompts:
        return prompts.read(args.sample_prompts).prompts
    return toy.prompts("heldout") if args.data == "toy" else list(PROMPTS)


class Preview:
    def __init__(self, args: argparse.Namespace):
        self.out, self.guidance, self.batch = args.out, args.guidance, args.micro_batch
        self.prompts, self.name, self.scorer_folder = (
            read_prompts(args),
            args.judge,
            args.scorer_folder,
        )
        self.judge = None

    def draw(self, pipeline, step: int, pause: Callable[[], None]) -> tuple[dict | None, bool]:
        """(scores, if there is a judge; whether they are the best so far), the same on all ranks.

        All ranks draw, since under ZeRO-3 a forward is collective; rank 0 saves and judges. With
        guidance, a micro-batch of prompts is as many images for the UNet as one of pairs. pause():
        called by all ranks before each of these; what it raises ends the drawing."""
        images, found, failed = [], (None, False), None
        for i in range(0, len(self.prompts), self.batch):
            pause()
            some = self.prompts[i : i + self.batch]
            seeds = list(range(i, i + len(some)))
            try:
                images += model.sample(pipeline, some, seeds, STEPS, self.guidance, self.batch)
            except UserError as error:  # NaN; all ranks go on, for the sake of ZeRO-3
                failed = error
        if is_main():
            try:
                if failed:
                    raise failed
                self.save(step, images)
                found = self.compare(step, images)
            except (OSError, UserError) as error:
                words = f"Warning: step {step} lacks pictures or scores ({error})."
                print0(words, file=sys.stderr)
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
            columns = {"start": [Image.open(path) for path in self.starts()], **columns}
        rows = [list(row) for row in zip(*columns.values(), strict=True)][:ROWS]
        picture = figures.grid(rows, self.prompts[:ROWS], list(columns))
        picture.save(self.out / "samples" / f"step_{step:06d}.png")

    def compare(self, step: int, images: list[Image.Image]) -> tuple[dict | None, bool]:
        """Score the pictures and the start's; a line of scores.jsonl."""
        if not self.name or not all(path.exists() for path in self.starts()):
            return None, False
        now, start = self.score(images), self.score([Image.open(path) for path in self.starts()])
        line = {
            "step": step,
            "scorer": self.name,
            "mean": float(np.mean(now)),
            "start": float(np.mean(start)),
            "win_rate": float(
                np.mean([(a > b) + 0.5 * (a == b) for a, b in zip(now, start, strict=True)])
            ),
        }
        file = self.out / "scores.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        lines = [one for one in map(json.loads, lines) if one["step"] < step]  # not undone
        write(file, "".join(json.dumps(one) + "\n" for one in [*lines, line]))
        rivals = [one["mean"] for one in lines if one["scorer"] == self.name]  # --judge may change
        return line, line["mean"] > max([line["start"], *rivals])

    def keep(self, line: dict, write_model: Callable[[Path], None]):
        """Make what write_model(folder) writes best/, of the scores `line`; rank 0.

        A kill leaves best/ as best.json says it is, or no best.json."""
        folder, file = self.out / "best", self.out / "best.json"
        with replacing(folder) as scratch:
            write_model(scratch)
            file.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        write(file, json.dumps(line, indent=2) + "\n")

    def score(self, images: list[Image.Image]) -> np.ndarray:
        self.judge = self.judge or scorers.load(self.name, self.scorer_folder)  # on the CPU
        scores = np.array(self.judge(images, self.prompts))
        if self.name in TOY:
            scores *= [toy.faithfulness(*pair) for pair in zip(images, self.prompts, strict=True)]
        return scores
