"""The original layout of the small checkpoints of conftest.py, by hand: a table of where each
module of diffusers is found there. Nothing of weights/ is used.

Two levels, one layer each: input_blocks are 0 the first convolution, 1 the upper level's layer, 2
its downsampler, 3 the lower level's layer; output_blocks are 0 and 1 the lower level's two layers,
with its upsampler in 1, then 2 and 3 the upper level's."""

import torch
from safetensors.torch import save_file

RESNETS = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
}
IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET |= {f"{a}.{x}": f"{b}.{y}" for a, b in RESNETS.items() for x, y in IN_RESNET.items()}
VAE = {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.down_blocks.0.resnets.0": "encoder.down.0.block.0",
    "encoder.down_blocks.0.downsamplers.0.conv": "encoder.down.0.downsample.conv",
    "encoder.down_blocks.1.resnets.0": "encoder.down.1.block.0",
    "encoder.down_blocks.1.resnets.0.conv_shortcut": "encoder.down.1.block.0.nin_shortcut",
    "encoder.mid_block.resnets.0": "encoder.mid.block_1",
    "encoder.mid_block.attentions.0.group_norm": "encoder.mid.attn_1.norm",
    "encoder.mid_block.attentions.0.to_q": "encoder.mid.attn_1.q",
    "encoder.mid_block.attentions.0.to_k": "encoder.mid.attn_1.k",
    "encoder.mid_block.attentions.0.to_v": "encoder.mid.attn_1.v",
    "encoder.mid_block.attentions.0.to_out.0": "encoder.mid.attn_1.proj_out",
    "encoder.mid_block.resnets.1": "encoder.mid.block_2",
    "encoder.conv_norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.mid_block.resnets.0": "decoder.mid.block_1",
    "decoder.mid_block.attentions.0.group_norm": "decoder.mid.attn_1.norm",
    "decoder.mid_block.attentions.0.to_q": "decoder.mid.attn_1.q",
    "decoder.mid_block.attentions.0.to_k": "decoder.mid.attn_1.k",
    "decoder.mid_block.attentions.0.to_v": "decoder.mid.attn_1.v",
    "decoder.mid_block.attentions.0.to_out.0": "decoder.mid.attn_1.proj_out",
    "decoder.mid_block.resnets.1": "decoder.mid.block_2",
    "decoder.up_blocks.0.resnets.0": "decoder.up.1.block.0",
    "decoder.up_blocks.0.resnets.1": "decoder.up.1.block.1",
    "decoder.up_blocks.0.upsamplers.0.conv": "decoder.up.1.upsample.conv",
    "decoder.up_blocks.1.resnets.0": "decoder.up.0.block.0",
    "decoder.up_blocks.1.resnets.0.conv_shortcut": "decoder.up.0.block.0.nin_shortcut",
    "decoder.up_blocks.1.resnets.1": "decoder.up.0.block.1",
    "decoder.conv_norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
}
BIG_G = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def renamed(module, table: dict[str, str], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a module under the longest entry of the table that fits each of them."""
    found = {}
    for name, tensor in module.state_dict().items():
        old = max((old for old in table if name.startswith(f"{old}.")), key=len)
        found[prefix + table[old] + name.removeprefix(old)] = tensor
    return found


def vae(module) -> dict[str, torch.Tensor]:
    found = renamed(module, VAE, "first_stage_model.")
    for name in found:
        if name.endswith(("attn_1.q.weight", "k.weight", "v.weight", "proj_out.weight")):
            if found[name].ndim == 2:
                found[name] = found[name].reshape(*found[name].shape, 1, 1)
    return found


def clip(module, prefix: str) -> dict[str, torch.Tensor]:
    found = {f"{prefix}text_model.{name}": x for name, x in module.state_dict().items()}
    positions = torch.arange(module.config.max_position_embeddings).reshape(1, -1)
    return found | {f"{prefix}text_model.embeddings.position_ids": positions}


def big_g(module, prefix: str) -> dict[str, torch.Tensor]:
    weights = module.state_dict()
    text = "text_model."
    found = {
        "token_embedding.weight": weights[f"{text}embeddings.token_embedding.weight"],
        "positional_embedding": weights[f"{text}embeddings.position_embedding.weight"],
        "ln_final.weight": weights[f"{text}final_layer_norm.weight"],
        "ln_final.bias": weights[f"{text}final_layer_norm.bias"],
        "text_projection": weights["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(4.6052),
    }
    for i in range(module.config.num_hidden_layers):
        layer, block = f"{text}encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            three = [weights[f"{layer}.self_attn.{one}_proj.{kind}"] for one in "qkv"]
            found[f"{block}.attn.in_proj_{kind}"] = torch.cat(three)
            for old, new in BIG_G.items():
                found[f"{block}.{new}.{kind}"] = weights[f"{layer}.{old}.{kind}"]
    return {prefix + name: x for name, x in found.items()}


def tensors(pipeline) -> dict[str, torch.Tensor]:
    """A pipeline of one of the small checkpoints in the original layout."""
    found = renamed(pipeline.unet, UNET, "model.diffusion_model.") | vae(pipeline.vae)
    if second := getattr(pipeline, "text_encoder_2", None):
        found |= clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        return found | big_g(second, "conditioner.embedders.1.model.")
    return found | clip(pipeline.text_encoder, "cond_stage_model.transformer.")


def write(file, pipeline, dtype=torch.float32, **more):
    """Write it, its weights in that dtype, with more tensors or, as None, without some of it."""
    found = {k: x.to(dtype) if x.is_floating_point() else x for k, x in tensors(pipeline).items()}
    found |= more
    save_file({k: x.contiguous().clone() for k, x in found.items() if x is not None}, file)
    return file
