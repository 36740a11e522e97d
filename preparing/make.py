"""Pairs out of a model's own pictures: draw several of a prompt, judge them, keep best and worst.

    F.pictures/              what evaluation/gallery.py writes: the pictures and their manifest.json
    F.pictures/JUDGE/        the judge's scores, see parts.py
    F.parquet                jpg_0, jpg_1 (the PNGs of F.pictures, byte by byte), label_0, caption;
                             strength: the first judge's probability that the winner is preferred,
                             0.5 to 1, where it has one (judges.py); margin_JUDGE: by how much the
                             winner scores higher; seed_0, seed_1: of the pictures; model

Pictures are PNGs because the gallery's are: what was judged is, byte by byte, what is trained on,
and nothing is encoded twice. Lossless WebP would save about a quarter of the disk.

A group is --per-prompt pictures of one prompt; each of its occurrences in the prompt set is one,
--rounds times. Of a group comes one pair or none: among all that every judge ranks alike, strictly,
the one with the largest margin of the first judge. Of a single judge these are best and worst.
Which side the winner stands on is drawn from (first seed, number of the group)."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

import toy
from evaluation import gallery, models, own, prompts, scorers
from preparing import parts, table
from preparing.judges import judged, log_odds, probability
from system import hub, processes
from system.files import UserError
from system.lock import alone
from system.processes import print0
from weights import loading

# --------------------------------------------------------------------------------------------------
# Checks, and what is to be drawn.


def check(args: Namespace) -> dict:
    """The manifest of the pictures. Raises UserError; the model is loaded once, on the CPU."""
    table.check_out(args.out)
    chosen = prompts.read(args.prompts)
    if kept := set(chosen.prompts) & set(toy.prompts("heldout")):
        raise UserError(
            f"--prompts {args.prompts} has '{sorted(kept)[0]}', one of the captions that the tiny "
            "model is judged on; take toy-train."
        )
    if chosen.name in prompts.PUBLISHED:
        print0(f"Note: {chosen.name} is for judging; do not judge a model of these pairs on it.")
    for judge in args.judge:
        scorers.check(judge, chosen.prompts, args.scorer_folder)
    if args.base and hub.kind(args.base) != "pipeline":
        raise UserError(f"--base '{args.base}' is no pipeline; name a folder or hub id of one.")
    around = loading.pipeline_of(args.model, args.base)
    settings = models.choose_settings(args, {"model": models.family(around)})["model"]
    each = args.per_prompt * args.rounds
    images = gallery.plan_images(chosen, each, args.first_seed, args.limit)
    about = {"name": "pairs", "model": args.model, "base": args.base, "dtype": models.precision()}
    about |= {"architecture": hub.architecture(around), "set": chosen.name}
    about |= settings | {"prompts": len(images) // each}
    manifest = gallery.describe(models.load(about), images, **about)
    gallery.refuse_others(pictures_of(args.out), manifest)
    return manifest


def pictures_of(out: Path) -> Path:
    return out.with_suffix(".pictures")


def about_pictures(manifest: dict) -> dict:
    """What decides them: the weights by their identity, not by where they lie."""
    skipped = ("name", "model", "base", "images")
    listed = json.dumps(manifest["images"], sort_keys=True).encode()
    about = {key: value for key, value in manifest.items() if key not in skipped}
    return about | {"images": hashlib.sha256(listed).hexdigest()[:16]}


def names(args: Namespace) -> list[str]:
    """Of the judges, in folders and columns."""
    return [own.title(judge) for judge in args.judge]


def about_pairs(args: Namespace, manifest: dict) -> dict:
    about = {"command": "make", "judge": names(args), "per_prompt": args.per_prompt}
    about |= own.digests(args.judge)
    about |= {"rounds": args.rounds, "first_seed": args.first_seed}
    libraries = ("torch", "diffusers")  # a file that is whole stays so under newer ones
    return about | {k: v for k, v in about_pictures(manifest).items() if k not in libraries}


# --------------------------------------------------------------------------------------------------
# The work.


def run(args: Namespace):
    """All of it, on every rank that a launcher has started."""
    with processes.joined():
        if (place := processes.together(gallery.device)).type == "cuda":
            torch.cuda.set_device(place)
        manifest = processes.on_main(lambda: check(args))
        about = processes.on_main(lambda: about_pairs(args, manifest))
        if processes.on_main(lambda: table.is_written(args.out, about)):
            print0(f"{args.out} is complete.")
            return
        with alone(pictures_of(args.out)):
            draw(pictures_of(args.out), manifest)
            for judge in args.judge:
                score(judge, args.scorer_folder, pictures_of(args.out), manifest)
                models.free()
            print0(processes.on_main(lambda: finish(args, manifest, about)))


def draw(folder: Path, manifest: dict):
    """Draw the pictures that are missing; the model is loaded only if there are any."""
    if any(processes.gather(bool(gallery.missing(folder, manifest)))):
        pipeline = processes.together(lambda: models.load(manifest).to(gallery.device()))
        gallery.generate(pipeline, folder, manifest, f"pictures by {manifest['model']}")
        del pipeline
        models.free()


def score(name: str, scorer_folder: Path | None, folder: Path, manifest: dict):
    """The scores of all pictures, in parts."""
    judge = processes.together(lambda: scorers.load(name, scorer_folder, gallery.device()))
    images = manifest["images"]

    def work(numbers: range) -> list[float]:
        scores = []
        for start in range(0, len(numbers), gallery.JUDGED):
            some = [images[k] for k in numbers[start : start + gallery.JUDGED]]
            files = [folder / entry["file"] for entry in some]
            opened = [gallery.open_image(file) for file in files]
            scores += judged(judge, opened, [entry["prompt"] for entry in some], files)
        return scores

    said = own.title(name)
    about = {"judge": said} | own.digests([name]) | about_pictures(manifest)
    parts.work_in_parts(folder / said, about, len(images), work, said)


# --------------------------------------------------------------------------------------------------
# The pairs.


class Pair(NamedTuple):
    group: int
    winner: int  # numbers of pictures
    loser: int
    margins: list[float]  # by judge, all above 0


def groups(pictures: int, prompts: int, per_prompt: int) -> Iterator[range]:
    """The numbers of the pictures of each group: picture k shows prompt k mod `prompts`."""
    for first in range(0, pictures, prompts * per_prompt):
        for prompt in range(prompts):
            start = first + prompt
            yield range(start, start + prompts * per_prompt, prompts)


def best_pair(scores: np.ndarray) -> tuple[int, int] | None:
    """(winner, loser) of N pictures, by their scores (judges, N), see above; None: no two pictures
    are ranked alike by all. Of equal margins the first counts."""
    margins = scores[:, :, None] - scores[:, None, :]  # [judge, a, b]: of a over b
    agreed = (margins > 0).all(0)
    if not agreed.any():
        return None
    best = np.where(agreed, margins[0], -np.inf).argmax()
    return tuple(map(int, divmod(best, scores.shape[1])))


def choose_pairs(scores: np.ndarray, prompts: int, per_prompt: int) -> tuple[list[Pair], int, int]:
    """(pairs, groups in which a judge gives all pictures the same score, those in which judges
    disagree); scores: (judges, pictures)."""
    chosen, ties, disagreements = [], 0, 0
    for group, numbers in enumerate(groups(scores.shape[1], prompts, per_prompt)):
        some = scores[:, list(numbers)]
        if found := best_pair(some):
            winner, loser = (numbers[place] for place in found)
            margins = (scores[:, winner] - scores[:, loser]).tolist()
            chosen.append(Pair(group, winner, loser, margins))
        elif (some.min(1) == some.max(1)).any():
            ties += 1
        else:
            disagreements += 1
    return chosen, ties, disagreements


def winner_is_first(seed: int, group: int) -> bool:
    return bool(np.random.default_rng([seed, group]).integers(2))


def row_of(pair: Pair, args: Namespace, manifest: dict) -> dict:
    """What the parquet file has of a pair."""
    first = winner_is_first(args.first_seed, pair.group)
    sides = (pair.winner, pair.loser) if first else (pair.loser, pair.winner)
    row = {"label_0": float(first), "caption": manifest["images"][pair.winner]["prompt"]}
    for i, k in enumerate(sides):
        entry = manifest["images"][k]
        row[f"jpg_{i}"] = (pictures_of(args.out) / entry["file"]).read_bytes()
        row[f"seed_{i}"] = entry["seed"]
    if log_odds(args.judge[0]):
        row["strength"] = probability(args.judge[0], pair.margins[0])
    row |= {f"margin_{j}": margin for j, margin in zip(names(args), pair.margins, strict=True)}
    return row | {"model": args.model}


def finish(args: Namespace, manifest: dict, about: dict) -> str:
    """Write the pairs; what is said of them. Rank 0."""
    folder, pictures = pictures_of(args.out), len(manifest["images"])
    scores = np.array([parts.read_parts(folder / judge, pictures) for judge in names(args)])
    chosen, ties, disagreements = choose_pairs(scores, manifest["prompts"], args.per_prompt)
    every = len(chosen) + ties + disagreements
    without = f"without a pair: {ties} in which all pictures tie"
    without += f", {disagreements} on which the judges disagree" if len(args.judge) > 1 else ""
    if not chosen:
        raise UserError(f"there is no pair in {every:,} groups ({without}); raise --per-prompt.")
    more = {"strength": pa.float64()} if log_odds(args.judge[0]) else {}
    more |= {f"margin_{judge}": pa.float64() for judge in names(args)}
    more |= {"seed_0": pa.int64(), "seed_1": pa.int64(), "model": pa.string()}
    table.write_pairs(args.out, (row_of(p, args, manifest) for p in chosen), more, about)
    each = f"{manifest['prompts']:,} prompts, {args.per_prompt} to choose a pair from"
    said = [f"{pictures:,} pictures of {each}"]
    said += [f"{len(chosen):,} pairs in {args.out}; groups {without}"]
    for judge, margins in zip(args.judge, np.transpose([p.margins for p in chosen]), strict=True):
        low, middle, high = np.quantile(margins, [0.1, 0.5, 0.9])
        odds = f", a probability of {probability(judge, middle):.2f}" if log_odds(judge) else ""
        spread = f"median {middle:.4g}{odds}; 80 % in {low:.4g} to {high:.4g}"
        said += [f"margin of {own.title(judge)}: {spread}"]
    said += [f"The pictures stay in {folder}; they may be deleted."]
    return "\n".join(said)
