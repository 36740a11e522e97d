"""The memory of a training step on each GPU: one configuration, the table, and measurements.

    python memory_table.py --model sdxl --gpus 8 --micro-batch 4      # full fine-tuning, ZeRO-2
    python memory_table.py --model sdxl --lora-rank 64 --stage 1 --micro-batch 1
    python memory_table.py --table --out docs/memory.md               # the whole table
    python memory_table.py --measure --out docs/memory-measured.json  # on a GPU, minutes

memory.py has the estimate, and says what each part is.
"""

import argparse
import copy
import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch

import model
from lab.bench import CONFIGS, hardware
from loss import inpo_loss, squared_error
from system.processes import join
from system.program import HelpFormatter
from training import lora, plan
from training.cost import build, random_inputs
from training.memory import GIB, encoders, estimate, settings, vae_peak
from training.recipes import recipe_of

RECIPE = {name: recipe_of(name)["micro_batch"] for name in CONFIGS}  # pairs
DS_CONFIGS = {  # by stage and offload
    (1, False): "configs/zero1.json",
    (2, False): "ds_config.json",
    (3, False): "configs/zero3.json",
    (2, True): "configs/zero2-offload.json",
    (3, True): "configs/zero3-offload.json",
}

# -------------------------------------------------------------------------------------------------
# Measured.


