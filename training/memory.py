"""How much memory a training step takes on each GPU, by part, and how much disk a run, beforehand.

memory_table.py has the command line and docs/memory.md. The estimate follows what DeepSpeed 0.19.8
allocates and what autograd keeps. It is the largest of three peaks, the end of a forward, the
optimizer's step, or the VAE at a picture:

    weights        the policy's, with adapters; sharded by ZeRO-3
    reference      the frozen copy; LoRA has none, its reference is the UNet without adapters
    gradients      what is accumulated over micro-steps
    optimizer      AdamW's two moments and the fp32 master copy
    buckets        gradients on their way to other ranks; under ZeRO-3 also the gathered weights
    activations    what the backward needs; with checkpointing also its largest block, recomputed
    step           what AdamW's step takes beyond buckets and activations, which are free by then
    vae            what encoding an image, or decoding a sample picture, takes beyond all of these
    encoders       VAE and text encoders

Not in it: the CUDA context, the kernels' workspaces, gradients of activations, fragments.
"""

import contextlib
import functools
import json
import math
import os
import shutil
from argparse import Namespace
from pathlib import Path
from unittest import mock

import torch
from torch.autograd.graph import saved_tensors_hooks

import model
from training import lora
from training.cost import build, random_inputs

GIB = 2**30
# DeepSpeed's defaults, in elements: reduce_bucket_size, stage3_max_live_parameters,
# stage3_prefetch_bucket_size, sub_group_size.
BUCKET, LIVE, PREFETCH, SUB_GROUP = 500_000_000, 10**9, 50_000_000, 10**9
# Parameters: AutoencoderKL, CLIP ViT-L/14's text model, OpenCLIP ViT-bigG/14's with its projection.
VAE, CLIP_L, BIG_G = 83_653_863, 123_060_480, 694_659_840
TEXT = {"sdxl": CLIP_L + BIG_G, "sd15": CLIP_L}
ENCODE, DECODE = 640, 768  # elements a pixel that the VAE holds at its peak

# -------------------------------------------------------------------------------------------------
# Activations, counted on the meta device.


class FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: q, k, v, output, and the fp32 logsumexp of each query."""

    @staticmethod
    def forward(ctx, q, k, v):
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)  # as the kernels do
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def kept_by_forward(unet, pairs: int, checkpointing: bool) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward of 2 x pairs images: (all along, largest block).

    All along: distinct storages that are no weights. With checkpointing (in diffusers of every
    transformer block, and every resnet but the middle's first) these are mostly the blocks' inputs,
    and the largest block is what recomputing one adds; without, it is 0."""
    weights = {w.untyped_storage()._cdata for w in [*unet.parameters(), *unet.buffers()]}
    kept, largest = {}, 0

    def keep(into: dict, x):
        storage = x.untyped_storage()  # held, so that its address stays its own
        if storage._cdata not in weights:
            into[storage._cdata] = storage
        return x

    def watch(into: dict):
        return saved_tensors_hooks(functools.partial(keep, into), lambda x: x)

    def size(storages: dict) -> int:
        return sum(storage.nbytes() for storage in storages.values())

    def checkpoint(block, *inputs):
        nonlocal largest
        with watch(inside := {}):
            out = block(*inputs)
        for x in inputs:
            if isinstance(x, torch.Tensor) and inside:  # else there is nothing to recompute
                keep(kept, x)
        largest = max(largest, size({k: v for k, v in inside.items() if k not in kept}))
        return out

    if checkpointing:
        unet.enable_gradient_checkpointing(checkpoint)
    x0, cond = random_inputs(unet, pairs)
    t = torch.zeros(2 * pairs, dtype=torch.int64, device=unet.device)
    functions = {
        "scaled_dot_product_attention": lambda q, k, v, **_: FusedAttention.apply(q, k, v),
        "linear": torch._C._nn.linear,  # torch's own, also where ZeRO-3 has put its one before
    }
    with mock.patch.multiple(torch.nn.functional, **functions), watch(kept):
        model.predict_noise(unet, x0, t, cond, torch.ones(1000, device=unet.device))
    return size(kept), largest


