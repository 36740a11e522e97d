"""SDXL, SD1.5 and the tiny model as eps(x, t, cond): load, identify, encode, predict, sample, save.

A model is a diffusers pipeline; its architecture is read from its own configuration. `cond` holds
the keyword arguments by which its UNet is conditioned on text (and, for SDXL, on size), one row per
image.

Where this departs from the released script, and why: a dropped caption becomes what the pipeline
itself uses for "no prompt" when it samples with guidance. For SDXL that is zeros; the script
encodes an empty string."""

import errno
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.utils import enable_progress_bars
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from invert import finite_sigma
from system.files import UserError
from system.hub import (
    PRESETS,
    architecture,
    find,
    kind,
    lora_file,
    one_sentence,
    part_of,
    read_config,
)

DECODED = 2**20  # pixels that the VAE decodes at once: a picture of SDXL, 256 of the tiny model
# Pixels that the VAE encodes at once: 8 images of 64 px, one from 256 px on. On one core of an EPYC
# the tiny VAE took 4.2, 2.8, 1.9, 2.4 ms an image of 64 px in batches of 1, 2, 8, 16, and 10.7, 9.4
# ms one of 128 px in batches of 1, 2; SD's took 114, 98 ms at 64 px, and gained nothing at 128 px.
ENCODED = 2**15

# No loading bars, which would come from every rank. Those of downloads, which transformers switches
# off as well, stay.
diffusers.utils.logging.disable_progress_bar()
transformers.logging.disable_progress_bar()
if not HF_HUB_DISABLE_PROGRESS_BARS:
    enable_progress_bars()

# -------------------------------------------------------------------------------------------------
# Load: a preset, a hub id, or a folder in diffusers layout. Safetensors where there are any, else
# pickles by torch.load(weights_only=True), else the fp16 variant; code that comes with a model is
# never run.


def read_scheduler(name: str):
    """The noise schedule of a pipeline, without its weights. Raises UserError."""
    config = read_config(name, "scheduler")
    cls = getattr(diffusers, str(config.get("_class_name")), diffusers.DDIMScheduler)
    scheduler = one_sentence(lambda: cls.from_config(config), f"Cannot load the schedule of {name}")
    check_scheduler(scheduler, name)
    return scheduler


def check_scheduler(scheduler, path: str):
    """Raises UserError where a model with this scheduler cannot be trained or judged."""
    if not hasattr(scheduler, "alphas_cumprod"):  # flow matching, EDM
        name = type(scheduler).__name__
        raise UserError(f"'{path}' has a {name}, which has no alphas_cumprod.")
    try:
        finite_sigma(scheduler.alphas_cumprod.float())
    except ValueError as error:
        raise UserError(
            f"The noise schedule of '{path}' cannot be used: {str(error).rstrip('.')}; mend "
            "beta_start and beta_end in its scheduler_config.json."
        ) from error
    predicts = scheduler.config.get("prediction_type", "epsilon")
    if predicts not in ("epsilon", "v_prediction"):
        raise UserError(
            f"'{path}' predicts '{predicts}'; epsilon and v_prediction can be trained here."
        )


def count_parameters(unet_config: dict) -> int:
    """Parameters of a UNet, from its configuration alone."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet2DConditionModel.from_config(unet_config).parameters())


def _load(cls, name: str, part: str, dtype: torch.dtype):
    """A part of a pipeline, with every weight from its file. Raises UserError where one is absent:
    the libraries only warn, and draw it at random."""
    path, subfolder = part_of(name, part)
    text = part.startswith("text_encoder")
    stem, pickled = ("model", "pytorch_model") if text else ("diffusion_pytorch_model",) * 2
    files = [f"{stem}.safetensors", f"{pickled}.bin"]
    files += [f"{file}.index.json" for file in files]  # of weights in several files
    files += [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"]
    if subfolder:
        files = [f"{subfolder}/{file}" for file in files]
    file = find(path, f"{part} with weights", *files)[1]
    variant = "fp16" if ".fp16." in file else None
    options = {"subfolder": subfolder, "dtype": dtype, "variant": variant}
    load = partial(cls.from_pretrained, path, **options, output_loading_info=True)
    module, found = one_sentence(load, f"Cannot load the {part} of '{path}'")
    said = f"The {part} of '{path}', {file},"
    # A weight that stays on the meta device is listed in the index, absent from the files.
    absent = {key for key, weight in module.named_parameters() if weight.is_meta}
    if absent := absent.union(found["missing_keys"]):
        raise UserError(f"{said} lacks the weight {min(absent)}; take a whole checkpoint.")
    if not text and (stray := found["unexpected_keys"]):  # text encoders come with all of CLIP, too
        raise UserError(f"{said} has the tensor {min(stray)}, which its configuration lacks.")
    return module


def load_unet(name: str, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The UNet of a pipeline, or of a checkpoint that holds a UNet alone."""
    return _load(UNet2DConditionModel, name, "unet", dtype)


def load_tokenizer(name: str) -> transformers.CLIPTokenizer:
    """The first tokenizer of a pipeline, alone. Raises UserError, or what transformers does."""
    find(name, "tokenizer", "tokenizer/vocab.json", "tokenizer/tokenizer.json")  # or it is empty
    source = PRESETS.get(name, name)
    return transformers.CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")


