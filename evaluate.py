"""Judge models side by side: images -> scores -> win rates -> table and picture.

    python evaluate.py --models base=assets/tiny-sdxl aligned=out/demo/aligned \\
                       --prompts toy --seeds 16 --out out/demo

The first model is the baseline. Every model draws the same prompts from the same initial noise, so
images pair up, and a win rate is the share of pairs that a model wins. Under --out it writes

    images/NAME/00000.png ...    image k: prompt k mod P of P prompts, from seed first_seed + k
    images/NAME/manifest.json    prompt and seed of each image, the model and the settings
    scores.json                  every score of every image
    results.json, table.md       win rates, ties, means and medians, 95 % intervals
    before_after.png             rows: prompts, evenly spaced over the set; columns: models

Only models share a seed. Were it shared by prompts too, so would be their noise, and the intervals,
which take prompts for independent, would be too narrow.
"""

import argparse
import json
import math
import re
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import figures
import model
import toy
from run import HelpFormatter

# --------------------------------------------------------------------------------------------------
# Scorers: a number for an image and its prompt, higher is better.

SCORERS = {"preference": toy.preference, "faithfulness": toy.faithfulness}
PERCENT = {"faithfulness"}  # 0 or 1 per image: reported as a mean in percent, not as a win rate

# --------------------------------------------------------------------------------------------------
# Statistics. Prompts are the independent unit: all images of a prompt stay together.


def interval(values, prompts: list[str], share: bool = False, resamples: int = 10_000):
    """95 % interval (low, high) of the mean of values, by bootstrap over prompts.

    values: (n,) numbers; prompts: (n,), the prompt of each. A resample draws as many prompts as
    there are, with replacement, and averages all their values; low and high are percentiles. Plain
    percentiles are too narrow for few prompts, so with G prompts the 2.5 % are replaced by
    Phi(-t sqrt(G / (G - 1))), t the 97.5 % point of Student's t with G - 1 degrees of freedom
    (the expanded percentile interval of Hesterberg, arXiv 1411.5279): 1.5 % at G = 18.

    share: values are 0 or 1. Where prompts do not differ (a single one, or all with the same mean,
    such as a rate of 0 or 1) resampling says nothing: a share then gets the Wilson interval with
    n = G, anything else (None, None). The seed is fixed: equal values give an equal interval."""
    _, group = np.unique(np.asarray(prompts), return_inverse=True)
    count = np.bincount(group)
    total = np.bincount(group, weights=np.asarray(values, dtype=float))
    G, z = len(count), NormalDist().inv_cdf(0.975)
    if np.ptp(total / count) < 1e-12:
        if not share:
            return None, None
        p = float(total.sum() / count.sum())
        center, spread = p + z**2 / (2 * G), z * math.sqrt(p * (1 - p) / G + z**2 / (4 * G**2))
        low, high = (center - spread) / (1 + z**2 / G), (center + spread) / (1 + z**2 / G)
        return max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding must not exclude p
    rng, means = np.random.default_rng(0), []
    for block in np.array_split(np.arange(resamples), math.ceil(resamples * G / 4e6)):  # memory
        drawn = rng.integers(G, size=(len(block), G))
        means.append(total[drawn].sum(1) / count[drawn].sum(1))
    nu = G - 1  # t from z by its expansion in 1 / nu
    t = z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
    tail = NormalDist().cdf(-t * math.sqrt(G / nu))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def win_rate(a, b, prompts: list[str], resamples: int = 10_000) -> dict[str, float]:
    """{wins, losses, ties, n, rate, low, high} of a over b; rate = share of pairs where a > b.

    a, b: (n,) scores, pair by pair; prompts: (n,). Ties count for neither, so that
    rate(a, b) + rate(b, a) + ties / n = 1, and a model against itself has rate 0. low, high: 95 %
    interval of the rate by bootstrap over prompts, all pairs of a prompt together; where every
    prompt has the same rate, such as 0 or 1, or is the only one, Wilson's with n = the number of
    prompts (see `interval`). Raises ValueError for a score that is not finite."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if not np.isfinite([a, b]).all():
        raise ValueError("a score is not a finite number, so its pair has no winner.")
    wins, losses = int((a > b).sum()), int((a < b).sum())
    low, high = interval(a > b, prompts, True, resamples)
    counts = {"wins": wins, "losses": losses, "ties": len(a) - wins - losses, "n": len(a)}
    return counts | {"rate": wins / len(a), "low": low, "high": high}


def average(values, prompts: list[str], share: bool = False) -> dict[str, float]:
    """{mean, median, low, high} of values (n,), with the interval of the mean; see `interval`."""
    low, high = interval(values, prompts, share)
    return {"mean": np.mean(values), "median": np.median(values), "low": low, "high": high}


# --------------------------------------------------------------------------------------------------
# Images, then scores. Scoring reads the folder alone.


def generate(name: str, path: str, images: list[dict], args: argparse.Namespace, folder: Path):
    """Draw images, {file, prompt, seed} each, into folder; the manifest comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipeline = model.load_pipeline(path, dtype=dtype).to(device)
    with tqdm(total=len(images), desc=f"images of {name}", unit="image") as bar:
        for start in range(0, len(images), args.batch):  # written as they come, never all in memory
            chunk = images[start : start + args.batch]
            texts, seeds = [entry["prompt"] for entry in chunk], [entry["seed"] for entry in chunk]
            drawn = model.sample(pipeline, texts, seeds, args.steps, args.guidance, args.batch)
            for entry, image in zip(chunk, drawn, strict=True):
                image.save(folder / entry["file"])
            bar.update(len(chunk))
    settings = {"steps": args.steps, "guidance": args.guidance, "dtype": str(dtype)[6:]}
    write(folder / "manifest.json", {"name": name, "model": path, **settings, "images": images})


