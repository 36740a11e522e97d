"""Models, prompts, scorers and pairs by name: a preset, a folder, a single file, or a repository of
the hub.

    find("sdxl", "pipeline", "model_index.json")   # the file's path here, downloaded if need be
    architecture("owner/name")                     # "sdxl" or "sd15", by model_index.json
    read_config("out/run", "unet")                 # config.json of a part

The hub is huggingface.co, or what HF_ENDPOINT names. Nothing here takes long to import.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from system import single
from system.files import ROOT, UserError, expanded, read_json

PRESETS = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "tiny": str(ROOT / "assets" / "tiny-sdxl"),
}
ARCHITECTURES = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"}
LORA = "pytorch_lora_weights.safetensors"
KOHYA_LORA = "comfyui_lora.safetensors"  # of a folder with both, diffusers takes LORA
FILES = "safetensors parquet jsonl json csv tsv tar".split()
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*" + "".join(rf"(?<!\.{suffix})" for suffix in FILES)
PICKAPIC, MIRROR = "yuvalkirstain/pickapic_v2", "liuhuohuo2/pick-a-pic-v2"
PAIRS = (
    "a .parquet, .csv, .tsv, .jsonl, .json or .tar file, a folder with them or with pictures, a "
    "folder saved by datasets, or a hub id"
)

# -------------------------------------------------------------------------------------------------
# The hub.

UNREACHABLE = "the hub cannot be reached; check the network"


def one_sentence(action: Callable[[], Any], sentence: str) -> Any:
    """action(); an error of a library becomes the UserError "sentence: reason"."""
    try:
        return action()
    except Exception as error:
        raise UserError(f"{sentence}: {reason(error)}.") from error


def reason(error: Exception) -> str:
    """The first line of what a library says, without the dot; what the hub says, in our words."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (LocalEntryNotFoundError, ConnectionError)):
            return UNREACHABLE
        if isinstance(cause, GatedRepoError):
            return "the hub asks for a login; accept its terms on its page, then `hf auth login`"
        if isinstance(cause, RepositoryNotFoundError):
            return "the hub has no such repository, or it is private"
        cause = cause.__cause__ or cause.__context__
    text = (str(error).strip() or type(error).__name__).replace(":\n\t", ": ")
    return text.splitlines()[0].rstrip(".")


@cache
def reachable(seconds: float = 5.0) -> bool:
    """Whether the hub answers at all. It is asked once a process: where it does not answer, every
    library is told to be offline, since each would ask again, for minutes."""
    answers = []

    def ask():
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=seconds))
        except Exception:  # of the HTTP library, or: HF_HUB_OFFLINE is set
            pass

    asking = Thread(target=ask, daemon=True)  # looking up the name has no timeout of its own
    asking.start()
    asking.join(seconds)
    if not answers:
        constants.HF_HUB_OFFLINE = True
    return bool(answers)


def download(
    repository: str,
    what: str,
    *files: str,
    repo_type: str = "model",
    instead: str = "name a local folder",
    here: str = "",
) -> tuple[Path, str]:
    """(path in the cache, name) of the first of `files` that a hub repository holds.

    what: the kind of thing that is looked for, in words. instead: the way out without the hub.
    Raises UserError. Where the hub cannot be reached, only what is in the cache is known."""
    failure = None
    for file in files:
        try:
            reachable()
            return Path(hf_hub_download(repository, file, repo_type=repo_type)), file
        except RemoteEntryNotFoundError:
            continue
        except Exception as error:
            failure = failure or error
    if failure is None:
        raise UserError(f"'{repository}' is not a {what}: it has no {' or '.join(files)}.")
    said = reason(failure)
    joint = ", or" if said == UNREACHABLE else ";"
    raise UserError(
        f"Cannot load the {what} '{repository}': {here}{said}{joint} {instead}."
    ) from failure


# -------------------------------------------------------------------------------------------------
# What the flags of a program say of a model, by its name: what a single file cannot say itself.

SAID: dict[str, dict[str, Any]] = {}  # {name: {"config", "prediction_type", "zero_snr"}}


def add_model_flags(add: Callable):
    """The flags of `say`. add: add_argument of a group."""
    # fmt: off
    add("--config", metavar="FOLDER|ID",
        help="of a single file: folder or hub id, in diffusers layout, with its configuration and "
             "tokenizers (if not given: those of sdxl or sd15)")
    add("--prediction-type", choices=("epsilon", "v_prediction"),
        help="what the UNet predicts, where its files do not say so")
    add("--zero-snr", action="store_true",
        help="the noise schedule ends on pure noise (zero terminal SNR), where the model's files "
             "do not say so")
    # fmt: on


