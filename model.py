"""SDXL, SD1.5 and the tiny model as eps(x, t, cond): load, encode, predict, sample, save.

A model is a diffusers pipeline; its architecture is read from its own configuration. `cond` holds
the keyword arguments by which its UNet is conditioned on text (and, for SDXL, on size), one row per
image.

Where this departs from the released script, and why: a dropped caption becomes what the pipeline
itself uses for "no prompt" when it samples with guidance. For SDXL that is zeros; the script
encodes an empty string."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

PRESETS = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "tiny": str(Path(__file__).parent / "assets" / "tiny-sdxl"),
}
ARCHITECTURES = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"}


UNREACHABLE = "the hub cannot be reached; check the network, or name a local folder."


class ModelError(ValueError):
    """A model that cannot be used: one sentence that names it and the fix."""


# -------------------------------------------------------------------------------------------------
# Load: a preset, a hub id, or a folder in diffusers layout.


def _unreachable(error: BaseException | None) -> bool:
    """Whether an error comes of a hub that cannot be reached, the file not being in its cache."""
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None


def _try(action: Callable, sentence: str):
    """action(), with the libraries' many errors made one sentence."""
    try:
        return action()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if _unreachable(error):
            reason = UNREACHABLE
        raise ModelError(f"{sentence}: {reason}") from error


def _locate(name: str, file: str, what: str) -> str:
    """The folder or hub id that a name stands for; ModelError where it can be neither."""
    path = PRESETS.get(name, name)
    if Path(path).is_dir():
        if not (Path(path) / file).is_file():
            raise ModelError(f"The folder '{path}' is not a {what}: it has no {file}.")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        known = ", ".join(PRESETS)
        raise ModelError(
            f"Unknown {what} '{name}': use {known}, a folder in diffusers layout, or a hub id like "
            "owner/name."
        )
    return path


def architecture(name: str) -> str:
    """The kind, "sdxl" or "sd15", by model_index.json. Raises ModelError for any other pipeline."""
    path = _locate(name, "model_index.json", "diffusers pipeline")
    index = _try(lambda: DiffusionPipeline.load_config(path), f"Cannot read the pipeline '{path}'")
    found = index.get("_class_name", "pipeline without a class")
    kind = ARCHITECTURES.get(found)
    if kind is None:
        known = " and ".join(ARCHITECTURES)
        raise ModelError(f"'{path}' is a {found}; {known} can be trained here.")
    return kind


def _place(name: str, part: str) -> tuple[str, str | None]:
    """(folder or hub id, subfolder) of a part, "unet" or "vae": in a pipeline, or by itself."""
    if (Path(name) / "config.json").is_file():
        return name, None
    path = _locate(name, f"{part}/config.json", f"{part} checkpoint or pipeline")
    if not Path(path).is_dir():
        try:  # a hub id: in a pipeline the part is a subfolder, alone it is at the root
            UNet2DConditionModel.load_config(path, subfolder=part)
        except OSError as error:
            if _unreachable(error):
                raise ModelError(f"Cannot load the {part} of '{path}': {UNREACHABLE}") from error
            return path, None
    return path, part


def read_config(name: str, part: str) -> dict:
    """The configuration of a part: "unet", "vae" (in a pipeline or by itself) or "scheduler"."""
    path, subfolder = (PRESETS.get(name, name), part) if part == "scheduler" else _place(name, part)
    # The classes matter only for the name of the file: scheduler_config.json or config.json.
    loader = DDIMScheduler if part == "scheduler" else UNet2DConditionModel
    return _try(
        lambda: loader.load_config(path, subfolder=subfolder), f"Cannot read the {part} of '{path}'"
    )


def count_parameters(unet_config: dict) -> int:
    """Parameters of a UNet, from its configuration alone."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet2DConditionModel.from_config(unet_config).parameters())


def _load(cls, name: str, part: str, dtype: torch.dtype):
    path, subfolder = _place(name, part)
    return _try(
        lambda: cls.from_pretrained(path, subfolder=subfolder, dtype=dtype),
        f"Cannot load the {part} of '{path}'",
    )


def load_unet(name: str, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The UNet of a pipeline, or of a checkpoint that holds a UNet alone."""
    return _load(UNet2DConditionModel, name, "unet", dtype)


def load_pipeline(
    name: str,
    unet: str | None = None,
    vae: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> DiffusionPipeline:
    """A pipeline on the CPU, its UNet and VAE replaced by other checkpoints where they are given.

    dtype: of UNet and text encoders, and of the VAE, with two exceptions: on half precision the VAE
    takes fp16, whose mantissa is longer than bf16's, and SDXL's stock VAE, which overflows there,
    stays in fp32."""
    kind, path = architecture(name), PRESETS.get(name, name)
    parts = {"unet": load_unet(unet, dtype)} if unet else {}
    if vae:
        parts["vae"] = _load(AutoencoderKL, vae, "vae", dtype)
    if kind == "sd15":
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    pipeline = _try(
        lambda: DiffusionPipeline.from_pretrained(path, dtype=dtype, **parts),
        f"Cannot load the pipeline '{path}'",
    )
    if dtype != torch.float32:
        overflows = kind == "sdxl" and pipeline.vae.config.force_upcast
        pipeline.vae.to(torch.float32 if overflows else torch.float16)
    if not hasattr(pipeline.scheduler, "alphas_cumprod"):  # flow matching, EDM
        scheduler = type(pipeline.scheduler).__name__
        raise ModelError(f"'{path}' has a {scheduler}, which knows no alphas_cumprod.")
    predicts = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if predicts not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"'{path}' predicts '{predicts}'; epsilon and v_prediction can be trained here."
        )
    reads, encoders = pipeline.unet.config, (pipeline.text_encoder, second_encoder(pipeline))
    width = sum(encoder.config.hidden_size for encoder in encoders if encoder is not None)
    pooled = reads.addition_embed_type == "text_time"
    if reads.cross_attention_dim != width or pooled != (kind == "sdxl"):
        raise ModelError(f"The UNet of '{unet or path}' does not read the text of '{path}'.")
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.vae, pipeline.unet, *encoders):
        if part is not None:
            part.requires_grad_(False).eval()
    return pipeline


