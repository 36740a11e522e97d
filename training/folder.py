"""The folder of a run: what lies in it, who may write there, what a resumed run may change.

run.json                the settings; the same command resumes, another one is refused
card.json               what the model card says of the run
metrics.jsonl           one line per optimizer step
tensorboard/, csv/      the same values, through DeepSpeed's monitors; see trackers.py
wandb/, wandb.json      W&B's files; the id of the run there
samples/                pictures of fixed prompts and seeds, the start beside the current model
samples.html            the same for a browser, with scores and curves; see pages.py
scores.jsonl, best/     how --judge likes these pictures, and the model that it liked best
checkpoints/            of all ranks; see checkpoint.py
.lock                   held by the job that writes here
unets/                  models exported during training, fp32
broken.jsonl            rows that were left out, see broken.py
latents/                of --cache-latents, see cache.py
nonfinite/              what to look at where steps failed; see guard.py
curves.png, README.md   training curves, model card
cost.json               UNet calls, FLOPs, time, memory
result.json             how many bytes each file of the result has
model_index.json, ...   the aligned pipeline in diffusers layout, written at the end; of a LoRA
                        run pytorch_lora_weights.safetensors, for load_lora_weights, and
                        comfyui_lora.safetensors, for ComfyUI, Forge and A1111
"""

import contextlib
import json
import math
import os
from pathlib import Path

from system import checkpoint, files
from system.files import (
    UserError,
    is_number,
    is_step,
    read_json,
    read_log,
    set_aside,
    sync_all,
    warn_once,
    write,
)
from system.lock import LOCK, delete_unfinished, not_written

# Settings a resumed run may change: flags, and keys of ds_config.json and of its optimizer.
MAY_CHANGE = {"steps", "workers", "micro_batch", "judge", "keep", "keep_every"}
MAY_CHANGE |= {"sample_every", "checkpoint_every", "export_every", "code"}
MAY_CHANGE |= {"cache_latents", "compile"}
MAY_CHANGE |= {"config"}  # the start has an identity
MAY_CHANGE |= {"prompts"}  # a run keeps those that it began with
MAY_CHANGE |= {"recipe"}  # it picks other settings, which are recorded themselves
MAY_CHANGE |= {"max_broken", "partial_data", "columns"}  # the data themselves have a fingerprint
ENGINE = {"zero_optimization", "communication_data_type", "zero_force_ds_cpu_optimizer"}
ENGINE |= {"tensorboard", "csv_monitor", "wandb", "comet"}
ENGINE |= {"steps_per_print", "wall_clock_breakdown"}
KERNELS = {"torch_adam", "fused", "foreach"}
# What run.json has beside the settings; it is known only once data and model have been read.
FROM_INPUTS = {"data_fingerprint", "held_out_fingerprint", "start_identity"}

RESULT = "result.json"

# -------------------------------------------------------------------------------------------------
# What a resumed run may change.


def result_settings(settings: dict) -> dict:
    """The settings that decide the result, flat, from those of a run. Idempotent."""
    kept = {k: v for k, v in settings.items() if k not in MAY_CHANGE and k != "ds_config"}
    if kept.get("inversion_steps"):  # runs of before had no other path
        kept.setdefault("inversion_spacing", "uniform")
    if "method" in kept and "latents" not in kept:  # which they had as a third path
        old = kept.get("inversion_spacing") == "released"
        inverted = "released" if old else "inversion"
        kept["latents"] = inverted if kept["method"] == "inpo" else "noise"
        kept["inversion_spacing"] = None if old else kept.get("inversion_spacing")
        kept["objective"] = {"inpo": "dpo"}.get(kept["method"], kept["method"])
    older = {"buckets": 0, "true_sizes": False, "stream": 0}  # squares, of a copy
    older |= {"safe_loser": None, "gamma": None, "alpha": None}
    older |= {"prediction_type": None, "zero_snr": False}  # as scheduler_config.json has it
    kept = older | kept
    kept.setdefault("held_out", 0.0)  # as they held nothing out
    config = settings.get("ds_config") or {}
    kept |= {f"ds_config.{key}": config[key] for key in config if key not in ENGINE}
    if optimizer := kept.get("ds_config.optimizer"):
        adamw = optimizer.get("type", "").lower() == "adamw"  # adam_w_mode is for Adam alone
        ignored = KERNELS | ({"adam_w_mode"} if adamw else set())
        params = {k: v for k, v in optimizer.get("params", {}).items() if k not in ignored}
        kept["ds_config.optimizer"] = optimizer | {"params": params}
    return kept


def differences(there: dict, now: dict) -> str:
    """Settings that decide the result and differ, in words; "" where there are none."""
    there, now = result_settings(there), result_settings(now)
    for key in FROM_INPUTS - (there.keys() & now.keys()):  # one side does not know it yet
        there.pop(key, None)
        now.pop(key, None)
    return files.differences(there, now)


# -------------------------------------------------------------------------------------------------
# Who may write here.


def check_folder(out: Path, settings: dict):
    """Raises UserError where `out` cannot be written to, or holds something else or another run."""
    place = out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder.")
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise UserError(f"--out {out}: {place} cannot be written to; name another folder.")
    if not (out / "run.json").exists() and not checkpoint.complete(out / "checkpoints"):
        if out.exists() and not all(map(is_ours, out.iterdir())):
            raise UserError(f"--out {out}: holds files of something else; name an empty folder.")
        return
    there = read_record(out)
    if differ := differences(there, settings):
        raise UserError(
            f"--out {out}: holds another run ({differ}); name another folder, or repeat that run's "
            "command to resume it."
        )