def measure(
    unet_config: dict,
    ds_config: dict,
    micro_batch: int,
    lora_rank: int | None,
    device: str,
    peak: Callable[[], int],
) -> int:
    """peak() after two optimizer steps of two micro-steps, at random weights, on one rank.

    ds_config: completed. Without VAE and text encoders; gradient checkpointing is on. An inversion
    needs less than the training forward, and is left out."""
    join()
    unet = build(unet_config, device, plan.compute_dtype(ds_config))
    x0, cond = random_inputs(unet, micro_batch)
    reference = None if lora_rank else copy.deepcopy(unet).requires_grad_(False)
    if lora_rank:
        lora.attach(unet, lora_rank, lora_rank)
    unet.enable_gradient_checkpointing()
    trained = [weight for weight in unet.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(model=unet, model_parameters=trained, config=ds_config)
    if reference is not None and engine.zero_optimization_stage() == 3:
        frozen = {key: value for key, value in ds_config.items() if key != "optimizer"}
        reference, *_ = deepspeed.initialize(model=reference, config=frozen)
    t, abar = torch.full((len(x0),), 500, device=x0.device), torch.full((1000,), 0.5).to(x0)

    def error(unet):
        return squared_error(model.predict_noise(unet, x0, t, cond, abar), x0)

    for _ in range(2 * ds_config["gradient_accumulation_steps"]):
        with torch.no_grad():  # LoRA: the same work with the adapters on
            err_ref = error(reference or engine)
        engine.backward(inpo_loss(error(engine), err_ref, beta=5000.0)[0].mean())
        engine.step()
    return peak()


def complete(ds_config: dict, micro_batch: int) -> dict:
    """A configuration file's content for `measure`: two micro-steps a step, no monitor."""
    kept = {key: value for key, value in ds_config.items() if key != "tensorboard"}
    kept["optimizer"]["params"]["lr"] = 1e-5
    kept |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": 2}
    return kept | {"train_batch_size": 2 * micro_batch}


def measure_one(args: argparse.Namespace) -> int | None:
    """Peak bytes of the configuration that the flags name; None where it does not fit the GPU."""
    ds_config = complete(plan.read_ds_config(DS_CONFIGS[args.stage, False]), args.micro_batch)
    try:
        return measure(
            CONFIGS[args.model], ds_config, args.micro_batch, args.lora_rank, "cuda",
            torch.cuda.max_memory_allocated,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        return None


def measure_all(out: Path):
    """Measure every line of `lines` on one GPU without offload, each in its own process, and write
    the file anew after each."""
    found = {
        "device": hardware(torch.device("cuda")),
        "torch": torch.__version__,
        "date": str(datetime.date.today()),
        "peaks": [],
    }
    for line in lines():
        if line["gpus"] > 1 or line["offload"]:
            continue
        case = {key: line[key] for key in ("model", "stage", "micro_batch", "lora_rank")}
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in case.items() if v is not None]
        done = subprocess.run(
            [sys.executable, __file__, "--measure", *flags], capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(f"--measure {' '.join(flags)}: failed.\n{done.stderr[-2000:]}")
        peak = json.loads(done.stdout.splitlines()[-1])  # DeepSpeed's notes come before it
        found["peaks"].append(case | {"bytes": peak})
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(*flags, "out of memory" if peak is None else f"{peak / GIB:.2f} GiB", flush=True)


# -------------------------------------------------------------------------------------------------
# The table.

CARDS, ROOM = (16, 24, 48, 80), 0.9  # GB; the share of a card that the estimate may fill
PARTS = "weights reference gradients optimizer buckets activations step vae encoders total".split()
PAGE = """\
# How much memory a training step takes

    python memory_table.py --table --out docs/memory.md

{source}

GiB on each GPU, bf16, gradient checkpointing, gradients reduced and accumulated in fp32; a
micro-batch is in pairs, two images each. SDXL at 1024 px, SD1.5 at 512 px. `memory.py` says what
each part is and where DeepSpeed 0.19.8 allocates it. Activations are counted on PyTorch's meta
device, with fused attention; the rest is arithmetic. The total is the largest of three peaks: the
end of a forward, the optimizer's step, or the VAE at a sample picture, whose column says by how
much it exceeds the others; `--sample-every 0` draws none. The VAE is in fp16 (SDXL's own, which
`--model sdxl` replaces, stays in fp32 and takes twice that). Not in it: the CUDA context, the
kernels' workspaces, gradients of activations, fragments. So a line stands under a card (or names
it) if it leaves {room:.0%} of it free.

| the card | what to train | flags of `train_inpo.py` |
| --- | --- | --- |
{recipes}

- LoRA needs no second UNet: its reference is the UNet with its adapters off.
- The buckets of ZeRO-2 are allocated whole, however few weights are trained: 1.9 GiB by default,
  and copies of what is in one. ZeRO-1 in bf16 has none, hence `configs/zero1.json` for LoRA. Else,
  lower `reduce_bucket_size`.
- ZeRO-1 in bf16 keeps all gradients on every GPU, raw and accumulated: 6 bytes a weight. On many
  GPUs ZeRO-2 takes less.
- Offload under ZeRO-2 leaves the fp32 gradients on the GPU; under ZeRO-3 they go to the CPU. There
  it takes 18 (ZeRO-2) or 20 (ZeRO-3) bytes a weight, {host:.0f} GiB of main memory for SDXL under
  ZeRO-3.
- ZeRO-3 on one GPU shards nothing; it is there for offload.
"""
RECIPES = (  # a card, and its line
    ("16 GB", ("sd15", 1, 1, 4, 64, False)),
    ("16 GB", ("sd15", 3, 1, 16, None, True)),
    ("16 GB", ("sdxl", 1, 1, 1, 64, False)),
    ("24 GB", ("sdxl", 1, 1, 4, 64, False)),
    ("24 GB", ("sdxl", 3, 1, 1, None, True)),
    ("80 GB", ("sdxl", 2, 1, 4, None, False)),
    ("8 of 24 GB", ("sdxl", 3, 8, 4, None, False)),
    ("8 of 48 or 80 GB", ("sdxl", 2, 8, 4, None, False)),
)
KEYS = ("model", "stage", "gpus", "micro_batch", "lora_rank", "offload")  # of a line of the table


def card(total: float) -> int | None:
    """The smallest of CARDS that holds so many GiB and leaves a tenth free; None: none does."""
    return next((size for size in CARDS if total <= ROOM * size), None)


def lines() -> list[dict]:
    """What the table has: the flags of each of its lines."""
    made = []
    for name in CONFIGS:
        sizes = (1, RECIPE[name])
        made += [
            (name, stage, gpus, pairs, None, False)
            for stage in (1, 2, 3) for gpus in (1, 2, 4, 8) for pairs in sizes
        ]  # fmt: skip
        made += [(name, stage, 1, pairs, None, True) for stage in (2, 3) for pairs in sizes]
        made += [(name, 1, 1, pairs, 64, False) for pairs in (1, 2, 4)]
    return [dict(zip(KEYS, line, strict=True)) for line in made]


def size_of_encoders(name: str) -> float:
    """GiB in the dtypes that model.load_pipeline gives a preset."""
    return encoders(name, torch.bfloat16, torch.float16)


def estimate_line(line: dict, checkpointing: bool = True) -> dict[str, float]:
    """`estimate` under the DeepSpeed configuration for the line's stage and offload."""
    config, pairs = CONFIGS[line["model"]], line["micro_batch"]
    found = settings(plan.read_ds_config(DS_CONFIGS[line["stage"], line["offload"]]))
    side = 8 * config["sample_size"]
    return estimate(
        config, **found, world=line["gpus"], dtype=torch.bfloat16, checkpointing=checkpointing,
        micro_batch=pairs, latent=config["sample_size"], lora_rank=line["lora_rank"],
        encoders=size_of_encoders(line["model"]),
        vae=vae_peak(torch.float16, side, side, pairs),
    )  # fmt: skip


def what(line: dict) -> str:
    """What is trained and how, in words."""
    rank, offload = line["lora_rank"], ", offload" * line["offload"]
    return f"{f'LoRA, rank {rank}' if rank else 'full'}, ZeRO-{line['stage']}{offload}"


def measured(line: dict, found: dict) -> str:
    """GiB with the encoders' size added, out of memory, or not measured."""
    if line["gpus"] == 1 and not line["offload"]:
        for case in found.get("peaks", []):
            if all(line[key] == value for key, value in case.items() if key != "bytes"):
                peak = case["bytes"]
                rest = size_of_encoders(line["model"])
                return "out of memory" if peak is None else f"{peak / GIB + rest:.1f}"
    return "not measured"


def rows(some: list[tuple[dict, dict]], found: dict) -> str:
    """Lines and their estimates as a Markdown table, the smallest first."""
    heads = ["model", "training", "GPUs", "micro-batch", *PARTS, "card", "measured"]
    table = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2)]
    for line, parts in sorted(some, key=lambda pair: pair[1]["total"]):
        row = [line["model"], what(line), line["gpus"], line["micro_batch"]]
        row += [f"{parts[part]:.1f}" for part in PARTS]
        table.append([*row, f"{card(parts['total'])} GB", measured(line, found)])
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in table)