def say(name: str, flags: argparse.Namespace):
    """From now on this process takes what these flags say of a model to be so. Raises UserError
    where --config has another architecture."""
    source = PRESETS.get(name, name)
    given = {key: getattr(flags, key, None) for key in ("config", "prediction_type", "zero_snr")}
    SAID[source] = {key: value for key, value in given.items() if value}
    if (config := given["config"]) and not single.is_single(source):
        raise UserError(f"--config {config}: {name} has its own; leave the flag out.")
    if config and architecture(config) != (kind := architecture(source)):
        raise UserError(f"--config {config}: is not of {kind}, as {name} is; name another.")


def say_of_files(names: Iterable[str], flags: argparse.Namespace):
    """`say` of the single files among several models; what such a file says of its schedule itself
    counts more. Raises UserError where a flag is given that no model has a use for."""
    files = [name for name in names if single.is_single(PRESETS.get(name, name))]
    silent = [name for name in files if not single.scheduler_of(name)]
    for flag, others in (("config", files), ("prediction_type", silent), ("zero_snr", silent)):
        if getattr(flags, flag) and not others:
            raise UserError(
                f"--{flag.replace('_', '-')}: no model here is a single file that needs it; leave "
                "the flag out."
            )
    for name in files:
        schedule = {} if name in silent else {"prediction_type": None, "zero_snr": False}
        say(name, argparse.Namespace(**vars(flags) | schedule))


def schedule_of(name: str) -> dict[str, Any]:
    """What a single file and `say` add to a model's scheduler_config.json."""
    source = PRESETS.get(name, name)
    found, said = single.scheduler_of(source) if single.is_single(source) else {}, SAID.get(source)
    if said and "prediction_type" in said:
        found |= {"prediction_type": said["prediction_type"]}
    return found | (single.ZERO_SNR if said and said.get("zero_snr") else {})


def layout_of(name: str) -> str:
    """The folder or hub id in diffusers layout that a model's configuration is read from: the model
    itself, or of a single file what --config names, else the first release of its architecture."""
    source = PRESETS.get(name, name)
    if not single.is_single(source):
        return source
    config = SAID.get(source, {}).get("config") or single.architecture_of(source)
    return PRESETS.get(config, config)


# -------------------------------------------------------------------------------------------------
# A folder, or the hub.


def find(name: str, what: str, *files: str) -> tuple[Path, str]:
    """(path here, name) of the first of `files` that a folder or hub repository holds.

    name: a preset, a folder, a single file, or a hub id. what: as of `download`. Raises
    UserError."""
    source = PRESETS.get(name, name)
    if (layout := layout_of(source)) != source:
        try:
            return find(layout, what, *files)
        except UserError as error:
            raise UserError(
                f"'{source}' is a single file; its configuration is read from '{layout}', or from "
                f"what --config names. {error}"
            ) from error
    path, exists = Path(source), os.path.exists(source)  # pathlib: OSError for names too long
    if exists and path.is_dir():
        for file in files:
            if (path / file).is_file():
                return path / file, file
        export = f"`python -m training.export {source}` writes a model from"
        if (path / "run.json").is_file():
            raise UserError(f"'{source}' is a run without a {what} yet; {export} its checkpoint.")
        if (path / "checkpoint.json").is_file():
            raise UserError(f"'{source}' is a checkpoint of a run, not a {what}; {export} it.")
        raise UserError(f"'{source}' is not a {what}: it has no {' or '.join(files)}.")
    if not exists and re.fullmatch(HUB_ID, source):
        return download(source, what, *files, here="there is no folder of that name here, and ")
    bare = " that has no UNet in the original layout" * source.endswith(".safetensors")
    found = f"it is {file_kind(path)}{bare}" if exists else "there is no folder of that name here"
    raise UserError(
        f"Unknown {what} '{name}': {found}; name a folder in diffusers layout, a single "
        f".safetensors file, a hub id like owner/name, or one of {', '.join(PRESETS)}."
    )


