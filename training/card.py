"""The model card: README.md of an aligned model. How it was made, on what, how training went.

Its YAML is what the hub takes: a start or data that are only on this machine are not named in it,
since there they would be broken links. `public` hides the folders of this machine in the rest."""

import argparse
import math
import os
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCardData

from system import hub
from system.files import ROOT, UserError, expanded, read_json
from system.text import code, markdown
from training.methods import describe
from training.recipes import crossed

METHODS = {
    "inpo": "DDIM-InPO (Lu et al., CVPR 2025, arXiv 2503.18454): the latents of winner and loser\n"
    "are found by DDIM inversion, and a pairwise preference loss is taken on those latents only",
    "dpo": "Diffusion-DPO (arXiv 2311.12908) on pairs of pictures",
    "kto": "Diffusion-KTO (arXiv 2404.04465) on liked and disliked pictures",
    "sft": "supervised fine-tuning on the preferred pictures",
    "smpo": "SmPO (arXiv 2506.02698): inversion, and a pairwise loss weighted by how sure a\n"
    "preference is",
    "dmpo": "DMPO (arXiv 2507.07510) on pairs of pictures",
    "mapo": "MaPO (arXiv 2406.06424) on pairs of pictures, without a reference",
    "dspo": "DSPO (Zhu et al., ICLR 2025) on pairs of pictures",
}
# Of those starts whose licence passes on to what is trained from them, as their cards name it.
LICENSES = {hub.PRESETS["sdxl"]: "openrail++", hub.PRESETS["sd15"]: "creativeml-openrail-m"}
STARTS = ("base_model", "unet", "merged")