@functools.cache
def _counted(
    config: str, dtype: torch.dtype, rank: int | None, targets: str, checkpointing: bool
) -> tuple[int, int, int]:
    """(parameters, those of adapters, bytes of activations a pair); config: JSON."""
    unet, adapters = build(json.loads(config), "meta", dtype), 0
    parameters = sum(weight.numel() for weight in unet.parameters())
    if rank:
        with torch.device("meta"):
            lora.attach(unet, rank, rank, targets)
        torch.nn.Module.to(unet, dtype)  # as the engine does; diffusers' own `to` warns
        adapters = sum(w.numel() for w in unet.parameters() if w.requires_grad)
    return parameters, adapters, sum(kept_by_forward(unet, 1, checkpointing))


# -------------------------------------------------------------------------------------------------
# The rest, by arithmetic.


def state(
    parameters: int,
    *,
    stage: int,
    world: int,
    dtype: torch.dtype,
    reference: bool = True,
    adapters: int = 0,
    grad_accum_fp32: bool = True,
    reduce_fp32: bool = True,
    offload: bool = False,
    bucket: int = BUCKET,
) -> dict[str, float]:
    """GiB a rank of all but activations and encoders; adapters: their parameters, 0 for none.

    "step" is here what the optimizer's step takes, in place of buckets and activations; "vae" is
    the part of the buckets that stays while the VAE works. With t trained parameters of s bytes, w
    ranks, and gradients that are reduced in c bytes, which is communication_data_type (files:
    deepspeed/runtime/):

    ZeRO-1    bf16_optimizer.py: s t of raw gradients and 4 t of accumulated ones on every rank
    ZeRO-2    zero/stage_1_and_2.py: 4 t / w of gradients; two buckets of s, whatever the size of
              the model, and what is in one flattened, then as c, while it is reduced
    ZeRO-3    zero/stage3.py: 4 t / w of gradients; one bucket of c, for good, and what is in it
              flattened; weights gathered up to stage3_max_live_parameters and a prefetch, on one
              rank none
    offload   the optimizer is on the CPU; under ZeRO-3 the gradients, too, under ZeRO-2 fp32 ones
              stay on the GPU
    AdamW     torch's foreach step takes the root of the second moment, 4 t / w; under ZeRO-3 that
              and a copy of the gradients, by sub-groups

    ZeRO-0 is plain fp32. Raises ValueError for offload below ZeRO-2."""
    if offload and stage < 2:
        raise ValueError("offload needs ZeRO-2 or ZeRO-3")
    size, trained = dtype.itemsize, adapters or parameters
    accumulated, sent = (4 if fp32 else size for fp32 in (grad_accum_fp32, reduce_fp32))
    own = [trained / (world if stage >= n else 1) for n in (0, 1, 2)]  # a rank's share in ZeRO-n
    shards = world if stage == 3 else 1
    held = {
        "weights": (parameters + adapters) * size / shards,
        "reference": parameters * size / shards if reference and not adapters else 0,
        "gradients": own[2] * accumulated,
        "optimizer": own[1] * (12 if stage else 8),
        "buckets": 0,
        "step": own[1] * 4,
        "vae": 0,
    }
    full = min(bucket, trained)  # of what is allocated
    if stage == 1 and accumulated > size:
        held["gradients"] += trained * size
        held["step"] = max(held["step"], trained * sent * (sent < accumulated))
    elif stage in (1, 2):
        held["buckets"] = 2 * bucket * size + full * (size + sent * (sent != size))
    if stage == 3:
        gathered = 0 if world == 1 else min(parameters + adapters, LIVE + PREFETCH)
        held["buckets"] = (bucket + full) * sent + gathered * size
        held["vae"] = bucket * sent
        held["step"] = 8 * min(own[2], SUB_GROUP) + held["vae"]
    elif accumulated < 4:
        held["step"] += own[1] * 4  # the gradients, in fp32
    if offload:
        held |= {"optimizer": 0, "step": 0}
        if stage == 3 or accumulated == size:
            held["gradients"] = 0
    return {part: size / GIB for part, size in held.items()}


def settings(ds_config: dict) -> dict:
    """What `estimate` has to know of a DeepSpeed configuration: stage, offload, buckets, dtypes."""
    zero = ds_config.get("zero_optimization", {})
    return {
        "stage": zero.get("stage", 0),
        "offload": zero.get("offload_optimizer", {}).get("device", "none") != "none",
        "bucket": int(zero.get("reduce_bucket_size", BUCKET)),
        "grad_accum_fp32": ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32",
        "reduce_fp32": ds_config.get("communication_data_type") == "fp32",
    }


def encoders(architecture: str, dtype: torch.dtype, vae: torch.dtype) -> float:
    """GiB of the text encoders, in dtype, and of the VAE, in its own, of "sdxl" or "sd15"."""
    return (TEXT[architecture] * dtype.itemsize + VAE * vae.itemsize) / GIB


