"""What lab/real.py checks and takes before any time of the GPU: machine, pairs, weights, judges."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
from huggingface_hub import constants

import data
import toy
from evaluation import prompts, scorers
from evaluation.gallery import plan_images
from preparing import table
from sources import parquet
from sources.pictures import what_is_broken
from system import hub
from system.files import ROOT, UserError, expanded
from training import budget, plan
from training.flags import parse as parse_training
from weights import loading

KEPT = 4  # row groups in memory while pairs are taken
SAMPLING, GUIDED = 25, 2  # steps of a picture, and UNet calls of each
PAIR, PICTURE, LORAS, FILE = 800_000, 2_000_000, 10**9, 600_000_000  # bytes, at most about
WEIGHTS = [
    "*.json", "*/*.json", "*/*.txt", "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors", "text_encoder*/model.safetensors",
]  # fmt: skip


def check(args: argparse.Namespace, training_words: Callable) -> dict:
    """Everything that can be wrong, cheap things first; what the phases after it need to know.
    Raises UserError."""
    config = hub.read_config(args.model, "unet")
    large = loading.count_parameters(config) >= budget.TOY
    if args.data != "toy":
        hub.check_pairs(args.data)
    machine = about_machine()
    check_gpu(args, machine, large)
    chosen = prompts.read(args.prompts)
    drawn = len(plan_images(chosen, limit=args.limit))
    check_room(args, 2 * drawn, large)
    taken = take(args)
    batch = taken // args.steps
    if taken < args.pairs:
        print(f"Note: {taken} pairs of {args.data} are taken, {batch} for each of the steps.")
    asked = parse_training("", training_words(args, batch, large)[1:])
    planned = plan.check(asked)
    memory = None
    if large:
        ds_config = plan.read_ds_config(asked.ds_config)
        parts = budget.gpu_memory(asked, planned, ds_config, plan.compute_dtype(ds_config))
        memory = sum(parts.values()) * budget.GIB
        check_memory(machine, memory)
    for scorer in args.scorers:
        scorers.check(scorer, chosen.prompts, args.scorer_folder)
    load_weights(args)
    calls = 2 * drawn * SAMPLING * GUIDED
    flops = {"training": budget.work(asked, planned, range(planned.strata))["flops"]}
    flops["pictures"] = calls * budget.call_flops(config)
    needs = f" Training should take {memory / budget.GIB:.1f} GiB." if memory else ""
    summary = f"{machine['device']}, {taken} pairs, {drawn} prompts.{needs}"
    return {
        "machine": machine, "batch": batch, "large": large, "beta": asked.beta,
        "toy": args.data == "toy", "architecture": planned.architecture, "memory": memory,
        "flops": flops, "prompts_drawn": drawn, "summary": summary,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------
# The machine.


def about_machine() -> dict:
    """What lab/machine.py says, in a process of its own: no context stays on the GPU."""
    command = [sys.executable, "-m", "lab.machine"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        said = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        raise UserError(
            f"The GPU cannot be used: {said.rstrip('.')}; see whether `python -m lab.machine` "
            "works, and whether torch fits the driver."
        ) from error


def check_gpu(args: argparse.Namespace, machine: dict, large: bool):
    if not large:
        return
    if machine["device"] == "CPU":
        raise UserError(
            f"--model {args.model}: needs a GPU, and torch sees none; `python -m lab.real --model "
            "tiny` shows the command on a CPU."
        )
    if not machine["bf16"]:
        raise UserError(
            f"{machine['device']}: has no bf16, which the run takes; use an NVIDIA GPU of the "
            "Ampere generation or a later one."
        )


def check_memory(machine: dict, planned: float):
    if planned > machine["free"]:
        free, need = machine["free"] / budget.GIB, planned / budget.GIB
        raise UserError(
            f"{machine['device']}: has {free:.1f} GiB free, and training is planned to take "
            f"{need:.1f}; end what else runs on it (nvidia-smi lists it), or take another GPU."
        )


def check_room(args: argparse.Namespace, pictures: int, large: bool):
    """Raises UserError where the disks are too small for what comes: downloads to the hub's cache,
    pairs (and their copy in the cache of datasets), LoRAs and pictures to --out."""
    own = 2 * args.pairs * PAIR + pictures * PICTURE + LORAS if large else 10**8
    needs: dict[int, float] = {}  # of each disk
    places = {}
    for folder, size in ((Path(constants.HF_HUB_CACHE), missing(args)), (args.out, own)):
        place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        disk = place.stat().st_dev
        needs[disk], places[disk] = needs.get(disk, 0) + size, place
    for disk, size in needs.items():
        if size > (free := shutil.disk_usage(places[disk]).free):
            raise UserError(
                f"{places[disk]}: has room for {budget.in_words(free)}, and downloads, pairs and "
                f"pictures take {budget.in_words(size)}; make room, or name other disks by HF_HOME "
                "and --out."
            )


# -------------------------------------------------------------------------------------------------
# The hub.


def is_hub_id(name: str) -> bool:
    return not os.path.exists(expanded(name)) and bool(re.fullmatch(hub.HUB_ID, name))


def downloads(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """(repository, patterns of its files) of the models that are read from the hub."""
    model = hub.PRESETS.get(args.model, args.model)
    if is_hub_id(model):
        yield model, WEIGHTS
    if args.model == "sdxl":
        yield "madebyollin/sdxl-vae-fp16-fix", ["config.json", "*pytorch_model.safetensors"]
    if "pickscore" in args.scorers and not args.scorer_folder:
        yield scorers.PICKSCORE, ["*.json", "model.safetensors"]


def missing(args: argparse.Namespace) -> int:
    """Bytes of models and pairs that are not in the cache yet; 0 where the hub cannot be asked,
    which is said by whoever needs a file."""
    if not hub.reachable():
        return 0
    size = FILE if is_hub_id(args.data) else 0
    for repository, patterns in downloads(args):
        ask = lambda r=repository, p=patterns: huggingface_hub.snapshot_download(  # noqa: E731
            r, allow_patterns=p, dry_run=True
        )
        files = hub.one_sentence(ask, f"Cannot look at '{repository}'")
        size += sum(file.file_size or 0 for file in files if file.will_download)
    return size


def load_weights(args: argparse.Namespace):
    """Download the models now, so that no GPU waits for them."""
    if not hub.reachable():
        return
    for repository, patterns in downloads(args):
        get = lambda r=repository, p=patterns: huggingface_hub.snapshot_download(  # noqa: E731
            r, allow_patterns=p
        )
        hub.one_sentence(get, f"Cannot load '{repository}'")


def first_file(repository: str) -> Path:
    """One parquet file of a data set on the hub: the first of the split train, else of all."""
    hub.check_pairs(repository)
    say = f"Cannot list the files of '{repository}'"
    api = huggingface_hub.HfApi()
    files = hub.one_sentence(lambda: api.list_repo_files(repository, repo_type="dataset"), say)
    files = sorted(file for file in files if file.endswith(".parquet"))
    of_train = [file for file in files if re.search(r"(^|[/_-])train[/_.-]", file)]
    if not files:
        raise UserError(
            f"--data {repository}: has no parquet file on the hub; download some of it, and give a "
            "file or folder."
        )
    return hub.download(
        repository, "data set", (of_train or files)[0], repo_type="dataset",
        instead="give a local file",
    )[0]  # fmt: skip


# -------------------------------------------------------------------------------------------------
# The pairs.


def source_of(args: argparse.Namespace) -> tuple[str, int]:
    """(what the pairs are read from, row groups to keep in memory), so that nobody downloads a
    large set, nor copies one."""
    if args.data == "toy":
        return str(toy.write_pairs_once("out/toy", 2048)), 0
    place = first_file(args.data) if is_hub_id(args.data) else expanded(args.data)
    files = parquet.visible(place, "*.parquet") if place.is_dir() else []
    if files:
        files = parquet.files_of(place, "train", True)
        with parquet.opened(files[0]) as one:
            if one.metadata.num_rows >= 2 * args.pairs:  # some are ties
                place = files[0]
    return str(place), KEPT if files or place.suffix == ".parquet" else 0


def take(args: argparse.Namespace) -> int:
    """Write --out/pairs.parquet: whole pairs with a winner, evenly spread over the source. Returns
    how many, a multiple of --steps. Raises UserError."""
    out, about = args.out / "pairs.parquet", {"data": args.data, "pairs": args.pairs}
    about["steps"] = args.steps
    if not table.is_written(out, about):
        source, stream = source_of(args)
        rows = data.read_pairs(source, partial=True, stream=stream)
        kept, broken = pick(rows, args.pairs)
        count = len(kept) // args.steps * args.steps
        if not count:
            why = f", {len(broken)} others are broken ({broken[0]})" if broken else ""
            raise UserError(
                f"--data {args.data}: has {len(kept)} whole pairs{why}, fewer than --steps "
                f"{args.steps}; give more pairs, or fewer --steps."
            )
        fair = [kept[i] for i in np.linspace(0, len(kept) - 1, count).round().astype(int)]
        table.write_pairs(out, fair, {}, about)
    with parquet.opened(out) as file:
        return file.metadata.num_rows


def pick(rows: data.Rows, count: int) -> tuple[list[dict], list[str]]:
    """(up to `count` whole pairs, what is wrong with others). Rows are evenly spaced; then those
    between them take the place of broken ones."""
    order = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    others = np.setdiff1d(np.arange(len(rows)), order)
    kept, broken = {}, []
    for row in [*order.tolist(), *others.tolist()]:
        if len(kept) == count:
            break
        try:
            pair = rows[row]
            data.read_pair(pair, 64)
            kept[row] = {key: pair[key] for key in table.COLUMNS}
        except Exception as error:  # as in data.Pairs: the row is left out
            broken.append(f"row {row} (from 0) of those with a winner: {what_is_broken(error)}")
    return [kept[row] for row in sorted(kept)], broken
