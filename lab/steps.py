"""The training step that lab/bench.py times: its variants, and a clock for its parts."""

import copy
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean

import torch

import model
from loss import inpo_loss, squared_error
from model import Denoiser
from training import lora
from training.budget import calls_per_image
from training.latents import generators, inversion_calls, latents

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PARTS = "encoders", "inversion", "reference", "forward", "backward", "optimizer"
# A repeat takes a variant through these of the ten cells of t. On the paper's grid they cost what
# the mean over t costs; the time of other inversions is scaled by the calls that t has on average.
CELLS, GRID, TIMESTEPS = (2, 7), 10, 1000
LARGE = "sdxl", "sd15"
PAIRS = {"sdxl": 4, "mid": 4}  # of a micro-step; 16 of other models


@dataclass
class Variant:
    name: str
    spacing: str  # of the inversion
    steps: int  # --inversion-steps
    pairs: int  # of a micro-step
    policy: torch.nn.Module
    reference: Callable
    dtype: torch.dtype  # of what the UNets are given
    cast: bool = False  # the policy's weights are fp32, and autocast computes in dtype
    parts: list[dict[str, float]] = field(default_factory=list)  # seconds a pair; one per repeat
    memory: int = 0  # peak bytes of a micro-step beyond what lay there before; 0: no GPU
    failed: bool = False  # the GPU's memory was too small

    @property
    def settings(self) -> Namespace:
        """Those of train_inpo.py that `latents` reads."""
        path = {"latents": "inversion", "inversion_spacing": self.spacing}
        path = {"latents": "released"} if self.spacing == "released" else path
        path |= {"objective": "dpo", "inversion_steps": self.steps}
        return Namespace(inverter="policy", eta=0.1, **path)

    def calls(self) -> dict[str, float]:
        """UNet calls an image needs, by purpose; a backward counts two."""
        inverting = inversion_calls(self.settings, range(GRID))
        return calls_per_image("dpo", inverting, lora.attached(self.policy))

    def seconds(self) -> list[float]:
        return [sum(parts.values()) for parts in self.parts]


class Clock:
    """Seconds by part. It waits for the device, so that a part ends where its work does."""

    def __init__(self, device: torch.device):
        self.device, self.parts = device, dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.parts[part] += time.perf_counter() - start


def micro_step(variant: Variant, pipeline, pixels, captions: list[str], cell: int, clock: Clock):
    """One micro-step, as train() of train_inpo.py takes it. pixels: uint8, winners first."""
    abar = model.alphas_cumprod(pipeline)
    noise = generators(0, range(variant.pairs))
    t = cell * TIMESTEPS // GRID + torch.randint(TIMESTEPS // GRID, (variant.pairs,))
    t = t.repeat(2)
    cast = torch.autocast(pixels.device.type, variant.dtype, enabled=variant.cast)
    with clock("encoders"):
        x0 = model.encode_images(pipeline, pixels, noise)
        cond = model.encode_prompts(pipeline, captions, pixels.shape[-1])
        cond = in_dtype(model.repeat(cond), variant.dtype)
    policy = Denoiser(variant.policy, cond, abar)
    frozen = torch.no_grad()(Denoiser(variant.reference, cond, abar))
    with clock("inversion"), cast:
        xt, tau = latents(variant.settings, policy, frozen, x0, t, abar, noise)
    with clock("reference"):
        err_ref = squared_error(frozen(xt, t), tau)
    with clock("forward"), cast:
        losses, _ = inpo_loss(squared_error(policy(xt, t), tau), err_ref, beta=1000.0)
    with clock("backward"):
        losses.mean().backward()


def in_dtype(cond: dict, dtype: torch.dtype) -> dict:
    return {
        key: in_dtype(value, dtype) if isinstance(value, dict) else value.to(dtype)
        for key, value in cond.items()
    }


def adamw(weights: list[torch.nn.Parameter]) -> Callable[[], None]:
    """A step of AdamW on fp32 weights; those of half precision are a copy of these."""
    masters = [weight.detach().float().requires_grad_(True) for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=True)

    @torch.no_grad()
    def step():
        for weight, master in zip(weights, masters, strict=True):
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
        optimizer.step()
        torch._foreach_copy_(weights, masters)

    return step


def variants_of(args: Namespace, name: str, unet: torch.nn.Module) -> list[Variant]:
    """The variants of one model, ours sharing their policy and reference."""
    gpu, ours_in = unet.device.type == "cuda", DTYPES[args.dtype]
    theirs_in = torch.float16 if gpu else torch.float32
    cast = torch.nn.Module.to  # diffusers' own warns of a case that these UNets are not
    theirs = cast(copy.deepcopy(unet), torch.float32).requires_grad_(True)
    frozen = cast(copy.deepcopy(unet), theirs_in).requires_grad_(False)
    ours = cast(unet, ours_in).requires_grad_(True)
    reference = copy.deepcopy(ours).requires_grad_(False)
    if args.lora_rank:
        lora.attach(ours, args.lora_rank, args.lora_rank)
        reference = lora.AdapterOff(ours)
    if args.gradient_checkpointing or (args.gradient_checkpointing is None and name in LARGE):
        theirs.enable_gradient_checkpointing()
        ours.enable_gradient_checkpointing()
    if args.compile:
        ours.compile()
        if not args.lora_rank:
            reference.compile()
    pairs = args.micro_batch or PAIRS.get(name, 16)
    paths = {"uniform": 10, "log-sigma": 4, "log-sigma, 2 calls": 2}
    mine = [
        Variant(name, name.split(",")[0], steps, pairs, ours, reference, ours_in)
        for name, steps in paths.items()
    ]
    return [Variant("released", "released", 10, 1, theirs, frozen, theirs_in, cast=gpu), *mine]


def timed(variant: Variant, pipeline, pixels: torch.Tensor, captions: list[str]):
    """Take the variant through CELLS once, and append what its parts took."""
    if variant.failed:
        return
    gpu, clock = pixels.device.type == "cuda", Clock(pixels.device)
    before = 0
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        for cell in CELLS:
            micro_step(variant, pipeline, pixels, captions, cell, clock)
            variant.policy.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        variant.failed = True
        return
    variant.memory = torch.cuda.max_memory_allocated() - before if gpu else 0
    made = fmean(inversion_calls(variant.settings, CELLS))
    clock.parts["inversion"] *= variant.calls()["to invert"] / made
    pairs = variant.pairs * len(CELLS)
    variant.parts.append({part: seconds / pairs for part, seconds in clock.parts.items()})


def time_optimizers(variants: list[Variant], pairs: int):
    """Add AdamW's step, a share for each of the pairs of an update; its state is there for one
    policy at a time."""
    for policy in {id(v.policy): v.policy for v in variants if not v.failed}.values():
        mine = [v for v in variants if v.policy is policy and not v.failed]
        clock = Clock(next(policy.parameters()).device)
        step = adamw([weight for weight in policy.parameters() if weight.requires_grad])
        step()
        for i in range(len(mine[0].parts)):
            with clock("optimizer"):
                step()
            for variant in mine:
                variant.parts[i]["optimizer"] = clock.parts["optimizer"] / pairs
            clock.parts["optimizer"] = 0.0
        del step
        policy.zero_grad(set_to_none=True)
