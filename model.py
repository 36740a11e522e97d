"""SDXL, SD1.5 and the tiny model as eps(x, t, cond): identify, encode, predict, sample.

A model is a diffusers pipeline; its architecture is read from its own configuration. `cond` holds
the keyword arguments by which its UNet is conditioned on text (and, for SDXL, on size), one row per
image.

Where this departs from the released script, and why: a dropped caption becomes what the pipeline
itself uses for "no prompt" when it samples with guidance. For SDXL that is zeros; the script
encodes an empty string."""

import hashlib
import json
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from invert import finite_sigma
from system.files import UserError
from weights.modules import modules_of, second_encoder

DECODED = 2**20  # pixels that the VAE decodes at once: a picture of SDXL, 256 of the tiny model
# Pixels that the VAE encodes at once: 8 images of 64 px, one from 256 px on. On one core of an EPYC
# the tiny VAE took 4.2, 2.8, 1.9, 2.4 ms an image of 64 px in batches of 1, 2, 8, 16, and 10.7, 9.4
# ms one of 128 px in batches of 1, 2; SD's took 114, 98 ms at 64 px, and gained nothing at 128 px.
ENCODED = 2**15


def alphas_cumprod(pipeline: DiffusionPipeline) -> Tensor:
    """abar, (T,) fp32, in [2^-24, 1): sigma stays finite where a schedule ends on zero SNR."""
    return finite_sigma(pipeline.scheduler.alphas_cumprod.float())


# -------------------------------------------------------------------------------------------------
# Identify: two pipelines with one identity draw the same pictures.


def identity(pipeline: DiffusionPipeline) -> str:
    """16 hex digits of what decides a picture, wherever it is stored: tensors and settings.

    Tensors: name, shape, dtype and bytes of every parameter and persistent buffer of UNet, VAE and
    text encoders. Settings: their configurations, the pipeline's, the scheduler's and its class,
    without paths and versions. Not the tokenizers. Hashes 1 GB/s; on a CPU no tensor is copied."""
    digest, modules = hashlib.blake2b(digest_size=8), modules_of(pipeline)
    configs = {part: module.config for part, module in modules.items()}
    configs |= {"": pipeline.config, type(pipeline.scheduler).__name__: pipeline.scheduler.config}
    passing = {*pipeline.components, "architectures", "dtype", "transformers_version"}
    for part, config in configs.items():
        config = config if isinstance(config, dict) else config.to_dict()  # transformers' own class
        kept = {k: v for k, v in config.items() if k[0] != "_" and k not in passing}
        digest.update(f"{part} {json.dumps(kept, sort_keys=True, default=str)}\n".encode())
    for part, module in modules.items():
        for name, tensor in module.state_dict().items():
            digest.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------
# Encode: captions to cond, pixels to latents.


