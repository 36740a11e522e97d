"""The frozen base of a LoRA run in 8 or 4 bits: --base-weights int8 or nf4.

    int8   W ~ s q, q in -127..127, a scale s = max |row| / 127 a row            1.0 byte a weight
    nf4    16 values by the quantiles of a normal, a scale a block of 64         0.56 bytes a weight
           (QLoRA, Dettmers et al., 2305.14314), by the library bitsandbytes

Quantised are the linear layers of the transformer blocks with their proj_in and proj_out: 2,208 M
of SDXL's 2,567 M parameters, 242 M of SD1.5's 860 M. Convolutions and time embeddings stay. A
product is taken with W in the dtype of its input, which is made anew each time and not kept for the
backward. Policy and reference are this base with and without the adapters; what a run saves is the
adapters alone, which are then put on the model's own weights.
"""

import logging

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from system.hub import one_sentence

KINDS = ("int8", "nf4")
LIBRARY = "bitsandbytes==0.50.2"
BLOCK = 64  # weights that share a scale of nf4


def check(kind: str):
    """Raises UserError where such layers cannot be made or used on this machine's device."""
    device = get_accelerator().current_device_name()

    def attempt():
        layer = QuantizedLinear(torch.nn.Linear(BLOCK, BLOCK, device=device), kind)
        layer(torch.ones(1, BLOCK, device=device))

    sentence = f"--base-weights {kind}: does not work on this {device.partition(':')[0]}"
    if kind == "nf4":
        sentence += f" (it takes a library: pip install {LIBRARY})"
    one_sentence(attempt, sentence)


def quantize(unet: torch.nn.Module, kind: str):
    """Replace the frozen linear layers of the UNet's attention blocks, in place, one at a time on
    the device. The names of all else stay, so those of adapters."""
    device = get_accelerator().current_device_name()
    for name, layer in list(unet.named_modules()):
        if _is_quantized(name, layer):
            unet.set_submodule(name, QuantizedLinear(layer.to(device), kind))


def saved_bytes(unet: torch.nn.Module, kind: str) -> int:
    """By how much `quantize` makes the weights smaller; the UNet may be on the meta device."""
    layers = [layer for name, layer in unet.named_modules() if _is_quantized(name, layer)]
    numbers = sum(layer.weight.numel() for layer in layers)
    before = sum(layer.weight.nbytes for layer in layers)
    if kind == "int8":
        return before - numbers - 4 * sum(layer.out_features for layer in layers)
    return before - numbers // 2 - 4 * numbers // BLOCK


def _is_quantized(name: str, layer: torch.nn.Module) -> bool:
    if not isinstance(layer, torch.nn.Linear) or ".attentions." not in name:
        return False
    weight = layer.weight
    return not weight.requires_grad and weight.numel() % BLOCK == 0  # adapters require it


class QuantizedLinear(torch.nn.Module):
    """y = x W^T + b of a frozen linear layer whose W is kept in few bits."""

    def __init__(self, layer: torch.nn.Linear, kind: str):
        super().__init__()
        self.kind, self.shape, self.bias = kind, layer.weight.shape, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes, scale = _encode(layer.weight.detach(), kind)
        # No state of the model: a checkpoint holds the adapters alone.
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.codes.device)  # fp32, also where an engine rounds its module
        return self

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        return _decode(self.codes, self.scale, self.shape, self.kind, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """x W^T + b; its gradient for x makes W again."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.weight_in(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ ctx.layer.weight_in(grad.dtype), None


def _encode(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(codes, scales in fp32) of a matrix."""
    if kind == "int8":
        weight = weight.float()
        scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo().tiny)
        return (weight / scale).round().to(torch.int8), scale
    # As rows of one block: on a CPU 0.50.2 reads rows of other lengths by other blocks.
    blocks = weight.reshape(-1, BLOCK)
    codes, state = _bitsandbytes().quantize_4bit(blocks, blocksize=BLOCK, quant_type=kind)
    return codes, state.absmax


def _decode(codes: Tensor, scale: Tensor, shape, kind: str, dtype: torch.dtype) -> Tensor:
    if kind == "int8":
        return (codes * scale).to(dtype)
    library, rows = _bitsandbytes(), torch.Size((scale.numel(), BLOCK))
    state = library.QuantState(scale, shape=rows, dtype=dtype, blocksize=BLOCK, quant_type=kind)
    return library.dequantize_4bit(codes, state).reshape(shape)


def _bitsandbytes():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that are not needed
    import bitsandbytes.functional

    return bitsandbytes.functional
