"""What a run is asked to do: flags, checks and the derived plan.

Everything that can be wrong is said here in one sentence, before any weights are loaded."""

import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

import data
import model
from evaluation import scorers
from system import hub
from system.files import ROOT, UserError
from system.program import HelpFormatter
from training import cost, lora, memory, preview
from training.folder import check_folder
from training.recipes import METHODS, recipe_of, recipe_table

# -------------------------------------------------------------------------------------------------
# Flags.


def parse(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; their defaults are the recipe of --model. Raises UserError for an unknown one."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--model", default="sdxl")
    first.add_argument("--method", choices=METHODS, default="inpo")
    known = first.parse_known_args(argv)[0]

    parser = argparse.ArgumentParser(
        description=description, epilog=recipe_table(), formatter_class=HelpFormatter
    )
    switch = argparse.BooleanOptionalAction
    # fmt: off

    add = parser.add_argument_group("model").add_argument
    add("--model", default="sdxl",
        help="sdxl, sd15, tiny, a hub id, or a folder in diffusers layout; picks the recipe")
    add("--unet", metavar="PATH",
        help="UNet (folder or hub id) in place of the pipeline's, as start and as reference")
    add("--vae", metavar="PATH",
        help="VAE checkpoint in place of the pipeline's (SDXL's own overflows in fp16)")
    add("--gradient-checkpointing", action=switch, help="less memory for a quarter more work")

    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="PATH",
        help="pairs in Pick-a-Pic v2's columns: hub id, .parquet file, folder of them, folder "
             "saved by datasets; 'toy' draws the tiny model's; Pick-a-Pic v2 left the hub in 2025: "
             "give a folder with a copy of its parquet files")
    add("--split", default="train", help="split of a hub id or DatasetDict")
    add("--resolution", type=int, metavar="PIXELS",
        help="side of the square; if not given the model's own (SDXL 1024, SD1.5 512, tiny 64)")
    add("--crop", choices=("center", "random"), default="center",
        help="what is kept once the shorter side has that length")
    add("--flip", action=switch, default=True, help="mirror half of the pairs")
    add("--caption-dropout", type=float, metavar="P",
        help="share of the pairs, 0 to 1, that are trained without their caption")
    add("--workers", type=int, metavar="N", help="loader processes per rank")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="inpo", help="picks the recipe, too")
    add("--beta", type=float,
        help="how strongly the policy is held to the reference, per mean squared error; a larger "
             "one moves less")
    add("--inversion-steps", type=int, metavar="N",
        help="inpo: cells of the inversion's grid over all timesteps; must divide them")
    add("--eta", type=float,
        help="inpo: noise injected while inverting, from 0 (none) to 1 (DDPM's)")
    add("--inverter", choices=("policy", "reference"), help="inpo: the model that inverts")
    add("--liked-share", type=float, metavar="P",
        help="kto: weight of the liked images, 0 to 1; the disliked ones have the rest")
    add("--strata", type=int, metavar="N",
        help="dpo, kto, sft: cells of the timesteps; all pairs of a micro-step draw theirs in one "
             "cell (for inpo these are the inversion's)")

    add = parser.add_argument_group("adapters (the reference is the UNet without them)")
    add = add.add_argument
    add("--lora-rank", type=int, default=0, metavar="R", help="rank of the adapters; 0: none")
    add("--lora-alpha", type=float, metavar="A",
        help="the adapters are scaled by A/R (if not given: A = R)")
    add("--lora-targets", choices=tuple(lora.TARGETS), default="attention",
        help="layers with adapters: the attention's, or the feed-forward's too")
    add("--lora", metavar="PATH", help="LoRA to start from (file, folder or hub id)")
    add("--lora-start", choices=("continue", "merge"), default="continue",
        help="continue: train its adapters on, the reference is the model without them; merge: "
             "add it to the weights first, it is part of the reference, too")

    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=int, metavar="N", help="optimizer steps")
    add("--batch", type=int, metavar="PAIRS", help="pairs per optimizer step, over all ranks")
    add("--micro-batch", type=int, metavar="PAIRS",
        help="pairs per rank and forward; the rest of the batch is accumulated")
    add("--lr", type=float, help="learning rate of AdamW, constant after the warm-up")
    add("--warmup", type=int, metavar="N", help="optimizer steps of linear warm-up")
    add("--seed", type=int, default=0, help="of everything random")
    add("--ds-config", metavar="FILE", default="ds_config.json",
        help="DeepSpeed's: ZeRO stage, precision, weight decay, clipping, monitors")

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="FOLDER", help="the run's folder (if not given: out/MODEL-METHOD)")
    add("--checkpoint-every", type=int, metavar="N",
        help="optimizer steps between checkpoints; 0: none")
    add("--export-every", type=int, metavar="N", default=0,
        help="optimizer steps between UNets (or LoRAs) written to unets/, for evaluate.py; 0: none")
    add("--sample-every", type=int, metavar="N",
        help="optimizer steps between sample pictures; 0: none")
    add("--keep", type=int, default=2, metavar="N", help="newest checkpoints to keep")
    add("--keep-every", type=int, default=0, metavar="N",
        help="keep the checkpoints of every N optimizer steps as well; 0: no")
    add("--judge", choices=(*scorers.SCORERS, "none"),
        help="scorer of the sample pictures; the model that it likes best is kept in best/ (if not "
             "given: preference for --data toy, else none)")
    add("--scorers", metavar="FOLDER", type=Path,
        help="folder with copies of the scorer's hub repositories, as owner/name")
    add("--sample-prompts", metavar="FILE", help="of the pictures: a .txt file, a prompt a line")
    add("--guidance", type=float, metavar="W",
        help="scale of classifier-free guidance of the sample pictures")
    add("--dry-run", action="store_true", help="print the plan, check every input, and stop")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    # fmt: on

    parser.set_defaults(**recipe_of(known.model, known.method))
    args = parser.parse_args(argv)
    args.out = Path(args.out or f"out/{Path(args.model).name}-{args.method}")
    args.judge = args.judge or ("preference" if args.data == "toy" else "none")
    args.judge = None if args.judge == "none" else args.judge
    if args.lora_alpha is None:
        args.lora_alpha = float(args.lora_rank)
    return args