def check_local(name: str):
    """UserError for a model that is neither here nor can be on the hub, which is not asked."""
    source = PRESETS.get(name, name)
    if not os.path.exists(source) and not re.fullmatch(HUB_ID, source):
        find(name, "model")  # raises


def short_name(name: str) -> str:
    """The last part of a model's name, without the suffix of a single file."""
    return Path(name).name.removesuffix(".safetensors")


def file_kind(path: Path) -> str:
    return f"a {path.suffix} file" if path.suffix else "a file without a suffix"


def lora_file(path: str) -> str:
    """A LoRA's file: itself, or the one in a folder or hub repository. Raises UserError."""
    return path if path.endswith(".safetensors") else str(find(path, "LoRA", LORA)[0])


def repository(text: str) -> str:
    """argparse's type of OWNER/NAME."""
    try:
        validate_repo_id(text)
        owner, name = text.split("/")
    except ValueError as error:  # also the library's own
        raise argparse.ArgumentTypeError(
            f"'{text}' is no repository of the hub; name one as OWNER/NAME, each of letters, "
            "digits, _ . and -, with neither - nor . at an end, nor -- or .. inside"
        ) from error
    return text


def check_pairs(source: str):
    """UserError for pairs that are neither here ("toy" always is) nor in the cache of datasets, if
    the hub lacks them or cannot be asked. Takes at most five seconds."""
    if source == "toy" or os.path.exists(expanded(source)):
        return
    here = "there is no file or folder of that name here"
    if not re.fullmatch(HUB_ID, source):
        raise UserError(f"Cannot read the pairs '{source}': {here}; give {PAIRS}.")
    kept = os.environ.get("HF_DATASETS_CACHE", f"{constants.HF_HOME}/datasets")
    owner, name = source.split("/")
    name = name if name.islower() else "*"  # datasets writes MyPairs as my_pairs
    if any(expanded(kept).glob(f"{owner}___{name}/*/*/*")):
        return
    if source == PICKAPIC:  # yuvalkirstain/PickScore#36
        raise UserError(
            f"{source} was taken off the hub in 2025, and {kept} holds no copy: give --data, a "
            f"folder with its parquet files or a copy on the hub such as {MIRROR}."
        )
    if not reachable():
        raise UserError(f"Cannot read the pairs '{source}': {here}, and {UNREACHABLE}.")


# -------------------------------------------------------------------------------------------------
# Models.


def kind(path: str) -> str:
    """What NAME=PATH may point at: "pipeline", "unet" (alone, at the root or in unet/), "lora".

    A .safetensors file is a pipeline if it has a UNet in the original layout, else a LoRA; of a
    folder or hub id the first file that it holds decides."""
    if path.endswith(".safetensors") and os.path.isfile(path):
        return "pipeline" if single.is_single(path) else "lora"
    files = ("model_index.json", "unet/config.json", "config.json", LORA)
    found = find(path, "pipeline, UNet or LoRA", *files)[1]
    return {"model_index.json": "pipeline", LORA: "lora"}.get(found, "unet")


def architecture(name: str) -> str:
    """The kind, "sdxl" or "sd15", by model_index.json, or a single file's own tensors. Raises
    UserError for any other pipeline."""
    path = PRESETS.get(name, name)
    if single.is_single(path):
        return single.architecture_of(path)
    index = _read(find(name, "diffusers pipeline", "model_index.json")[0])
    cls = str(index.get("_class_name", "pipeline without a class"))  # a list names code of its own
    if cls not in ARCHITECTURES:
        raise UserError(f"'{path}' is a {cls}; {' and '.join(ARCHITECTURES)} can be trained here.")
    return ARCHITECTURES[cls]


def part_of(name: str, part: str) -> tuple[str, str | None]:
    """(folder or hub id, subfolder) of a part, "unet" or "vae": in a pipeline, or by itself."""
    files = f"{part}/config.json", "config.json"
    file = find(name, f"{part} checkpoint or pipeline", *files)[1]
    return layout_of(name), part if "/" in file else None


def read_config(name: str, part: str) -> dict:
    """The configuration of a part: "unet", "vae" (in a pipeline or by itself), "text_encoder" or
    "scheduler"."""
    files = f"{part}/config.json", "config.json"
    if part == "scheduler":
        files = ("scheduler/scheduler_config.json",)
    return _read(find(name, f"{part} checkpoint or pipeline", *files)[0])


def _read(file: Path) -> dict:
    return read_json(file, "download it again")
