"""SDXL and SD1.5 at full size without a GPU: make, train one LoRA step, export, reload, draw.

    python -m lab.full_size                                # both, about a quarter of an hour
    python -m lab.full_size --model sd15 --scratch /data   # where there is room
    python -m lab.full_size --small                        # the same programs on small models

The pipelines have the published architectures and random weights, in fp16 on the disk and in fp32
in memory: every shape, name and file is a real run's, and only the pictures say nothing. The
programs are started as a user starts them, each in a process of its own, whose time and peak memory
are listed. Nothing is downloaded.

All files lie in SCRATCH/inpo-full-size, which is deleted at the end; after a kill the same command
goes on with the part that was not finished.
"""

import argparse
import tempfile
from pathlib import Path

from system.program import Parser, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.full_size", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--model", choices=("sdxl", "sd15", "both"), default="both", help="what is trained")
    add("--scratch", type=Path, default=Path(tempfile.gettempdir()), metavar="FOLDER",
        help="a folder with room")
    add("--keep", action="store_true", help="do not delete what was made")
    add("--small", action="store_true", help="small models, to try the programs")
    add("--report", type=Path, metavar="FILE", help="Markdown file for the section")
    add("--part", choices=("make", "check"), help=argparse.SUPPRESS)  # of this program's own
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import datetime
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import diffusers
import psutil
import torch
from safetensors import safe_open

import toy
from evaluation import tables
from lab import architectures
from lab.architectures import CONFIGS
from lab.bench import hardware
from system import checkpoint
from system.files import ROOT, UserError, read_json, write, write_section
from system.lock import lock
from training import budget
from training.budget import in_words
from training.plan import read_ds_config
from weights import loading, saving

SIDE = 32  # of the full models' latents: they draw and train at 256 px

# -------------------------------------------------------------------------------------------------
# The models.


def architecture(name: str, small: bool) -> tuple[str, int | None]:
    """Its name in lab/architectures.py, and the side of the latents."""
    return (f"{name}-small", None) if small else (name, SIDE)


def make(name: str, small: bool, folder: Path):
    """Write the pipeline in fp16, in diffusers layout, and four pairs to train on."""
    torch.manual_seed(0)
    name, side = architecture(name, small)
    pipeline = architectures.build(name, "cpu", torch.float16, side)
    saving.write_pipeline(pipeline, folder)
    toy.write_pairs(folder / "pairs.parquet", n=4)


# -------------------------------------------------------------------------------------------------
# The check: what diffusers reloads is what was trained.


def check(folder: Path):
    """Compare each weight of folder/merged, as diffusers loads it, with W + B A of what was trained
    and of folder/base; write what was compared to folder/check.json. Raises UserError.

    A sum that is rounded to fp16 in another order may differ in its last bit. UserError also where
    the step has moved nothing."""
    (newest,) = checkpoint.complete(folder / "lora" / "checkpoints")
    trained = checkpoint.weights(newest)
    deltas = {
        key.replace(".lora_A.default", ""): trained[key.replace("_A.", "_B.")] @ trained[key]
        for key in trained
        if ".lora_A." in key
    }
    load = diffusers.DiffusionPipeline.from_pretrained
    merged, exact, last_bit = load(folder / "merged", dtype=torch.float16), 0, 0
    for part, module in merged.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        state = module.state_dict()
        (file,) = (folder / "base" / part).glob("*.safetensors")
        with safe_open(file, "pt") as base:
            if {key.removeprefix("text_model.") for key in base.keys()} ^ {
                key.removeprefix("text_model.") for key in state
            }:
                raise UserError(f"{folder / 'merged'}: {part} has not the weights of the start.")
            prefix = "text_model." if next(iter(base.keys())).startswith("text_model.") else ""
            for key, found in state.items():
                start = base.get_tensor(key if key in base.keys() else prefix + key)
                delta = deltas.pop(key, None) if part == "unet" else None
                wanted = start if delta is None else (start.float() + delta).half()
                gap = found.view(torch.int16).int() - wanted.view(torch.int16).int()
                if gap.abs().max() > (delta is not None):
                    raise UserError(f"{folder / 'merged'}: {part}.{key} is not what was trained.")
                if delta is not None and torch.equal(found, start):
                    raise UserError(f"{folder / 'merged'}: the step has not moved {part}.{key}.")
                last_bit += int(gap.count_nonzero())
                exact += gap.numel() - int(gap.count_nonzero())
    if deltas:
        raise UserError(f"{folder / 'merged'}: lacks {min(deltas)}, which was trained.")
    adapters = {"adapters": sum(weight.numel() for weight in trained.values())}
    write(folder / "check.json", json.dumps(adapters | {"exact": exact, "last_bit": last_bit}))


