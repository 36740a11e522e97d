"""Models by name: a preset, a hub id, a folder in diffusers layout, or a single file, as a
diffusers pipeline.

Safetensors where there are any, else pickles by torch.load(weights_only=True), else the fp16
variant; code that comes with a model is never run."""

from functools import partial
from inspect import signature

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.utils import enable_progress_bars
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from invert import finite_sigma
from system.files import UserError
from system.hub import (
    PRESETS,
    architecture,
    find,
    kind,
    layout_of,
    one_sentence,
    part_of,
    read_config,
    schedule_of,
)
from system.single import is_single
from weights.loras import fuse_lora
from weights.modules import modules_of, second_encoder
from weights.original import load_part

# No loading bars, which would come from every rank. Those of downloads, which transformers switches
# off as well, stay.
diffusers.utils.logging.disable_progress_bar()
transformers.logging.disable_progress_bar()
if not HF_HUB_DISABLE_PROGRESS_BARS:
    enable_progress_bars()


def read_scheduler(name: str):
    """The noise schedule of a pipeline, without its weights. Raises UserError."""
    config, said = read_config(name, "scheduler"), schedule_of(name)
    cls = getattr(diffusers, str(config.get("_class_name")), diffusers.DDIMScheduler)
    if not said.keys() <= set(signature(cls).parameters):  # PNDM has no zero terminal SNR
        cls, config = diffusers.DDIMScheduler, config | {"clip_sample": False}
    config |= said
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
    if is_single(name):
        return load_part(cls, name, part, dtype)
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
    return transformers.CLIPTokenizer.from_pretrained(layout_of(name), subfolder="tokenizer")


def load_pipeline(
    name: str, unet: str | None = None, vae: str | None = None, dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """A pipeline on the CPU, its UNet and VAE replaced by other checkpoints where they are given.

    dtype: of UNet and text encoders. In half precision the VAE takes fp16, whose mantissa is longer
    than bf16's; SDXL's stock VAE, which overflows in fp16, stays in fp32."""
    sdxl, path = architecture(name) == "sdxl", PRESETS.get(name, name)
    find(name, "pipeline", "model_index.json")  # of a single file its configuration's
    parts = {
        "unet": load_unet(unet or path, dtype),
        "vae": _load(AutoencoderKL, vae or path, "vae", torch.float32),  # rounded once, below
        "text_encoder": _load(CLIPTextModel, path, "text_encoder", dtype),
        "image_encoder": None,  # is not needed to draw from text
        "feature_extractor": None,
    }
    if schedule_of(name):
        parts["scheduler"] = read_scheduler(name)
    if sdxl:
        parts["text_encoder_2"] = _load(CLIPTextModelWithProjection, path, "text_encoder_2", dtype)
    else:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    load = partial(DiffusionPipeline.from_pretrained, layout_of(name), **parts)
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
    for module in modules_of(pipeline).values():
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