# -------------------------------------------------------------------------------------------------
# ds_config.json: plain DeepSpeed, completed from the flags.


def read_ds_config(file: str) -> dict:
    """The file (beside this one, if not in the working directory) as a dictionary.

    Raises UserError where it is missing, no JSON object, or holds "auto"."""
    path = Path(file) if Path(file).exists() else ROOT / file
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--ds-config {file}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"--ds-config {file}: is no JSON ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"--ds-config {file}: must hold a JSON object.")
    place = find_auto(config)
    if place is not None:
        raise UserError(
            f'--ds-config {file}: {place} is "auto", a word of another library; write a value, or '
            "leave the key out (batch sizes, accumulation and lr come from the flags)."
        )
    return config


def find_auto(node: Any, place: str = "") -> str | None:
    """The dotted place of the first value "auto" in nested dictionaries and lists."""
    if node == "auto":
        return place
    if isinstance(node, list):
        node = dict(enumerate(node))
    items = node.items() if isinstance(node, dict) else ()
    found = (find_auto(child, f"{place}.{key}".lstrip(".")) for key, child in items)
    return next((place for place in found if place is not None), None)


def compute_dtype(ds_config: dict) -> torch.dtype:
    """The dtype of the UNets under a completed configuration."""
    if ds_config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if ds_config.get("fp16", {}).get("enabled") else torch.float32


# -------------------------------------------------------------------------------------------------
# The plan.

