"""What a run takes: UNet calls and FLOPs, GPU memory by part, disk.

Work is counted in UNet calls: the forward of one image is one call, its backward two, and a
recomputed activation nothing. Where adapters (LoRA) are trained a backward is one call, since the
frozen weights need no gradient. VAE, text encoders and optimizer are left out.

Memory follows what DeepSpeed 0.19.8 allocates and what autograd keeps. It is the largest of three
peaks: the end of a forward, the optimizer's step, or the VAE at work. Its parts:

    weights        the policy's, with adapters; sharded by ZeRO-3
    reference      the frozen copy; LoRA has none, its reference is the UNet without adapters
    gradients      what is accumulated over micro-steps
    optimizer      AdamW's two moments and the fp32 master copy
    buckets        gradients on their way to other ranks; under ZeRO-3 also the gathered weights
    activations    what the backward needs; with checkpointing also its largest block, recomputed
    step           what AdamW's step takes beyond buckets and activations, which are free by then
    vae            what encoding images, or decoding sample pictures, takes beyond all of these
    encoders       the weights of VAE and text encoders

It leaves out the CUDA context, the kernels' workspaces, gradients of activations and fragments.

Below, args are the flags of train_inpo.py, and plan is the Plan of training/plan.py.
"""

import contextlib
import functools
import json
import math
import os
import shutil
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import model
from training import adamw8bit, cache, lora, quantized
from training.latents import inversion_calls, stratum
from training.methods import OBJECTIVES

GIB = 2**30
TOY = 10**8  # parameters of a UNet; with fewer its encoders are as small, and nobody plans memory


def images_per_pair(objective: str) -> int:
    """How many images of a pair are trained on: SFT takes the winner alone."""
    return OBJECTIVES[objective].images


def lora_rank(args: Namespace) -> int | None:
    """The rank of the adapters, None where all weights are trained.

    The rank of a LoRA that is trained on stands in its file; it is counted as 64."""
    return (args.lora_rank or 64) if lora.trains_adapters(args) else None


# -------------------------------------------------------------------------------------------------
# Work.


def calls_per_image(
    objective: str, inverting: Iterable[int] = (), adapters: bool = False
) -> dict[str, float]:
    """UNet calls of a training step on one image, by purpose. inverting: those of inversions, see
    latents.inversion_calls; their mean counts."""
    inverting = list(inverting)
    calls = {"to invert": fmean(inverting)} if any(inverting) else {}
    if OBJECTIVES[objective].reference:
        calls["reference"] = 1
    return calls | {"to train": 2 if adapters else 3}


def unet_calls(
    objective: str, pairs: int, inverting: Iterable[int] = (), adapters: bool = False
) -> float:
    """UNet calls of training on so many pairs."""
    per_image = sum(calls_per_image(objective, inverting, adapters).values())
    return pairs * images_per_pair(objective) * per_image


def call_flops(config: dict, tokens: int = 77) -> float:
    """FLOPs of a UNet call, 2 per multiply-add: counted by PyTorch on the meta device, where
    attention is always the same operations."""
    return _counted_flops(json.dumps(config, sort_keys=True, default=str), tokens)


@functools.cache  # a run asks when it plans, and at its end
def _counted_flops(config: str, tokens: int) -> float:
    unet = build(json.loads(config), "meta", torch.float32)
    x0, cond = random_inputs(unet, 1, tokens)
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.predict_noise(unet, x0, t, cond, torch.ones(1000, device="meta"))
    return counter.get_total_flops() / 2


