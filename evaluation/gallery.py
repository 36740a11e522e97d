"""The images of a model for a prompt set: a folder of PNGs and the manifest that describes them.

    manifest.json    {name, model, base, architecture, set, prompts (how many), steps, guidance,
                     batch, dtype, size (pixels), identity (of the weights), torch, diffusers,
                     images: [{file, prompt, seed, and category if there are any}]}
    00000.png ...    image k: prompt k mod P of P prompts, from seed first_seed + k

The manifest comes first. A folder is continued where it was interrupted, to the same bytes, and
refuses any other manifest. `generate` and `score` are called by all ranks, which share the work:
batch b is rank b mod world's, so that the files do not depend on how many ranks there are. Image
folders from elsewhere have no manifest; `read_pictures` makes one up from the order of the files.
"""

import errno
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import model
from evaluation import figures
from evaluation.prompts import PromptSet, is_text
from sources.pictures import PIXELS, decode, opened, what_is_broken
from system import hub, processes
from system.files import UserError, differences, is_number, read_json, replacing, write

# --------------------------------------------------------------------------------------------------
# The machine. A launcher starts one process per GPU; plain `python` is a group of one.


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= there:
        raise UserError(f"process {local} of a machine has no GPU; start {there} processes.")
    return torch.device("cuda", local)


# --------------------------------------------------------------------------------------------------
# What is to be drawn.


def spaced(n: int, count: int) -> list[int]:
    """`count` of the numbers 0..n-1, evenly spaced; all where there are no more."""
    return [round(k) for k in np.linspace(0, n - 1, min(n, count))]


def thin(images: list[dict], prompts: int, limit: int | None) -> list[dict]:
    """The images of `limit` evenly spaced prompts, where image k shows prompt k mod `prompts`."""
    kept = set(spaced(prompts, limit or prompts))
    return [entry for k, entry in enumerate(images) if k % prompts in kept]


def plan_images(
    prompts: PromptSet, seeds: int = 1, first_seed: int = 0, limit: int | None = None
) -> list[dict]:
    """[{file, prompt, seed, and category if there are any}]: `seeds` images of each prompt.

    With a limit these are some of the images that there would be without."""
    texts, kinds, P = prompts.prompts, prompts.categories, len(prompts.prompts)
    images = [
        {"file": f"{k:05d}.png", "prompt": texts[k % P], "seed": first_seed + k}
        | ({"category": kinds[k % P]} if kinds else {})
        for k in range(seeds * P)
    ]
    return thin(images, P, limit)