def facts(args: argparse.Namespace, asked: dict, adapters: bool, pairs: int, world: int) -> dict:
    """What the card says of a run, as JSON holds it. asked: its settings. pairs: of the data."""
    names = hub.PRESETS | {"tiny": "assets/tiny-sdxl"}
    argv = [word for word in sys.argv if not word.startswith("--local_rank")]
    versions = [f"{name} {version(name)}" for name in ("torch", "deepspeed", "diffusers")]
    other = crossed(args)
    record = {
        "title": "-".join([hub.short_name(args.model), args.method, *other, *["lora"] * adapters]),
        "method": args.method,
        "objective": args.objective,
        "crossed": describe(args) if other else None,
        "base_model": names.get(args.model, args.model),
        "architecture": hub.architecture(args.model),
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
    named = [*argv, *asked.values(), *record.values()]
    texts = {value for value in named if isinstance(value, str) and "/" in value}
    return record | {"local": sorted(filter(is_here, texts))}


def is_here(text: str) -> bool:
    """Whether a file or folder of this machine has that name, here or beside train_inpo.py."""
    return any(map(os.path.exists, (expanded(text), os.path.join(ROOT, text))))


def is_local(text: str, record: dict) -> bool:
    """Whether that is a path of the machine that trained, or can be one."""
    if "/" not in text:
        return False
    return text in record["local"] or is_here(text) or not re.fullmatch(hub.HUB_ID, text)


def public(record: dict) -> dict:
    """The facts without folders of the machine that trained: of its paths the last part is left."""

    def hide(text: str) -> str:
        return f".../{Path(text).name}" if is_local(text, record) else text

    def hide_value(word: str) -> str:  # of a command line: FLAG, VALUE or FLAG=VALUE
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return flag + equals + hide(value)

    launcher, program, *words = shlex.split(record["command"]) + [""]
    command = [launcher, Path(program).name, *map(hide_value, filter(None, words))]
    told = {key: record[key] and hide(record[key]) for key in (*STARTS, "data")}
    told["recipe"] = {k: hide(v) if isinstance(v, str) else v for k, v in record["recipe"].items()}
    return record | told | {"command": shlex.join(command)}


def read(file: Path, fix: str) -> dict:
    """The facts that a run has left. Raises UserError where they are damaged."""
    record = read_json(file, fix)
    texts = ("title", "method", "base_model", "data", "command", "versions")
    whole = all(isinstance(record.get(key), str) for key in texts) and record["method"] in METHODS
    perhaps = [record.get(key) for key in ("unet", "unet_subfolder", "merged")]
    whole = whole and all(value is None or isinstance(value, str) for value in perhaps)
    if not whole or type(record.get("pairs")) is not int or type(record.get("recipe")) is not dict:
        raise UserError(f"{file} is damaged; {fix}.")
    return dict.fromkeys(("unet", "unet_subfolder", "merged")) | {"local": []} | record


def loading(record: dict) -> str:
    """The Python that loads the model that adapters were trained on, then the adapters."""
    python, given = "import diffusers\n\n", ""
    if record["unet"]:
        subfolder = record["unet_subfolder"]
        place = quoted(record["unet"]) + (f", subfolder={quoted(subfolder)}" if subfolder else "")
        python += f"unet = diffusers.UNet2DConditionModel.from_pretrained({place})\n"
        given = ", unet=unet"
    python += f"{loading_base(record, given)}\n"
    if record["merged"]:
        python += f"pipeline.load_lora_weights({quoted(record['merged'])})\n"
        python += "pipeline.fuse_lora()\npipeline.unload_lora_weights()\n"
    place = quoted(record["place"]) if "place" in record else "FOLDER"
    return f"{python}pipeline.load_lora_weights({place})"


def loading_all(record: dict, kind: str) -> str:
    """The Python that loads what is at record["place"]: a "pipeline", or a "unet" into its base."""
    python, place = "import diffusers\n\n", quoted(record["place"])
    if kind == "pipeline":
        return f"{python}pipeline = diffusers.DiffusionPipeline.from_pretrained({place})"
    python += f"unet = diffusers.UNet2DConditionModel.from_pretrained({place})\n"
    return python + loading_base(record, ", unet=unet")


def loading_base(record: dict, given: str) -> str:
    """The line that loads the model that training started from. given: further arguments."""
    base, load = record["base_model"], "DiffusionPipeline.from_pretrained"
    if base.endswith(".safetensors"):
        (cls,) = [c for c, kind in hub.ARCHITECTURES.items() if kind == record["architecture"]]
        load = f"{cls}.from_single_file"
    return f"pipeline = diffusers.{load}({quoted(base)}{given})"


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
    method = record.get("crossed") or METHODS[record["method"]]
    sentence = f"{start}, fine-tuned by {method}."
    if not record["adapters"]:
        return sentence
    whose = "" if record["unet"] else "the UNet of "
    return (
        f"LoRA adapters for {whose}{sentence}\n\n{code(loading(record), 'python')}\n\n"
        f"`{hub.KOHYA_LORA}` is the same LoRA for ComfyUI (`models/loras/`), Forge and A1111 "
        "(`models/Lora/`)."
    )


def rows(values: dict) -> str:
    return "\n".join(
        f"| {markdown(key)} | {markdown(str(value))} |" for key, value in values.items()
    )


def front_matter(record: dict, widget: list[dict]) -> str:
    """The YAML that the hub reads; widget: pictures with their prompts. It has no instance_prompt:
    preferences have no trigger word."""
    given = [record[key] for key in STARTS if record[key]]
    starts = [name for name in given if "/" in name and not is_local(name, record)]
    told: dict = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if starts:
        told["base_model"] = starts[0] if len(starts) == 1 else starts
        told["base_model_relation"] = "adapter" if record["adapters"] else "finetune"
    if len(given) == 1 and given[0] in LICENSES:
        told["license"] = LICENSES[given[0]]
    if "/" in record["data"] and not is_local(record["data"], record):
        told["datasets"] = [record["data"]]
    tags = [record["method"], "preference-alignment", "text-to-image"]
    tags += ["lora", "template:sd-lora"] if record["adapters"] else []
    widget = {"widget": widget} if widget else {}
    return ModelCardData(**told, tags=tags, **widget).to_yaml()


def render(record: dict, lines: list[dict], widget: list[dict] = (), shown: str = "") -> str:
    """The card. record: of `facts`. lines: of metrics.jsonl, averaged over the last tenth. widget:
    see `front_matter`. shown: Markdown that follows how to load the model."""
    last = lines[-max(1, len(lines) // 10) :]
    names = [name for name in last[-1] if name != "step"] if last else []
    logged = {name: [line[name] for line in last if name in line] for name in names}
    means = {
        name: f"{sum(values) / len(values):.4g}"
        for name, values in logged.items()
        if all(isinstance(value, float) and math.isfinite(value) for value in values)
    }
    shown = shown and f"{shown}\n\n"
    return f"""---
{front_matter(record, list(widget))}
---

# {markdown(record["title"])}

{origin(record)}

{shown}{code(record["command"], "")}

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
