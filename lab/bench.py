"""Speed, memory and cost of InPO's training step, by variant and by part, on one device.

    python -m lab.bench --model tiny mid                      # two cores, 5 minutes  (make bench)
    python -m lab.bench --model sdxl --report docs/speed.md   # a GPU, random weights, no network
    python -m lab.bench --model sdxl --compile --micro-batch 8

Variants are timed in turn, A B C A B C, in one process. A figure that counts is a ratio of two
variants within a repeat; seconds belong to the machine, and stand there to show their size.

    released     as the released script trains: one pair a micro-step, its own inversion, the policy
                 in fp32 (on a GPU under fp16 autocast, beside a reference in fp16)
    uniform      the paper's path, a micro-batch of pairs, the policy in --dtype
    log-sigma    our path of 4 calls, the same otherwise, and of 2, which trains worse
                 (docs/inversion.md) but has a smaller error of tau than the first two

Timed is the code that trains: encode_images, encode_prompts, latents, Denoiser, squared_error,
inpo_loss, then AdamW on fp32 weights. The presets are built from their configurations. "mid" is
SD1.5 at about a third of its widths, at 256 px. It is a plain process: no engine, no other ranks.
"""

import argparse
from pathlib import Path

from system.program import Parser, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.bench", __doc__)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    # fmt: off
    add("--model", nargs="+", default=["sdxl"], metavar="NAME",
        help="sdxl, sd15, mid, tiny, or folders in diffusers layout")
    add("--dtype", choices=("bf16", "fp16", "fp32"),
        help="of our UNets; if not given: bf16 on a GPU, fp32 on a CPU")
    add("--micro-batch", type=int, metavar="PAIRS",
        help="of our variants; if not given the recipe's (mid: 4)")
    add("--lora-rank", type=int, default=0, metavar="R",
        help="train adapters of this rank in our variants; the reference is the UNet without them")
    add("--gradient-checkpointing", action=switch, help="if not given: for sdxl and sd15")
    add("--compile", action="store_true", help="torch.compile our UNets; warm-up takes minutes")
    add("--repeats", type=int, metavar="N",
        help="timed runs of each variant (if not given: tiny 5, others 3)")
    add("--out", type=Path, default=Path("out/bench"), metavar="FOLDER",
        help="of speed.json and speed.png")
    add("--report", type=Path, metavar="FILE", help="Markdown file, whose sections are replaced")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import datetime
import io
import json
import os
import platform
import re
import shlex
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import model
from evaluation import figures, tables
from lab import architectures
from lab.steps import (
    CELLS,
    LARGE,
    PARTS,
    Clock,
    Variant,
    time_optimizers,
    timed,
    variants_of,
)
from system.files import UserError, write, write_section
from training.budget import call_flops
from weights import loading

UPDATE = {"sdxl": 128, "sd15": 128}  # pairs of an update on one of eight devices; 16 of others
RECIPE_PAIRS = 400 * 1024  # of the published run, for both models

# -------------------------------------------------------------------------------------------------
# What is measured.


@dataclass
class Found:
    """What was measured of one model."""

    name: str
    device: torch.device
    variants: list[Variant]
    data: float  # seconds a pair of a loader's worker, on one core
    flops: dict[str, float]  # of the encoders for a pair, and of a UNet call of one image
    rates: dict[torch.dtype, list[float]]  # FLOP/s of a large product; one per repeat

    def ratios(self, a: Variant, b: Variant) -> list[float]:
        """How many pairs a takes while b takes one, repeat by repeat."""
        return [y / x for x, y in zip(a.seconds(), b.seconds(), strict=True)]

    def shares(self, variant: Variant) -> list[float]:
        """Of the rate of a large product, in what the step needs: recomputing counts nothing."""
        needed = self.flops["encoders"] + 2 * sum(variant.calls().values()) * self.flops["call"]
        rates = zip(variant.seconds(), self.rates[variant.dtype], strict=True)
        return [needed / seconds / rate for seconds, rate in rates]


