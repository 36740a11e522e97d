"""README.md of an aligned model: how it was made, on what, and how training went."""

import argparse
import math
import shlex
import sys
from pathlib import Path

import deepspeed
import diffusers
import torch

from system import hub

METHODS = {
    "inpo": "DDIM-InPO (Lu et al., CVPR 2025, arXiv 2503.18454): the latents of winner and loser\n"
    "are found by DDIM inversion, and a pairwise preference loss is taken on those latents only",
    "dpo": "Diffusion-DPO (arXiv 2311.12908) on pairs of pictures",
    "kto": "Diffusion-KTO (arXiv 2404.04465) on liked and disliked pictures",
    "sft": "supervised fine-tuning on the preferred pictures",
}


def facts(args: argparse.Namespace, asked: dict, adapters: bool, pairs: int, world: int) -> dict:
    """What is to be said of a run, as JSON holds it. asked: its flags. pairs: of the data."""
    names = hub.PRESETS | {"tiny": "assets/tiny-sdxl"}
    recipe = {key: value for key, value in asked.items() if key != "ds_config"}
    argv = [word for word in sys.argv if not word.startswith("--local_rank")]
    return {
        "title": f"{Path(args.model).name}-{args.method}" + "-lora" * adapters,
        "method": args.method,
        "base_model": names.get(args.model, args.model),
        "unet": args.unet and names.get(args.unet, args.unet),
        "unet_subfolder": args.unet and hub.part_of(args.unet, "unet")[1],
        "adapters": adapters,
        "merged": args.lora if args.lora_start == "merge" else None,
        "data": args.data,
        "pairs": pairs,
        "command": f"deepspeed {shlex.join(argv)}",
        "recipe": {key.replace("_", "-"): value for key, value in recipe.items()},
        "versions": f"torch {torch.__version__}, deepspeed {deepspeed.__version__}, "
        f"diffusers {diffusers.__version__}, {world} rank(s)",
    }


def loading(card: dict, unet: str | None) -> str:
    """The Python that loads what adapters were trained on, and then them from FOLDER."""
    code, given = "", ""
    if unet:
        subfolder = f', subfolder="{folder}"' if (folder := card.get("unet_subfolder")) else ""
        code = f'unet = diffusers.UNet2DConditionModel.from_pretrained("{unet}"{subfolder})\n'
        given = ", unet=unet"
    base = f'"{card["base_model"]}"{given}'
    code += f"pipeline = diffusers.DiffusionPipeline.from_pretrained({base})\n"
    if card["merged"]:
        code += f'pipeline.load_lora_weights("{card["merged"]}")\n'
        code += "pipeline.fuse_lora()\npipeline.unload_lora_weights()\n"
    return f"{code}pipeline.load_lora_weights(FOLDER)"


def render(card: dict, lines: list[dict]) -> str:
    """The card, from `facts` and the lines of metrics.jsonl: means over the last tenth of steps."""
    last = lines[-max(1, len(lines) // 10) :]
    names = [name for name in last[-1] if name != "step"] if last else []
    means = {
        name: sum(line[name] for line in last) / len(last)
        for name in names
        if all(isinstance(line[name], float) and math.isfinite(line[name]) for line in last)
    }
    recipe = {key: value for key, value in card["recipe"].items() if value is not None}
    recipe = "\n".join(f"| {key} | {value} |" for key, value in recipe.items())
    metrics = "\n".join(f"| {key} | {value:.4g} |" for key, value in means.items())
    base, tags = f"`{card['base_model']}`", [card["method"], "preference-alignment"]
    if unet := card.get("unet", card["recipe"].get("unet")):  # older runs have it there alone
        base += f" with the UNet of `{unet}`"
    if card["merged"]:
        base += " and" * bool(unet) + f" with the LoRA `{card['merged']}` merged into it"
    what = f"{base}, fine-tuned by {METHODS[card['method']]}."
    if card["adapters"]:
        tags.append("lora")
        what = f"LoRA adapters for {'' if unet else 'the UNet of '}{what}"
        what += f"\n\n```python\nimport diffusers\n\n{loading(card, unet)}\n```"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
base_model: {card["base_model"]}
datasets: [{card["data"]}]
tags: [{", ".join(tags)}, text-to-image]
---

# {card["title"]}

{what}

```
{card["command"]}
```

## Recipe

| | |
|---|---|
{recipe}

Data: `{card["data"]}`, {card["pairs"]} pairs after ties were removed. {card["versions"]}.

## Training metrics

Means over the last {len(last)} of {len(lines)} steps, on the training pairs. They say nothing of
the pictures; `evaluate.py` does.

| | |
|---|---|
{metrics}
"""
