"""SDXL and SD1.5 at random weights, without the hub: in their size, and smaller.

What a configuration does not say is the default of diffusers or transformers. Random weights have
every shape, cost and memory of the published ones; their pictures say nothing."""

import tempfile
from pathlib import Path

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lab.pretrain import write_tokenizer
from system import hub
from system.files import UserError

SDXL = {  # stabilityai/stable-diffusion-xl-base-1.0: 2,567,463,684 parameters
    "sample_size": 128, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD15 = {  # stable-diffusion-v1-5/stable-diffusion-v1-5: 859,520,964 parameters
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8, "cross_attention_dim": 768,
}  # fmt: skip
# SD1.5 at about a third of its widths, at 256 px: what two CPU cores take in a minute.
MID = SD15 | {
    "sample_size": 32, "block_out_channels": (96, 192, 384, 384), "cross_attention_dim": 256,
}  # fmt: skip
# As many levels of the same kinds, but narrow and shallow: to try programs with.
SDXL_SMALL = SDXL | {
    "sample_size": 8, "block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2), "cross_attention_dim": 64, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}  # fmt: skip
SD15_SMALL = SD15 | {
    "sample_size": 8, "block_out_channels": (32, 64, 64, 64), "attention_head_dim": 2,
    "cross_attention_dim": 32,
}  # fmt: skip
CONFIGS = {"sdxl": SDXL, "sd15": SD15, "mid": MID}  # of UNets
CONFIGS |= {"sdxl-small": SDXL_SMALL, "sd15-small": SD15_SMALL}

VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu",
}  # fmt: skip
BIG_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280,
    "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu",
}  # fmt: skip
MID_TEXT = CLIP_L | {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
FEW = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32, "num_hidden_layers": 2}
FEW |= {"num_attention_heads": 2, "vocab_size": 200}
ENCODERS = {  # (VAE, text encoders)
    "sdxl": (VAE, [CLIP_L, BIG_G]),
    "sd15": (VAE, [CLIP_L]),
    "mid": (VAE | {"block_out_channels": (32, 64, 128, 128)}, [MID_TEXT]),
    "sdxl-small": (VAE | {"block_out_channels": (32,) * 4}, [CLIP_L | FEW, BIG_G | FEW]),
    "sd15-small": (VAE | {"block_out_channels": (32,) * 4}, [CLIP_L | FEW]),
}
SCHEDULE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
    "clip_sample": False,
}  # fmt: skip


def read_config(name: str) -> dict:
    """The UNet configuration of a name above, or of a folder. Raises UserError."""
    if name == "tiny" and not Path(hub.PRESETS[name]).is_dir():
        raise UserError("--model tiny: assets/tiny-sdxl is not there; name a folder.")
    config = CONFIGS.get(name) or hub.read_config(name, "unet")
    if name not in CONFIGS and config.get("_class_name") != "UNet2DConditionModel":
        raise UserError(f"--model {name}: is no UNet2DConditionModel, nor has one.")
    return config


def sizes(name: str, side: int | None = None) -> tuple[dict, dict, list[dict]]:
    """Configurations of UNet, VAE and text encoders; side: of the latents, in place of the usual,
    which no weight depends on."""
    unet, (vae, texts) = CONFIGS[name], ENCODERS[name]
    unet = unet | {"sample_size": side or unet["sample_size"]}
    return unet, vae | {"sample_size": 8 * unet["sample_size"]}, texts


def modules(name: str, side: int | None = None, **tokens: int) -> dict[str, torch.nn.Module]:
    """UNet, VAE and text encoders at random weights, by their names in a pipeline, of the default
    device and dtype. tokens: ids of the special ones."""
    unet, vae, texts = sizes(name, side)
    parts = {"unet": diffusers.UNet2DConditionModel(**unet), "vae": diffusers.AutoencoderKL(**vae)}
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for (part, kind), text in zip(kinds.items(), texts, strict=False):
        parts[part] = kind(CLIPTextConfig(**{"vocab_size": 49408, **text, **tokens}))
    return parts


def build(
    name: str, device="cpu", dtype=torch.float32, side: int | None = None
) -> diffusers.DiffusionPipeline:
    """A pipeline at random weights, drawn on the device in its dtype."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    tokens = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id") for key in ("bos", "eos")}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            parts = modules(name, side, **tokens)
    finally:
        torch.set_default_dtype(before)
    for part in parts.values():
        part.requires_grad_(False).eval()
    parts |= {"tokenizer": tokenizer, "scheduler": diffusers.DDIMScheduler(**SCHEDULE)}
    if "text_encoder_2" in parts:
        parts |= {"tokenizer_2": tokenizer, "add_watermarker": False}
        return diffusers.StableDiffusionXLPipeline(**parts)
    none = {"safety_checker": None, "feature_extractor": None}
    return diffusers.StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)