# -------------------------------------------------------------------------------------------------
# The parts: command lines, as a user types them.


def parts(name: str, folder: Path, small: bool) -> dict[str, tuple[list, str]]:
    """{what it does: (arguments of python, what it writes in the folder)}."""
    base, lora, merged = folder / "base", folder / "lora", folder / "merged"
    own = ["-m", "lab.full_size", "--model", name, "--scratch", folder, *["--small"] * small]
    pixels = 64 if small else 256
    return {
        "write the pipeline": ([*own, "--part", "make"], "base"),
        "train a LoRA step": (
            ["train_inpo.py", "--model", base, "--data", base / "pairs.parquet", "--out", lora,
             "--ds-config", "configs/zero1.json", "--lora-rank", 4, "--resolution", pixels,
             "--steps", 1, "--batch", 1, "--micro-batch", 1, "--warmup", 0, "--lr", 1e-3,
             "--workers", 0, "--sample-every", 0, "--checkpoint-every", 1],
            "lora",
        ),
        "export it, merged": (
            ["-m", "training.export", lora, "--to", "pipeline", "--dtype", "fp16", "--out", merged],
            "merged",
        ),
        "reload, compare": ([*own, "--part", "check"], "check.json"),
        "draw and judge": (
            ["evaluate.py", "--models", f"base={base}", f"lora={lora}", f"merged={merged}",
             "--prompts", "toy", "--limit", 1, "--steps", 2, "--guidance", 1, "--batch", 1,
             "--scorers", "preference", "--out", folder / "drawn"],
            "drawn",
        ),
    }  # fmt: skip


def measured(argv: list[str]) -> dict:
    """Run python with these arguments in a process: {seconds, cpu (seconds), peak
    (bytes)}. Raises UserError."""
    start, offline = time.monotonic(), {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=os.environ | offline)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if code := process.returncode:
        why = "was killed, perhaps for want of memory" if code == -9 else f"ended with code {code}"
        raise UserError(f"`{shlex.join(['python', *argv])}` {why}; repeat the command to go on.")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": time.monotonic() - start, "cpu": cpu, "peak": 1024 * usage.ru_maxrss}


def run(name: str, folder: Path, small: bool) -> list[dict]:
    """The parts of a model, in order: {part, argv, seconds, cpu, peak} of each.

    One that was finished before a kill is not done again."""
    file, done = folder / "parts.json", []
    kept = read_json(file)["parts"] if file.exists() else []
    for part, (argv, target) in parts(name, folder, small).items():
        argv = [str(word) for word in argv]
        if len(kept) > len(done) and kept[len(done)]["argv"] == argv:
            print(f"{name}: {part}: done before.", flush=True)
            done.append(kept[len(done)])
            continue
        kept = []  # what comes after it was made from something else
        print(f"{name}: {part}\n    {shlex.join(['python', *argv])}", flush=True)
        place = folder / target
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        done.append({"part": part, "argv": argv} | measured(argv))
        write(file, json.dumps({"parts": done}))
    return done


# -------------------------------------------------------------------------------------------------
# What it needs.

# Bytes: Python with its libraries, activations, what DeepSpeed's buffers touch, and pages of the
# fp16 files while they are read. The most that was measured is 3.9e9, of SDXL.
OVERHEAD = 4e9


def weights(name: str, small: bool) -> int:
    """Parameters of a whole pipeline, counted on the meta device."""
    with torch.device("meta"):
        modules = architectures.modules(*architecture(name, small)).values()
    return sum(weight.numel() for module in modules for weight in module.parameters())


def needs(names: list[str], small: bool, keep: bool) -> tuple[float, float]:
    """Bytes of (memory, disk): all weights in fp32; the pipeline and its export in fp16."""
    counts = [weights(name, small) for name in names]
    return 4 * max(counts) + OVERHEAD, 4 * (sum if keep else max)(counts) + 0.5e9


def check_room(names: list[str], small: bool, keep: bool, place: Path):
    """Say what is needed and what there is. Raises UserError where that is less."""
    memory, disk = needs(names, small, keep)
    free, room = psutil.virtual_memory().available, budget.room(place)
    print(
        f"This takes {in_words(memory)} of memory ({in_words(free)} are free) and "
        f"{in_words(disk)} of disk in {place} ({in_words(room)} are free).",
        flush=True,
    )
    if free < memory:
        raise UserError(
            f"{in_words(memory)} of memory are needed, and {in_words(free)} are free; end other "
            "programs, or take --model sd15, which needs less."
        )
    if room < disk:
        raise UserError(
            f"--scratch {place.parent}: {in_words(disk)} of disk are needed, and {in_words(room)} "
            "are free; name a folder with room."
        )


