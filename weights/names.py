"""Names of a UNet's layers in the original layout (Stability's generative-models and its LDM)."""

from collections.abc import Mapping

OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_name(path: str, config: Mapping) -> str:
    """The original name of a layer of diffusers' UNet2DConditionModel.

        down_blocks.1.attentions.0.proj_in -> input_blocks.4.1.proj_in      (two layers a block)

    There the blocks are counted through, samplers among them, and 0, 1, 2 in a block are ResNet,
    attention and upsampler. config: the UNet's. Source: openaimodel.py of generative-models."""
    if path in OUTER:
        return OUTER[path]
    side, *rest = path.split(".")
    if side == "mid_block":
        kind, index, *rest = rest
        block = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
    elif side in ("down_blocks", "up_blocks"):
        block, kind, index, *rest = rest
        block, index, layers = int(block), int(index), config["layers_per_block"]
        if isinstance(layers, int):
            layers = [layers] * len(config["block_out_channels"])
        sizes = [n + 1 for n in (layers if side == "down_blocks" else reversed(layers))]
        first = sum(sizes[:block])
        if kind == "downsamplers":
            return f"input_blocks.{first + sizes[block]}.0.op"
        if kind == "upsamplers":
            attends = "Attn" in config["up_block_types"][block]
            return f"output_blocks.{first + sizes[block] - 1}.{2 if attends else 1}.conv"
        number = first + index + (side == "down_blocks")  # input_blocks.0 is conv_in
        block = f"{'input' if side == 'down_blocks' else 'output'}_blocks.{number}"
        block += f".{1 if kind == 'attentions' else 0}"
    else:
        return path
    if kind == "resnets":
        rest[0] = RESNET.get(rest[0], rest[0])
    return ".".join([block, *rest])
