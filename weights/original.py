"""SDXL and SD1.5 in the original layout: a whole model in one .safetensors file, read and written.

    module = load_part(UNet2DConditionModel, "model.safetensors", "unet", torch.float32)
    save(pipeline, "sdxl", Path("model.safetensors"), torch.float16, "my model")

diffusers reads the layout, and has nothing that writes it. Names of the layout are those of its
first code: latent-diffusion's UNet and VAE (CompVis/stable-diffusion, ldm/modules/diffusionmodules;
in SDXL Stability-AI/generative-models, sgm/modules/diffusionmodules), transformers' CLIP, and for
SDXL's second encoder open_clip's. Tensors are the same but for four changes of form:

1. The VAE's attention has 1x1 convolutions, (C, C, 1, 1), where diffusers has linear layers.
2. open_clip keeps query, key and value of a layer in one matrix, and its projection transposed.
3. CLIP's position_ids, (1, tokens) int64, are in the file. They are counted up, not learned.
4. open_clip's logit_scale is in the file. No picture depends on it; programs that look for it find
   its upper limit, ln 100, which training reaches.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from system.files import UserError
from system.hub import layout_of, one_sentence
from system.single import PARTS, architecture_of
from weights.modules import modules_of
from weights.names import original_name

# -------------------------------------------------------------------------------------------------
# Read.


def load_part(cls, file: str, part: str, dtype: torch.dtype) -> torch.nn.Module:
    """A part of a single file, "unet", "vae", "text_encoder" or "text_encoder_2", as an instance of
    cls whose configuration is that of `layout_of`. Raises UserError where a weight is absent, or
    one has no place."""
    prefix = PARTS[architecture_of(file)][part]
    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if name.startswith(prefix)]
        tensors = {name: opened.get_tensor(name) for name in names}
    counted = {k: x for k, x in tensors.items() if not k.removeprefix(prefix).startswith("loss.")}
    options = {"config": layout_of(file), "subfolder": part, "torch_dtype": dtype}

    def load():
        if part.startswith("text_encoder"):
            return create_diffusers_clip_model_from_ldm(cls, tensors, **options)
        return cls.from_single_file(counted, **options)

    said = f"The {part} of '{file}' does not fit the configuration of '{layout_of(file)}'"
    try:
        module = one_sentence(load, said)
    except UserError as error:
        if isinstance(error.__cause__, NotImplementedError):  # what is absent has no data to move
            raise UserError(f"{said}: it lacks weights.") from error
        raise
    held = sum(weight.numel() for weight in module.state_dict().values())
    given = {k: x for k, x in counted.items() if not k.endswith(("position_ids", "logit_scale"))}
    if (count := sum(x.numel() for x in given.values())) != held:
        raise UserError(f"{said}: it has {count:,} weights, and {held:,} have a place.")
    return module


# -------------------------------------------------------------------------------------------------
# Write.


def save(pipeline: DiffusionPipeline, kind: str, file: Path, dtype: torch.dtype, title: str):
    """Write a pipeline of that architecture, every weight in dtype, which its modules take as well,
    with what `single.scheduler_of` and other programs read of its noise schedule. Raises UserError
    where a weight overflows."""
    weights = tensors_of({k: m.to(dtype) for k, m in modules_of(pipeline).items()}, kind)
    weights = {k: x.to(dtype) if x.is_floating_point() else x for k, x in weights.items()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{name} overflows in this precision; give --dtype fp32 or bf16.")
    schedule = pipeline.scheduler.config
    predicts_v = schedule.get("prediction_type") == "v_prediction"
    if predicts_v:
        weights["v_pred"] = torch.empty(0)
    if schedule.get("rescale_betas_zero_snr"):
        weights["ztsnr"] = torch.empty(0)
    named = {"sdxl": "stable-diffusion-xl-v1-base", "sd15": "stable-diffusion-v1"}
    facts = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",  # github.com/Stability-AI/ModelSpec
        "modelspec.architecture": named[kind],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
    }
    save_file(weights, file, metadata=facts)


def tensors_of(modules: dict[str, torch.nn.Module], kind: str) -> dict[str, Tensor]:
    """The tensors of a pipeline's UNet, VAE and text encoders, by their names in the original
    layout; on any device, the meta device too."""
    found: dict[str, Tensor] = {}
    for part, prefix in PARTS[kind].items():
        items = _CONVERTERS[part](modules[part])
        found |= {prefix + name: tensor.contiguous() for name, tensor in items}
    return found


Items = Iterator[tuple[str, Tensor]]


def _replaced(name: str, table: dict[str, str]) -> str:
    """The name with its first part that stands in the table replaced."""
    for old, new in table.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _unet(module: UNet2DConditionModel) -> Items:
    for name, tensor in module.state_dict().items():
        layer, kind = name.rsplit(".", 1)
        yield f"{original_name(layer, module.config)}.{kind}", tensor


VAE_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v."}
VAE_ATTENTION |= {"to_out.0.": "proj_out."}


def _vae(module: torch.nn.Module) -> Items:
    levels = len(module.config.block_out_channels)
    for name, tensor in module.state_dict().items():
        if place := re.match(r"(\w+)\.(down|up)_blocks\.(\d+)\.([a-z]+)\.(\d+)\.(.*)", name):
            half, side, level, kind, number, rest = place.groups()
            level = int(level) if side == "down" else levels - 1 - int(level)  # by resolution
            sampler = {"downsamplers": "downsample", "upsamplers": "upsample"}.get(kind)
            rest = _replaced(rest, {"conv_shortcut.": "nin_shortcut."})
            name = f"{half}.{side}.{level}.{sampler or f'block.{number}'}.{rest}"
        elif place := re.match(r"(\w+)\.mid_block\.resnets\.(\d)\.(.*)", name):
            name = f"{place[1]}.mid.block_{int(place[2]) + 1}.{place[3]}"
        elif place := re.match(r"(\w+)\.mid_block\.attentions\.0\.(.*)", name):
            name = f"{place[1]}.mid.attn_1.{_replaced(place[2], VAE_ATTENTION)}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        yield name.replace("conv_norm_out.", "norm_out."), tensor


def _clip(module: torch.nn.Module) -> Items:
    tokens = module.config.max_position_embeddings
    device = next(module.parameters()).device
    yield "text_model.embeddings.position_ids", torch.arange(tokens, device=device)[None]
    for name, tensor in module.state_dict().items():
        yield f"text_model.{name.removeprefix('text_model.')}", tensor


OPEN_CLIP = {
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.final_layer_norm.": "ln_final.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}


def _open_clip(module: torch.nn.Module) -> Items:
    weights = module.state_dict()
    device = next(module.parameters()).device
    yield "logit_scale", torch.tensor(math.log(100), device=device)
    yield "positional_embedding", weights.pop("text_model.embeddings.position_embedding.weight")
    yield "text_projection", weights.pop("text_projection.weight").T
    for name, tensor in weights.items():
        layer = re.match(r"text_model\.encoder\.layers\.(\d+)\.(.*)", name)
        block, rest = (f"transformer.resblocks.{layer[1]}.", layer[2]) if layer else ("", name)
        if attention := re.match(r"self_attn\.q_proj\.(\w+)", rest):
            three = [weights[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            yield f"{block}attn.in_proj_{attention[1]}", torch.cat(three)
        elif not rest.startswith(("self_attn.k_proj", "self_attn.v_proj")):
            yield block + _replaced(rest, OPEN_CLIP), tensor


_CONVERTERS = {"unet": _unet, "vae": _vae, "text_encoder": _clip, "text_encoder_2": _open_clip}
