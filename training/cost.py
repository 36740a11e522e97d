"""What training costs: UNet calls, FLOPs, memory, time.

The unit is the UNet call: the forward of one image. A backward counts as two, a recomputed
activation as nothing; one where adapters (LoRA) are trained, since the frozen weights need no
gradient. Per image, with the policy's and the reference's forward:

    inpo        inversion + 1 (reference) + 3 (policy), 9.5 on a grid of 10
    dpo, kto                1 (reference) + 3 (policy)
    sft                                     3 (policy), and only the winners' images

Encoders and optimizer are left out.
"""

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

import model


def calls_per_image(method: str, inversion: float, adapters: bool = False) -> float:
    """UNet calls to train on an image; inversion: the mean number that inverting one takes."""
    return 3 - adapters + (method != "sft") + (inversion if method == "inpo" else 0)


def build(config: dict, device, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet at random weights, made on the device in its dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return UNet2DConditionModel.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)


def random_inputs(
    unet: UNet2DConditionModel, pairs: int, tokens: int = 77
) -> tuple[torch.Tensor, dict]:
    """x0 (2P, C, h, w) fp32 and cond of so many tokens, shaped as model.encode_images and
    encode_prompts make them, on the UNet's device."""
    shape, like = unet.config, {"device": unet.device, "dtype": unet.dtype}
    size, added = shape.sample_size, {}
    if shape.addition_embed_type == "text_time":
        pooled = shape.projection_class_embeddings_input_dim - 6 * shape.addition_time_embed_dim
        ids = torch.tensor([8 * size, 8 * size, 0, 0, 8 * size, 8 * size], **like).expand(pairs, 6)
        added = {"text_embeds": torch.randn(pairs, pooled, **like), "time_ids": ids}
        added = {"added_cond_kwargs": added}
    cond = {"encoder_hidden_states": torch.randn(pairs, tokens, shape.cross_attention_dim, **like)}
    x0 = torch.randn(2 * pairs, shape.in_channels, size, size, device=unet.device)
    return x0, model.repeat(cond | added, 2)


def call_flops(config: dict, tokens: int = 77) -> float:
    """FLOPs of a UNet call, the forward of one image, 2 per multiply-add: counted by PyTorch on the
    meta device, where attention is always the same operations."""
    unet = build(config, "meta", torch.float32)
    x0, cond = random_inputs(unet, 1, tokens)
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.predict_noise(unet, x0, t, cond, torch.ones(1000, device="meta"))
    return counter.get_total_flops() / 2
