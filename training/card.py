"""The model card: README.md of an aligned model. How it was made, on what, how training went."""

import argparse
import math
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCardData

from system import hub
from system.files import UserError, read_json
from system.text import code, markdown, printable

METHODS = {
    "inpo": "DDIM-InPO (Lu et al., CVPR 2025, arXiv 2503.18454): the latents of winner and loser\n"
    "are found by DDIM inversion, and a pairwise preference loss is taken on those latents only",
    "dpo": "Diffusion-DPO (arXiv 2311.12908) on pairs of pictures",
    "kto": "Diffusion-KTO (arXiv 2404.04465) on liked and disliked pictures",
    "sft": "supervised fine-tuning on the preferred pictures",
}


def facts(args: argparse.Namespace, asked: dict, adapters: bool, pairs: int, world: int) -> dict:
    """What the card says of a run, as JSON holds it. asked: its settings. pairs: of the data."""
    names = hub.PRESETS | {"tiny": "assets/tiny-sdxl"}
    argv = [word for word in sys.argv if not word.startswith("--local_rank")]
    versions = [f"{name} {version(name)}" for name in ("torch", "deepspeed", "diffusers")]
    return {
        "title": f"{Path(args.model).name}-{args.method}" + ("-lora" if adapters else ""),
        "method": args.method,
        "base_model": names.get(args.model, args.model),
        "unet": args.unet and names.get(args.unet, args.unet),
        "unet_subfolder": args.unet and hub.part_of(args.unet, "unet")[1],
        "adapters": adapters,
        "merged": args.lora if args.lora_start == "merge" else None,
        "data": args.data,
        "pairs": pairs,
        "command": f"deepspeed {shlex.join(argv)}",
        "recipe": {k.replace("_", "-"): v for k, v in asked.items() if k != "ds_config"},
        "versions": f"{', '.join(versions)}, {world} rank(s)",
    }


def read(file: Path, fix: str) -> dict:
    """The facts that a run has left. Raises UserError where they are damaged."""
    record = read_json(file, fix)
    texts = ("title", "method", "base_model", "data", "command", "versions")
    whole = all(isinstance(record.get(key), str) for key in texts) and record["method"] in METHODS
    perhaps = [record.get(key) for key in ("unet", "unet_subfolder", "merged")]
    whole = whole and all(value is None or isinstance(value, str) for value in perhaps)
    if not whole or type(record.get("pairs")) is not int or type(record.get("recipe")) is not dict:
        raise UserError(f"{file} is damaged; {fix}.")
    return dict.fromkeys(("unet", "unet_subfolder", "merged")) | record


def loading(record: dict) -> str:
    """The Python that loads the model that adapters were trained on, then the adapters."""
    python, given = "import diffusers\n\n", ""
    if record["unet"]:
        subfolder = record["unet_subfolder"]
        place = quoted(record["unet"]) + (f", subfolder={quoted(subfolder)}" if subfolder else "")
        python += f"unet = diffusers.UNet2DConditionModel.from_pretrained({place})\n"
        given = ", unet=unet"
    base = f"{quoted(record['base_model'])}{given}"
    python += f"pipeline = diffusers.DiffusionPipeline.from_pretrained({base})\n"
    if record["merged"]:
        python += f"pipeline.load_lora_weights({quoted(record['merged'])})\n"
        python += "pipeline.fuse_lora()\npipeline.unload_lora_weights()\n"
    return f"{python}pipeline.load_lora_weights(FOLDER)"


def quoted(path: str) -> str:
    """As a string of Python, in double quotes where nothing has to be escaped."""
    return f'"{path}"' if f"'{path}'" == repr(path) and '"' not in path else repr(path)


def origin(record: dict) -> str:
    """One sentence on what was trained from what; for adapters, with the code that loads them."""
    start = code(record["base_model"])
    if record["unet"]:
        start += f" with the UNet of {code(record['unet'])}"
    if record["merged"]:
        also = " and" if record["unet"] else ""
        start += f"{also} with the LoRA {code(record['merged'])} merged into it"
    sentence = f"{start}, fine-tuned by {METHODS[record['method']]}."
    if not record["adapters"]:
        return sentence
    whose = "" if record["unet"] else "the UNet of "
    return f"LoRA adapters for {whose}{sentence}\n\n{code(loading(record), 'python')}"


def rows(values: dict) -> str:
    return "\n".join(
        f"| {markdown(key)} | {markdown(str(value))} |" for key, value in values.items()
    )


def render(record: dict, lines: list[dict]) -> str:
    """The card. record: of `facts`. lines: of metrics.jsonl, averaged over the last tenth."""
    last = lines[-max(1, len(lines) // 10) :]
    names = [name for name in last[-1] if name != "step"] if last else []
    logged = {name: [line[name] for line in last if name in line] for name in names}
    means = {
        name: f"{sum(values) / len(values):.4g}"
        for name, values in logged.items()
        if all(isinstance(value, float) and math.isfinite(value) for value in values)
    }
    tags = [record["method"], "preference-alignment", "text-to-image"]
    front = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=printable(record["base_model"]),
        datasets=[printable(record["data"])],
        tags=[*tags, "lora"] if record["adapters"] else tags,
    )
    return f"""---
{front.to_yaml()}
---

# {markdown(record["title"])}

{origin(record)}

{code(record["command"], "")}

## Recipe

| | |
|---|---|
{rows({key: value for key, value in record["recipe"].items() if value is not None})}

Data: {code(record["data"])}, {record["pairs"]} pairs after ties were removed.
{markdown(record["versions"])}.

## Training metrics

These are means over the last {len(last)} of {len(lines)} steps, on the training pairs, or on those
that were held out. They say nothing about the pictures; `evaluate.py` does.

| | |
|---|---|
{rows(means)}
"""