RANGES = {
    "beta": (1e-9, 1e9), "eta": (0, 1), "caption_dropout": (0, 1), "lr": (1e-12, 1),
    "steps": (1, 10**9), "batch": (1, 10**9), "micro_batch": (1, 10**9), "warmup": (0, 10**9),
    "inversion_steps": (1, 1000), "workers": (0, 1024), "seed": (0, 2**32),
    "sample_every": (0, 10**9), "checkpoint_every": (0, 10**9), "export_every": (0, 10**9),
    "liked_share": (0, 1), "strata": (1, 1000), "lora_rank": (0, 4096), "lora_alpha": (0, 1e6),
    "keep": (1, 10**9), "keep_every": (0, 10**9),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What follows from the flags, the model, the data and the number of ranks."""

    world: int  # ranks
    accumulation: int  # micro-steps per optimizer step
    ds_config: dict  # completed
    dtype: torch.dtype  # of the UNets
    architecture: str  # sdxl or sd15
    parameters: int  # of the UNet
    unet_config: dict
    vae_config: dict
    tokens: int  # of a caption, padded
    latent: int  # side of the latents
    factor: int  # pixels of a latent's side
    timesteps: int  # T
    resolution: int  # pixels
    sides: int  # images of a pair that are trained on: 2, or the winner alone
    strata: int  # cells of the timesteps
    pairs: Any  # datasets.Dataset without ties
    fingerprint: str  # of the pairs


def asked(args: argparse.Namespace) -> dict:
    """What makes a run this run: every flag that is not about where it is written."""
    skip = ("local_rank", "dry_run", "out", "scorers")
    kept = {key: value for key, value in vars(args).items() if key not in skip}
    return kept | {"ds_config": read_ds_config(args.ds_config)}


def trains_adapters(args: argparse.Namespace) -> bool:
    return bool(args.lora_rank or (args.lora and args.lora_start == "continue"))


def check(args: argparse.Namespace) -> Plan:
    """Check everything, cheap things first. Raises UserError."""
    for flag, default in recipe_of(args.model, args.method).items():
        if default is None and flag != "vae" and getattr(args, flag) is not None:
            raise UserError(
                f"--{flag.replace('_', '-')}: has no meaning for --method {args.method}."
            )
    for flag, (low, high) in RANGES.items():
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {value}: must lie between {low} and {high}.")
    world = int(os.environ.get("WORLD_SIZE", 1))
    at_once = args.micro_batch * world
    if args.batch % at_once:
        fits = [n for n in range(1, world) if args.batch % (args.micro_batch * n) == 0]
        fixes = [f"--batch {-(-args.batch // at_once) * at_once}"]
        if args.batch % world == 0:
            fixes.insert(0, f"--micro-batch {math.gcd(args.micro_batch, args.batch // world)}")
        if fits:
            fixes.append(f"start {fits[-1]} process(es) (deepspeed --num_gpus {fits[-1]} ...)")
        raise UserError(
            f"--batch {args.batch}: must be a multiple of --micro-batch {args.micro_batch} x "
            f"{world} rank(s) = {at_once}; give {', or '.join(fixes)}."
        )
    accumulation = args.batch // at_once
    if args.lora and args.lora_start == "continue" and args.lora_rank:
        raise UserError(
            f"--lora-rank {args.lora_rank}: {args.lora} has its own rank; leave the flag out, or "
            "give --lora-start merge."
        )
    prompts = preview.read_prompts(args)
    if args.judge and args.sample_every:
        scorers.check(args.judge, prompts, args.scorers)

    ds_config = read_ds_config(args.ds_config)
    ds_config["train_micro_batch_size_per_gpu"] = args.micro_batch
    ds_config["gradient_accumulation_steps"] = accumulation
    ds_config["train_batch_size"] = args.batch
    ds_config.setdefault("optimizer", {"type": "AdamW"}).setdefault("params", {})["lr"] = args.lr
    if ds_config["optimizer"].get("type", "").lower() == "adafactor":
        raise UserError(
            f"--ds-config {args.ds_config}: under ZeRO, Adafactor would see flat partitions, which "
            "is another algorithm; take AdamW."
        )
    if ds_config.get("zero_optimization", {}).get("stage") not in (1, 2, 3):
        raise UserError(
            f"--ds-config {args.ds_config}: zero_optimization.stage must be 1, 2 or 3; on one GPU, "
            "1 is plain training."
        )
    if ds_config.get("tensorboard", {}).get("enabled"):
        ds_config["tensorboard"] |= {"output_path": str(args.out), "job_name": "tensorboard"}
    if get_accelerator().device_name() == "cpu":  # half precision only pays on a GPU
        ds_config = {key: ds_config[key] for key in ds_config if key not in ("bf16", "fp16")}

    check_folder(args.out, asked(args))
    unet = hub.read_config(args.unet or args.model, "unet")
    vae = hub.read_config(args.vae or args.model, "vae")
    timesteps = hub.read_config(args.model, "scheduler").get("num_train_timesteps", 1000)
    strata = args.inversion_steps or args.strata
    if timesteps % strata:
        flag = "--inversion-steps" if args.inversion_steps else "--strata"
        raise UserError(
            f"{flag} {strata}: must divide the model's {timesteps} timesteps, so that the cells of "
            "the grid are equally likely."
        )
    if not isinstance(unet.get("sample_size"), int):  # the pipeline draws at this size, too
        raise UserError(
            f"{'--unet' if args.unet else '--model'} {args.unet or args.model}: sample_size in its "
            f"UNet's config.json is {unet.get('sample_size')}; write one number there, the side of "
            "the latents."
        )
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    resolution = args.resolution or unet["sample_size"] * factor
    if resolution < factor or resolution % factor:
        raise UserError(f"--resolution {resolution}: must be a multiple of the VAE's {factor}.")
    pairs = read_pairs(args)
    return Plan(
        world=world,
        accumulation=accumulation,
        ds_config=ds_config,
        dtype=compute_dtype(ds_config),
        architecture=hub.architecture(args.model),
        parameters=model.count_parameters(unet),
        unet_config=unet,
        vae_config=vae,
        tokens=hub.read_config(args.model, "text_encoder").get("max_position_embeddings", 77),
        latent=resolution // factor,
        factor=factor,
        timesteps=timesteps,
        resolution=resolution,
        sides=1 if args.method == "sft" else 2,
        strata=strata,
        pairs=pairs,
        fingerprint=data.fingerprint(pairs),
    )


def read_pairs(args: argparse.Namespace):
    if args.data != "toy":
        return data.read_pairs(args.data, args.split, copy=not args.dry_run)
    import toy

    return data.read_pairs(str(toy.write_pairs_once("out/toy", n=2048)))


# -------------------------------------------------------------------------------------------------
# What the run takes.

TOY = 10**8  # parameters of a UNet; with fewer its encoders are as small, and nobody plans memory


def lora_rank(args: argparse.Namespace) -> int | None:
    """Of the adapters, None without; that of a --lora to train on is in its file: counted as 64."""
    return (args.lora_rank or 64) if trains_adapters(args) else None


def work(args: argparse.Namespace, plan: Plan, inversion: float) -> tuple[float, float]:
    """(UNet calls, FLOPs) of the whole run, over all ranks; inversion: the mean number of calls
    that inverting an image takes."""
    calls = cost.calls_per_image(args.method, inversion, trains_adapters(args))
    calls *= args.steps * args.batch * plan.sides
    config = plan.unet_config | {"sample_size": plan.latent}
    return calls, calls * cost.call_flops(config, plan.tokens)


def vae_dtype(plan: Plan, dtype: torch.dtype) -> torch.dtype:
    """The VAE's, beside a UNet of dtype, as model.load_pipeline has it."""
    overflows = plan.architecture == "sdxl" and plan.vae_config.get("force_upcast", True)
    return torch.float32 if overflows or dtype == torch.float32 else torch.float16


def gpu_memory(args: argparse.Namespace, plan: Plan) -> str:
    """In words, as if each rank had a GPU: a run is planned where there may be none."""
    config = read_ds_config(args.ds_config)
    dtype = compute_dtype(config)
    vae, drawn = vae_dtype(plan, dtype), plan.unet_config["sample_size"] * bool(args.sample_every)
    parts = memory.estimate(
        plan.unet_config,
        **memory.settings(config),
        world=plan.world,
        dtype=dtype,
        micro_batch=args.micro_batch,
        latent=plan.latent,
        sides=plan.sides,
        reference=args.method != "sft",
        checkpointing=args.gradient_checkpointing,
        lora_rank=lora_rank(args),
        targets=args.lora_targets,
        encoders=memory.encoders(plan.architecture, dtype, vae),
        vae=memory.vae_peak(vae, plan.resolution, drawn * plan.factor, args.micro_batch),
    )
    return f"about {parts['total']:.1f} GiB a GPU, {str(dtype).removeprefix('torch.')}: " + (
        ", ".join(f"{k} {v:.1f}" for k, v in parts.items() if v >= 0.05 and k != "total")
    )


def disk(args: argparse.Namespace, plan: Plan) -> dict[str, int]:
    """Bytes that the run has in --out at most, by what they are in words."""
    rank, written = lora_rank(args), plan.parameters
    if rank:
        written = lora.parameters(plan.unet_config, rank, args.lora_targets)
    encoders = 0 if rank or plan.parameters < TOY else memory.VAE + memory.TEXT[plan.architecture]
    stage = plan.ds_config["zero_optimization"]["stage"]
    return memory.disk(args, written, encoders, plan.dtype, stage)


# -------------------------------------------------------------------------------------------------
# The plan in words.


def describe(args: argparse.Namespace, plan: Plan) -> str:
    """The plan in words. A UNet call is a forward of one image; a backward counts as two."""
    seen = args.steps * args.batch
    objective = {
        "inpo": "InPO, beta {beta:g}, inversion on a grid of {inversion_steps} by the {inverter}, "
        "eta {eta:g}",
        "dpo": "Diffusion-DPO, beta {beta:g}",
        "kto": "Diffusion-KTO, beta {beta:g}, {liked_share:.0%} of the weight on liked images",
        "sft": "denoising error of the winners",
    }[args.method].format(**{key: value or 0 for key, value in vars(args).items()})
    inversion = (plan.strata + 1) / 2  # the mean of 1..strata
    calls, flops = work(args, plan, inversion)
    takes = [f"{inversion:g} to invert"] * (args.method == "inpo")
    takes += ["1 reference"] * (args.method != "sft") + [f"{3 - trains_adapters(args)} to train"]
    stage = plan.ds_config.get("zero_optimization", {}).get("stage", 0)
    released = " (released: Adafactor, which ZeRO would show flat partitions)"
    released *= plan.architecture == "sdxl" and args.method != "kto"
    adapters = ""
    if rank := lora_rank(args):
        adapters = f", LoRA of rank {rank}" if args.lora_rank else f", LoRA, counted as rank {rank}"
    taken, free = disk(args, plan), memory.room(args.out)
    most = sum(taken.values())
    lines = {
        "model": f"{args.model} ({plan.architecture}), UNet of {plan.parameters / 1e6:,.1f} M "
        f"parameters{adapters}, {plan.resolution} px",
        "data": f"{args.data}, {len(plan.pairs):,} pairs without ties; the run sees {seen:,} "
        f"({seen / len(plan.pairs):.2f} epochs)",
        "batch": f"{args.batch} pairs = {args.micro_batch} x {plan.world} rank(s) x "
        f"{plan.accumulation} accumulated",
        "steps": f"{args.steps}; lr {args.lr:g} after {args.warmup} of warm-up; "
        f"{plan.ds_config['optimizer']['type']}{released}, ZeRO-{stage}, "
        f"{str(plan.dtype).removeprefix('torch.')}",
        "objective": objective,
        "UNet calls": f"an image takes {' + '.join(takes)}; {calls:,.0f} in all, {flops:.2e} FLOPs",
        "memory": gpu_memory(args, plan) if plan.parameters >= TOY else "",
        "out": f"{args.out}",
        "disk": f"at most {memory.size(most)}: {', '.join(taken)}; {memory.size(free)} free",
    }
    words = [f"  {key:<12}{text}" for key, text in lines.items() if text]
    if free < most:
        words.append(
            f"Warning: --out {args.out}: the run may take {memory.size(most)} there, more than is "
            "free; make room, name another folder, or keep less (--keep, --export-every)."
        )
    return "\n".join(words)
