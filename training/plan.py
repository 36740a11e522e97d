"""The plan of a run: what follows from the flags, and every check before weights are loaded."""

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from scipy.special import bdtrc

import data
import toy
from evaluation import scorers
from evaluation.published import TOY
from sources import buckets
from system.files import ROOT, UserError
from system.hub import architecture, read_config
from system.workers import check_open_files, check_shared_memory
from training import (
    adamw8bit,
    advice,
    budget,
    cache,
    folder,
    held_out,
    lora,
    methods,
    preview,
    quantized,
    trackers,
)
from training.flags import check_flags
from training.latents import count_cells, inversion_calls
from training.recipes import TITLES
from weights import loading

# -------------------------------------------------------------------------------------------------
# ds_config.json: plain DeepSpeed, completed from the flags.


def read_ds_config(file: str) -> dict:
    """The file (in the project's folder, if not in the working directory) as a dictionary.

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


def complete(config: dict, args: argparse.Namespace, accumulation: int) -> dict:
    """The configuration with what follows from the flags; fp32 where there is no GPU, since half
    precision only pays on one. Raises UserError for what cannot be trained with."""
    config["train_micro_batch_size_per_gpu"] = args.micro_batch
    config["gradient_accumulation_steps"] = accumulation
    config["train_batch_size"] = args.batch
    config.setdefault("optimizer", {"type": "AdamW"}).setdefault("params", {})["lr"] = args.lr
    if config["optimizer"].get("type", "").lower() == "adafactor":
        raise UserError(
            f"--ds-config {args.ds_config}: under ZeRO, Adafactor would see flat partitions, which "
            "is another algorithm; take AdamW."
        )
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise UserError(
            f"--ds-config {args.ds_config}: zero_optimization.stage must be 1, 2 or 3; on one GPU, "
            "1 is plain training."
        )
    if zero["stage"] == 1 and zero.get("offload_optimizer", {}).get("device", "none") != "none":
        raise UserError(f"--ds-config {args.ds_config}: offload_optimizer needs ZeRO-2 or ZeRO-3.")
    for name, place in trackers.FOLDERS.items():
        if name in config:
            config[name] |= {"output_path": str(args.out), "job_name": place}
    if get_accelerator().device_name() == "cpu":
        config = {key: config[key] for key in config if key not in ("bf16", "fp16")}
    return config


# What a configuration may hold of DeepSpeed's, and what decides instead.
OVERRULED = {"scheduler": "--lr and --warmup", "optimizer.params.lr": "--lr"}
OVERRULED |= {"train_batch_size": "--batch", "train_micro_batch_size_per_gpu": "--micro-batch"}
OVERRULED |= {"gradient_accumulation_steps": "--batch"}
OVERRULED |= {f"{x}.{y}": "--out" for x in trackers.FOLDERS for y in ("output_path", "job_name")}


def ignored(file: str) -> Iterator[str]:
    """A sentence for each key of the file that a flag overrules."""
    config = read_ds_config(file)
    for place, flag in OVERRULED.items():
        node = config
        for key in place.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        if node is not None:
            yield f"{place} of --ds-config {file} is ignored: it follows from {flag}."


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
    images_per_pair: int  # that are trained on: 2, or the winner alone
    strata: int  # cells of the timesteps
    pairs: data.Rows  # without ties
    order: Any  # sources.order.Bucketed; None: squares, or a dry run, which knows no sizes
    shapes: dict[tuple[int, int], float]  # shares of the pairs by (height, width), in pixels
    fingerprint: str  # of the pairs
    sampled: int  # pairs that were decoded
    broken: list[str]  # what was wrong with some of them
    captions: list[str]  # of the others
    held_out: data.Rows | None  # kept from training; for a share None until held_out.split


def asked(args: argparse.Namespace) -> dict:
    """What makes a run this run: every flag that is not about where it is written."""
    skip = ("local_rank", "dry_run", "out", "scorer_folder")
    kept = {key: value for key, value in vars(args).items() if key not in skip}
    return kept | {"ds_config": read_ds_config(args.ds_config)}


def check(args: argparse.Namespace) -> Plan:
    """Check everything, cheap things first. Raises UserError."""
    check_flags(args)
    world = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = accumulate(args, world)
    check_blocks(args, world)
    prompts, judge = preview.given_prompts(args), args.judge if args.sample_every else None
    if judge and judge != "held-out":
        scorers.check(judge, prompts or [], args.scorer_folder)
    ds_config = read_ds_config(args.ds_config)
    trackers.check(args.ds_config, ds_config)
    ds_config = complete(ds_config, args, accumulation)
    if args.base_weights:
        if ds_config["zero_optimization"]["stage"] == 3:
            raise UserError(
                f"--base-weights {args.base_weights}: ZeRO-3 of {args.ds_config} shards weights, "
                "and cannot shard these; take another --ds-config, such as configs/zero1.json."
            )
        quantized.check(args.base_weights)
    adamw8bit.check(ds_config, args.ds_config)
    if args.compile and ds_config["zero_optimization"]["stage"] == 3:
        raise UserError(
            f"--compile: under ZeRO-3 of {args.ds_config} a UNet falls into dozens of graphs; "
            "leave it out, or take another --ds-config."
        )
    folder.check_folder(args.out, asked(args))

    unet = read_config(args.unet or args.model, "unet")
    vae = read_config(args.vae or args.model, "vae")
    timesteps = loading.read_scheduler(args.model).config.num_train_timesteps
    strata = count_cells(args)
    if timesteps % strata:
        flag = "--strata" if args.latents == "noise" else "--inversion-steps"
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
    side = buckets.unit(resolution, factor, len(unet["block_out_channels"]))
    if args.buckets and resolution % side:
        raise UserError(
            f"--resolution {resolution}: with --buckets it must be a multiple of {side}."
        )
    if args.true_sizes and architecture(args.model) != "sdxl":
        raise UserError(f"--true-sizes: {args.model} is no SDXL, which alone is told of sizes.")
    batch = args.micro_batch * 2 * 3 * resolution**2  # bytes: two images, three bands, uint8
    check_shared_memory(args.workers, batch, loaders=ranks_here())
    check_open_files(args.workers)
    if args.lora:
        lora.check(args.lora, args.lora_start, args.model, unet)
    pairs = read_pairs(args)
    check_strengths(args, pairs)
    captions, broken = data.sample(pairs, resolution)
    sampled = len(captions) + len(broken)
    check_sample(args, len(pairs), sampled, broken)
    order, shares = shape_pairs(args, pairs, resolution, side)
    if judge in TOY and prompts is None:
        scorers.check(judge, captions, args.scorer_folder)
    second = read_held_out(args, resolution)
    plan = Plan(
        world=world,
        accumulation=accumulation,
        ds_config=ds_config,
        dtype=compute_dtype(ds_config),
        architecture=architecture(args.model),
        parameters=loading.count_parameters(unet),
        unet_config=unet,
        vae_config=vae,
        tokens=read_config(args.model, "text_encoder").get("max_position_embeddings", 77),
        latent=resolution // factor,
        factor=factor,
        timesteps=timesteps,
        resolution=resolution,
        images_per_pair=budget.images_per_pair(args.objective),
        strata=strata,
        pairs=pairs,
        order=order,
        shapes=shares,
        fingerprint=data.fingerprint(pairs),
        sampled=sampled,
        broken=broken,
        captions=captions,
        held_out=second,
    )
    if args.cache_latents:
        check_cache(args, plan)
    return plan


def check_blocks(args: argparse.Namespace, world: int):
    """Raises UserError where the pairs of a micro-step, of all ranks, could be of two shapes."""
    at_once = args.micro_batch * world
    if args.buckets % at_once:
        raise UserError(
            f"--buckets {args.buckets}: must be a multiple of --micro-batch {args.micro_batch} x "
            f"{world} rank(s) = {at_once}, so that all pairs of a micro-step have one shape; give "
            f"--buckets {-(-args.buckets // at_once) * at_once}, or to resume a run another "
            "--micro-batch."
        )


def shape_pairs(args: argparse.Namespace, pairs, resolution: int, side: int) -> tuple[Any, dict]:
    """(order, shapes) of the plan. side: what sides of buckets are multiples of. A dry run knows a
    sample's shares alone."""
    if args.stream and not args.dry_run:
        order = data.streamed(pairs, args.stream, args.seed, resolution)
        return order, {(resolution, resolution): 1.0}
    if not args.buckets:
        return None, {(resolution, resolution): 1.0}
    shapes = buckets.shapes(resolution, side)
    if args.dry_run:
        return None, data.sampled_shapes(pairs, shapes) or {(resolution, resolution): 1.0}
    order = data.bucketed(pairs, shapes, args.buckets, args.seed)
    return order, order.shares()