@torch.no_grad()
def encode_prompts(pipeline: DiffusionPipeline, captions: list[str], size: int) -> dict:
    """The UNet's conditioning for captions (B); SDXL's sizes are `size` pixels, its crop (0, 0):
    other ones by `tell_sizes`.

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


def tell_sizes(cond: dict, sizes: list[list[int]]) -> dict:
    """cond that tells SDXL of these sizes, one row an image; SD1.5, which asks for none, gets cond
    as it is.

    sizes: of each image height and width of the original, top and left of the crop, height and
    width of the target. They become fp32 for any text: bf16 has no number between 1020 and 1024."""
    if "added_cond_kwargs" not in cond:
        return cond
    added = cond["added_cond_kwargs"]
    time_ids = torch.tensor(sizes, dtype=torch.float32, device=added["time_ids"].device)
    return cond | {"added_cond_kwargs": added | {"time_ids": time_ids}}


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
    """x0 of each image, drawn from the VAE's posterior of it: (B, C, h, w) fp32.

    pixels: (B, 3, H, W) uint8. generator: one per image, on any device."""
    return draw_latents(pipeline.vae, posteriors(pipeline, pixels), generator)


@torch.no_grad()
def posteriors(pipeline: DiffusionPipeline, pixels: Tensor) -> Tensor:
    """What the VAE says of each image: mean and log variance of its z, (B, 2C, h, w), in its dtype.

    pixels: (B, 3, H, W) uint8, which become -1..1 here, in fp32 on the VAE's device. As many images
    at a time as have ENCODED pixels, at least one; what is said of an image is the same in any
    batch but for a convolution's last digits, within 1e-5 in fp32."""
    vae, found = pipeline.vae, []
    half = torch.tensor(127.5, device=vae.device)  # by a number a GPU multiplies, with its inverse
    for some in pixels.split(max(1, ENCODED // pixels[0, 0].numel())):
        images = some.to(vae.device).float() / half - 1
        found.append(vae.encode(images.to(vae.dtype)).latent_dist.parameters)
    return torch.cat(found)


def draw_latents(vae, posteriors: Tensor, generator: list[torch.Generator] | None = None) -> Tensor:
    """x0 = scaling_factor * (z - mean) / std, with z drawn from each posterior, on its device.

    mean, std: of the VAE's configuration, for most VAEs 0 and 1."""
    z = DiagonalGaussianDistribution(posteriors).sample(generator).float()
    mean, std = _moments(vae, z)
    return (z - mean) * vae.config.scaling_factor / std


def _moments(vae, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(mean, std) of its latents, (1, C, 1, 1); 0 and 1 unless both are given, as diffusers' SDXL
    pipelines have it."""
    given = vae.config.latents_mean, vae.config.latents_std
    if None in given:
        return 0.0, 1.0
    return tuple(like.new_tensor(x).view(1, -1, 1, 1) for x in given)


# -------------------------------------------------------------------------------------------------
# Predict: the one place where a UNet is called.


def predict_noise(
    unet, x: Tensor, t: Tensor, cond: dict, abar: Tensor, prediction_type: str = "epsilon"
) -> Tensor:
    """The noise eps_theta(x_t, t, cond) that an epsilon or a v model (2202.00512) predicts.

    eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t   for a model whose output is v

    unet: the module, or an engine around it. x: (B, C, h, w). t: (B,) int64. cond: B rows, its
    dtype is the UNet's. abar: (T,), with t on any one device. Returns (B, C, h, w) fp32. Called
    with `return_dict=False` and a (B,) tensor t, so that a compiled UNet keeps to one graph."""
    dtype, time = cond["encoder_hidden_states"].dtype, t.to(x.device)
    out = unet(x.to(dtype), time, **cond, return_dict=False)[0].float()
    if prediction_type == "v_prediction":
        signal = abar[t.to(abar.device)].reshape(-1, 1, 1, 1).to(x.device)
        out = signal.sqrt() * out + (1 - signal).sqrt() * x.float()
    return out


@dataclass(frozen=True)
class Denoiser:
    """A UNet under its conditioning, as the function eps_theta(x, t) that invert.py takes."""

    unet: torch.nn.Module
    cond: dict
    abar: Tensor
    predicts: str = "epsilon"

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return predict_noise(self.unet, x, t, self.cond, self.abar, self.predicts)


# -------------------------------------------------------------------------------------------------
# Sample: the pipeline's own business.


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
    progress bar, None for none. Raises UserError where UNet or VAE draw NaN or infinity, of which
    the pipeline would make black pictures."""
    images, unet = [], pipeline.unet
    shape = 1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size
    for i in tqdm(range(0, len(prompts), batch), desc=progress, disable=progress is None):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch]]
        # In fp32, since torch 2.9 draws other noise of the same seed in half precision.
        noise = torch.cat([torch.randn(shape, generator=seeded) for seeded in generators])
        latents = pipeline(
            prompts[i : i + batch],
            generator=generators,
            latents=noise.to(unet.dtype),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).images
        _check(latents, "UNet", unet.dtype)
        vae = pipeline.vae  # decoded here, since its dtype may differ from the UNet's
        latents = latents.to(vae.dtype)
        mean, std = _moments(vae, latents)
        latents = latents * std / vae.config.scaling_factor + mean
        size = latents[0, 0].numel() * pipeline.vae_scale_factor**2
        for part in latents.split(max(1, DECODED // size)):
            pixels = vae.decode(part).sample
            _check(pixels, "VAE", vae.dtype)
            images += pipeline.image_processor.postprocess(pixels.float(), output_type="pil")
    return images


def _check(drawn: Tensor, part: str, dtype: torch.dtype):
    """UserError where what this part has drawn is not finite."""
    if not drawn.isfinite().all():
        raise UserError(
            f"The {part} draws values that are not finite in {str(dtype).removeprefix('torch.')}; "
            "its weights are damaged, have diverged, or need another precision."
        )