def mean_call_flops(plan) -> float:
    """FLOPs of a UNet call, over the shapes of the pairs; a shape on its side takes as many."""
    flops = 0.0
    for shape, share in plan.shapes.items():
        sides = sorted(side // plan.factor for side in shape)
        flops += share * call_flops(plan.unet_config | {"sample_size": sides}, plan.tokens)
    return flops


def work(args: Namespace, plan, cells: Iterable[int]) -> dict:
    """What the whole run has to do, over all ranks; with each cell once, what it is expected to."""
    pairs = args.steps * args.batch
    inverting = inversion_calls(args, cells)
    calls = unet_calls(args.objective, pairs, inverting, lora.trains_adapters(args))
    flops = calls * mean_call_flops(plan)
    done = {"method": args.method, "steps": args.steps, "pairs": pairs}
    return done | {"unet_calls": round(calls), "flops": flops}


def work_done(args: Namespace, plan) -> dict:
    """What a whole run had to do, for cost.json: with the cells that it has drawn."""
    micro_steps = range(args.steps * plan.accumulation)
    return work(args, plan, (stratum(args.seed, n, plan.strata) for n in micro_steps))


# FLOP/s of a dense bf16 product that accumulates in fp32: measured on an H200, from NVIDIA's
# whitepapers on Ada and GA102. Published scripts of this kind reach about a fifth: SmPO's 151
# A800-hours are 19 % of that card's peak.
RATES, SHARE = {"H200": 790e12, "RTX 4090": 165e12, "RTX 3090": 71e12}, 0.2


def time_in_words(flops: float, world: int) -> str:
    """Hours of a run on so many GPUs of each kind, were they to reach SHARE of RATES."""
    listed = ", ".join(
        f"{flops / (SHARE * rate * world) / 3600:,.1f} h on {world} {card}"
        for card, rate in RATES.items()
    )
    rates = ", ".join(f"{rate / 1e12:.0f}" for rate in RATES.values())
    return (
        f"computed, not measured: {listed}, at {SHARE:.0%} of {rates} TFLOP/s, without encoders, "
        "recomputation and samples"
    )


# -------------------------------------------------------------------------------------------------
# A UNet at random weights, and its inputs.


def build(config: dict, device, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet at random weights, made on the device in its dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return UNet2DConditionModel.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)


def random_inputs(unet, pairs: int, tokens: int = 77) -> tuple[torch.Tensor, dict]:
    """x0 (2P, C, h, w) fp32 and cond of so many tokens, shaped as model.encode_images and
    encode_prompts make them, on the UNet's device."""
    shape, like = unet.config, {"device": unet.device, "dtype": unet.dtype}
    size = shape.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    cond = {"encoder_hidden_states": torch.randn(pairs, tokens, shape.cross_attention_dim, **like)}
    if shape.addition_embed_type == "text_time":
        pooled = shape.projection_class_embeddings_input_dim - 6 * shape.addition_time_embed_dim
        ids = [8 * height, 8 * width, 0, 0, 8 * height, 8 * width]
        ids = torch.tensor(ids, **like).expand(pairs, 6)
        added = {"text_embeds": torch.randn(pairs, pooled, **like), "time_ids": ids}
        cond["added_cond_kwargs"] = added
    x0 = torch.randn(2 * pairs, shape.in_channels, height, width, device=unet.device)
    return x0, model.repeat(cond, 2)


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
    transformer block, and of every resnet but the middle's first) these are mostly the blocks'
    inputs, and the largest block is what recomputing one adds; without, it is 0."""
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
    config: str,
    dtype: torch.dtype,
    rank: int | None,
    targets: str,
    checkpointing: bool,
    base_weights: str | None,
) -> tuple[int, int, int, int]:
    """(parameters, those of adapters, bytes of activations a pair, those that base_weights saves);
    config: JSON."""
    unet, adapters, saved = build(json.loads(config), "meta", dtype), 0, 0
    parameters = sum(weight.numel() for weight in unet.parameters())
    if rank:
        with torch.device("meta"):
            lora.attach(unet, rank, rank, targets)
        torch.nn.Module.to(unet, dtype)  # as the engine does; diffusers' own `to` warns
        adapters = sum(weight.numel() for weight in lora.trainable(unet).values())
    if base_weights:
        saved = quantized.saved_bytes(unet, base_weights)
    return parameters, adapters, sum(kept_by_forward(unet, 1, checkpointing)), saved


# -------------------------------------------------------------------------------------------------
# The rest of the memory, by arithmetic.

# DeepSpeed's defaults, in elements: reduce_bucket_size, stage3_max_live_parameters,
# stage3_prefetch_bucket_size, sub_group_size.
BUCKET, LIVE, PREFETCH, SUB_GROUP = 500_000_000, 10**9, 50_000_000, 10**9
# Parameters: AutoencoderKL, CLIP ViT-L/14's text model, OpenCLIP ViT-bigG/14's with its projection.
VAE, CLIP_L, BIG_G = 83_653_863, 123_060_480, 694_659_840
TEXT = {"sdxl": CLIP_L + BIG_G, "sd15": CLIP_L}
ENCODE, DECODE = 640, 768  # elements a pixel that the VAE holds at its peak


def state(
    parameters: int, ds_config: dict, dtype: torch.dtype, world: int, reference=True, adapters=0
) -> dict[str, float]:
    """GiB on a rank of all but activations and encoders; adapters: their parameters, 0 for none.

    "step" is here what the optimizer's step takes in place of buckets and activations; "vae" is
    the part of the buckets that stays while the VAE works. Files are in deepspeed/runtime/."""
    zero = ds_config["zero_optimization"]
    stage, bucket = zero["stage"], int(zero.get("reduce_bucket_size", BUCKET))
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"

    # torch's foreach AdamW takes the root of the second moment; the fused one needs no room.
    fused = ds_config.get("optimizer", {}).get("params", {}).get("fused")
    root = 0 if fused or adamw8bit.asked_for(ds_config) else 4
    # Bytes of a weight, of an accumulated gradient, and of one on its way to other ranks.
    size = accumulated = sent = dtype.itemsize
    if ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        accumulated = 4
    if ds_config.get("communication_data_type") == "fp32":
        sent = 4

    trained = adapters or parameters
    shard = trained / world
    filled = min(bucket, trained)  # of an allocated bucket
    frozen = parameters if reference and not adapters else 0
    held = {
        "weights": (parameters + adapters) * size,
        "reference": frozen * size,
        "gradients": (trained if stage == 1 else shard) * accumulated,
        "optimizer": shard * (4 + (adamw8bit.BYTES if adamw8bit.asked_for(ds_config) else 8)),
        "buckets": 0,
        "activations": 0,
        "step": shard * root,
        "vae": 0,
    }
    if stage == 3:  # zero/stage3.py
        held["weights"] /= world
        held["reference"] /= world
        # Weights are gathered, but not on one rank. One bucket is there for good; what is in it is
        # flattened once more. AdamW's step goes by sub-groups, and copies the gradients as well.
        gathered = 0 if world == 1 else min(parameters + adapters, LIVE + PREFETCH)
        held["buckets"] = (bucket + filled) * sent + gathered * size
        held["vae"] = bucket * sent
        held["step"] = (4 + root) * min(shard, SUB_GROUP) + held["vae"]
    elif stage == 1 and accumulated > size:  # bf16_optimizer.py: all gradients, also as they come
        held["gradients"] += trained * size
        if sent < accumulated:
            held["step"] = max(held["step"], trained * sent)
    else:  # zero/stage_1_and_2.py
        # Two buckets, whatever the size of the model; what is in one is flattened, then converted.
        held["buckets"] = 2 * bucket * size + filled * (size if sent == size else size + sent)
        if accumulated < 4:
            held["step"] += shard * 4  # the gradients in fp32
    if offload:
        held |= {"optimizer": 0, "step": 0}
        if stage == 3 or accumulated == size:  # ZeRO-2 leaves fp32 gradients on the GPU
            held["gradients"] = 0
    return {part: count / GIB for part, count in held.items()}


def host_memory(trained: int, ds_config: dict) -> float:
    """GiB of main memory that offload_optimizer takes, of all ranks together; 0 without it.

    Bytes of a weight: 4 of the master weight, 8 of AdamW's moments, 4 of the gradient, 2 of the
    copy in half precision that goes back; under ZeRO-3 2 more, of the gradient as it comes."""
    zero = ds_config["zero_optimization"]
    if zero.get("offload_optimizer", {}).get("device", "none") != "cpu":
        return 0.0
    return trained * (20 if zero["stage"] == 3 else 18) / GIB


def encoders(architecture: str, dtype: torch.dtype, vae: torch.dtype) -> float:
    """GiB of the text encoders, in dtype, and of the VAE, in its own, of "sdxl" or "sd15"."""
    return (TEXT[architecture] * dtype.itemsize + VAE * vae.itemsize) / GIB


def vae_peak(vae: torch.dtype, trained: int, drawn: int, batch: int) -> float:
    """GiB that the VAE takes beside its weights, at its peak.

    trained: side in pixels of the images of `batch` pairs. drawn: of as many sample pictures, 0 for
    none. As many are encoded and decoded at once as model.ENCODED and model.DECODED allow."""
    encoded = trained**2 * max(1, min(2 * batch, model.ENCODED // trained**2))
    decoded = drawn and drawn**2 * max(1, min(batch, model.DECODED // drawn**2))
    return max(ENCODE * encoded, DECODE * decoded) * vae.itemsize / GIB


def step_memory(
    unet_config: dict,
    ds_config: dict,
    dtype: torch.dtype,
    *,
    world: int,
    micro_batch: int,
    images: int = 2,
    reference: bool = True,
    checkpointing: bool = True,
    rank: int | None = None,
    targets: str = "attention",
    base_weights: str | None = None,
    encoders: float = 0.0,
    vae: float = 0.0,
) -> dict[str, float]:
    """GiB on each GPU, by part as listed above; no weight is loaded.

    The UNet's sample_size is the side of the latents. images: of a pair. rank, targets: of the
    adapters, None for full fine-tuning. base_weights: a kind of quantized.py. encoders, vae: GiB,
    from `encoders` and `vae_peak`."""
    config = json.dumps(unet_config, sort_keys=True, default=str)
    parameters, adapters, pair, saved = _counted(
        config, dtype, rank, targets, checkpointing, base_weights
    )
    parts = state(parameters, ds_config, dtype, world, reference, adapters)
    parts["weights"] -= saved / GIB
    parts["activations"] = micro_batch * images / 2 * pair / GIB
    backward = parts["buckets"] + parts["activations"]
    peak = max(backward, parts["step"])
    vae_beyond = max(0.0, parts["vae"] + vae - peak)
    return parts | {"step": peak - backward, "vae": vae_beyond, "encoders": encoders}


def vae_dtype(plan, dtype: torch.dtype) -> torch.dtype:
    """The VAE's, beside a UNet of dtype, as loading.load_pipeline has it."""
    overflows = plan.architecture == "sdxl" and plan.vae_config.get("force_upcast", True)
    return torch.float32 if overflows or dtype == torch.float32 else torch.float16


def gpu_memory(args: Namespace, plan, ds_config: dict, dtype: torch.dtype) -> dict[str, float]:
    """step_memory of the run, under a configuration and dtype that may be those of other machines:
    a run is planned where there may be no GPU."""
    vae, drawn = vae_dtype(plan, dtype), 0
    if args.sample_every:
        drawn = plan.unet_config["sample_size"] * plan.factor
    resting = encoders(plan.architecture, dtype, vae)
    working = vae_peak(vae, plan.resolution, drawn, args.micro_batch)
    if args.cache_latents:  # the encoders are there while they work, and not in a step
        resting, working = 0.0, resting + working
    return step_memory(
        plan.unet_config | {"sample_size": plan.latent}, ds_config, dtype, world=plan.world,
        micro_batch=args.micro_batch, images=images_per_pair(args.objective),
        reference=OBJECTIVES[args.objective].reference, checkpointing=args.gradient_checkpointing,
        rank=lora_rank(args), targets=args.lora_targets, base_weights=args.base_weights,
        encoders=resting, vae=working,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------
# Disk.


def checkpoints(steps: int, every: int, keep: int, keep_every: int) -> int:
    """The largest number of checkpoints at a time: the newest `keep`, those of every `keep_every`th
    step (0: none), and one more while it is written.

    They are made every `every` steps and after the last step."""
    newest = range((steps - 1) // every * every, 0, -every)[:keep]  # when the last one is written
    oldest = newest[-1] if newest else steps
    older = (oldest - 1) // math.lcm(every, keep_every) if keep_every else 0
    return 1 + len(newest) + older


def disk(args: Namespace, plan) -> dict[str, int]:
    """Bytes that the run has in --out at most, by what they are in words.

    A checkpoint has 12 bytes a trained parameter, the fp32 weights and AdamW's moments, and below
    ZeRO-3 the weights in plan.dtype as well. Models are fp32; a LoRA stands alone, in two files."""
    trained = plan.parameters
    if rank := lora_rank(args):
        trained = lora.parameters(plan.unet_config, rank, args.lora_targets)
    sharded = plan.ds_config["zero_optimization"]["stage"] == 3
    checkpoint = trained * (12 if sharded else 12 + plan.dtype.itemsize)
    unet = aligned = (6 if rank else 4) * trained  # a LoRA is written in fp32 and in fp16
    if not rank and plan.parameters >= TOY:
        aligned += 4 * (VAE + TEXT[plan.architecture])
    taken = {}
    if args.cache_latents:
        latents = cache.size(args, plan, vae_dtype(plan, plan.dtype))
        taken[f"latents of {len(plan.pairs):,} pairs, {in_words(latents)}"] = latents
    if args.checkpoint_every:
        count = checkpoints(args.steps, args.checkpoint_every, args.keep, args.keep_every)
        taken[f"{count} checkpoint(s) of {in_words(checkpoint)}"] = count * checkpoint
    if args.export_every:
        count = math.ceil(args.steps / args.export_every)
        taken[f"{count} export(s) of {in_words(unet)}"] = count * unet
    if args.judge and args.sample_every:
        taken[f"best/ and its successor, {in_words(2 * unet)}"] = 2 * unet
    return taken | {f"the aligned model, {in_words(aligned)}": aligned}


def in_words(count: int) -> str:
    """Bytes as GB or MB."""
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
