"""Step time on 8 to 512 GPUs under ZeRO-1, -2 and -3, on paper: docs/speed.md and docs/scale.png.

    python -m lab.scale                            # print the section
    python -m lab.scale --report docs/speed.md     # write it, and the picture beside it

Nothing here is measured. Work is counted in FLOPs (training/budget.py), traffic in the bytes that
DeepSpeed 0.19.8 hands to its collectives under the shipped configurations, and time follows from
the stated rates of GPUs and links. tests/test_lab_scale.py counts the same bytes and collectives in
real steps on two ranks.
"""

import argparse
from pathlib import Path

from system.program import Parser, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.scale", __doc__)
    parser.add_argument("--report", type=Path, metavar="FILE", help="Markdown file of the section")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import datetime
import functools
import json
import math
import textwrap
from dataclasses import dataclass
from typing import NamedTuple

import torch

from evaluation import figures, tables
from lab.architectures import CONFIGS
from system.files import UserError, write_section
from training import budget
from training.latents import inversion_calls
from training.plan import read_ds_config
from training.recipes import recipe_of

GPUS = (8, 16, 32, 64, 128, 256, 512)
NODE = 8  # GPUs
RATE, SHARES = 790e12, (0.40, 0.55)  # FLOP/s of a dense bf16 product on an H200; of it, as needed
NVLINK = 450e9  # bytes a second and direction, of a GPU: H200, 900 GB/s in both directions
NETWORKS = {"InfiniBand": 8 * 400e9 / 8, "Ethernet": 100e9 / 8}  # of a node: 8 x 400, 100 Gbit/s
# FLOPs: of the VAE's encoder for an image, of the text encoders for a caption.
ENCODERS = {"sdxl": (4879e9, 13e9 + 98e9), "sd15": (1117e9, 13e9)}
PATHS = {"the paper's path": ("uniform", 10), "log-sigma, 3 calls": ("log-sigma", 3)}
CONFIG_OF = {1: "configs/zero1.json", 2: "ds_config.json", 3: "configs/zero3.json"}

# -------------------------------------------------------------------------------------------------
# Work.


def inverting(path: str) -> list[int]:
    """UNet calls of the inversion, for each cell of t."""
    spacing, steps = PATHS[path]
    cells = range(steps if spacing == "uniform" else 1)
    path = {"latents": "inversion", "inversion_spacing": spacing, "inversion_steps": steps}
    args = argparse.Namespace(**path)
    return inversion_calls(args, cells)


def pair_flops(model: str, calls: list[int]) -> float:
    """FLOPs of a pair, recomputed activations not counted:
    2 images x (calls x UNet + VAE) + a caption, where calls = inversion + 1 reference + 3 to train.
    """
    vae, text = ENCODERS[model]
    each = sum(budget.calls_per_image("dpo", calls).values())
    return 2 * (each * budget.call_flops(CONFIGS[model]) + vae) + text


