"""Models that draw: the settings that are usual for their family, and how they come and go."""

import argparse
import gc

import torch

from evaluation import gallery
from system import hub
from system.files import UserError
from weights import loading

USUAL = {"tiny": (12, 2.0, 16), "sdxl": (50, 5.0, 4), "sd15": (50, 7.5, 16)}
FLAGS = "steps", "guidance", "batch"  # of USUAL


def family(pipeline: str) -> str:
    """tiny, sdxl or sd15: of USUAL. An SDXL is tiny with latents up to 32 px."""
    kind, size = hub.architecture(pipeline), hub.read_config(pipeline, "unet").get("sample_size")
    if type(size) is not int:
        raise UserError(
            f"'{pipeline}' has sample_size {size} in its UNet's config.json; write one number "
            "there, the side of the latents."
        )
    return "tiny" if kind == "sdxl" and size <= 32 else kind


def choose_settings(args: argparse.Namespace, families: dict[str, str]) -> dict[str, dict]:
    """{name: {steps, guidance, batch}}: the flags, else what is usual for {name: family}."""
    settings = {name: {} for name in families}
    for i, flag in enumerate(FLAGS):
        usual, asked = {name: USUAL[kind][i] for name, kind in families.items()}, vars(args)[flag]
        if asked is None and flag != "batch" and len(set(usual.values())) > 1:
            each = ", ".join(f"{name} {value:g}" for name, value in usual.items())
            raise UserError(f"the models differ in their usual {flag} ({each}); give --{flag}.")
        for name, value in usual.items():
            settings[name][flag] = value if asked is None else asked
    return settings


def precision() -> str:
    """The dtype that models draw in: half precision on a GPU."""
    return "float32" if gallery.device().type == "cpu" else "float16"


def load(manifest: dict):
    """The pipeline that a manifest tells of, on the CPU."""
    dtype = getattr(torch, manifest["dtype"])
    return loading.load_any(manifest["model"], manifest["base"], dtype)


def free():
    """Make room for the next model; modules may refer to each other in circles."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
