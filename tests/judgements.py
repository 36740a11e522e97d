"""A small judgement whose prompts are hard to show and whose models are easy to find in a text."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

import evaluate
from evaluation import gallery, prompts

NASTY = [
    "</script><script>document.title = 'ran'</script>",
    '<img src=x onerror="document.title = 1"> "quoted" \'single\' &amp; & <!--',
    "a fox \U0001f98a, a family \U0001f468\u200d\U0001f469\u200d\U0001f467 and \u2028 a line",
    "\u202etfel ot thgir, %%DATA%% ${1 + 1} \\u003c `tick`",
    "\u65e5\u672c\u8a9e\u306e\u30d7\u30ed\u30f3\u30d7\u30c8",
    "a red square",
]
MODELS = {"zebra": 100, "walrus": 130, "lemur": 160}  # brightness, which `glow` scores
SCORER = """
import pathlib

def glow(images, prompts):
    with open(pathlib.Path(__file__).with_name("calls"), "a") as log:
        log.write("x" * len(images))
    return [float(image.convert("L").getpixel((0, 0))) for image in images]

def gloom(images, prompts):
    foxes = [500 * (" fox" in prompt) for prompt in prompts]
    return [fox - value for fox, value in zip(foxes, glow(images, prompts))]
"""


def draw(root: Path, seeds: int = 2, sides=(16, 16, 32), texts=NASTY):
    """Folders of pictures of the models with their manifests, prompts.tsv and mine.py."""
    rows = "".join(f"{('odd', 'even')[k % 2]}\t{text}\n" for k, text in enumerate(texts))
    (root / "prompts.tsv").write_text(f"Category\tPrompt\n{rows}", "utf-8")
    (root / "mine.py").write_text(SCORER)
    images = gallery.plan_images(prompts.read(str(root / "prompts.tsv")), seeds)
    for (name, level), side in zip(MODELS.items(), sides, strict=True):
        (root / name).mkdir()
        about = {"name": name, "model": f"runs/{name}", "set": "prompts", "prompts": len(texts)}
        about |= {"identity": f"{level:016x}", "steps": 2, "guidance": 1.0, "images": images}
        (root / name / "manifest.json").write_text(json.dumps(about))
        for entry in images:
            dice = np.random.default_rng([entry["seed"], level])
            pixels = np.full((side, side, 3), level + int(dice.integers(-60, 60)), np.uint8)
            Image.fromarray(pixels).save(root / name / entry["file"])


def judge(root: Path, *options, models=tuple(MODELS), scorers=("glow", "gloom")) -> dict:
    """results.json of the pictures in root, judged into root/out."""
    flags = ["--models", *(f"{name}={root / name}" for name in models)]
    flags += ["--prompts", str(root / "prompts.tsv"), "--out", str(root / "out"), "--scorers"]
    return evaluate.main([*flags, *(f"{root}/mine.py:{name}" for name in scorers), *options])
