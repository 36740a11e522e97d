"""Ten ways to train and the memory that each takes on a GPU: docs/memory.md, and a measurement.

    python -m lab.memory                           # print the page
    python -m lab.memory --out docs/memory.md      # write it
    python -m lab.memory --measure 3               # on a GPU: the peak of row 3, one line of JSON

training/budget.py has the estimate, and says what each part is. For any other setting,
`train_inpo.py --dry-run` prints it.
"""

import argparse
from pathlib import Path

from system.program import Parser, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.memory", __doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown file for the page")
    parser.add_argument(
        "--measure", type=int, metavar="ROW", help="measure a row of one GPU, at random weights"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import copy
import json
from dataclasses import dataclass

import deepspeed
import torch

import model
from lab.architectures import CONFIGS
from lab.bench import hardware
from loss import inpo_loss, squared_error
from system.files import UserError, write
from system.processes import join
from training import lora, quantized
from training.budget import (
    GIB,
    build,
    encoders,
    host_memory,
    random_inputs,
    step_memory,
    vae_peak,
)
from training.plan import compute_dtype, read_ds_config
from weights import loading

# -------------------------------------------------------------------------------------------------
# The rows.

FREE = 0.1  # share of a card that the estimate has to leave


@dataclass(frozen=True)
class Row:
    card: int  # GB, of the card that it is meant for
    gpus: int
    model: str
    micro_batch: int  # pairs
    ds_config: str
    lora_rank: int | None = None
    base_weights: str | None = None

    def flags(self) -> str:
        """Of train_inpo.py."""
        adapters = f"--lora-rank {self.lora_rank} " if self.lora_rank else ""
        adapters += f"--base-weights {self.base_weights} " if self.base_weights else ""
        rest = f"{adapters}--ds-config {self.ds_config}"
        return f"--model {self.model} --micro-batch {self.micro_batch} {rest}"

    def memory(self, training_alone: bool = False) -> dict[str, float]:
        """GiB on each GPU by part; training_alone: without encoders and pictures."""
        config, vae = CONFIGS[self.model], torch.float16
        pixels, rest = 8 * config["sample_size"], {}
        if not training_alone:
            rest["encoders"] = encoders(self.model, torch.bfloat16, vae)
            rest["vae"] = vae_peak(vae, pixels, pixels, self.micro_batch)
        return step_memory(
            config, read_ds_config(self.ds_config), torch.bfloat16, world=self.gpus,
            micro_batch=self.micro_batch, rank=self.lora_rank, base_weights=self.base_weights,
            **rest,
        )  # fmt: skip


ROWS = (
    Row(16, 1, "sd15", 4, "configs/zero1.json", lora_rank=64),
    Row(16, 1, "sd15", 16, "configs/zero3-offload.json"),
    Row(16, 1, "sdxl", 1, "configs/zero1.json", lora_rank=64),
    Row(24, 1, "sdxl", 4, "configs/zero1.json", lora_rank=64),
    Row(24, 1, "sdxl", 1, "configs/zero3-offload.json"),
    Row(80, 1, "sdxl", 4, "ds_config.json"),
    Row(24, 8, "sdxl", 4, "configs/zero3.json"),
    Row(48, 8, "sdxl", 4, "ds_config.json"),
    Row(12, 1, "sdxl", 1, "configs/zero1.json", lora_rank=64, base_weights="int8"),
    Row(12, 1, "sdxl", 2, "configs/zero1.json", lora_rank=64, base_weights="nf4"),
)

# -------------------------------------------------------------------------------------------------
# The page.

PAGE = """\
# How much memory a training step takes

    python -m lab.memory --out docs/memory.md

**Computed, not measured.** `python -m lab.memory --measure ROW` measures a row of one GPU, and
`python train_inpo.py --dry-run` computes the memory of any other run.

| row | the card | what to train | flags of `train_inpo.py` |
| ---: | --- | --- | --- |
{recipes}

GiB on each GPU, by part:

{parts}

The numbers are for bf16, gradient checkpointing, and gradients reduced and accumulated in fp32.
A micro-batch is counted in pairs, two images each. SDXL is trained at 1024 px, SD1.5 at 512 px.
`training/budget.py` says what each part is and where DeepSpeed 0.19.8 allocates it. Activations are
counted on PyTorch's meta device, with fused attention; the rest is arithmetic. The total is the
largest of three peaks: the end of a forward, the optimizer's step, or the VAE at a sample picture.
The columns "step" and "vae" say by how much those exceed the peaks before them; `--sample-every 0`
draws no pictures. The VAE is in fp16. (SDXL's own VAE, which `--model sdxl` replaces, stays in fp32
and takes twice that.) The CUDA context, the kernels' workspaces, gradients of activations and
fragments are left out, so each row leaves at least {free:.0%} of its card free.

- LoRA needs no second UNet: its reference is the UNet with its adapters off.
- ZeRO-2 allocates its buckets whole, however few weights are trained: 1.9 GiB by default, and
  copies of what is in one. In bf16 ZeRO-1 has none, so LoRA takes `configs/zero1.json`. Otherwise
  lower `reduce_bucket_size`.
- In bf16 ZeRO-1 keeps all gradients on every GPU, raw and accumulated: 6 bytes a weight. On many
  GPUs ZeRO-2 takes less.
- With offload ZeRO-2 leaves the fp32 gradients on the GPU; ZeRO-3 moves them to the CPU as well.
  Main memory then holds 18 (ZeRO-2) or 20 (ZeRO-3) bytes a weight, {host:.0f} GiB for SDXL under
  ZeRO-3.
- On one GPU ZeRO-3 shards nothing; it serves for offload.

## 12 GB, and 8

SDXL at 1024 px, LoRA of rank 64, one pair a micro-batch, `configs/zero1.json`; GiB, computed:

{small}

A card of 12 GB has 11.2 GiB, one of 8 GB 7.5, and what is left out above has to fit as well. Of the
UNet's 4.8 GiB in bf16 4.1 are linear layers of transformer blocks, which `--base-weights` keeps in
8 or 4 bits; a product makes its W anew, of which the largest takes 0.1 GiB for a moment. Rank 8 is
that of `--recipe lora`; `--cache-latents` takes the encoders away, `--sample-every 0` the pictures.
What few bits do to the margin: [few_bits.md](few_bits.md).
"""


def small_cards() -> str:
    """The table of one row of SDXL under each kind of --base-weights."""
    heads = "`--base-weights`", "weights", "adapters' gradients, optimizer", "activations"
    rest = "VAE, encoders | total | total of rank 8"
    lines = [f"| {' | '.join(heads)} | {rest} |", f"| --- |{' ---: |' * 6}"]
    for kind in (None, *quantized.KINDS):
        parts, small = (
            Row(12, 1, "sdxl", 1, "configs/zero1.json", rank, kind).memory() for rank in (64, 8)
        )
        sizes = [
            parts["weights"],
            parts["gradients"] + parts["optimizer"] + parts["buckets"],
            parts["activations"] + parts["step"],
            parts["vae"] + parts["encoders"],
        ]
        cells = " | ".join(f"{size:.1f}" for size in (*sizes, sum(sizes), sum(small.values())))
        lines.append(f"| {kind or 'not given: bf16'} | {cells} |")
    return "\n".join(lines)


def page() -> str:
    """docs/memory.md."""
    recipes, parts = [], []
    for number, row in enumerate(ROWS, 1):
        zero = read_ds_config(row.ds_config)["zero_optimization"]
        trained = f"LoRA, rank {row.lora_rank}" if row.lora_rank else "full"
        trained += f", base in {row.base_weights}" if row.base_weights else ""
        offload = ", offload" if "offload_optimizer" in zero else ""
        card = f"{row.card} GB" if row.gpus == 1 else f"{row.gpus} of {row.card} GB"
        memory = row.memory()
        memory["total"] = sum(memory.values())
        what = f"{trained}, ZeRO-{zero['stage']}{offload}: {memory['total']:.1f} GiB"
        recipes.append(f"| {number} | {card} | {what} | `{row.flags()}` |")
        sizes = (f"{size:.1f}" for size in memory.values())
        parts.append(f"| {number} | {' | '.join(sizes)} |")
    heads = [f"| row | {' | '.join(memory)} |", f"| ---: |{' ---: |' * len(memory)}"]
    config = read_ds_config("configs/zero3-offload.json")
    host = host_memory(loading.count_parameters(CONFIGS["sdxl"]), config)
    tables = {"recipes": "\n".join(recipes), "parts": "\n".join(heads + parts)}
    return PAGE.format(**tables, small=small_cards(), free=FREE, host=host)


# -------------------------------------------------------------------------------------------------
# Measuring.


def two_steps(
    unet_config: dict,
    ds_config: dict,
    micro_batch: int,
    lora_rank: int | None,
    device: str,
    base_weights: str | None = None,
) -> deepspeed.DeepSpeedEngine:
    """The engine after two optimizer steps of two micro-steps, at random weights, on one rank.

    Gradient checkpointing is on. VAE and text encoders are left out, and so is the inversion, which
    needs less than the training forward."""
    ds_config = {key: value for key, value in ds_config.items() if key != "tensorboard"}
    ds_config["optimizer"]["params"]["lr"] = 1e-5
    ds_config |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": 2}
    ds_config["train_batch_size"] = 2 * micro_batch
    join()
    unet = build(unet_config, device, compute_dtype(ds_config))
    x0, cond = random_inputs(unet, micro_batch)
    reference = None if lora_rank else copy.deepcopy(unet).requires_grad_(False)
    if lora_rank:
        lora.attach(unet, lora_rank, lora_rank)
    if base_weights:
        quantized.quantize(unet, base_weights)
    unet.enable_gradient_checkpointing()
    trained = [weight for weight in unet.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(model=unet, model_parameters=trained, config=ds_config)
    if lora_rank:
        reference = lora.AdapterOff(engine)
    elif engine.zero_optimization_stage() == 3:
        frozen = {key: value for key, value in ds_config.items() if key != "optimizer"}
        reference, *_ = deepspeed.initialize(model=reference, config=frozen)
    t, abar = torch.full((len(x0),), 500, device=x0.device), torch.full((1000,), 0.5).to(x0)

    def error(unet):
        return squared_error(model.predict_noise(unet, x0, t, cond, abar), x0)

    for _ in range(4):
        with torch.no_grad():
            err_ref = error(reference)
        engine.backward(inpo_loss(error(engine), err_ref, beta=5000.0)[0].mean())
        engine.step()
    return engine


def measure(number: int) -> dict:
    """What training takes at its peak, without encoders and pictures, beside the estimate of it."""
    if not 1 <= number <= len(ROWS):
        raise UserError(f"--measure {number}: the rows are 1 to {len(ROWS)}.")
    row = ROWS[number - 1]
    if row.gpus > 1:
        raise UserError(f"--measure {number}: needs {row.gpus} GPUs; rows of one can be measured.")
    if not torch.cuda.is_available():
        raise UserError("--measure: needs a GPU, and CUDA sees none.")
    ds_config, peak = read_ds_config(row.ds_config), None
    try:
        how = row.micro_batch, row.lora_rank, "cuda", row.base_weights
        two_steps(CONFIGS[row.model], ds_config, *how)
        peak = torch.cuda.max_memory_allocated() / GIB
    except torch.OutOfMemoryError:
        pass  # the peak stays None
    found = {"row": number, "flags": row.flags(), "device": hardware(torch.device("cuda"))}
    found |= {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
    return found | {"computed_gib": sum(row.memory(True).values()), "measured_gib": peak}


def main(argv: list[str] | None = None):
    with reported("lab.memory"):
        args = parse(argv)
        if args.measure is not None:
            print(json.dumps(measure(args.measure)))
        elif args.out is None:
            print(page(), end="")
        elif args.out.is_dir() or not args.out.parent.is_dir():
            raise UserError(f"--out {args.out}: must be a file in a folder that exists.")
        else:
            write(args.out, page())


if __name__ == "__main__":
    main()
