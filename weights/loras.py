"""LoRA files: read in the keys of peft, diffusers and kohya, merged, written in kohya's.

    W + alpha/r up down      down: (r, in) or (r, in, h, w);  up: (out, r) or (out, r, 1, 1)

A layer of SDXL's UNet, as others name it:

    unet.down_blocks.1.attentions.0.proj_in.lora_A.weight          diffusers, peft; and lora_B
    unet.down_blocks.1.attentions.0.proj_in.lora.down.weight       diffusers of 2023; and lora.up
    lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight  and lora_up, alpha
    lora_unet_input_blocks_4_1_proj_in.lora_down.weight            and lora_up, alpha

kohya's sd-scripts write the last form for SDXL and the one above it for SD1.5, and so do we: A1111
(networks.py) takes SDXL's names as they are and converts those of SD1.5; ComfyUI and Forge (their
lora.py) know both. diffusers 0.42.1 has converters as well. The one that writes sets alpha = r; the
one that reads agrees with this one on what sd-scripts write (checked with both text encoders, alpha
and ranks that differ), drops most of a file for SD1.5 in original names, and only warns of tensors
that match nothing, of which a UserError names one here.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from system.files import UserError
from system.hub import lora_file, one_sentence
from weights.modules import modules_of
from weights.names import original_name

FACTOR = re.compile(r"(.+?)[._](?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)\.weight")
OTHER_KINDS = {  # marks in keys, of LyCORIS and peft
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lora_mid": "a LoCon in Tucker's form",
    "oft_": "an OFT",
}
TEXT = ("text_encoder", "lora_te")  # how keys of text encoders begin
OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}  # of 2023


@dataclass(frozen=True)
class Layer:
    """down: (r, in, ...); up: (out, r, ...); of W + alpha/r up down."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def update(self) -> Tensor:
        """alpha/r up down in fp32, (out, in, ...)."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.alpha / self.rank * product).reshape(-1, *self.down.shape[1:])


# -------------------------------------------------------------------------------------------------
# Read.


def read(path: str, parts: Mapping[str, torch.nn.Module], model: str) -> dict[str, dict]:
    """{part: {path of a layer in it: Layer}} of a LoRA file, folder or hub id.

    parts: "unet", "text_encoder", "text_encoder_2", perhaps on the meta device; without text
    encoders in it their tensors are passed over. Raises UserError for what is no LoRA, and for a
    tensor that fits nothing in `model`."""
    tensors, settings = _open(path)
    places = {name: place for place in _layers(parts) for name in _names(*place, parts)}
    found, keys = {}, {}
    misfit = f"The LoRA '{path}' does not fit '{model}'"
    for key, tensor in tensors.items():
        if key.startswith(TEXT) and not any(part.startswith("text") for part in parts):
            continue
        stem, kind = _split(key, misfit)
        place = places.get(stem.replace(".processor", "").replace(".", "_"))
        if place is None:
            raise UserError(f"{misfit}: {key} has no counterpart.")
        if kind in found.setdefault(place, {}):
            raise UserError(f"{misfit}: {key} and {keys[place, kind]} are of one layer.")
        if not tensor.isfinite().all():
            raise UserError(f"{misfit}: {key} has NaN or inf.")
        found[place][kind], keys[place, kind] = tensor, key
    layers = {part: {} for part in parts}
    for (part, name), of in found.items():
        if "down" not in of or "up" not in of:
            key = min(keys[(part, name), kind] for kind in of)
            raise UserError(f"{misfit}: {key} has no counterpart.")
        weight = parts[part].get_submodule(name).weight
        rank, ones = of["down"].shape[0], [1] * (weight.ndim - 2)
        wanted = {"down": (rank, *weight.shape[1:]), "up": (weight.shape[0], rank, *ones)}
        for kind, shape in wanted.items():
            if _trimmed(of[kind].shape) != _trimmed(shape):
                raise UserError(
                    f"{misfit}: {keys[(part, name), kind]} is {tuple(of[kind].shape)}, and the "
                    f"layer takes {shape}."
                )
        alpha = of["alpha"].item() if "alpha" in of else _alpha(settings, part, name, rank)
        factors = (of[kind].reshape(shape) for kind, shape in wanted.items())
        layers[part][name] = Layer(*factors, float(alpha))
    return layers


def text_tensors(path: str) -> list[str]:
    """The keys of a LoRA's text encoders. Raises UserError where it cannot be read."""
    return [key for key in _open(path)[0] if key.startswith(TEXT) and not key.endswith(".alpha")]