def batches(pairs: int, gpus: int, micro: int) -> tuple[int, int]:
    """(pairs of a GPU in a micro-step, micro-steps accumulated): the batch stays what it is, so on
    many GPUs the micro-batch shrinks."""
    micro = min(micro, pairs // gpus)
    return micro, pairs // (gpus * micro)


# -------------------------------------------------------------------------------------------------
# Traffic: what DeepSpeed 0.19.8 hands to the collectives of torch.distributed in a step.


class Layout(NamedTuple):
    """Parameters of a UNet and the modules that own them, and how many of both ZeRO-3 gathers once
    more to recompute the checkpointed blocks: all of these but the last module of each block."""

    parameters: int
    modules: int
    recomputed: int
    recomputed_modules: int


class Collective(NamedTuple):
    """kind: all-reduce, all-gather or reduce-scatter. bytes: of the whole tensors, of all calls."""

    kind: str
    bytes: float
    calls: int


@functools.cache
def _layout(config: str) -> Layout:
    unet = budget.build(json.loads(config), "meta", torch.float32)
    again = []

    def own(module) -> int:
        return sum(weight.numel() for weight in module.parameters(recurse=False))

    def checkpoint(block, *inputs):
        called = []
        hooks = [
            module.register_forward_hook(lambda module, *_: called.append(module))
            for module in filter(own, block.modules())
        ]
        out = block(*inputs)
        for hook in hooks:
            hook.remove()
        # PyTorch stops recomputing inside the last module, whose weights stay for the backward.
        again.extend(called[:-1])
        return out

    unet.enable_gradient_checkpointing(checkpoint)
    x, cond = budget.random_inputs(unet, 1)
    unet(x, torch.zeros(2, dtype=torch.int64, device="meta"), **cond)
    every = list(filter(own, unet.modules()))
    return Layout(sum(map(own, every)), len(every), sum(map(own, again)), len(again))


def layout(config: dict) -> Layout:
    return _layout(json.dumps(config, sort_keys=True, default=str))


def collectives(
    stage: int, ds_config: dict, unet: Layout, calls: float, accumulation: int
) -> list[Collective]:
    """The collectives of an optimizer step, with checkpointed activations and bf16 weights.

    ZeRO-1 is DeepSpeed's BF16_Optimizer: after the last micro-step's backward, one all-reduce of
        all accumulated gradients; after AdamW, one all-gather of the weights.
    ZeRO-2 all-reduces each full bucket of gradients during every micro-step's backward. It keeps
        its shard of the result alone, but does not reduce-scatter (use_multi_rank_bucket_allreduce
        is on by default). The all-gather is ZeRO-1's.
    ZeRO-3 gathers the weights in every forward (each inversion call, the reference's, the
        training's), again where checkpointed blocks are recomputed, and in the backward; gradients
        are reduce-scattered in buckets in every micro-step. After the backward the trace of the
        modules is void: the first forward of a micro-step and its backward gather module by
        module, the other forwards ahead, by prefetch buckets.

    calls: of the inversion. Left out: norms, metrics and the start, a few bytes each."""
    size, sent = 2, 4 if ds_config.get("communication_data_type") == "fp32" else 2
    zero, p = ds_config["zero_optimization"], unet.parameters
    buckets = math.ceil(p / zero.get("reduce_bucket_size", budget.BUCKET))
    if stage < 3:
        times, parts = (1, 1) if stage == 1 else (accumulation, buckets)
        reduced = Collective("all-reduce", times * sent * p, times * parts)
        return [reduced, Collective("all-gather", size * p, 1)]
    ahead = math.ceil(p / zero.get("stage3_prefetch_bucket_size", budget.PREFETCH))
    gathered = (calls + 3) * p + unet.recomputed  # inversion, reference, forward, backward
    one_by_one = 2 * unet.modules + unet.recomputed_modules
    count = one_by_one + (calls - 1 + 2) * ahead
    return [
        Collective("all-gather", accumulation * size * gathered, round(accumulation * count)),
        Collective("reduce-scatter", accumulation * sent * p, accumulation * buckets),
    ]


def passes(kind: str, gpus: int) -> float:
    """Times that a rank of a ring sends the tensor: 2 (n-1)/n for an all-reduce, (n-1)/n else."""
    return (2 if kind == "all-reduce" else 1) * (gpus - 1) / gpus


def sent(many: list[Collective], gpus: int) -> float:
    """Bytes that a GPU sends, in rings."""
    return sum(passes(one.kind, gpus) * one.bytes for one in many)


# NCCL's own model of its ring (NVIDIA/nccl, src/graph/tuning.cc at 01afd20): for each protocol the
# microseconds of a call, of a hop within a node and between nodes, and its share of the bandwidth.
# NCCL takes the protocol that is fastest for a size.
PROTOCOLS = {
    "LL": (3.6, 0.47, 2.7, 0.25),
    "LL128": (10.0, 1.9, 4.0, 0.92),
    "Simple": (8.4, 3.4, 9.6, 1.0),
}


def seconds(many: list[Collective], gpus: int, network: float, latency: bool = True) -> float:
    """Time of the collectives, one after the other, without computing meanwhile.

    A ring over all GPUs, one for each network adapter of a node: it goes at the speed of NVLink or
    of the node's network, whichever is slower. network: bytes a second and direction, of a node."""
    nodes, total = -(-gpus // NODE), 0.0
    speed = NVLINK if nodes == 1 else min(NVLINK, network)
    for one in filter(lambda one: one.calls, many):
        wire = passes(one.kind, gpus) * one.bytes / one.calls / speed
        factor = 2 if one.kind == "all-reduce" else 1
        between = factor * (nodes - 1)
        within, times = factor * (gpus - 1) - between, []
        for name, (base, hop, far, share) in PROTOCOLS.items():
            hop *= 1.8 if name == "LL" and nodes > 1 else 1
            late = (base + within * hop + between * far) * 1e-6
            times.append(wire / share + late)
        total += one.calls * (min(times) if latency else wire)
    return total


# -------------------------------------------------------------------------------------------------
# A step.


@dataclass(frozen=True)
class Step:
    """An optimizer step of the published recipe."""

    model: str
    path: str
    gpus: int

    def split(self) -> tuple[int, int]:
        recipe = recipe_of(self.model)
        return batches(recipe["batch"], self.gpus, recipe["micro_batch"])

    def compute(self, share: float = SHARES[-1]) -> float:
        """Seconds of FLOPs alone; share: of RATE."""
        pairs = math.prod(self.split())
        return pairs * pair_flops(self.model, inverting(self.path)) / (share * RATE)

    def traffic(self, stage: int) -> list[Collective]:
        calls = inverting(self.path)
        config = read_ds_config(CONFIG_OF[stage])
        unet = layout(CONFIGS[self.model])
        return collectives(stage, config, unet, sum(calls) / len(calls), self.split()[1])

    def network(self, stage: int, name: str) -> float:
        return seconds(self.traffic(stage), self.gpus, NETWORKS[name])

    def bounds(self, stage: int, name: str, share: float = SHARES[-1]) -> tuple[float, float]:
        """Seconds: where all traffic hides behind computing or the reverse, and where none does."""
        compute, network = self.compute(share), self.network(stage, name)
        return max(compute, network), compute + network

    def memory(self, stage: int) -> float:
        """GiB on a GPU, without encoders and sample pictures."""
        config = read_ds_config(CONFIG_OF[stage])
        parts = budget.step_memory(
            CONFIGS[self.model], config, torch.bfloat16, world=self.gpus,
            micro_batch=self.split()[0],
        )  # fmt: skip
        return sum(parts.values())


# -------------------------------------------------------------------------------------------------
# The section.


def digits(value: float) -> str:
    """Three digits, and no more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.{2 - math.floor(math.log10(value))}f}"


def between(low: float, high: float) -> str:
    low, high = digits(low), digits(high)
    return low if low == high else f"{low} to {high}"


def time_table(model: str, path: str) -> str:
    rows = []
    for gpus in GPUS:
        step = Step(model, path, gpus)
        row = [str(gpus), "{} x {}".format(*step.split())]
        row += [digits(step.compute(share)) for share in SHARES]
        row += [between(*step.bounds(stage, net)) for net in NETWORKS for stage in CONFIG_OF]
        rows.append(row)
    heads = ["GPUs", "pairs x micro-steps", *(f"FLOPs at {share:.0%}" for share in SHARES)]
    heads += [f"{net}, ZeRO-{stage}" for net in NETWORKS for stage in CONFIG_OF]
    return tables.markdown(heads, rows)


def traffic_table(model: str) -> str:
    rows, (paper, three) = [], PATHS
    for gpus in GPUS:
        step = Step(model, paper, gpus)
        found = [step.traffic(stage) for stage in CONFIG_OF]
        found.append(Step(model, three, gpus).traffic(3))
        row = [str(gpus), *(digits(sent(many, gpus) / 1e9) for many in found)]
        row += [f"{sum(one.calls for one in many):,}" for many in found[:3]]
        rows.append(row + [digits(step.memory(stage)) for stage in CONFIG_OF])
    heads = ["GPUs", *(f"GB sent, ZeRO-{n}" for n in (1, 2)), "ZeRO-3", "ZeRO-3, 3 calls"]
    heads += ["calls, ZeRO-1", *(f"ZeRO-{n}" for n in (2, 3))]
    heads += ["GiB held, ZeRO-1", *(f"ZeRO-{n}" for n in (2, 3))]
    return tables.markdown(heads, rows)


TITLES = {"sdxl": "SDXL, 1024 px", "sd15": "SD1.5, 512 px"}


def conclusion() -> str:
    """Three sentences, with the numbers of the tables."""
    paper, least, most = next(iter(PATHS)), GPUS[0], GPUS[-1]

    def share(gpus, stage, net):  # of SDXL's step without overlap, the network's
        step = Step("sdxl", paper, gpus)
        return step.network(stage, net) / step.bounds(stage, net)[1]

    def first(level):  # size at which ZeRO-1 on Ethernet spends that share
        return next((n for n in GPUS if share(n, 1, "Ethernet") > level), "no number of")

    held = {
        stage: " to ".join(f"{Step('sdxl', paper, n).memory(stage):.0f}" for n in (least, most))
        for stage in CONFIG_OF
    }
    last = Step("sdxl", paper, most)
    late, calls = last.network(3, "InfiniBand"), sum(one.calls for one in last.traffic(3))
    wire = seconds(last.traffic(3), most, NETWORKS["InfiniBand"], latency=False)
    fast, slow = NETWORKS
    text = f"""
**ZeRO-1 never sends more than the others**, once a step, and holds {held[1]} GiB of SDXL (on
{least} to {most} GPUs, without encoders): take it wherever that fits; ZeRO-2, which sends as much
again in every micro-step, where its {held[2]} GiB fit; and ZeRO-3 ({held[3]} GiB) on the smallest
cards, within a node. On {fast} the network takes at most {share(most, 1, fast):.0%} of SDXL's step
with ZeRO-1, but {share(most, 3, fast):.0%} with ZeRO-3 on {most} GPUs, where {late - wire:.1f} of
{late:.1f} s are the latency of {calls:,} collectives. On 100 Gbit/s {slow} it takes a quarter of
the step with ZeRO-1 from {first(0.25)} GPUs and half from {first(0.5)}; with ZeRO-2
{share(16, 2, slow):.0%} and with ZeRO-3 {share(16, 3, slow):.0%} already on 16."""
    return textwrap.fill(" ".join(text.split()), 100)


def section() -> str:
    unet = {name: layout(CONFIGS[name]) for name in ENCODERS}
    parts = [
        f"""\
```
python -m lab.scale --report docs/speed.md
```

{datetime.date.today()}. **Computed, not measured**: no run on several GPUs stands behind it. The
bytes are those that DeepSpeed 0.19.8 sends under the shipped configurations;
`tests/test_lab_scale.py` counts them in real steps of two ranks.

{conclusion()}

<img src="scale.png" width="800" alt="share of a step that is spent computing, by GPUs">
"""
    ]
    for model in ENCODERS:
        for path in PATHS:
            parts.append(f"{TITLES[model]}, {path}: seconds of a step of 1,024 pairs.\n")
            parts.append(time_table(model, path))
    parts.append("""\
The first of two times has all traffic behind the FLOPs (or these behind it), the second none of it;
FLOPs are at 55 % of the dense rate. DeepSpeed hides less than the first: ZeRO-1's all-reduce comes
after the last backward, the all-gather of weights after AdamW, and ZeRO-2 has a micro-step's
backward to hide behind. On the paper's path all ranks share a cell of t, so the times are means
over the ten cells; with fewer than ten micro-steps an update sees some of the cells only.
""")
    for model in ENCODERS:
        parts.append(f"{TITLES[model]}: what a GPU sends in a step, in how many collectives, and "
                     "what it holds.\n")  # fmt: skip
        parts.append(traffic_table(model))
    share = {name: one.recomputed / one.parameters for name, one in unet.items()}
    parts.append(f"""\
The formulas, with P parameters, n GPUs, N = n/8 nodes, a micro-steps a step:

```text
FLOPs of a pair   2 (c F + V) + T    c = inversion's calls + 1 reference + 3 to train: 9.5, or 7
                  F: a UNet call, {budget.call_flops(CONFIGS["sdxl"]) / 1e9:,.0f} GFLOP (SDXL), \
{budget.call_flops(CONFIGS["sd15"]) / 1e9:,.0f} (SD1.5); V: the VAE, 4,879 and 1,117;
                  T: the text encoders, 111 and 13; recomputed activations count nothing
seconds of FLOPs  (1024/n) FLOPs of a pair / (share x 790 TFLOP/s, measured on an H200)
pairs             a micro-step has min(recipe's, 1024/n): 4 (SDXL) or 16 (SD1.5), down to 2

collectives       ZeRO-1   all-reduce 4P; all-gather 2P                            once a step
(bytes)           ZeRO-2   all-reduce 4P, a times; all-gather 2P                   once a step
                  ZeRO-3   all-gather 2P (inversion's calls + 1 reference + 1 forward + r
                           recomputed + 1 backward), a times; reduce-scatter 4P, a times
                           r = {share["sdxl"]:.3f} (SDXL), {share["sd15"]:.3f} (SD1.5): of P, all in
                           checkpointed blocks but the last module of each
                  4: communication_data_type fp32; 2: bf16 weights
a GPU sends       (n-1)/n of an all-gather or a reduce-scatter, 2 (n-1)/n of an all-reduce
at                NVLink 450 GB/s a GPU and direction in a node; between nodes a ring goes at the
                  smaller of that and the node's network: InfiniBand 8 x 400 Gbit/s = 400 GB/s,
                  Ethernet 100 Gbit/s = 12.5 GB/s, all at line rate
latency           of each collective, by NCCL's own model of its ring (n-N hops in nodes, N-1
                  between them, twice for an all-reduce), with the protocol that is fastest
```

Not in it: reading data, the optimizer, congestion, stragglers, the lower rate of small
micro-batches, and what a network loses to its line rate. Memory is `training/budget.py`'s, without
encoders and sample pictures.
""")
    return "\n".join(parts)


def picture(path: Path):
    """Share of the step that is FLOPs, without overlap, by log2 of the GPUs."""
    paper, panels = next(iter(PATHS)), []
    for model in ENCODERS:
        for net in NETWORKS:
            lines = {}
            for stage in CONFIG_OF:
                steps = [Step(model, paper, gpus) for gpus in GPUS]
                ys = [step.compute() / step.bounds(stage, net)[1] for step in steps]
                lines[f"ZeRO-{stage}"] = [([math.log2(gpus) for gpus in GPUS], ys)]
            panels.append({
                "title": f"{TITLES[model]}, {net}", "x": "log2 of the GPUs (3: 8, 9: 512)",
                "y": "share of the step that computes", "lines": lines, "span": (0.0, 1.02),
            })  # fmt: skip
    figures.trajectories(panels, path, "Computed, not measured: no overlap, the paper's path")


def main(argv: list[str] | None = None):
    with reported("lab.scale"):
        args = parse(argv)
        if args.report and (args.report.is_dir() or not args.report.parent.is_dir()):
            raise UserError(f"--report {args.report}: must be a file in a folder that exists.")
        text = section()
        if args.report:
            write_section(args.report, "Step time on 8 to 512 GPUs, on paper", text)
            picture(args.report.with_name("scale.png"))
        else:
            print(text)


if __name__ == "__main__":
    main()
