"""Models, prompts and scorers by name: a preset, a folder, or a repository of the Hugging Face hub.

    find("sdxl", "pipeline", "model_index.json")   # the file's path here, downloaded if need be
    architecture("owner/name")                     # "sdxl" or "sd15", by model_index.json
    read_config("out/run", "unet")                 # config.json of a part

Nothing here takes long to import.
"""

import json
import re
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from system.files import ROOT, UserError

PRESETS = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "tiny": str(ROOT / "assets" / "tiny-sdxl"),
}
ARCHITECTURES = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"}
LORA = "pytorch_lora_weights.safetensors"
HUB_ID = r"[\w-][\w.-]*/[\w.-]+(?<!\.safetensors)(?<!\.parquet)"
UNREACHABLE = "the hub cannot be reached; check the network, or name a local folder"


def one_sentence(action: Callable[[], Any], sentence: str) -> Any:
    """action(); an error of a library becomes the UserError "sentence: reason"."""
    try:
        return action()
    except Exception as error:
        raise UserError(f"{sentence}: {reason(error)}.") from error


def reason(error: Exception) -> str:
    """The first line of what a library says, without the dot; of an unreachable hub, our words."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError):
            return UNREACHABLE
        cause = cause.__cause__ or cause.__context__
    text = (str(error).strip() or type(error).__name__).replace(":\n\t", ": ")
    return text.splitlines()[0].rstrip(".")


@cache
def reachable(seconds: float = 5.0) -> bool:
    """Whether the hub, or the proxy in front of it, answers; huggingface_hub itself would ask again
    for minutes. Asked once a process."""
    if constants.HF_HUB_OFFLINE:
        return False
    url = urlsplit(constants.ENDPOINT)
    url = urlsplit(getproxies().get(url.scheme, constants.ENDPOINT))
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname, port), seconds).close()
    except OSError:
        return False
    return True


def find(name: str, what: str, *files: str, repo_type: str = "model") -> tuple[Path, str]:
    """(path here, name) of the first of `files` that a folder or hub repository holds; from the hub
    it is downloaded into the cache.

    name: a preset, a folder, or a hub id. what: the kind of thing that is looked for, in words.
    Raises UserError. Without a network only what is in the cache is known."""
    source = PRESETS.get(name, name)
    if Path(source).is_dir():
        for file in files:
            if (Path(source) / file).is_file():
                return Path(source) / file, file
        raise UserError(f"'{source}' is not a {what}: it has no {' or '.join(files)}.")
    if Path(source).exists() or not re.fullmatch(HUB_ID, source):
        raise UserError(
            f"Unknown {what} '{name}': there is no folder of that name here; name a folder in "
            f"diffusers layout, a hub id like owner/name, or one of {', '.join(PRESETS)}."
        )
    failure = None
    for file in files:
        try:
            offline = not reachable()
            found = hf_hub_download(source, file, repo_type=repo_type, local_files_only=offline)
            return Path(found), file
        except RemoteEntryNotFoundError:
            continue
        except Exception as error:
            failure = failure or error
    if failure is None:
        raise UserError(f"'{source}' is not a {what}: it has no {' or '.join(files)}.")
    here = "there is no folder of that name here, and "
    raise UserError(f"Cannot load the {what} '{source}': {here}{reason(failure)}.") from failure


def kind(path: str) -> str:
    """What NAME=PATH may point at: "pipeline", "unet" (alone, at the root or in unet/), "lora".

    A .safetensors file is a LoRA; of a folder or hub id the first file that it holds decides."""
    if path.endswith(".safetensors") and Path(path).is_file():
        return "lora"
    files = ("model_index.json", "unet/config.json", "config.json", LORA)
    found = find(path, "pipeline, UNet or LoRA", *files)[1]
    return {"model_index.json": "pipeline", LORA: "lora"}.get(found, "unet")


def architecture(name: str) -> str:
    """The kind, "sdxl" or "sd15", by model_index.json. Raises UserError for any other pipeline."""
    path = PRESETS.get(name, name)
    index = _read(find(name, "diffusers pipeline", "model_index.json")[0])
    cls = str(index.get("_class_name", "pipeline without a class"))  # a list names code of its own
    if cls not in ARCHITECTURES:
        raise UserError(f"'{path}' is a {cls}; {' and '.join(ARCHITECTURES)} can be trained here.")
    return ARCHITECTURES[cls]


def part_of(name: str, part: str) -> tuple[str, str | None]:
    """(folder or hub id, subfolder) of a part, "unet" or "vae": in a pipeline, or by itself."""
    files = f"{part}/config.json", "config.json"
    file = find(name, f"{part} checkpoint or pipeline", *files)[1]
    return PRESETS.get(name, name), part if "/" in file else None


def read_config(name: str, part: str) -> dict:
    """The configuration of a part: "unet", "vae" (in a pipeline or by itself), "text_encoder" or
    "scheduler"."""
    files = f"{part}/config.json", "config.json"
    if part == "scheduler":
        files = ("scheduler/scheduler_config.json",)
    return _read(find(name, f"{part} checkpoint or pipeline", *files)[0])


def _read(file: Path) -> dict:
    return one_sentence(lambda: json.loads(file.read_text("utf-8")), f"'{file}' is no JSON")