def describe(pipeline, images: list[dict], **asked) -> dict:
    """The manifest of images to be drawn by a pipeline.

    asked: name, model, base, architecture, set, prompts, steps, guidance, batch."""
    drawn_by = {
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "size": pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
        "identity": model.identity(pipeline),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    return asked | drawn_by | {"images": images}


# --------------------------------------------------------------------------------------------------
# What is there.


def pictures(folder: Path) -> list[str]:
    """The PNG and JPEG files of a folder in natural order, 2 before 10."""

    def key(name: str) -> list:
        return [(part.isdecimal() and int(part), part) for part in re.split(r"(\d+)", name)]

    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return sorted((n for n in names if re.search(r"(?i)^[^.].*\.(png|jpe?g)$", n)), key=key)


def is_gallery(path: str) -> bool:
    """Whether a path is a folder of images: with a manifest, or with pictures and neither a model
    nor a run."""
    folder = Path(path)
    if (folder / "manifest.json").is_file():
        return True
    if not pictures(folder) or (folder / "run.json").is_file():
        return False
    try:
        hub.kind(path)
    except UserError:
        return True
    return False


def read_manifest(folder: Path) -> dict | None:
    """manifest.json of a folder, None where there is none; UserError where it is damaged."""
    file, fix = folder / "manifest.json", "delete it where others wrote it, else delete that folder"
    if not file.exists():
        return None
    manifest = read_json(file, fix)
    if isinstance(images := manifest.get("images"), list):
        manifest = {"set": "images", "prompts": len(images)} | manifest
    if found := flaw(manifest):
        raise UserError(f"{file} is damaged, {found}; {fix}.")
    return manifest


TEXTS = ("name", "model", "base", "architecture", "dtype", "identity", "torch", "diffusers")
NUMBERS = ("steps", "guidance", "batch", "size")


def is_string(value) -> bool:
    return isinstance(value, str)


def flaw(manifest: dict) -> str | None:
    """The first value of a manifest that cannot be what the docstring above says."""
    images, P = manifest.get("images"), manifest.get("prompts")
    if not isinstance(images, list) or not images:
        return "images is no list with entries"
    if type(P) is not int or P < 1 or len(images) % P:
        return f"prompts is no number that divides its {len(images)} images"
    kinds = {"set": is_text} | dict.fromkeys(TEXTS, is_string) | dict.fromkeys(NUMBERS, is_number)
    for key, fits in kinds.items():
        if manifest.get(key) is not None and not fits(manifest[key]):
            return f"{key} has the wrong type"
    for k, entry in enumerate(images):
        if not isinstance(entry, dict):
            return f"image {k} is no object"
        file, prompt, seed = (entry.get(key) for key in ("file", "prompt", "seed"))
        if not is_string(file) or file in ("", "..") or Path(file).name != file or "\0" in file:
            return f"file of image {k} is not the name of a file in its folder"
        if not is_text(prompt) or not prompt.strip():
            return f"prompt of image {k} is no text"
        if seed is not None and type(seed) is not int:
            return f"seed of image {k} is no whole number"
        if entry.get("category") is not None and not is_text(entry["category"]):
            return f"category of image {k} is no text"
    return None


LARGEST = 8 * PIXELS  # bytes: 16 bits, four bands, not compressed


def readable(path: Path, read: Callable[[], Any]) -> Any:
    """read(), of a picture; a UserError where that fails, or the file cannot be a picture."""
    try:
        if not path.is_file():  # to open a pipe would wait for ever
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        return read()
    except Exception as error:  # PIL: OSError, SyntaxError, ValueError, struct.error, ...
        why = getattr(error, "strerror", None) or what_is_broken(error)
        raise UserError(f"'{path}' cannot be read as a picture ({why}); draw it again.") from error


def prompts_of(manifest: dict) -> PromptSet:
    """The prompt set that a manifest's images were drawn from."""
    images = manifest["images"][: manifest["prompts"]]
    categories = [entry.get("category") for entry in images]
    texts = [entry["prompt"] for entry in images]
    return PromptSet(manifest["set"], texts, categories if all(categories) else None)


def read_pictures(folder: Path, prompts: PromptSet, limit: int | None = None) -> dict:
    """The manifest of a folder of images, drawn here or elsewhere, as images of a prompt set.

    Without a manifest file k in natural order is prompt k mod P, and its seed and settings are not
    known. Raises UserError where images and prompts do not fit, or a file is not there."""
    manifest, one_each = read_manifest(folder), plan_images(prompts, limit=limit)
    if manifest is None:
        P, files = len(prompts.prompts), pictures(folder)
        if len(files) % P:
            raise UserError(
                f"'{folder}' holds {len(files)} pictures, no multiple of the {P} prompts of "
                f"{prompts.name}; name the prompts they show with --prompts."
            )
        plan = plan_images(prompts, len(files) // P)
        plan = [e | {"file": file, "seed": None} for e, file in zip(plan, files, strict=True)]
        manifest = {"model": str(folder), "prompts": P, "images": plan}
    P = manifest["prompts"]
    images = thin(manifest["images"], P, limit if limit and limit < P else None)
    for k, entry in enumerate(images):
        shown = one_each[k % len(one_each)]["prompt"]
        if entry["prompt"] != shown or len(images) % len(one_each):
            raise UserError(
                f"'{folder}' shows other prompts than {prompts.name}: image {k} of {len(images)} "
                f"is '{entry['prompt']}', not '{shown}' of {len(one_each)}; give its --prompts."
            )
        path = folder / entry["file"]
        readable(path, lambda path=path: opened(path).close())
    images = [one_each[k % len(one_each)] | entry for k, entry in enumerate(images)]
    return manifest | {"prompts": len(one_each), "images": images}


def traits(manifest: dict) -> dict:
    """What two models' images must agree in to be compared; None: not known. Size is the model's
    own, and a batch changes rounding alone."""
    known = {"number of images": len(manifest["images"])}
    known |= {key: manifest.get(key) for key in ("steps", "guidance", "dtype")}
    return known | {f"seed of image {k}": e.get("seed") for k, e in enumerate(manifest["images"])}


def shared(manifests: list[dict]) -> dict:
    """What the images of all models have in common; None where it is not known of all."""
    every = [traits(manifest) for manifest in manifests]
    common = {key: value for key, value in every[0].items() if all(value == t[key] for t in every)}
    about = {"prompts": manifests[0]["prompts"], "images": len(manifests[0]["images"])}
    about |= {key: common.get(key) for key in ("steps", "guidance", "dtype")}
    return about | {"first_seed": common.get("seed of image 0")}


def refuse_mixing(manifests: dict[str, dict]):
    """UserError where the images of models, {name: manifest}, were not drawn alike."""
    first = {}
    for name, manifest in manifests.items():
        for key, value in traits(manifest).items():
            other, known = (name, value) if value is None else first.setdefault(key, (name, value))
            if known != value:
                raise UserError(
                    f"'{other}' and '{name}' cannot be compared: {key} is {known} for {other} and "
                    f"{value} for {name}; draw them alike."
                )


def refuse_others(folder: Path, manifest: dict):
    """UserError where a folder holds images of other settings, weights, prompts or seeds."""
    if not pictures(folder):
        return
    there, fix = read_manifest(folder), "name another --out, or delete that folder."
    if there is None:
        raise UserError(f"'{folder}' holds pictures without a manifest; {fix}")
    common = min(len(there["images"]), len(manifest["images"]))
    if differ := differences(settings(there, common), settings(manifest, common), 5):
        raise UserError(f"'{folder}' holds other images ({differ}); {fix}")


def settings(manifest: dict, images: int) -> dict:
    """What decides a folder's images, the first `images` of them one by one. The model's weights
    count, by their identity, and not where they lie."""
    skipped = ("name", "model", "base", "images")
    found = {key: value for key, value in manifest.items() if key not in skipped}
    found["images"] = len(manifest["images"])
    for k, entry in enumerate(manifest["images"][:images]):
        found |= {f"{key} of image {k}": value for key, value in entry.items()}
    return found


def missing(folder: Path, manifest: dict) -> list[list[dict]]:
    """This rank's batches, every world-th, of which an image is not there.

    A batch always holds the same images and is drawn as a whole: rounding depends on its size."""
    images, batch = manifest["images"], manifest["batch"]
    batches = [images[start : start + batch] for start in range(0, len(images), batch)]
    mine = batches[processes.rank() :: processes.world()]
    return [some for some in mine if not all((folder / e["file"]).is_file() for e in some)]


# --------------------------------------------------------------------------------------------------
# Draw, and judge.


def to_json(content: dict) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def save_png(image: Image.Image, path: Path):
    """Write a picture, or leave what was there."""
    with replacing(path) as scratch:
        image.save(scratch, "PNG")


TOO_LARGE = (
    "the GPU's memory is too small; give a smaller --batch and, where pictures are there, another "
    "--out."
)


def generate(pipeline, folder: Path, manifest: dict, progress: str | None = None):
    """Draw what is missing of a manifest's images into its folder. All ranks call it, and share.

    Raises UserError where the folder holds images of another manifest. A rank that fails leaves
    a file `failed`, so that the others do not draw on for hours before they are told."""
    failed = folder / "failed"

    def start():
        refuse_others(folder, manifest)
        folder.mkdir(parents=True, exist_ok=True)
        for left in (failed, *folder.glob("*.new")):  # by a rank that failed or was killed
            left.unlink(missing_ok=True)
        write(folder / "manifest.json", to_json(manifest))

    def draw():
        how = [manifest[key] for key in ("steps", "guidance", "batch")]
        off = progress is None or not processes.is_main()
        for entries in tqdm(missing(folder, manifest), desc=progress, unit="batch", disable=off):
            if failed.exists():
                return
            texts, seeds = [e["prompt"] for e in entries], [e["seed"] for e in entries]
            try:
                drawn = model.sample(pipeline, texts, seeds, *how)
                for entry, image in zip(entries, drawn, strict=True):
                    save_png(image, folder / entry["file"])
            except BaseException as error:
                failed.touch()
                if isinstance(error, torch.OutOfMemoryError):
                    raise UserError(TOO_LARGE) from error
                raise

    processes.on_main(start)
    processes.together(draw)


def open_image(path: Path) -> Image.Image:
    """A picture as training would see it, see `decode`; UserError where it cannot be read."""
    return readable(path, lambda: decode(path.read_bytes()))


JUDGED = 16  # images at a time


def score(folder: Path, images: list[dict], judge, progress: str | None = None) -> list[float]:
    """A number per image, in their order. All ranks call it, share the work, and get all of it.

    images: {file, prompt} of each. judge(pictures, prompts) -> numbers, as of scorers.load. Raises
    UserError for a number that is not finite."""

    def judge_mine() -> dict[int, float]:
        found, off = {}, progress is None or not processes.is_main()
        starts = range(processes.rank() * JUDGED, len(images), processes.world() * JUDGED)
        for start in tqdm(starts, desc=progress, unit="batch", disable=off):
            entries = images[start : start + JUDGED]
            opened = [open_image(folder / entry["file"]) for entry in entries]
            values = judge(opened, [entry["prompt"] for entry in entries])
            for k, (entry, value) in enumerate(zip(entries, values, strict=True), start):
                if not math.isfinite(value):
                    file = folder / entry["file"]
                    raise UserError(f"the score of '{file}' is {value}, no finite number.")
                found[k] = float(value)
        return found

    every = {
        k: value
        for part in processes.gather(processes.together(judge_mine))
        for k, value in part.items()
    }
    return [every[k] for k in range(len(images))]


def overview(
    models: dict[str, tuple[Path, list[dict]]], prompts: int, rows: int = 8
) -> Image.Image:
    """Up to `rows` of the prompts, evenly spaced and not picked; columns are the models. Of up to
    three models two blocks stand side by side, each of half the rows.

    models: {name: (folder, images)}; the first `prompts` images show a prompt each."""

    def block(chosen: list[int]) -> Image.Image:
        places = [
            [folder / images[k]["file"] for folder, images in models.values()] for k in chosen
        ]
        cells = [[open_image(path) for path in row] for row in places]
        return figures.grid(cells, [first[k]["prompt"] for k in chosen], list(models))

    _, first = next(iter(models.values()))
    chosen = spaced(prompts, rows)
    half = len(chosen) if len(models) > 3 else -(-len(chosen) // 2)
    return figures.beside([block(part) for part in (chosen[:half], chosen[half:]) if part])