def load_pipeline(
    name: str, unet: str | None = None, vae: str | None = None, dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """A pipeline on the CPU, its UNet and VAE replaced by other checkpoints where they are given.

    dtype: of UNet and text encoders. In half precision the VAE takes fp16, whose mantissa is longer
    than bf16's; SDXL's stock VAE, which overflows in fp16, stays in fp32."""
    sdxl, path = architecture(name) == "sdxl", PRESETS.get(name, name)
    parts = {
        "unet": load_unet(unet or path, dtype),
        "vae": _load(AutoencoderKL, vae or path, "vae", torch.float32),  # rounded once, below
        "text_encoder": _load(CLIPTextModel, path, "text_encoder", dtype),
        "image_encoder": None,  # is not needed to draw from text
        "feature_extractor": None,
    }
    if sdxl:
        parts["text_encoder_2"] = _load(CLIPTextModelWithProjection, path, "text_encoder_2", dtype)
    else:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    load = partial(DiffusionPipeline.from_pretrained, path, **parts)
    pipeline = one_sentence(load, f"Cannot load the pipeline '{path}'")
    if dtype != torch.float32:
        overflows = sdxl and pipeline.vae.config.force_upcast
        pipeline.vae.to(torch.float32 if overflows else torch.float16)
    check_scheduler(pipeline.scheduler, path)
    reads, encoders = pipeline.unet.config, (pipeline.text_encoder, second_encoder(pipeline))
    width = sum(encoder.config.hidden_size for encoder in encoders if encoder is not None)
    pooled = reads.addition_embed_type == "text_time"
    if reads.cross_attention_dim != width or pooled != sdxl:
        raise UserError(f"The UNet of '{unet or path}' does not read the text of '{path}'.")
    if not sdxl and pipeline.vae.config.latents_mean is not None:
        raise UserError(
            f"The VAE of '{vae or path}' has latents_mean, which diffusers ignores in SD1.5; name "
            "another with --vae."
        )
    pipeline.set_progress_bar_config(disable=True)
    for module in _modules(pipeline).values():
        module.requires_grad_(False).eval()
    return pipeline


def pipeline_of(path: str, base: str | None) -> str:
    """The pipeline that a path needs: itself, or base for a UNet or LoRA; UserError without one."""
    if (found := kind(path)) == "pipeline":
        return path
    if base is None:
        raise UserError(f"'{path}' is a {found} without a pipeline; name one with --base.")
    return base


def load_any(
    path: str, base: str | None = None, dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """The pipeline at a path, or base with the UNet or LoRA at it."""
    around, found = pipeline_of(path, base), kind(path)
    pipeline = load_pipeline(around, unet=path if found == "unet" else None, dtype=dtype)
    if found == "lora":
        fuse_lora(pipeline, path)
    return pipeline


def fuse_lora(pipeline: DiffusionPipeline, path: str):
    """Put W + alpha/r B A in the place of W. Fused, so that identity() sees the scale.

    Raises UserError, see `load_lora`."""
    load_lora(pipeline, path)
    sentence = f"The LoRA '{path}' does not fit '{pipeline.config._name_or_path}'"
    one_sentence(lambda: pipeline.fuse_lora(safe_fusing=True), sentence)
    pipeline.unload_lora_weights()


def load_lora(pipeline: DiffusionPipeline, path: str):
    """Add a LoRA as the adapter "it".

    Raises UserError for a tensor that matches nothing, of which diffusers only warns."""

    def plain(key: str) -> str:  # one form for a key of peft, diffusers or kohya; .it. is our name
        key = key.replace(".processor", "").replace(".it.", ".").replace(".", "_")
        return key.replace("lora_down", "lora_A").replace("lora_up", "lora_B")

    sentence = f"The LoRA '{path}' does not fit '{pipeline.config._name_or_path}'"
    file = lora_file(path)
    with one_sentence(lambda: safe_open(file, "pt"), sentence) as lora:
        keys = [key for key in lora.keys() if not key.endswith(".alpha")]
        given = {plain(key.removeprefix("lora_")): key for key in keys}
    load = partial(pipeline.load_lora_weights, file, adapter_name="it", use_safetensors=True)
    one_sentence(load, sentence)
    loaded = [f"{part}.{key}" for part, m in _modules(pipeline).items() for key in m.state_dict()]
    found = {plain(key): key.replace(".it.", ".") for key in loaded if ".it." in key}
    if len(given) != len(found):
        odd = (found | given)[min(given.keys() ^ found.keys())]
        raise UserError(f"{sentence}: {odd} has no counterpart.")


def _modules(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """UNet, VAE and text encoders by name."""
    return {k: v for k, v in sorted(pipeline.components.items()) if isinstance(v, torch.nn.Module)}


def second_encoder(pipeline: DiffusionPipeline) -> torch.nn.Module | None:
    return getattr(pipeline, "text_encoder_2", None)


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
    digest, modules = hashlib.blake2b(digest_size=8), _modules(pipeline)
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
    progress bar, None for none. Raises UserError where UNet or VAE draw NaN or infinity, of which
    the pipeline would make black pictures."""
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
        _check(latents, "UNet", pipeline.unet.dtype)
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