# -------------------------------------------------------------------------------------------------
# The report.


def full_step() -> tuple[float, float]:
    """GB of memory that a full fine-tuning step of SD1.5 takes in fp32 on one rank under ZeRO-2,
    beside activations: with DeepSpeed's default buckets, with small ones (computed)."""
    config, found = read_ds_config("configs/cpu.json"), []
    for bucket in (budget.BUCKET, 2 * 10**7):
        config["zero_optimization"]["reduce_bucket_size"] = bucket
        parameters = loading.count_parameters(CONFIGS["sd15"])
        held = budget.state(parameters, config, torch.float32, world=1)
        peak = sum(held.values()) - held["vae"] - min(held["buckets"], held["step"])
        peak += budget.encoders("sd15", torch.float32, torch.float32)
        found.append(peak * budget.GIB / 1e9)
    return tuple(found)


def report(done: dict[str, list[dict]], checks: dict[str, dict], args: argparse.Namespace) -> str:
    """The section of docs/speed.md."""
    rows = [
        [
            name,
            one["part"],
            f"{one['seconds']:.0f}",
            f"{one['cpu']:.0f}",
            f"{one['peak'] / 1e9:.1f}",
        ]
        for name, ones in done.items()
        for one in ones
    ]
    found = ["torch", "deepspeed", "diffusers", "transformers"]
    versions = ", ".join(f"{lib} {importlib.metadata.version(lib)}" for lib in found)
    commands = [
        shlex.join(["python", *one["argv"]]).replace(str(args.scratch), "SCRATCH")
        for one in next(iter(done.values()))
    ]
    memory, disk = needs(list(done), args.small, args.keep)
    large, small = full_step()
    compared = "\n".join(
        f"- {name}: {one['adapters']:,} weights of adapters trained, {one['exact']:,} reloaded "
        f"weights equal, {one['last_bit']:,} off by the last bit of fp16"
        for name, one in checks.items()
    )
    flags = ["--small"] * args.small + ([] if args.model == "both" else ["--model", args.model])
    return f"""\
```
{shlex.join(["python", "-m", "lab.full_size", *flags])}
```

{datetime.date.today()}, {hardware(torch.device("cpu"))}, no GPU; {versions}.

Pipelines of the published architectures ({", ".join(done)}) at random weights, fp16 on the disk
and fp32 in memory, through the real programs: one InPO step of LoRA, rank 4, one pair at
{64 if args.small else 256} px, ZeRO-1; the export, merged in fp16; the reload by diffusers alone;
and pictures of two sampling steps by the start, by it with the LoRA, and by the merged model. It
asks for {in_words(memory)} of memory and {in_words(disk)} of disk.

{tables.markdown(["model", "part", "seconds", "CPU seconds", "peak memory, GB"], rows)}
Seconds include Python's start, and what other programs took of the machine; CPU seconds are the
part's own. Peak memory is the largest resident set of its processes, with pages of mapped files.
A reloaded weight is compared with W + B A of the trained adapters, computed apart:

{compared}

Not measured: a step of full fine-tuning. For SD1.5 in fp32 it takes {large:.1f} GB beside
activations under ZeRO-2 with DeepSpeed's default buckets, {small:.1f} GB with `reduce_bucket_size`
2e7 (computed, `training/budget.py`).

The commands, of the first model:

```
{chr(10).join(commands)}
```
"""


def main(argv: list[str] | None = None):
    args = parse(argv)
    with reported("lab.full_size"):
        if args.part:  # a part of one model, whose folder is given
            if args.part == "make":
                return make(args.model, args.small, args.scratch / "base")
            return check(args.scratch)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what was started, too
        args.scratch = args.scratch.resolve()
        names = ["sdxl", "sd15"] if args.model == "both" else [args.model]
        place, done, checks = args.scratch / "inpo-full-size", {}, {}
        try:
            held = lock(place)
        except UserError as error:
            raise UserError(str(error).replace("--out", "--scratch", 1)) from error
        try:
            check_room(names, args.small, args.keep, place)
            for name in names:
                folder = place / (f"{name}-small" if args.small else name)
                folder.mkdir(exist_ok=True)
                done[name] = run(name, folder, args.small)
                checks[name] = read_json(folder / "check.json")
                if not args.keep:  # what was measured stays until all is done
                    for path in folder.iterdir():
                        if path.name not in ("parts.json", "check.json"):
                            shutil.rmtree(path)
        finally:
            os.close(held)
        text = report(done, checks, args)
        if args.report:
            write_section(args.report, "The whole architecture without a GPU", text)
        if not args.keep:
            shutil.rmtree(place)
        print(text)


if __name__ == "__main__":
    main()
