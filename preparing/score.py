"""How clearly a judge prefers the winner of each pair, as a column `strength`.

F.parts/          the scores of both pictures of each pair, see parts.py, until F.parquet is
                  written
F.parquet         jpg_0, jpg_1, label_0, caption as they were, without ties and broken pairs;
                  strength: the judge's probability that the labelled winner is preferred, 0..1
                  (judges.py, or by --log-odds); below 0.5 judge and label disagree
F.broken.jsonl    pairs that are left out: {row (from 0, ties not counted), reason, and where
                  they are known file, file_row (from 0, ties counted)}"""

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

import data
from evaluation import gallery, own, scorers, winrate
from preparing import parts, table
from preparing.judges import check_probability, judged, probability
from sources.pictures import decode, what_is_broken
from sources.rows import PICTURES, Rows
from system import processes
from system.files import UserError, expanded, write
from system.lock import alone
from system.processes import print0

MORE = {"strength": pa.float64()}


def check(args: Namespace) -> dict:
    """What decides the file. Raises UserError. Parquet is copied into the Arrow cache."""
    table.check_out(args.out)
    source = expanded(args.source)
    if source.is_dir() and source.resolve() in args.out.resolve().parents:
        raise UserError(f"--out '{args.out}' would become one of the pairs of {source}; move it.")
    if args.log_odds is None:
        check_probability(args.judge)
    scorers.check(args.judge, [], args.scorer_folder)
    rows = open_pairs(args)
    about = {"command": "score", "judge": own.title(args.judge), "pairs": len(rows)}
    about |= {} if args.log_odds is None else {"log_odds": args.log_odds}
    return about | {"fingerprint": data.fingerprint(rows)} | own.digests([args.judge])


def open_pairs(args: Namespace) -> Rows:
    return data.read_pairs(args.source, args.split, columns=args.columns)


def run(args: Namespace):
    """All of it, on every rank that a launcher has started."""
    with processes.joined():
        if (place := processes.together(gallery.device)).type == "cuda":
            torch.cuda.set_device(place)
        about = processes.on_main(lambda: check(args))
        if processes.on_main(lambda: table.is_written(args.out, about)):
            print0(f"{args.out} is complete.")
            return
        rows = processes.together(lambda: open_pairs(args))
        folder = args.out.with_suffix(".parts")
        with alone(folder):
            score(args, rows, folder, about)
            print0(processes.on_main(lambda: finish(args, rows, folder, about)))


def score(args: Namespace, rows: Rows, folder: Path, about: dict):
    """Of each pair [score of picture 0, of picture 1], or what of it is broken, in parts."""
    judge = processes.together(
        lambda: scorers.load(args.judge, args.scorer_folder, gallery.device())
    )

    def work(numbers: range) -> list[list[float] | str]:
        found, at_once = {}, gallery.JUDGED // 2
        for start in range(0, len(numbers), at_once):
            whole = {}
            for row in numbers[start : start + at_once]:
                try:
                    whole[row] = read(rows[row])
                except Exception as error:  # as in data.Pairs: whatever cannot be read is left out
                    found[row] = what_is_broken(error)
            images = [image for pictures, _ in whole.values() for image in pictures]
            texts = [caption for _, caption in whole.values() for _ in PICTURES]
            names = [f"{name} of row {row} (from 0)" for row in whole for name in PICTURES]
            scores = judged(judge, images, texts, names)
            found |= {row: scores[2 * i : 2 * i + 2] for i, row in enumerate(whole)}
        return [found[row] for row in numbers]

    parts.work_in_parts(folder, about, len(rows), work, own.title(args.judge))


def read(pair: dict) -> tuple[list, str]:
    """(both pictures, caption). Raises whatever is wrong with them, as data.read_pair does."""
    images = []
    for name in PICTURES:
        try:
            images.append(decode(pair[name] or b""))
        except Exception as error:  # PIL: OSError, SyntaxError, ValueError, MemoryError, ...
            raise ValueError(f"{name}: {what_is_broken(error)}") from error
    data.check_pair(pair)
    return images, pair["caption"]


def strength(judge: str, scores: list[float], label: float, odds: float | None = None) -> float:
    """scores: of picture 0 and picture 1; label: 1 where picture 0 won; odds: as `probability`."""
    winner, loser = scores if label == 1 else reversed(scores)
    return probability(judge, winner - loser, odds)


def finish(args: Namespace, rows: Rows, folder: Path, about: dict) -> str:
    """Write the pairs; what is said of them. Rank 0."""
    found = parts.read_parts(folder, len(rows))
    broken = [row for row, scores in enumerate(found) if isinstance(scores, str)]
    if len(broken) == len(found):
        raise UserError(f"all {len(found):,} pairs of {args.source} are broken: {found[0]}.")
    strengths, captions = [], []

    def weighed() -> Iterator[dict]:
        for row, scores in enumerate(found):
            if isinstance(scores, str):
                continue
            pair = rows[row]
            strengths.append(strength(args.judge, scores, pair["label_0"], args.log_odds))
            captions.append(pair["caption"])
            yield pair | {"strength": strengths[-1]}

    if broken:
        write(listed(args.out), "".join(line(rows, row, found[row]) for row in broken))
    table.write_pairs(args.out, weighed(), MORE, about)
    shutil.rmtree(folder)
    agree = np.array(strengths) > 0.5
    low, high = winrate.interval(agree, captions, share=True)
    said = [f"{len(strengths):,} pairs in {args.out}"]
    if broken:
        said[0] += f"; {len(broken):,} broken ones are left out, see {listed(args.out)}"
    share = f"{agree.mean():.1%} [{low:.1%}, {high:.1%}]"
    said += [f"{own.title(args.judge)} agrees with {share} of the labels"]
    low, middle, high = np.quantile(strengths, [0.1, 0.5, 0.9])
    said += [f"strength: median {middle:.2f}; 80 % in {low:.2f} to {high:.2f}"]
    return "\n".join(said)


def listed(out: Path) -> Path:
    return out.with_suffix(".broken.jsonl")


def line(rows: Rows, row: int, reason: str) -> str:
    file, file_row = rows.origin(row)
    return json.dumps({"row": row, "file": file, "file_row": file_row, "reason": reason}) + "\n"