def measure(args: Namespace, name: str, device: torch.device) -> Found:
    """Time the variants of one model in turn."""
    gpu = device.type == "cuda"
    dtype = torch.float16 if gpu else torch.float32  # of the encoders
    if name in architectures.CONFIGS:
        pipeline = architectures.build(name, device, dtype)
    else:
        pipeline = loading.load_pipeline(name, dtype=dtype).to(device)
    unet = pipeline.unet
    resolution = unet.config.sample_size * pipeline.vae_scale_factor
    variants = variants_of(args, name, unet)
    captions = [f"a red circle on a gray background {k}" for k in range(variants[-1].pairs)]
    shape = (2, len(captions), 3, resolution, resolution)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    with FlopCounterMode(display=False) as counter:
        model.encode_images(pipeline, pixels[:, 0])
        model.encode_prompts(pipeline, captions[:1], resolution)
    flops = {"encoders": counter.get_total_flops(), "call": call_flops(unet.config)}
    rates = {variant.dtype: [] for variant in variants}
    found = Found(name, device, variants, data_seconds(resolution), flops, rates)

    repeats = args.repeats or (5 if name == "tiny" else 3)
    work = sum(2 * v.pairs * sum(v.calls().values()) * len(CELLS) for v in variants)
    bar = tqdm(total=round(work * (repeats + 1)), unit="call", unit_scale=True)
    for _ in range(repeats + 1):  # the first one is the warm-up
        for dtype in rates:
            rates[dtype].append(product_rate(device, dtype))
        for variant in variants:
            bar.set_description(f"{name}, {variant.name}")
            some = pixels[:, : variant.pairs].flatten(0, 1), captions[: variant.pairs]
            timed(variant, pipeline, *some)
            bar.update(round(2 * variant.pairs * sum(variant.calls().values()) * len(CELLS)))
    bar.close()
    for variant in variants:
        del variant.parts[:1]
    for dtype in rates:
        del rates[dtype][:1]
    time_optimizers(variants, UPDATE.get(name, 16))
    return found


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of three."""
    n, best = (8192 if device.type == "cuda" else 2048), float("inf")
    a = torch.randn(n, n, device=device).to(dtype)
    for _ in range(3):
        clock = Clock(device)
        with clock("forward"):
            a @ a
        best = min(best, clock.parts["forward"])
    return 2 * n**3 / best


def data_seconds(resolution: int, pairs: int = 4) -> float:
    """Seconds a pair, on one core, of decoding two JPEGs half as large again, and of collating."""
    coarse = np.random.default_rng(0).integers(0, 256, (resolution // 8, resolution // 8, 3))
    image = Image.fromarray(coarse.astype(np.uint8)).resize((3 * resolution // 2,) * 2)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    pair = {
        "jpg_0": file.getvalue(),
        "jpg_1": file.getvalue() + bytes(1),
        "label_0": 1.0,
        "caption": "",
    }
    start, items = time.perf_counter(), []
    for n in range(pairs):
        winner, loser, caption, _ = data.read_pair(pair, resolution)
        item = {"winner": winner, "loser": loser, "caption": caption}
        items.append(item | {"sizes": [[], []], "n": n, "row": n, "broken": []})
    data.collate(items)
    return (time.perf_counter() - start) / pairs


# -------------------------------------------------------------------------------------------------
# The report.


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    cpu = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpu.read_text() if cpu.exists() else "")
    return f"{name[1] if name else platform.processor()}, {torch.get_num_threads()} thread(s)"


def of(values: list[float], form: str = ".3g", unit: float = 1) -> str:
    """`median (lowest to highest)` of the repeats."""
    middle, low, high = (unit * function(values) for function in (median, min, max))
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def heading(args: Namespace, found: Found) -> str:
    options = [args.dtype, *(["compiled"] if args.compile else [])]
    options += [f"LoRA of rank {args.lora_rank}"] if args.lora_rank else []
    where = "a GPU" if found.device.type == "cuda" else "a CPU"
    return f"A training step of {found.name} on {where}: {', '.join(options)}"


def section(args: Namespace, argv: list[str], found: Found) -> str:
    """The section of docs/speed.md."""
    rows, parts = [], []
    base = found.variants[0]
    for v in found.variants:
        calls = f"{sum(v.calls().values()):g}"
        if v.failed:
            rows.append([v.name, f"{v.pairs}", calls, "out of memory", "", "", ""])
            parts.append([v.name, "out of memory", *("" for _ in PARTS)])
            continue
        row = [v.name, f"{v.pairs}", calls, of([1 / s for s in v.seconds()])]
        row.append("" if base.failed else of(found.ratios(v, base), ".2f"))
        row.append(of(found.shares(v), ".0f", 100))
        rows.append([*row, f"{v.memory / 2**30:.1f}" if v.memory else ""])
        total = median(v.seconds())
        split = [median(part[key] for part in v.parts) / total for key in PARTS]
        parts.append([v.name, f"{total:.3g}", *(f"{100 * share:.0f}" for share in split)])
    heads = ["variant", "pairs at once", "calls an image", "pairs/s", "times released"]
    heads += ["% of the product's rate", "GiB beside weights"]
    if not any(v.memory for v in found.variants):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    paper = next(v for v in found.variants if v.name == "uniform")
    rate = median(found.rates[paper.dtype]) / 1e12
    repeats = max(len(v.parts) for v in found.variants)
    times = [median(v.seconds()) for v in found.variants if not v.failed]
    fastest = min(times, default=float("inf"))
    waits = [max(0, 1 - fastest * workers / found.data) for workers in (1, 8)]
    after = (
        f"Beside it, in a loader's worker: {1000 * found.data:.3g} ms a pair on one core. So of "
        f"the fastest variant's time a share of {waits[0]:.0%} would be waiting with one worker, "
        f"{waits[1]:.0%} with eight, each on a core of its own (computed).\n"
    )
    if found.name in LARGE and not paper.failed:
        hours = RECIPE_PAIRS * median(paper.seconds()) / 3600
        after += (
            f"\nAt this pace the {RECIPE_PAIRS:,} pairs of the published recipe would take "
            f"{hours:,.0f} device-hours on the paper's path (computed).\n"
        )
    return (
        f"```\n{shlex.join(['python', '-m', 'lab.bench', *argv])}\n```\n\n"
        f"{datetime.date.today()}, {hardware(found.device)}, torch {torch.__version__}. A UNet "
        f"call is {found.flops['call'] / 1e9:,.4g} GFLOP an image, VAE and text encoders "
        f"{found.flops['encoders'] / 1e9:,.4g} a pair. A large product ran at {rate:,.3g} TFLOP/s. "
        f"Medians of {repeats} repeat(s), in parentheses the lowest and the highest:\n\n"
        f"{tables.markdown(heads, rows)}\n"
        f"Seconds a pair, and what the parts take of them, in %:\n\n"
        f"{tables.markdown(['variant', 's', *PARTS], parts)}\n"
        f"{after}"
    )


def as_json(args: Namespace, argv: list[str], found: Found) -> dict:
    about = {"model": found.name, "argv": argv, "date": str(datetime.date.today())}
    about |= {"hardware": hardware(found.device), "torch": torch.__version__}
    about |= {"dtype": args.dtype, "data_seconds_a_pair": found.data}
    variants = [
        {"name": v.name, "pairs": v.pairs, "failed": v.failed, "memory": v.memory, "parts": v.parts}
        for v in found.variants
    ]
    return about | {"variants": variants}


def picture(every: list[Found], file: Path):
    """A bar for each variant, in parts: seconds a pair over the released one's."""
    panels = []
    for found in every:
        bars = {
            v.name: {part: median(p[part] for p in v.parts) for part in PARTS}
            for v in found.variants
            if not v.failed
        }
        unit = 1.0 if found.variants[0].failed else sum(bars["released"].values())
        bars = {name: {k: x / unit for k, x in parts.items()} for name, parts in bars.items()}
        panels.append({"title": found.name, "x": "time a pair, released = 1", "bars": bars})
    figures.bars(panels, file, "A training step, by part")


