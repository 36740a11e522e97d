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
from collections import Counter
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from system.files import UserError
from system.hub import KOHYA_LORA
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
        adopt(pipeline.unet, args.lora, args.model)
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


def adopt(unet: UNet2DConditionModel, path: str, model_name: str):
    """Freeze the UNet and make a LoRA (file, folder, hub id) its trainable adapter.

    Ranks, alphas and targets are the file's, the dtype is the UNet's. Raises UserError where a
    tensor of the file would be lost; see `loras.read`."""
    if text := loras.text_tensors(path):
        raise UserError(
            f"The LoRA '{path}' has {len(text)} tensors of text encoders, which are not trained "
            "here and would be lost; merge it: --lora-start merge."
        )
    layers = loras.read(path, {"unet": unet}, model_name)["unet"]
    rank, ranks = _most({name: layer.rank for name, layer in layers.items()})
    alpha, alphas = _most({name: layer.alpha for name, layer in layers.items()})
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(layers), **patterns)
    unet.requires_grad_(False)
    unet.add_adapter(config, NAME)
    for name, layer in layers.items():
        adapted = unet.get_submodule(name)
        adapted.lora_A[NAME].weight.data.copy_(layer.down)
        adapted.lora_B[NAME].weight.data.copy_(layer.up)


def _most(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """(the most frequent value, those that differ from it by name)."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {name: value for name, value in values.items() if value != most}


def check(path: str, start: str, model_name: str, unet_config: dict):
    """Raises UserError for a LoRA that training cannot start from: fits it to a UNet without
    weights. Of text encoders, which are merged, only that their tensors are a LoRA is known."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
    if start == "continue":
        adopt(unet, path, model_name)
    else:
        loras.read(path, {"unet": unet}, model_name)


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
    weights: dict[str, Tensor],
    unet: UNet2DConditionModel,
    folder: Path,
    title: str,
    dtype: torch.dtype = torch.float32,
):
    """Write folder/pytorch_lora_weights.safetensors for load_lora_weights of SDXL and SD1.5, and
    folder/comfyui_lora.safetensors for ComfyUI, Forge and A1111, in fp16 (`loras.save_kohya`).

    weights: the full tensors of `trainable`, by its names. What differs from peft's defaults in the
    adapters' settings goes into the first file's metadata, so that alpha != r is not lost, with the
    two patterns, without which diffusers 0.35 raises KeyError. title: shown of the second file."""
    config, default = unet.peft_config[NAME], LoraConfig().to_dict()
    layers = {name.replace(f".{NAME}.", "."): w.to(dtype) for name, w in weights.items()}
    said = {k: v for k, v in config.to_dict().items() if v != default[k]}
    said = {k: sorted(v) if isinstance(v, set) else v for k, v in said.items()}  # one file, always
    always = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    said |= {key: getattr(config, key) for key in always}
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=said
    )
    factors = {}
    for name, down in weights.items():
        if (mark := f".lora_A.{NAME}.") in name:
            place, up = name.split(mark)[0], weights[name.replace("lora_A", "lora_B")]
            alpha = unet.get_submodule(place).lora_alpha[NAME]
            factors[place] = loras.Layer(down, up, float(alpha))
    loras.save_kohya(factors, unet.config, folder / KOHYA_LORA, title)
