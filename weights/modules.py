"""The parts of a diffusers pipeline."""

import torch
from diffusers import DiffusionPipeline


def modules_of(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """UNet, VAE and text encoders by name."""
    return {k: v for k, v in sorted(pipeline.components.items()) if isinstance(v, torch.nn.Module)}


def second_encoder(pipeline: DiffusionPipeline) -> torch.nn.Module | None:
    return getattr(pipeline, "text_encoder_2", None)