def vae_peak(vae: torch.dtype, trained: int, drawn: int, batch: int) -> float:
    """GiB that the VAE takes beside its weights, at its peak.

    trained: side in pixels of the images, encoded one by one. drawn: of the sample pictures, 0 for
    none; `batch` of them are decoded at once, or as many as model.DECODED allows."""
    decoded = drawn and drawn**2 * max(1, min(batch, model.DECODED // drawn**2))
    return max(ENCODE * trained**2, DECODE * decoded) * vae.itemsize / GIB


def estimate(
    unet_config: dict,
    *,
    stage: int,
    world: int,
    dtype: torch.dtype,
    micro_batch: int,
    latent: int,
    sides: int = 2,
    reference: bool = True,
    checkpointing: bool = True,
    lora_rank: int | None = None,
    targets: str = "attention",
    grad_accum_fp32: bool = True,
    reduce_fp32: bool = True,
    offload: bool = False,
    bucket: int = BUCKET,
    encoders: float = 0.0,
    vae: float = 0.0,
) -> dict[str, float]:
    """GiB a rank by part, as in the header, and their sum, "total"; nothing is loaded.

    latent: side of the latents. sides: images of a pair that are trained on. lora_rank: of the
    adapters, None for full fine-tuning. reduce_fp32: communication_data_type, else the dtype.
    bucket: reduce_bucket_size. encoders: GiB, as of `encoders`. vae: GiB, as of `vae_peak`."""
    config = json.dumps(dict(unet_config) | {"sample_size": latent}, sort_keys=True, default=str)
    parameters, adapters, pair = _counted(config, dtype, lora_rank, targets, checkpointing)
    parts = state(
        parameters, stage=stage, world=world, dtype=dtype, reference=reference, adapters=adapters,
        grad_accum_fp32=grad_accum_fp32, reduce_fp32=reduce_fp32, offload=offload, bucket=bucket,
    )  # fmt: skip
    parts["activations"] = micro_batch * sides / 2 * pair / GIB
    backward = parts["buckets"] + parts["activations"]
    step = max(backward, parts["step"])
    parts |= {"step": step - backward, "vae": max(0.0, parts["vae"] + vae - step)}
    parts["encoders"] = encoders
    return parts | {"total": sum(parts.values())}


# -------------------------------------------------------------------------------------------------
# Disk.


def checkpoints(steps: int, every: int, keep: int, keep_every: int) -> int:
    """How many there are at most: the newest `keep`, those of every `keep_every`th step (0: none),
    and one more while it is written. They are made every `every` steps and after the last."""
    newest = range((steps - 1) // every * every, 0, -every)[:keep]  # when the last one is written
    oldest = newest[-1] if newest else steps
    older = (oldest - 1) // math.lcm(every, keep_every) if keep_every else 0
    return 1 + len(newest) + older


def disk(
    args: Namespace, written: int, encoders: int, dtype: torch.dtype, stage: int
) -> dict[str, int]:
    """Bytes that a run has in its folder at most, by what they are in words.

    args: plan.py's. written: the trained parameters; all of them and `encoders` more are in the
    aligned pipeline, 0 for a LoRA. A checkpoint has 12 bytes a trained parameter, the fp32 weights
    and AdamW's moments, and below ZeRO-3 the weights in dtype. Models are fp32."""
    one, unet = written * (12 + dtype.itemsize * (stage < 3)), 4 * written
    whole, taken = unet + 4 * encoders, {}
    if args.checkpoint_every:
        every = args.checkpoint_every
        count = checkpoints(args.steps, every, args.keep, args.keep_every)
        taken[f"{count} checkpoint(s) of {size(one)}"] = count * one
    if args.export_every:
        count = math.ceil(args.steps / args.export_every)
        taken[f"{count} export(s) of {size(unet)}"] = count * unet
    if args.judge and args.sample_every:
        taken[f"best/ and its successor, {size(2 * unet)}"] = 2 * unet
    return taken | {f"the aligned model, {size(whole)}": whole}


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def room(folder: Path) -> int:
    """Bytes that a run may have in its folder: what is free there, and what it has already."""
    place, own = folder.absolute(), 0
    while not place.exists():
        place = place.parent
    for path, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # a job that runs there deletes some
                own += os.path.getsize(os.path.join(path, file))
    return shutil.disk_usage(place).free + own