def check_cache(args: argparse.Namespace, plan: Plan):
    """Raises UserError where --cache-latents takes more than there is room for."""
    size = cache.size(args, plan, budget.vae_dtype(plan, plan.dtype))
    if size > (free := budget.room(args.out)):
        raise UserError(
            f"--cache-latents: what is kept of {len(plan.pairs):,} pairs takes up to "
            f"{budget.in_words(size)}, and {args.out} has room for {budget.in_words(free)}; name "
            "another folder with --out, or leave the flag out."
        )


def ranks_here() -> int:
    """How many ranks share this machine, as torchrun or DeepSpeed says; 1 where nothing does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def read_held_out(args: argparse.Namespace, resolution: int):
    """The pairs of --held-out SOURCE; None for a share. Raises UserError."""
    if not isinstance(args.held_out, str):
        return None
    pairs = data.read_pairs(
        args.held_out, args.split, args.dry_run, args.partial_data, args.columns
    )
    captions, broken = data.sample(pairs, resolution)
    count = len(captions) + len(broken)
    check_sample(args, len(pairs), count, broken, "held-out")
    return pairs


def check_strengths(args: argparse.Namespace, pairs):
    """Raises UserError where the objective weights pairs by how surely their winner is preferred,
    and the data do not say it of each."""
    if args.objective != "smpo":
        return
    unknown = len(pairs) if pairs.strengths is None else int(np.isnan(pairs.strengths).sum())
    if unknown:
        raise UserError(
            f"--objective smpo: {args.data} does not say of {unknown:,} of {len(pairs):,} pairs "
            "how surely the winner is preferred; `python pairs.py score ... --judge pickscore "
            "--log-odds 0.06` adds a column with it, as SmPO's release has it."
        )


def check_sample(
    args: argparse.Namespace, pairs: int, count: int, broken: list[str], flag: str = "data"
):
    """Raises UserError where more than --max-broken are broken: of all pairs, or surely, as less
    than one in 1,000 samples of data that have just that share would show by chance."""
    bad, limit, source = len(broken), args.max_broken, getattr(args, flag.replace("-", "_"))
    if bad > limit * count and (count == pairs or bdtrc(bad - 1, count, limit) < 0.001):
        raise UserError(
            f"--{flag} {source}: {bad} of {count} pairs are broken, more than --max-broken "
            f"{limit:g} lets pass ({broken[0]}); mend the data, or give a larger --max-broken."
        )


def accumulate(args: argparse.Namespace, world: int) -> int:
    """Micro-steps per optimizer step. Raises UserError with what would fit."""
    at_once = args.micro_batch * world
    if args.batch % at_once == 0:
        return args.batch // at_once
    fixes = [f"--batch {-(-args.batch // at_once) * at_once}"]
    if args.batch % world == 0:
        fixes.insert(0, f"--micro-batch {math.gcd(args.micro_batch, args.batch // world)}")
    if fits := [n for n in range(1, world) if args.batch % (args.micro_batch * n) == 0]:
        fixes.append(f"start {fits[-1]} process(es) (deepspeed --num_gpus {fits[-1]} ...)")
    raise UserError(
        f"--batch {args.batch}: must be a multiple of --micro-batch {args.micro_batch} x "
        f"{world} rank(s) = {at_once}; give {', or '.join(fixes)}."
    )


def read_pairs(args: argparse.Namespace):
    if args.data == "toy":
        try:
            return data.read_pairs(str(toy.write_pairs_once("out/toy", n=2048)))
        except OSError as error:
            raise UserError(
                f"--data toy: its pairs cannot be drawn into {Path('out/toy').absolute()} "
                f"({error.strerror}): start in another folder, or draw them yourself (python "
                f"{ROOT / 'toy.py'} pairs --out FOLDER) and give --data FOLDER/pairs.parquet."
            ) from error
    return data.read_pairs(
        args.data, args.split, args.dry_run, args.partial_data, args.columns, args.stream
    )


# -------------------------------------------------------------------------------------------------
# The plan in words.


def describe(args: argparse.Namespace, plan: Plan) -> str:
    """The plan in words. A UNet call is a forward of one image; a backward counts as two."""
    seen, rank, cells = args.steps * args.batch, budget.lora_rank(args), range(plan.strata)
    work = budget.work(args, plan, cells)
    inverting = inversion_calls(args, cells)
    calls = budget.calls_per_image(args.objective, inverting, lora.trains_adapters(args))
    takes = " + ".join(f"{count:g} {purpose}" for purpose, count in calls.items())
    held, count = args.held_out, 0 if plan.held_out is None else len(plan.held_out)
    held = f"{held}, {count:,} pairs" if count else held and f"about {held:.2%} of the pairs"
    looks = f"{held_out.calls(args, plan):,} UNet calls" if held else ""
    taken, free = budget.disk(args, plan), budget.in_words(budget.room(args.out))
    large = plan.parameters >= budget.TOY
    adafactor = plan.architecture == "sdxl" and args.method != "kto"
    released = " (released: Adafactor, which ZeRO would show flat partitions)" if adafactor else ""
    lines = {
        "model": f"{args.model} ({plan.architecture}), UNet of {plan.parameters / 1e6:,.1f} M "
        f"parameters, {plan.resolution} px{f', LoRA of rank {rank}' if rank else ''}"
        f"{f' on a base in {args.base_weights}' if args.base_weights else ''}",
        "data": f"{args.data}, {len(plan.pairs):,} pairs without ties; the run sees {seen:,} "
        f"({seen / len(plan.pairs):.2f} epochs)",
        "read as": plan.pairs.description,
        "shapes": shapes_in_words(args, plan) if args.buckets else "",
        "held out": f"{held}; {looks} at each sample step and the last" if held else "",
        "batch": f"{args.batch} pairs = {args.micro_batch} x {plan.world} rank(s) x "
        f"{plan.accumulation} accumulated",
        "steps": f"{args.steps}; lr {args.lr:g} after {args.warmup} of warm-up; "
        f"{plan.ds_config['optimizer']['type']}{released}, "
        f"ZeRO-{plan.ds_config['zero_optimization']['stage']}, "
        f"{str(plan.dtype).removeprefix('torch.')}",
        "method": f"{TITLES[args.method]}: {methods.describe(args)}",
        "UNet calls": f"an image takes {takes}; {work['unet_calls']:,} in all, "
        f"{work['flops']:.2e} FLOPs",
        "time": budget.time_in_words(work["flops"], plan.world) if large else "",
        "memory": memory_in_words(args, plan) if large else "",
        "out": f"{args.out}",
        "disk": f"at most {budget.in_words(sum(taken.values()))}: {', '.join(taken)}; {free} free",
    }
    words = [f"  {key:<12}{text}" for key, text in lines.items() if text]
    if step := folder.resumes_at(args.out):
        words.append(f"  {args.out} has a checkpoint; the run resumes at step {step}.")
    return "\n".join([*words, *(f"Warning: {warning}" for warning in warnings(args, plan))])


def warnings(args: argparse.Namespace, plan: Plan) -> Iterator[str]:
    """What runs, but perhaps not as its user thinks."""
    yield from ignored(args.ds_config)
    if plan.broken:
        yield (
            f"{len(plan.broken)} of {plan.sampled} pairs are broken ({plan.broken[0]}); a run "
            f"leaves such pairs out, and stops above --max-broken {args.max_broken:g}."
        )
    if args.method == "inpo" and plan.architecture == "sd15" and not args.unet:
        yield (
            "the published SD1.5 run starts from SFT on the winners; train one with --method sft, "
            "and give its folder as --unet."
        )
    if args.latents != "noise" and plan.world > 1 and plan.accumulation < plan.strata:
        yield (
            f"an update sees {plan.accumulation} of the {plan.strata} cells of timesteps, one a "
            "micro-step; fewer GPUs or a smaller --micro-batch let it see more."
        )
    seen, kept = args.steps * args.batch, len(plan.pairs) * (2 if args.flip else 1)
    if args.cache_latents and seen <= kept:
        yield (
            f"the run sees {seen:,} pairs, and --cache-latents encodes {kept:,} (a pair and its "
            "mirror image count as two); without it the run encodes less."
        )
    yield from advice.settings(args, plan)
    yield from advice.captions(args, plan)
    most = sum(budget.disk(args, plan).values())
    if budget.room(args.out) < most:
        yield (
            f"--out {args.out}: the run may take {budget.in_words(most)} there, more than is free; "
            "make room, name another folder, or keep less (--keep, --export-every)."
        )


def shapes_in_words(args: argparse.Namespace, plan: Plan) -> str:
    most = sorted(plan.shapes.items(), key=lambda shape: -shape[1])
    listed = ", ".join(f"{width}x{height} {share:.0%}" for (height, width), share in most)
    of = f" of {plan.sampled} sampled pairs" if args.dry_run else ""
    return f"width x height{of}: {listed}; {args.buckets} pairs in a row share one"


def memory_in_words(args: argparse.Namespace, plan: Plan) -> str:
    """As if each rank had a GPU: a run is planned where there may be none."""
    config = read_ds_config(args.ds_config)
    dtype = compute_dtype(config)
    parts = budget.gpu_memory(args, plan, config, dtype)
    listed = ", ".join(f"{part} {size:.1f}" for part, size in parts.items() if size >= 0.05)
    precision = str(dtype).removeprefix("torch.")
    said = f"about {sum(parts.values()):.1f} GiB a GPU, {precision}: {listed}"
    rank = budget.lora_rank(args)
    trained = lora.parameters(plan.unet_config, rank, args.lora_targets) if rank else 0
    host = budget.host_memory(trained or plan.parameters, config)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    offloaded = f"; {host:.0f} GiB of main memory over all ranks (here are {there:.0f})"
    return said + (offloaded if host else "")
