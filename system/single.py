"""What the header of a single file says of the model in it; its weights are not read.

A single file is a whole SDXL or SD1.5 in the original layout: UNet, VAE and text encoders in one
.safetensors file, as model sites have it and as ComfyUI, Forge and A1111 read it. It has neither a
configuration nor tokenizers: those come from a folder or hub id in diffusers layout. What it may
say is how it predicts: by the names of two empty tensors, `v_pred` and `ztsnr`, which ComfyUI reads
(comfy/supported_models.py), or by the key modelspec.prediction_type of its metadata (Stability-AI's
ModelSpec, which kohya's sd-scripts writes).
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from system.files import UserError

UNET = "model.diffusion_model."
PARTS = {  # where the tensors of each part begin
    "sdxl": {
        "unet": UNET,
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sd15": {
        "unet": UNET,
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
    },
}


def header(file: str | Path) -> dict[str, dict[str, Any]]:
    """{tensor: {"dtype", "shape", "data_offsets"}} of a .safetensors file, and "__metadata__" where
    there is any. Raises UserError for a file that is cut short or none of the kind."""
    state = os.stat(file)
    return _header(str(file), state.st_size, state.st_mtime_ns)


@cache
def _header(file: str, size: int, _changed: int) -> dict[str, dict[str, Any]]:
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header is cut short")
            found = json.loads(opened.read(length))
        tensors = [one for name, one in found.items() if name != "__metadata__"]
        end = max((one["data_offsets"][1] for one in tensors), default=0)
        if 8 + length + end > size:
            raise ValueError(f"it has {size:,} bytes of {8 + length + end:,}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        words = getattr(error, "strerror", None) or error
        raise UserError(f"'{file}' is no whole .safetensors file ({words}).") from error
    return found


def is_single(name: str) -> bool:
    """Whether it is a single file with a whole model: one that has a UNet in the original layout.
    Raises UserError as `header` does."""
    if not name.endswith(".safetensors") or not os.path.isfile(name):
        return False
    return any(key.startswith(UNET) for key in header(name))


def architecture_of(file: str) -> str:
    """The kind of a single file, "sdxl" or "sd15". Raises UserError for any other."""
    keys = header(file).keys()
    text = {kind: parts["text_encoder"] for kind, parts in PARTS.items()}
    kind = next((k for k in text if any(key.startswith(text[k]) for key in keys)), None)
    if kind is None:
        raise UserError(
            f"'{file}' holds a UNet, and no text encoder of SDXL or SD1.5, which alone can be "
            "trained here; take a whole checkpoint of one of them."
        )
    for part, prefix in PARTS[kind].items():
        if not any(key.startswith(prefix) for key in keys):
            raise UserError(f"'{file}' lacks the {part} ({prefix}*); take a whole checkpoint.")
    shape = header(file).get(f"{UNET}input_blocks.0.0.weight", {}).get("shape", [0, 0])
    if shape[1] != 4:
        raise UserError(
            f"The UNet of '{file}' reads {shape[1]} channels, as one for inpainting; one that "
            "draws from text alone reads 4."
        )
    return kind


def scheduler_of(file: str) -> dict[str, Any]:
    """What the file says of its noise schedule, in the words of diffusers; {} where nothing."""
    found = header(file)
    metadata = found.get("__metadata__") or {}
    said = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
    predicts = said.get(str(metadata.get("modelspec.prediction_type")))
    predicts = "v_prediction" if "v_pred" in found else predicts
    known: dict[str, Any] = {"prediction_type": predicts} if predicts else {}
    return known | (ZERO_SNR if "ztsnr" in found else {})


# Common Diffusion Noise Schedules and Sample Steps are Flawed (2305.08891), Sections 3.1 and 3.3.
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