def score(folder: Path, scorers: list[str]) -> dict[str, list[float]]:
    """{scorer: one number per image} of a folder, in the order of its manifest."""
    scores = {scorer: [] for scorer in scorers}
    for entry in json.loads((folder / "manifest.json").read_text("utf-8"))["images"]:
        with Image.open(folder / entry["file"]) as image:
            for scorer in scores:
                scores[scorer].append(float(SCORERS[scorer](image, entry["prompt"])))
    return scores


def summarize(scores: dict[str, dict[str, list[float]]], prompts: list[str]) -> dict:
    """Averages of each model, and comparisons with the first; scores[model][scorer], prompts: (n,).

    Also the mean change of each score against the first model, pair by pair."""
    baseline, *others = scores
    results = {"baseline": baseline, "n": len(prompts), "prompts": len(set(prompts))}
    results |= {"models": {}, "win_rates": {}, "changes": {}}
    for name, row in scores.items():
        results["models"][name] = {s: average(row[s], prompts, s in PERCENT) for s in row}
    for name in others:
        a, b = ({s: np.array(row) for s, row in scores[x].items()} for x in (name, baseline))
        rated = [s for s in a if s not in PERCENT]
        results["win_rates"][name] = {s: win_rate(a[s], b[s], prompts) for s in rated}
        results["changes"][name] = {s: average(a[s] - b[s], prompts) for s in a}
    return results


def table(results: dict) -> str:
    """The results as Markdown: a row per model, the baseline first; intervals in brackets."""

    def cell(stats: dict | None, key: str, form: str, unit: float = 100) -> str:
        if stats is None:  # the baseline is not compared with itself
            return ""
        low, high = stats["low"], stats["high"]
        brackets = "" if low is None else f" [{unit * low:{form}}, {unit * high:{form}}]"
        return f"{unit * stats[key]:{form}}{brackets}"

    baseline, models = results["baseline"], results["models"]
    head, rows = ["model"], {name: [name] for name in models}
    for s in models[baseline]:
        wins = [f"{s}: wins over {baseline}, %", "ties, %", "mean", "median"]
        head += [f"{s}, %", "change, points"] if s in PERCENT else wins
        for name, row in rows.items():
            stats, change = models[name][s], results["changes"].get(name, {}).get(s)
            rate = results["win_rates"].get(name, {}).get(s)
            if s in PERCENT:
                row += [cell(stats, "mean", ".1f"), cell(change, "mean", "+.1f")]
            else:
                ties = f"{100 * rate['ties'] / rate['n']:.1f}" if rate else ""
                row += [cell(rate, "rate", ".1f"), ties, cell(stats, "mean", ".3f", 1)]
                row += [f"{stats['median']:.3f}"]
    note = f"{results['n']} images per model, {results['prompts']} prompts, the same seeds for all "
    lines = [head, ["---"] * len(head), *rows.values()]
    lines = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([note + "models; in brackets 95 % intervals, over prompts.", "", *lines, ""])


def picture(folders: dict[str, Path], images: list[dict], path: Path, rows: int = 8):
    """Up to `rows` of the images, evenly spaced and not picked; columns are the models."""
    chosen = [images[round(k)] for k in np.linspace(0, len(images) - 1, min(len(images), rows))]
    pixels = [[Image.open(folder / e["file"]) for folder in folders.values()] for e in chosen]
    figures.grid(pixels, [entry["prompt"] for entry in chosen], list(folders)).save(path)


def write(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


# --------------------------------------------------------------------------------------------------
# The command line. What a user can get wrong is checked before a model is loaded.


def name_and_path(text: str) -> tuple[str, str]:
    """("base", "out/run") of "base=out/run"; a bare path is named by its last part."""
    name, path = text.split("=", 1) if "=" in text else (Path(text).name, text)
    if not path or not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"'{text}' is not NAME=PATH with a NAME of letters, digits, _ . + and -.")
    return name, path


