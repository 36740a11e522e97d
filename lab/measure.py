"""Judge the exports of a run of the tiny model on captions that alignment never saw.

    python -m lab.measure out/run --images 8      # a run of train_inpo.py with --export-every

Writes measured.json into the run's folder. An export that was judged before is not judged again.
Each is compared with the model that training started from:

    preference      the toy's hidden preference, a number for each image; exact (toy.py); --task
                    red: that of its judge
    faithfulness    1 where colour and shape are those of the caption, else 0; exact
    grain           mean absolute Laplacian of the pixels (0 to 1): fine texture that a judge may
                    take for quality, be it sharp edges or static
    drift           mean squared difference of predicted noise, on held-out drawings, all timesteps
"""

import argparse
import json
from pathlib import Path

from system.files import UserError, is_number, read_json, write
from system.program import Parser, reported
from toy import TASKS

STEPS, GUIDANCE = 15, 2.0  # of sampling
KEYS = "preference", "faithfulness", "grain"  # a number for each image
DRAWINGS = 72  # that drift is measured on


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.measure", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="of a run; without exports the embedded model is judged")
    add("--images", type=int, default=8, metavar="N", help="per prompt")
    add("--fold", type=int, default=0, help="which quarter of the captions is held out, 0 to 3")
    add("--task", choices=TASKS, default=TASKS[0], help="whose judge gives the preference")
    add("--exports", type=int, nargs="+", metavar="STEP", help="steps to judge (default: all)")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error("--images must be at least 1.")
    if args.fold not in range(4):
        parser.error("--fold must lie between 0 and 3.")
    return args


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import numpy as np
import torch
from PIL import Image

import model
import toy
from invert import add_noise, randn_like
from system import hub
from system.lock import alone
from weights import loading


def held_out(
    pipeline, count: int, fold: int = 0
) -> tuple[torch.Tensor, dict, torch.Tensor, torch.Tensor]:
    """(xt, cond, t, abar) of held-out drawings with forward noise, the same in every process.

    t is evenly spaced over 0..999, in random order. xt: (B, C, h, w), t: (B,), abar: (T,);
    B = count."""
    captions = (toy.prompts("heldout", fold) * count)[:count]
    rng, noise = np.random.default_rng(7), torch.Generator().manual_seed(7)
    pixels = np.stack([np.asarray(toy.draw(caption, rng)) for caption in captions])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    seeds = [torch.Generator().manual_seed(k) for k in range(count)]
    x0 = model.encode_images(pipeline, pixels, seeds)
    t = (torch.arange(count) * 1000 // count)[torch.randperm(count, generator=noise)]
    abar = model.alphas_cumprod(pipeline)
    xt = add_noise(x0, randn_like(x0, noise), abar[t])
    return xt, model.encode_prompts(pipeline, captions, toy.SIZE), t, abar


def grain(image: Image.Image) -> float:
    """Mean absolute Laplacian, from the four neighbours, of the pixels in 0..1."""
    p = np.asarray(image.convert("RGB"), np.float64) / 255
    around = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:]
    return float(np.abs(around - 4 * p[1:-1, 1:-1]).mean())


@torch.no_grad()
def judge(pipeline, unet, images: int, folder: Path, fold: int = 0, task: str = TASKS[0]) -> dict:
    """Scores of a UNet that is put into the pipeline, and its drift from the pipeline's own UNet.

    Image k shows prompt k mod P, drawn from seed k. The first image of each prompt is kept."""
    prompts, start = toy.prompts("heldout", fold), pipeline.unet
    xt, cond, t, abar = held_out(pipeline, DRAWINGS, fold)
    both = [model.predict_noise(u, xt, t, cond, abar) for u in (start, unet)]
    pipeline.register_modules(unet=unet)
    texts = prompts * images
    drawn = model.sample(pipeline, texts, list(range(len(texts))), STEPS, GUIDANCE)
    pipeline.register_modules(unet=start)
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(len(prompts)):
        drawn[k].save(folder / f"{k:05d}.png")
    return {
        "preference": [round(toy.preference(image, task=task), 6) for image in drawn],
        "faithfulness": [toy.faithfulness(*pair) for pair in zip(drawn, texts, strict=True)],
        "grain": [round(grain(image), 6) for image in drawn],
        "drift": (both[1] - both[0]).square().mean().item(),
    }


def read(folder: Path, images: int) -> dict[str, dict]:
    """{step: scores} of folder/measured.json that are whole and of this many images per prompt."""
    try:
        there = read_json(folder / "measured.json")
    except UserError:  # absent or damaged: what is missing is judged again
        return {}
    count, steps = images * len(toy.prompts("heldout")), there.get("steps")
    if there.get("images") != images or not isinstance(steps, dict):
        return {}
    return {step: scores for step, scores in steps.items() if is_whole(scores, count)}


def is_whole(scores: dict, count: int) -> bool:
    """Whether this is what `judge` gives of that many images."""
    if not isinstance(scores, dict) or not is_number(scores.get("drift")):
        return False
    rows = [scores.get(key) for key in KEYS]
    rows = [row for row in rows if isinstance(row, list) and len(row) == count]
    return len(rows) == len(KEYS) and all(is_number(value) for row in rows for value in row)


def exports(folder: Path) -> dict[str, str]:
    """{step: path} of the models in unets/, without a *.new that a kill has left."""
    found = [path for path in sorted(folder.glob("unets/step_*")) if path.name[5:].isdigit()]
    return {str(int(path.name[5:])): str(path) for path in found}


def measure(
    folder: Path,
    images: int,
    steps: list[int] | None = None,
    fold: int = 0,
    task: str = TASKS[0],
):
    """Write folder/measured.json, {images, steps: {step: judge(...)}}, for the exports of these
    steps, or for all; [0] is the model that training started from. Raises UserError."""
    file, paths = folder / "measured.json", exports(folder)
    if steps == [0]:
        paths = {"0": hub.PRESETS["tiny"]}
    if file.is_dir():
        raise UserError(f"{file} is a folder; move it away.")
    if not paths:
        raise UserError(f"{folder} has no unets/step_*; train with --export-every.")
    measured = {"images": images, "steps": read(folder, images)}
    pipeline = loading.load_pipeline("tiny")
    for step, path in paths.items():
        if step not in measured["steps"] and (steps is None or int(step) in steps):
            kept = folder / "images" / f"step_{int(step):06d}"
            measured["steps"][step] = judge(
                pipeline, loading.load_unet(path), images, kept, fold, task
            )
            write(file, json.dumps(measured))


def main(argv: list[str] | None = None):
    args = parse(argv)
    with reported("lab.measure"), alone(args.folder):
        measure(args.folder, args.images, args.exports, args.fold, args.task)


if __name__ == "__main__":
    main()
