"""Low-rank adapters on the UNet (LoRA, Hu et al., 2106.09685): attach, switch off, save, load.

    y = W x + alpha/r B A x      W: (out, in), frozen;  A: (r, in) and B: (out, r), trained

Switched off, the adapted UNet is the reference: no second copy of the weights. Training may start

    from nothing             attach: B = 0, the start is the model itself
    from a LoRA, as it is    adopt: its A and B are trained on; the reference is the model without
    from a LoRA, merged      loras.fuse_lora, then attach: W takes alpha/r B A in, text encoders
                             too; the reference is the model with it, and what `save` writes is to
                             be loaded on top of the merged model, not of the original one
"""

from argparse import Namespace
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor

from system.files import UserError
from system.hub import lora_file, one_sentence
from weights import loading, loras

NAME = "default"  # of the adapter: peft's own default, as in the published scripts
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {"attention": ATTENTION, "all": [*ATTENTION, "ff.net.0.proj", "ff.net.2"]}

# -------------------------------------------------------------------------------------------------
# Start.


def trains_adapters(args: Namespace) -> bool:
    return bool(args.lora_rank or (args.lora and args.lora_start == "continue"))


def load_start(args: Namespace, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline that training starts from; of a LoRA run its UNet has the adapters.

    In half precision the UNet's weights are those in fp32, rounded once: what the policy's fp32
    master weights round to before the first step, and what the reference stays."""
    pipeline = loading.load_pipeline(args.model, args.unet, args.vae, dtype)
    if args.lora and args.lora_start == "merge":
        loras.fuse_lora(pipeline, args.lora)
    elif args.lora:
        adopt(pipeline, args.lora)
    if args.lora_rank:
        attach(pipeline.unet, args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
    if args.lora and args.lora_start == "merge" and dtype != torch.float32:  # or round it twice
        pipeline.unet.load_state_dict(load_start(args, torch.float32).unet.state_dict())
    return pipeline


def attach(
    unet: UNet2DConditionModel, rank: int, alpha: float, targets: str = "attention", seed: int = 0
):
    """Freeze the UNet; make its targets' layers W x + alpha/r B A x (2106.09685, Section 4.1).

    A ~ N(0, 1/r^2), B = 0, as in diffusers' train_diffusion_dpo_sdxl.py: the adapted UNet is the
    UNet itself, exactly. A is a function of the seed, drawn on the CPU; in the UNet's dtype."""
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=TARGETS[targets], init_lora_weights="gaussian"
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too
        unet.add_adapter(config, NAME)


def adopt(pipeline: DiffusionPipeline, path: str):
    """Freeze the pipeline's UNet and make a LoRA (file, folder, hub id) its trainable adapter.

    Rank, alpha and targets are the file's, the dtype is the UNet's. Raises UserError where a
    tensor of the file would be lost, or one of the adapter is not in the file."""
    file, sentence = lora_file(path), f"The LoRA '{path}' does not fit the UNet"
    given = tensors_of(path)
    if text := of_text_encoders(given):
        raise UserError(
            f"The LoRA '{path}' has {len(text)} tensors of text encoders, which are not trained "
            "here and would be lost; merge it: --lora-start merge."
        )
    load, unet = pipeline.load_lora_weights, pipeline.unet.requires_grad_(False)
    one_sentence(lambda: load(file, adapter_name=NAME, use_safetensors=True), sentence)
    if len(given) != len(trainable(unet)):  # diffusers only warns of tensors that match nothing
        raise UserError(
            f"{sentence}: it has {len(given)} tensors, the adapter that it describes has "
            f"{len(trainable(unet))}."
        )


def tensors_of(path: str) -> list[str]:
    """The names of a LoRA's tensors, without scales. Raises UserError where it cannot be opened."""
    file = lora_file(path)
    with one_sentence(
        lambda: safe_open(file, "pt"), f"The LoRA '{path}' cannot be read"
    ) as tensors:
        return [key for key in tensors.keys() if not key.endswith(".alpha")]


def of_text_encoders(names: list[str]) -> list[str]:
    return [key for key in names if key.startswith(("text_encoder", "lora_te"))]


def check(path: str, start: str, model_name: str, architecture: str, unet_config: dict):
    """Raises UserError for a LoRA that training cannot start from: adds it to a UNet without
    weights. Of one with text encoders, which is merged, only that it can be opened is known."""
    if start == "merge" and of_text_encoders(tensors_of(path)):
        return
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet, "scheduler": None}
    if architecture == "sdxl":
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
        pipeline = StableDiffusionXLPipeline(**parts)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
        pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.register_to_config(_name_or_path=model_name)
    loras.load_lora(pipeline, path) if start == "merge" else adopt(pipeline, path)


def trainable(unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by name, all that DeepSpeed is to be given."""
    return {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}


def attached(unet: torch.nn.Module) -> bool:
    """Whether it has adapters."""
    return hasattr(unet, "peft_config")


def parameters(unet_config: dict, rank: int, targets: str) -> int:
    """Parameters of an adapter: r (in + out) of each target, on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
        attach(unet, rank, rank, targets)
    return sum(weight.numel() for weight in trainable(unet).values())


# -------------------------------------------------------------------------------------------------
# The reference.


class AdapterOff:
    """The model without its adapters, called like a UNet: the frozen reference y = W x.

    engine: an adapted UNet, or a DeepSpeed engine around one; under ZeRO-3 the forward gathers W
    and leaves A and B alone. It takes no gradient, so a backward with checkpointed activations
    recomputes nothing of it; when it returns or raises, the adapters are on, as the policy's
    forward and the recomputation in its backward want them."""

    def __init__(self, engine: torch.nn.Module):
        self.engine = engine
        self.layers = [layer for layer in engine.modules() if isinstance(layer, BaseTunerLayer)]

    def _switch(self, off: bool):
        for layer in self.layers:  # peft's enable_adapters would change requires_grad as well
            layer._disable_adapters = off

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        self._switch(off=True)
        try:
            return self.engine(*args, **kwargs)
        finally:
            self._switch(off=False)


# -------------------------------------------------------------------------------------------------
# Save.


def save(
    weights: dict[str, Tensor], config: LoraConfig, folder: Path, dtype: torch.dtype = torch.float32
):
    """Write folder/pytorch_lora_weights.safetensors for load_lora_weights of SDXL and SD1.5.

    weights: the full tensors of `trainable`, by its names. config: unet.peft_config[NAME]; what
    differs from peft's defaults goes into the file's metadata, so that alpha != r is not lost, with
    the two patterns, without which diffusers 0.35 raises KeyError."""
    layers = {name.replace(f".{NAME}.", "."): w.to(dtype) for name, w in weights.items()}
    default = LoraConfig().to_dict()
    said = {k: v for k, v in config.to_dict().items() if v != default[k]}
    said = {k: sorted(v) if isinstance(v, set) else v for k, v in said.items()}  # one file, always
    always = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    said |= {key: getattr(config, key) for key in always}
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=said
    )