def default_guidance(path: str) -> float:
    """The papers' 7.5 for SD1.5 and 5 for SDXL; 2 for a tiny SDXL, latents up to 32 px."""
    if model.architecture(path) == "sd15":
        return 7.5
    return 2.0 if model.read_config(path, "unet")["sample_size"] <= 32 else 5.0


def read_prompts(source: str) -> list[str]:
    """The held-out toy captions, or the lines of a text file that are not blank."""
    if source == "toy":
        return toy.prompts("heldout")
    try:
        lines = Path(source).read_text("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"--prompts '{source}' is neither toy nor a readable text file."
        ) from error
    if not any(line.strip() for line in lines):
        raise ValueError(f"--prompts '{source}' holds no prompt.")
    return [line.strip() for line in lines if line.strip()]


def check(args: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """({name: path}, prompts), and args.guidance filled in; ValueError, one sentence, if wrong."""
    for option, least in (("seeds", 1), ("first_seed", 0), ("steps", 1), ("batch", 1)):
        if getattr(args, option) < least:
            raise ValueError(f"--{option.replace('_', '-')} must be at least {least}.")
    if args.guidance is not None and not 1 <= args.guidance < math.inf:
        raise ValueError("--guidance must be a number from 1, which means none.")
    if len(args.models) < 2:
        raise ValueError("--models needs at least two models, the baseline first.")
    models = {}
    for name, path in map(name_and_path, args.models):
        if name.casefold() in map(str.casefold, models):  # folders of some systems ignore case
            raise ValueError(f"two models are named '{name}'; tell them apart with NAME=PATH.")
        models[name] = path
    if unknown := set(args.scorers) - set(SCORERS):
        raise ValueError(f"unknown scorer '{min(unknown)}'; there are {', '.join(SCORERS)}.")
    if any(path.exists() and not path.is_dir() for path in (args.out, *args.out.parents)):
        raise ValueError(f"--out '{args.out}' is a file, or lies in one, and must be a folder.")
    prompts = read_prompts(args.prompts)
    for prompt in prompts:
        try:
            toy.parse_caption(prompt)
        except ValueError as error:
            known = "preference and faithfulness judge captions like those of --prompts toy"
            raise ValueError(f"there is no scorer for '{prompt}' yet; {known}.") from error
    guidance = {name: default_guidance(path) for name, path in models.items()}
    if args.guidance is None and len(set(guidance.values())) > 1:
        usual = ", ".join(f"{name} {value:g}" for name, value in guidance.items())
        raise ValueError(f"the models differ in their usual guidance ({usual}); give --guidance.")
    args.guidance = args.guidance or next(iter(guidance.values()))
    return models, prompts


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        "evaluate.py", description=__doc__, formatter_class=HelpFormatter
    )
    group = parser.add_argument_group("what is judged").add_argument
    models_help = (
        "two or more, the baseline first: folders of pipelines, hub ids, or tiny, sdxl, sd15"
    )
    group("--models", nargs="+", required=True, metavar="NAME=PATH", help=models_help)
    prompts_help = "toy (captions that alignment never sees), or a text file, one prompt a line"
    group("--prompts", default="toy", help=prompts_help)
    scorers_help = "preference gives a win rate, faithfulness a mean in percent"
    group("--scorers", nargs="+", default=list(SCORERS), metavar="SCORER", help=scorers_help)
    group = parser.add_argument_group("how images are drawn").add_argument
    group("--seeds", type=int, default=1, help="images per prompt and model")
    group(
        "--first-seed", type=int, default=0, help="seed of the first image; the next ones count up"
    )
    group("--steps", type=int, default=25, help="sampling steps per image")
    guidance_help = "classifier-free guidance scale, 1 = none (default: tiny 2, SDXL 5, SD1.5 7.5)"
    group("--guidance", type=float, help=guidance_help)
    group("--batch", type=int, default=16, help="images per call of the model")
    group = parser.add_argument_group("what is written").add_argument
    group("--out", type=Path, default="out/eval", help="folder for images, scores, table, picture")
    args = parser.parse_args(argv)
    try:
        models, prompts = check(args)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")

    model.quiet()
    images = [
        {"file": f"{k:05d}.png", "prompt": prompts[k % len(prompts)], "seed": args.first_seed + k}
        for k in range(args.seeds * len(prompts))
    ]
    folders = {name: args.out / "images" / name for name in models}
    for name, path in models.items():
        generate(name, path, images, args, folders[name])
    scores = {name: score(folder, args.scorers) for name, folder in folders.items()}
    results = summarize(scores, [entry["prompt"] for entry in images])
    text = table(results)
    write(args.out / "scores.json", {"images": images, "scores": scores})
    write(args.out / "results.json", results | {"settings": vars(args) | {"out": str(args.out)}})
    (args.out / "table.md").write_text(text, "utf-8")
    picture(folders, images[: len(prompts)], args.out / "before_after.png")
    print(text)
    return results


if __name__ == "__main__":
    main()
