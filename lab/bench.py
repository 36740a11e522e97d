"""Speed, memory and cost of one InPO training step, on one device, at random weights.

    python -m lab.bench --model sdxl --peak-tflops 989 --out bench-sdxl.md  # H200: 989 dense, bf16
    python -m lab.bench --model sdxl --compile --repeats 3 --out bench-sdxl-compile.md
    python -m lab.bench --model tiny                                        # a laptop, minutes

No weights and no hub are needed: UNets are built from their configuration, latents and conditioning
are random. Timed is the code that trains: ddim_invert, Denoiser, squared_error, inpo_loss. A
timing is a ratio within one run; its seconds belong to the hardware and versions printed with them.
They are those of a plain process: without other ranks and clipping, gradients in the UNet's dtype.
"""

import argparse
from pathlib import Path

from system.program import Parser, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.bench", __doc__)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    # fmt: off
    add("--model", default="sdxl", help="sdxl, sd15, tiny, or a folder in diffusers layout")
    add("--dtype", choices=("bf16", "fp16", "fp32"),
        help="of the UNets; if not given: bf16 on a GPU, fp32 on a CPU")
    add("--micro-batch", type=int, metavar="PAIRS", help="if not given: 4, for sd15 and tiny 16")
    add("--inversion-steps", type=int, default=10, metavar="N",
        help="cells of the inversion's grid")
    add("--eta", type=float, default=0.1, help="noise injected while inverting, 0 to 1")
    add("--gradient-checkpointing", action=switch,
        help="in micro-steps; if not given: not for tiny")
    add("--compile", action="store_true", help="torch.compile both UNets; warm-up takes minutes")
    add("--repeats", type=int, default=5, metavar="N", help="timed runs of each row")
    add("--warmup-repeats", type=int, default=1, metavar="N", help="untimed ones before them")
    add("--peak-tflops", type=float, metavar="N", help="the GPU's dense peak in this dtype")
    add("--out", type=Path, metavar="FILE", help="Markdown file for the report")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import copy
import datetime
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from diffusers import UNet2DConditionModel
from tqdm import tqdm

from invert import ddim_invert
from loss import inpo_loss, squared_error
from model import Denoiser, count_parameters
from system import hub
from system.files import UserError, write
from training.budget import build, call_flops, calls_per_image, random_inputs

# -------------------------------------------------------------------------------------------------
# The models: the public UNet configurations; what is not said is diffusers' default.