def _open(path: str) -> tuple[dict[str, Tensor], dict]:
    """(tensors, peft's settings, which may be none) of a LoRA's file."""
    file = lora_file(path)

    def load():
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            return tensors, json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))

    tensors, settings = one_sentence(load, f"The LoRA '{path}' cannot be read")
    for mark, kind in OTHER_KINDS.items():
        if found := [key for key in tensors if mark in key]:
            raise UserError(
                f"The LoRA '{path}' is {kind} ({min(found)}); only plain LoRA can be read here, on "
                "linear layers and convolutions."
            )
    if not tensors:
        raise UserError(f"The LoRA '{path}' has no tensors.")
    return tensors, settings


def _split(key: str, misfit: str) -> tuple[str, str]:
    """(a layer's name, "down", "up" or "alpha") of a key."""
    if found := FACTOR.fullmatch(key):
        return found[1], {"A": "down", "B": "up"}.get(found[2], found[2])
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    raise UserError(f"{misfit}: {key} is no tensor of a LoRA.")


def _alpha(settings: dict, part: str, name: str, rank: int) -> float:
    """alpha of a layer that has no tensor of it: as peft's settings say, else r."""
    alphas = settings.get(f"{part}.alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas, name), settings.get(f"{part}.lora_alpha", rank))
    return alpha * math.sqrt(rank) if settings.get(f"{part}.use_rslora") else alpha


def _layers(parts: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, str]]:
    for part, module in parts.items():
        for name, layer in module.named_modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                yield part, name


def _names(part: str, name: str, parts: Mapping[str, torch.nn.Module]) -> Iterator[str]:
    """What a layer is called in LoRA files, with _ for each dot."""
    if part == "unet":
        names = {name, original_name(name, parts[part].config), name.replace("to_out.0", "to_out")}
        prefixes = ("unet", "lora_unet")
    else:  # transformers 5 dropped text_model. from CLIPTextModel
        bare = name.removeprefix("text_model.")
        end = bare.rpartition(".")[2]
        names = {bare, bare.removesuffix(end) + OLD_TEXT.get(end, end)}
        names |= {f"text_model.{one}" for one in names}
        prefixes = {
            "text_encoder": ("text_encoder", "lora_te", "lora_te1"),
            "text_encoder_2": ("text_encoder_2", "lora_te2"),
        }.get(part, ())
    yield from (f"{prefix}_{one}".replace(".", "_") for prefix in prefixes for one in names)


def _trimmed(shape) -> tuple[int, ...]:
    """Without ones at the end: a 1x1 convolution is written as a linear layer, too."""
    shape = list(shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


# -------------------------------------------------------------------------------------------------
# Use.


@torch.no_grad()
def fuse_lora(pipeline: DiffusionPipeline, path: str):
    """Put W + alpha/r up down in the place of W, added in fp32. Raises UserError, see `read`."""
    parts = {k: m for k, m in modules_of(pipeline).items() if k == "unet" or k.startswith("text")}
    for part, layers in read(path, parts, pipeline.config._name_or_path).items():
        for name, layer in layers.items():
            weight = parts[part].get_submodule(name).weight
            weight.copy_(weight.float() + layer.update().to(weight.device))


# -------------------------------------------------------------------------------------------------
# Write.


def save_kohya(layers: dict[str, Layer], unet_config: Mapping, file: Path, title: str):
    """Write a UNet's LoRA in fp16, in the keys that ComfyUI, Forge and A1111 load.

    layers: by the path of each layer in diffusers' UNet. The metadata are those of sd-scripts and
    of Stability's ModelSpec by which such programs show rank, alpha and what the LoRA is for."""
    sdxl = unet_config.get("addition_embed_type") == "text_time"
    tensors = {}
    for name, layer in layers.items():
        theirs = original_name(name, unet_config) if sdxl else name
        key = f"lora_unet_{theirs.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = layer.down.half().contiguous()
        tensors[f"{key}.lora_up.weight"] = layer.up.half().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    ranks, alphas = ({getattr(one, of) for one in layers.values()} for of in ("rank", "alpha"))
    original = "https://github.com/Stability-AI/generative-models"
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": f"{min(ranks)}"
        if len(ranks) == 1
        else "Dynamic",  # its resize_lora's word
        "ss_network_alpha": f"{min(alphas):g}" if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": "sdxl_base_v1-0" if sdxl else "sd_v1",
        "ss_v2": "False",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-{'xl-v1-base' if sdxl else 'v1'}/lora",
        "modelspec.implementation": original if sdxl else "diffusers",
        "modelspec.title": title,
    }
    save_file(tensors, file, metadata)