def page(found: dict) -> str:
    """docs/memory.md: the lines by the card that they need. found: what --measure wrote, or {}."""
    made = [(line, estimate_line(line)) for line in lines()]
    sections = ""
    for size in CARDS:
        one = [(a, b) for a, b in made if a["gpus"] == 1 and card(b["total"]) == size]
        sections += f"\n## One card of {size} GB\n\n{rows(one, found)}\n"
    for gpus in (8, 4, 2):
        some = [(a, b) for a, b in made if a["gpus"] == gpus]
        sections += f"\n## {gpus} GPUs, each\n\n{rows(some, found)}\n"
    source = "Computed, not measured: no GPU was at hand."
    if found:
        source = (
            f"Computed; measured where the last column says so, on {found['device']}, torch\n"
            f"{found['torch']}, {found['date']}, with the encoders' size added and no pictures."
        )
    recipes = ""
    for words, line in RECIPES:
        line = dict(zip(KEYS, line, strict=True))
        flags = f"--model {line['model']} --micro-batch {line['micro_batch']}"
        flags += f" --lora-rank {line['lora_rank']}" if line["lora_rank"] else ""
        flags += f" --ds-config {DS_CONFIGS[line['stage'], line['offload']]}"
        total = estimate_line(line)["total"]
        recipes += f"| {words} | {what(line)}: {total:.1f} GiB | `{flags}` |\n"
    host = 20 * model.count_parameters(CONFIGS["sdxl"]) / GIB
    return PAGE.format(source=source, room=1 - ROOM, recipes=recipes[:-1], host=host) + sections


# -------------------------------------------------------------------------------------------------
# Flags.


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", default="sdxl", help="sdxl or sd15")
    add("--lora-rank", type=int, metavar="R", help="train adapters; if not given: all weights")
    add("--stage", type=int, default=2, choices=(1, 2, 3), help="of ZeRO")
    add("--gpus", type=int, default=1, metavar="N", help="ranks that share the work")
    add("--micro-batch", type=int, metavar="PAIRS", help="if not given: the recipe's")
    add("--offload", action="store_true", help="optimizer on the CPU; ZeRO-2 or -3")
    add("--gradient-checkpointing", action=switch, default=True, help="less memory, more work")
    add("--table", action="store_true", help="write docs/memory.md's table to --out instead")
    add("--measure", action="store_true",
        help="on a GPU: print the peak bytes of --model, --stage, --micro-batch, --lora-rank; with "
             "--out measure every line of the table that one GPU can run")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="for --table (Markdown) or --measure (JSON)")
    return parser


def check(args: argparse.Namespace):
    """Fill in the micro-batch. Raises ValueError, a sentence, for a mistake."""
    if args.model not in CONFIGS:
        raise ValueError(f"--model {args.model}: must be {' or '.join(CONFIGS)}.")
    args.micro_batch = RECIPE[args.model] if args.micro_batch is None else args.micro_batch
    for flag in ("lora_rank", "gpus", "micro_batch"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: must be at least 1.")
    if (args.stage, args.offload) not in DS_CONFIGS:
        raise ValueError("--offload: needs --stage 2 or 3.")
    if args.table and args.measure:
        raise ValueError("--table and --measure: give one of them.")
    if args.table and not args.out:
        raise ValueError("--table: needs --out FILE.")
    if args.out and not (args.table or args.measure):
        raise ValueError("--out: goes with --table or --measure.")
    if args.out and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise ValueError(f"--out {args.out}: must be a file in a folder that exists.")
    if args.measure and not torch.cuda.is_available():
        raise ValueError("--measure: needs a GPU, and CUDA sees none.")


def main(argv: list[str] | None = None):
    flags = parser()
    args = flags.parse_args(argv)
    try:
        check(args)
        if args.table:
            file = Path(__file__).parent / "docs" / "memory-measured.json"
            args.out.write_text(page(json.loads(file.read_text()) if file.exists() else {}))
        elif args.measure and args.out:
            measure_all(args.out)
        elif args.measure:
            print(json.dumps(measure_one(args)))
        else:
            line = vars(args)
            parts = estimate_line(line, args.gradient_checkpointing)
            print(f"{args.model}, {what(line)}, {args.gpus} GPU(s), {args.micro_batch} pair(s):")
            print("\n".join(f"  {part:<12}{parts[part]:7.2f} GiB" for part in PARTS))
            size = card(parts["total"])
            print(f"Needs a card of {size or f'more than {CARDS[-1]}'} GB. Computed, not measured.")
    except ValueError as error:
        flags.exit(2, f"memory_table.py: error: {error}\n")


if __name__ == "__main__":
    main()