# -------------------------------------------------------------------------------------------------
# The program.


def check(args: Namespace, gpu: bool):
    """Fill in what depends on the device. Raises UserError."""
    args.dtype = args.dtype or ("bf16" if gpu else "fp32")
    for flag in ("micro_batch", "repeats"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1.")
    if args.report and not args.report.is_file():
        raise UserError(f"--report {args.report}: must be a Markdown file that exists.")
    for name in args.model:
        config = architectures.read_config(name)
        if not gpu:
            check_memory(name, loading.count_parameters(config))


def check_memory(name: str, parameters: int):
    """Raises UserError where a CPU's memory is surely too small: the kernel would kill the program.
    In fp32 two policies, two references, gradients and AdamW's two moments are 28 bytes a
    parameter."""
    need, there = 28 * parameters, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > there:
        raise UserError(
            f"--model {name}: a step on the CPU takes more than {need / 1e9:.0f} GB of memory, "
            f"and this machine has {there / 1e9:.0f}; take one with a GPU, or --model tiny."
        )


def main(argv: list[str] | None = None) -> list[Found]:
    with reported("lab.bench"):
        args, gpu = parse(argv), torch.cuda.is_available()
        argv = sys.argv[1:] if argv is None else argv
        check(args, gpu)
        torch.manual_seed(0)
        device, every = torch.device("cuda" if gpu else "cpu"), []
        for name in args.model:
            try:
                every.append(measure(args, name, device))
            except torch.OutOfMemoryError as error:
                raise UserError(f"--model {name}: the GPU's memory is too small.") from error
            text = section(args, argv, every[-1])
            print(f"\n## {heading(args, every[-1])}\n\n{text}")
            if args.report:
                write_section(args.report, heading(args, every[-1]), text)
            for variant in every[-1].variants:  # the next model needs their memory
                variant.policy = variant.reference = None
        found = [as_json(args, argv, one) for one in every]
        args.out.mkdir(parents=True, exist_ok=True)
        write(args.out / "speed.json", json.dumps(found, indent=1) + "\n")
        picture(every, args.out / "speed.png")
        print(f"Look at {args.out / 'speed.png'}.")
        return every


if __name__ == "__main__":
    main()
