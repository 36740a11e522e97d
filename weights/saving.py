"""Models, written in diffusers layout."""

import errno
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor


def _unet(config: dict, weights: dict[str, Tensor]) -> UNet2DConditionModel:
    """A UNet of these very tensors; RuntimeError where they are not those of the configuration."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(weights, assign=True)
    return unet


def save_unet(config: dict, weights: dict[str, Tensor], folder: Path):
    """Write a UNet alone (weights by name, any dtype, kept) in diffusers layout."""
    _unet(config, weights).save_pretrained(folder, max_shard_size="1TB")  # one file


def save_pipeline(pipeline: DiffusionPipeline, unet_weights: dict[str, Tensor], folder: Path):
    """Write the pipeline with these UNet weights (by name, any dtype, kept) in diffusers layout."""
    kept = pipeline.unet
    pipeline.register_modules(unet=_unet(kept.config, unet_weights))
    try:
        write_pipeline(pipeline, folder)
    finally:
        pipeline.register_modules(unet=kept)


def write_pipeline(pipeline: DiffusionPipeline, folder: Path):
    """Write the pipeline in diffusers layout, as releases before transformers 5 read it, too.

    transformers 5 writes no vocab.json and merges.txt, without which older releases have no CLIP
    tokenizer, and the first text encoder without the prefix of its weights, which older releases
    then draw at random. Raises OSError where the disk is full."""
    try:
        pipeline.save_pretrained(folder)
        for part, tokenizer in pipeline.components.items():
            if part.startswith("tokenizer"):
                tokenizer.backend_tokenizer.model.save(str(Path(folder) / part))
        encoder = pipeline.text_encoder
        weights = {f"text_model.{key}": weight for key, weight in encoder.state_dict().items()}
        encoder.save_pretrained(Path(folder) / "text_encoder", state_dict=weights)
    except Exception as error:
        if type(error) is not Exception:  # which is what tokenizers raises of a full disk
            raise
        raise OSError(errno.EIO, str(error)) from error