SDXL = {  # stabilityai/stable-diffusion-xl-base-1.0: 2,567,463,684 parameters
    "sample_size": 128, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD15 = {  # stable-diffusion-v1-5/stable-diffusion-v1-5: 859,520,964 parameters
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8, "cross_attention_dim": 768,
}  # fmt: skip
CONFIGS, TIMESTEPS = {"sdxl": SDXL, "sd15": SD15}, 1000
RECIPE_PAIRS = 400 * 1024  # of the published run: optimizer steps x pairs, for both models
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def read_config(name: str) -> dict:
    """The UNet configuration of a preset or a folder. Raises UserError."""
    if name == "tiny" and not Path(hub.PRESETS[name]).is_dir():
        raise UserError("--model tiny: assets/tiny-sdxl is not there; name a folder.")
    config = CONFIGS.get(name) or hub.read_config(name, "unet")
    if name not in CONFIGS and config.get("_class_name") != UNet2DConditionModel.__name__:
        raise UserError(f"--model {name}: is no UNet2DConditionModel, nor has one.")
    return config


# -------------------------------------------------------------------------------------------------
# What is timed. A repeat is one pass over all rows, so that a slow minute hits them alike; in it a
# row runs once in every cell of the grid, and takes the mean.


@dataclass
class Row:
    name: str
    work: float  # UNet calls an image needs; a backward counts two, recomputed forwards nothing
    action: Callable[[int], object]  # of the cell that the timesteps lie in
    checkpointing: bool = False  # of the policy's activations
    seconds: list[float] | None = field(default_factory=list)  # by repeat; None: out of memory
    memory: int = 0  # peak bytes in the warm-up; 0: no GPU


def adamw(weights: list[torch.nn.Parameter]) -> Callable[[], None]:
    """A step of AdamW on fp32 master weights; those of half precision are a copy, made by the first
    step, as are the two moments."""
    state = []

    @torch.no_grad()
    def step():
        if not state:
            state.append([weight.detach().float() for weight in weights])
            state.append(torch.optim.AdamW(state[0], lr=1e-5, fused=True))
        masters, optimizer = state
        for weight, master in zip(weights, masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        if weights[0].dtype != torch.float32:
            torch._foreach_copy_(weights, masters)

    return step


def rows_of(args: argparse.Namespace, policy: UNet2DConditionModel) -> list[Row]:
    """The rows of the table, in the order they must run: the last one brings the optimizer."""
    reference = copy.deepcopy(policy).requires_grad_(False)
    if args.compile:
        policy.compile()
        reference.compile()
    x0, cond = random_inputs(policy, args.micro_batch)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, device=x0.device).square()
    abar, cells = (1 - betas).cumprod(0), range(args.inversion_steps)
    width = TIMESTEPS // len(cells)
    t = [torch.randint(width, (args.micro_batch,)) + k * width for k in cells]
    t = [one.repeat(2).to(x0.device) for one in t]
    noise = [torch.Generator().manual_seed(i) for i in range(len(x0))]  # CPU's, as train_inpo.py's
    step = adamw(list(policy.parameters()))
    eps = Denoiser(policy, cond, abar)
    eps_ref = torch.no_grad()(Denoiser(reference, cond, abar))

    def invert(k):
        return ddim_invert(eps, x0, t[k], abar, len(cells), args.eta, noise)

    def micro_step(k):
        xt, tau = invert(k)
        err_ref, err = squared_error(eps_ref(xt, t[k]), tau), squared_error(eps(xt, t[k]), tau)
        inpo_loss(err, err_ref, beta=5000.0)[0].mean().backward()

    def forward_backward(k):
        squared_error(eps(x0, t[k]), x0).mean().backward()

    forward = torch.no_grad()(lambda k: eps(x0, t[k]))
    calls, saves = calls_per_image("inpo", [k + 1 for k in cells]), args.gradient_checkpointing
    all_calls = sum(calls.values())
    how = "checkpointing" if saves else "no checkpointing"
    return [
        Row("UNet forward, no grad", 1, forward),
        Row("forward + backward", calls["to train"], forward_backward),
        Row("forward + backward, checkpointing", calls["to train"], forward_backward, True),
        Row(f"DDIM inversion, mean of {len(cells)} cells", calls["to invert"], invert),
        Row(f"micro-step, {how}", all_calls, micro_step, saves),
        Row("micro-step + AdamW", all_calls, lambda k: (micro_step(k), step()), saves),
    ]


def measure(rows: list[Row], policy: UNet2DConditionModel, cells: int, warmup: int, repeats: int):
    """Fill in seconds and memory; a row that ever runs out of the GPU's memory keeps no seconds."""
    gpu = policy.device.type == "cuda"
    wait = torch.cuda.synchronize if gpu else lambda: None
    policy.enable_gradient_checkpointing()
    switches = [m for m in policy.modules() if hasattr(m, "gradient_checkpointing")]
    total = cells * sum(row.work for row in rows) * (warmup + repeats)
    bar = tqdm(total=total, unit="call", unit_scale=True, dynamic_ncols=True)
    for i in range(warmup + repeats):
        for row in rows:
            bar.set_description(row.name)
            policy.zero_grad(set_to_none=True)  # no row inherits gradients
            for module in switches:  # enabling anew would make a new function, and a new graph
                module.gradient_checkpointing = row.checkpointing
            if gpu and i == 0:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            wait()
            start = time.perf_counter()
            try:
                for cell in range(cells if row.seconds is not None else 0):
                    row.action(cell)
                wait()
                if i >= warmup and row.seconds is not None:
                    row.seconds.append((time.perf_counter() - start) / cells)
            except torch.OutOfMemoryError:
                row.seconds = None
            if gpu and i == 0:
                row.memory = torch.cuda.max_memory_allocated()
            bar.update(row.work * cells)
    bar.close()


# -------------------------------------------------------------------------------------------------
# The report.


def device_hours(seconds: float, pairs: int) -> float:
    """Hours of one device for all pairs of the published recipe, at `seconds` per `pairs`."""
    return RECIPE_PAIRS / pairs * seconds / 3600


def table(rows: list[Row], images: int, flops: float, peak_tflops: float | None = None) -> str:
    """The rows in Markdown. flops: of a UNet call. FLOP/s and memory only where memory is known."""

    def ratio(row: Row, unit: Row) -> float:  # within a repeat, whose rows share a slow minute
        return median(a / b for a, b in zip(row.seconds, unit.seconds, strict=True))

    def cells(row: Row) -> dict[str, str]:
        if row.seconds is None:
            return {"": row.name, "seconds": "out of memory"}
        each, low, high = (of(row.seconds) for of in (median, min, max))
        rate = row.work * images * flops / each / 1e12
        found = {"": row.name, "seconds": f"{each:.4g}", "min-max": f"{low:.4g}-{high:.4g}"}
        found |= {"images/s": f"{images / each:.4g}", "in calls": f"{ratio(row, rows[0]):.2f}"}
        found |= {"needed": f"{row.work:g}"}
        found |= {"of micro-step": f"{ratio(row, rows[4]):.1%}" if rows[4].seconds else ""}
        if row.memory:
            found |= {"TFLOP/s": f"{rate:.3g}"}
            found |= {"of peak": f"{rate / peak_tflops:.1%}" if peak_tflops else ""}
            found |= {"peak GiB": f"{row.memory / 2**30:.2f}"}
        return found

    found = [cells(row) for row in rows]
    heads = list(max(found, key=len))
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    lines += [[row.get(head, "") for head in heads] for row in found]
    name, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    lines = [[line[0].ljust(name), *map(str.rjust, line[1:], widths)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    cpu = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpu.read_text() if cpu.exists() else "")
    return f"{name[1] if name else platform.processor()}, {torch.get_num_threads()} thread(s)"


def report(args: argparse.Namespace, argv: list[str], rows: list[Row], policy) -> str:
    """The page that is printed, and written to --out."""
    pairs, flops, step = args.micro_batch, call_flops(policy.config), rows[4].seconds
    compiled = ", compiled" if args.compile else ""
    unit = "GPU" if policy.device.type == "cuda" else "CPU"
    projection = "None: the micro-step ran out of memory; lower --micro-batch."
    if step:
        hours, low, high = (f"{device_hours(of(step), pairs):,.4g}" for of in (median, min, max))
        projection = f"""\
The published recipe sees {RECIPE_PAIRS:,} pairs, 400 steps of 1024. At {median(step):.4g} s for
every {pairs} of them, this model on this device would take
**{hours} {unit}-hours** ({low} to {high}).
Not in it: VAE and text encoders, reading of data, optimizer steps, traffic between devices."""
    parameters = count_parameters(policy.config) / 1e6
    return f"""\
# One InPO training step: {args.model}, {pairs} pairs

    {shlex.join(["python", "-m", "lab.bench", *argv])}

{datetime.date.today()}, {hardware(policy.device)}, torch {torch.__version__}.
UNet of {parameters:,.1f} M parameters, random, {args.dtype}{compiled}.
A call is the forward of one image, {flops / 1e9:,.4g} GFLOP.
Inversion on a grid of {args.inversion_steps}, eta {args.eta:g}.
Medians of {args.repeats} repeat(s) after {args.warmup_repeats} of warm-up.

{table(rows, 2 * pairs, flops, args.peak_tflops)}

"In calls" is a time over that of the first row, repeat by repeat. "Needed" are the calls of the
work itself: a backward is two, a recomputed activation none; TFLOP/s count these. Memory, where
shown, holds policy and reference in every row, gradients after a backward, and AdamW's state in the
last. Compare ratios; seconds belong to the machine and the versions above.

## A projection, not a measurement

{projection}
"""


# -------------------------------------------------------------------------------------------------
# The program.


def check(args: argparse.Namespace, gpu: bool):
    """Fill in what depends on model and device. Raises UserError."""
    if args.micro_batch is None:
        args.micro_batch = 16 if args.model in ("sd15", "tiny") else 4
    args.dtype = args.dtype or ("bf16" if gpu else "fp32")
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = args.model != "tiny"
    for flag in ("micro_batch", "repeats", "warmup_repeats"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1.")
    steps = args.inversion_steps
    if steps < 1 or TIMESTEPS % steps:
        raise UserError(f"--inversion-steps {steps} must divide the {TIMESTEPS} timesteps.")
    if not 0 <= args.eta <= 1:
        raise UserError(f"--eta {args.eta:g} must lie between 0 and 1.")
    if args.peak_tflops is not None and (not gpu or args.peak_tflops <= 0):
        raise UserError("--peak-tflops must be positive, and needs a GPU.")
    if args.out and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise UserError(f"--out {args.out} must be a file in a folder that exists.")


def check_memory(model: str, parameters: int):
    """Raises UserError where a CPU's memory is surely too small: the kernel would kill the program.
    In fp32 policy, reference, gradients and AdamW's two moments are 20 bytes a parameter."""
    need, there = 20 * parameters, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > there:
        raise UserError(
            f"--model {model}: a step on the CPU takes more than {need / 1e9:.0f} GB of memory, "
            f"and this machine has {there / 1e9:.0f}; take one with a GPU, or --model tiny."
        )


def main(argv: list[str] | None = None) -> list[Row]:
    with reported("lab.bench"):
        args, gpu = parse(argv), torch.cuda.is_available()
        check(args, gpu)
        config = read_config(args.model)
        if not gpu:
            check_memory(args.model, count_parameters(config))
        torch.manual_seed(0)
        try:
            policy = build(config, "cuda" if gpu else "cpu", DTYPES[args.dtype])
            rows = rows_of(args, policy)
            measure(rows, policy, args.inversion_steps, args.warmup_repeats, args.repeats)
        except torch.OutOfMemoryError as error:
            raise UserError("The GPU's memory is too small for this model.") from error
        if rows[0].seconds is None:
            raise UserError("A forward exceeds the GPU's memory; lower --micro-batch.")
        page = report(args, sys.argv[1:] if argv is None else argv, rows, policy)
        print(page)
        if args.out:
            write(args.out, page)
        return rows


if __name__ == "__main__":
    main()