def second_encoder(pipeline: DiffusionPipeline) -> torch.nn.Module | None:
    return getattr(pipeline, "text_encoder_2", None)


def alphas_cumprod(pipeline: DiffusionPipeline) -> Tensor:
    """abar, (T,) fp32, at least 2^-24: sigma stays finite where a schedule ends on zero SNR."""
    return pipeline.scheduler.alphas_cumprod.float().clamp(min=2**-24)


# -------------------------------------------------------------------------------------------------
# Encode: captions to cond, pixels to latents.


@torch.no_grad()
def encode_prompts(pipeline: DiffusionPipeline, captions: list[str], size: int) -> dict:
    """The UNet's conditioning for captions (B); SDXL's sizes are `size` pixels, its crop (0, 0).

    Returns {"encoder_hidden_states": (B, L, D)}, for SDXL also {"added_cond_kwargs":
    {"text_embeds": (B, E), "time_ids": (B, 6)}}, in the dtype of the text encoders. An empty
    caption gives what the pipeline uses as the unconditional input."""
    device = pipeline.text_encoder.device
    options = dict(device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    if second_encoder(pipeline) is None:
        return {"encoder_hidden_states": pipeline.encode_prompt(captions, **options)[0]}
    text, _, pooled, _ = pipeline.encode_prompt(captions, **options)
    if pipeline.config.force_zeros_for_empty_prompt:
        given = torch.tensor([caption != "" for caption in captions], device=device)
        text, pooled = text * given[:, None, None], pooled * given[:, None]
    time_ids = torch.tensor([size, size, 0, 0, size, size], device=device, dtype=text.dtype)
    added = {"text_embeds": pooled, "time_ids": time_ids.expand(len(captions), -1)}
    return {"encoder_hidden_states": text, "added_cond_kwargs": added}


def repeat(cond: dict, times: int = 2) -> dict:
    """cond for `times` copies of the batch, one after the other: winners, then losers."""
    return {
        key: repeat(value, times) if isinstance(value, dict) else torch.cat([value] * times)
        for key, value in cond.items()
    }


@torch.no_grad()
def encode_images(
    pipeline: DiffusionPipeline, pixels: Tensor, generator: list[torch.Generator] | None = None
) -> Tensor:
    """x0 = scaling_factor * z, with z drawn from the VAE's posterior of each image.

    pixels: (B, 3, H, W) in [-1, 1]. generator: one per image, on any device. Returns (B, C, h, w)
    fp32. One image at a time, which bounds the memory at 1024 px."""
    vae = pipeline.vae
    latents = []
    for i, image in enumerate(pixels.to(vae.device, vae.dtype).split(1)):
        posterior = vae.encode(image).latent_dist
        latents.append(posterior.sample(generator[i] if generator else None).float())
    return torch.cat(latents) * vae.config.scaling_factor


# -------------------------------------------------------------------------------------------------
# Predict: the one place where a UNet is called.


def predict_noise(
    unet, x: Tensor, t: Tensor, cond: dict, abar: Tensor, prediction_type: str = "epsilon"
) -> Tensor:
    """The noise eps_theta(x_t, t, cond) that an epsilon or a v model (2202.00512) predicts.

    eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t   for a model whose output is v

    unet: the module, or an engine around it. x: (B, C, h, w). t: (B,) int64. cond: B rows, its
    dtype is the UNet's. abar: (T,). Returns (B, C, h, w) fp32. Called with `return_dict=False` and
    a (B,) tensor t, so that a compiled UNet keeps to one graph."""
    out = unet(x.to(cond["encoder_hidden_states"].dtype), t, **cond, return_dict=False)[0].float()
    if prediction_type == "v_prediction":
        signal = abar[t].reshape(-1, 1, 1, 1)
        out = signal.sqrt() * out + (1 - signal).sqrt() * x.float()
    return out


# -------------------------------------------------------------------------------------------------
# Sample and save: the pipeline's own business.


@torch.no_grad()
def sample(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int,
    guidance: float,
    batch: int = 16,
    progress: str | None = None,
) -> list[Image.Image]:
    """One picture per (prompt, seed), by the pipeline's own scheduler. The noise of a seed is drawn
    on the CPU, so it is the same on every model, device and batch size. progress: name of a
    progress bar, None for none."""
    images = []
    for i in tqdm(range(0, len(prompts), batch), desc=progress, disable=progress is None):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch]]
        latents = pipeline(
            prompts[i : i + batch],
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).images
        vae = pipeline.vae  # decoded here, since its dtype may differ from the UNet's
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        images += pipeline.image_processor.postprocess(pixels.float(), output_type="pil")
    return images


def save_pipeline(pipeline: DiffusionPipeline, unet_weights: dict[str, Tensor], folder: Path):
    """Write the pipeline with the given UNet weights (by name, any dtype, kept as they are) in
    diffusers layout."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(pipeline.unet.config)
    unet.load_state_dict(unet_weights, assign=True)
    kept = pipeline.unet
    pipeline.register_modules(unet=unet)
    try:
        pipeline.save_pretrained(folder)
    finally:
        pipeline.register_modules(unet=kept)


def quiet():
    """Only errors of the libraries, and no loading bars: many ranks' notes hide what matters."""
    import transformers
    from diffusers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in (logging, transformers.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