def read_record(out: Path) -> dict:
    """The settings in run.json; where it is damaged or lost, those of the newest checkpoint that
    has them, which are the ones that decide the result. Raises UserError."""
    try:
        found = read_json(out / "run.json")
        result_settings(found)
        if isinstance(found["ds_config"], dict) and isinstance(found["model"], str):
            return found
        flaw = f"{out / 'run.json'} cannot be read (it has no settings)"
    except UserError as error:
        flaw = str(error).rstrip(".")
    except (AttributeError, KeyError, TypeError) as error:
        flaw = f"{out / 'run.json'} cannot be read ({type(error).__name__}: {error})"
    for path in checkpoint.complete(out / "checkpoints"):
        with contextlib.suppress(UserError):
            run = checkpoint.read_list(path)["run"]
            warn_once(f"{flaw}; the settings are those of {path.name}.")
            config = {k[10:]: v for k, v in run.items() if k.startswith("ds_config.")}
            return {k: v for k, v in run.items() if k[:10] != "ds_config."} | {"ds_config": config}
    raise UserError(f"{flaw}, and no checkpoint has its settings; name another folder.")


def is_ours(path: Path) -> bool:
    """Whether a run that was killed before its run.json was written may have left this."""
    if path.name in ("samples", "checkpoints"):
        return path.is_dir() and not any(path.iterdir())
    unfinished = path.name.startswith(("run.json.", "held_out.json.")) and path.suffix == ".new"
    return path.name in (LOCK, "held_out.json") or unfinished


def claim(out: Path, record: dict, facts: dict):
    """Make `out`, whose lock is held, this run's. Raises UserError."""
    check_folder(out, record)
    try:
        if (out / "run.json").is_dir():
            set_aside([out / "run.json"])
        write(out / "run.json", json.dumps(record, indent=2) + "\n")
        write(out / "card.json", json.dumps(facts, indent=2) + "\n")
        for name in ("samples", "checkpoints"):  # after run.json, which says whose they are
            (out / name).mkdir(exist_ok=True)
        for name in ("samples", "unets"):
            delete_unfinished(out / name)
        (out / "README.md").unlink(missing_ok=True)  # written last: it marks a finished run
    except OSError as error:
        raise not_written(out, error) from error


# -------------------------------------------------------------------------------------------------
# How far the run is.


def list_result(out: Path, names: list[str], step: int, **more):
    """Write result.json: the size of each file of the result, which is these files and folders, and
    what else is to be known of it.

    All are on the disk before README.md, which comes next, says that the run has finished."""
    sizes = {}
    for path in [out / name for name in names if (out / name).exists()]:
        sync_all(path)
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        sizes |= {str(f.relative_to(out)): f.stat().st_size for f in files if f.is_file()}
    write(out / RESULT, json.dumps({"step": step, **more, "files": sizes}, indent=2) + "\n")


def read_result(out: Path) -> dict:
    """result.json. Raises UserError where one of the files that it lists is not whole."""
    found = read_json(out / RESULT)
    sizes = found.get("files")
    if not is_step(found.get("step")) or not isinstance(sizes, dict):
        raise UserError(f"{out / RESULT} cannot be read (it lists no files).")
    for name, size in sizes.items():
        try:
            there = (out / name).stat().st_size
        except (OSError, ValueError) as error:  # ValueError: of a name that cannot be one
            words = getattr(error, "strerror", None) or error
            raise UserError(f"{out / name} cannot be read ({words}).") from error
        if there != size:
            raise UserError(f"{out / name} has {there:,} of {size} bytes.")
    return found


def finished(out: Path, steps: int) -> bool:
    """Whether the result of that many steps is in `out`. Where a file of it is damaged, and there
    is a checkpoint to write it again from, it is not, with a warning; else UserError."""
    if not (out / "README.md").exists():
        return False
    if not (out / RESULT).exists():  # runs had no list once
        lines = read_metrics(out)
        return bool(lines) and lines[-1]["step"] >= steps
    try:
        return read_result(out)["step"] >= steps
    except UserError as error:
        flaw = str(error).rstrip(".")
    if at := resumes_at(out):
        warn_once(f"{flaw}; the result is written again from the checkpoint of step {at}.")
        return False
    raise UserError(
        f"--out {out}: {flaw}, and there is no checkpoint to write the result again from; put back "
        f"a copy, or delete {out / 'README.md'} to train from the start."
    )


def resumes_at(out: Path) -> int:
    """The step of the newest complete checkpoint in `out`, or 0; its files are not verified."""
    found = checkpoint.complete(out / "checkpoints")
    return checkpoint.step_of(found[0]) if found else 0


def read_metrics(out: Path, until: float = math.inf) -> list[dict]:
    """The lines of metrics.jsonl up to a step, without damaged ones, see `read_log`. What was
    measured of a step after its line was written stands in a second line; here it is one."""
    lines = {}
    for line in read_log(out / "metrics.jsonl", is_metrics):
        if line["step"] <= until:
            lines[line["step"]] = lines.get(line["step"], {}) | line
    return list(lines.values())


def is_metrics(line: dict) -> bool:
    """Whether this can be a line of metrics.jsonl: a step, and numbers, or null for nan."""
    numbers = all(value is None or is_number(value) for value in line.values())
    return is_step(line.get("step")) and numbers


def drop_metrics(out: Path, step: int):
    """Delete the lines of metrics.jsonl after that step."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(out, until=step)]
    write(out / "metrics.jsonl", "".join(kept))


def append_metrics(out: Path, lines: str, name: str = "metrics.jsonl"):
    """Add lines to metrics.jsonl, or to another log: all of them, or none on a full disk."""
    file = out / name
    size = file.stat().st_size if file.exists() else 0
    try:
        with open(file, "a") as end:
            end.write(lines)
    except OSError:
        os.truncate(file, size)
        raise
