"""Checkpoints of a run: complete or absent, verified before use, on any number of ranks.

    checkpoints/step_000050/                complete: DeepSpeed's files of all ranks, and their list
    checkpoints/step_000100.partial/        being written; renamed once every rank's files are safe
    checkpoints/step_000100.broken/         set aside because it cannot be read; yours to delete
    checkpoints/step_000050.universal/      while step_000050 is loaded for another number of ranks
    checkpoints/step_000000.old/            being deleted

A kill at any instant leaves the other checkpoints as they were. DeepSpeed's files are pickles: open
only those of your own runs.

save and resume are called by all ranks. The ranks wait for each other several times while DeepSpeed
saves, so a rank whose disk is full must not raise in between: it keeps its failure until all ranks
have written, and then they compare.
"""

import contextlib
import io
import itertools
import json
import os
import shutil
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param
from torch.serialization import set_crc32_options

from system.files import UserError, differences, is_full, read_json, sync, write
from system.processes import first, gather, on_main, print0, share

LIST = "checkpoint.json"


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, newest first."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step of a complete checkpoint."""
    return int(path.name[5:])


def read_list(path: Path) -> dict:
    """{step, world, stage, run, files: {name: [bytes, CRC-32]}} of a checkpoint, "run" being the
    settings. Raises UserError."""
    facts = read_json(path / LIST)
    kinds = {"step": int, "world": int, "stage": int, "run": dict, "files": dict}
    if odd := [key for key, kind in kinds.items() if not isinstance(facts.get(key), kind)]:
        raise UserError(f"{path / LIST} cannot be read (it lacks {', '.join(odd)}).")
    return facts


# -------------------------------------------------------------------------------------------------
# Save.


class Writer(TorchCheckpointEngine):
    """torch.save with fsync. Keeps the size and checksum of what it meant to write, and the first
    failure, which it does not raise: what went wrong, and whether the disk is full."""

    def __init__(self):
        super().__init__()
        self.files: dict[str, list[int]] = {}
        self.failure: tuple[str, bool] | None = None

    def makedirs(self, path, exist_ok=False):
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.failure = self.failure or failure_of(error, path)

    def save(self, state_dict, path: str):
        if "optimizer_state_dict" in state_dict:  # for zero_to_fp32; BF16_Optimizer has none
            state_dict["optimizer_state_dict"].setdefault("zero_stage", 1)
        set_crc32_options(False)  # of the parts: Sums has that of the whole file
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, sums := Sums(file))
                file.flush()
                os.fsync(file.fileno())
            self.files[Path(path).name] = [sums.size, sums.crc]
        except Exception as error:  # on a full disk, torch's writer has a RuntimeError
            while error.__context__ and not isinstance(error, OSError):
                error = error.__context__
            self.failure = self.failure or failure_of(error, path)
        finally:
            set_crc32_options(True)


def failure_of(error: Exception, path) -> tuple[str, bool]:
    """(what went wrong, whether the disk is full)."""
    words = f"{path}: {getattr(error, 'strerror', None) or error}"
    return words, isinstance(error, OSError) and is_full(error)


class Sums:
    """Size and CRC-32 of what is written to a file."""

    def __init__(self, file):
        self.file, self.size, self.crc = file, 0, 0

    def write(self, data) -> int:
        self.size, self.crc = self.size + len(data), zlib.crc32(data, self.crc)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def save(engine, step: int, folder: Path, settings: dict, keep: int, every: int) -> str | None:
    """Write folder/step_NNNNNN; keep it, the newest `keep` and those of every `every`th step.

    Step 0 is never saved; an existing checkpoint is not rewritten.

    settings: what must be the same when the checkpoint is used. Returns what went wrong, on any
    rank; then the newest checkpoint is as it was, and so are the older ones, but where the disk is
    full: there the oldest ones make room."""
    path = folder / f"step_{step:06d}"
    if step == 0 or share(path.exists()):
        return None
    while failure := _write(engine, path, settings):
        on_main(lambda: _clean(folder))
        words, full = failure
        if not full or not on_main(lambda: make_room(folder, every)):
            return words
    on_main(lambda: _prune(folder, keep, every))
    return None


def _write(engine, path: Path, settings: dict) -> tuple[str, bool] | None:
    """Write a checkpoint. Returns `failure_of` any rank."""
    scratch = path.with_suffix(".partial")
    on_main(lambda: _clean(path.parent))
    engine.checkpoint_engine = writer = Writer()
    engine._copy_recovery_script = lambda save_path: None  # export.py does that script's work
    engine.save_checkpoint(
        str(path.parent),
        tag=scratch.name,
        client_state={"step": step_of(path)},
        save_latest=False,
        exclude_frozen_parameters=True,  # of LoRA: they are in the base model
    )
    files = {name: sums for written in gather(writer.files) for name, sums in written.items()}
    facts = {"step": step_of(path), "world": dist.get_world_size(), "run": settings, "files": files}
    facts["stage"] = engine.zero_optimization_stage()
    return first(writer.failure) or on_main(lambda: _publish(scratch, path, facts))


def _publish(scratch: Path, path: Path, facts: dict) -> tuple[str, bool] | None:
    """List the files and give the folder its name; each step is on the disk before the next."""
    try:
        write(scratch / LIST, json.dumps(facts, indent=2) + "\n")
        scratch.rename(path)
        sync(path.parent)
    except OSError as error:
        return failure_of(error, scratch / LIST)


def make_room(folder: Path, every: int) -> bool:
    """Delete the oldest checkpoint, where that helps: the newest one is whole, and would fit into
    what the older ones take and what is free. Those of every `every`th step stay."""
    whole = complete(folder)
    spare = [path for path in whole[1:] if not every or step_of(path) % every]
    if not spare or _flaw(whole[0]):
        return False
    room = shutil.disk_usage(folder).free + sum(map(_size, spare))
    if room < _size(whole[0]):
        return False
    print0(f"Warning: the disk is full; {spare[-1]} is deleted to make room.")
    return _delete(spare[-1])


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _prune(folder: Path, keep: int, every: int):
    for path in complete(folder)[keep:]:
        if not every or step_of(path) % every:
            _delete(path)  # where that fails, the next save tries again
    _clean(folder)


def _delete(path: Path) -> bool:
    """Delete a checkpoint; False where that is not possible."""
    try:
        path.rename(path.with_suffix(".old"))  # a kill must not leave half a checkpoint
    except OSError:
        return False
    _clean(path.parent)
    return True


def _clean(folder: Path):
    """Delete what is neither complete nor broken; the next call retries what cannot be deleted."""
    for suffix in ("partial", "old", "universal"):
        for path in folder.glob(f"step_*.{suffix}"):
            shutil.rmtree(path, ignore_errors=True)


# -------------------------------------------------------------------------------------------------
# Resume.


def resume(
    engine, folder: Path, settings: dict, result_settings: Callable[[dict], dict] = dict
) -> int:
    """Load the newest complete checkpoint that can be read. Returns its step, or 0 without one.

    settings: those that it must have been saved with. result_settings: picks from the saved ones
    those that have to agree.

    Newer ones that are broken are set aside with a warning. A checkpoint of another number of ranks
    or ZeRO stage is converted by DeepSpeed's universal checkpoint. Raises UserError if it is of
    another run, or if there are checkpoints and none can be read."""
    on_main(lambda: _clean(folder))
    flaws = {}
    for path in share(complete(folder)):
        flaw = first(_flaw(path, dist.get_rank(), dist.get_world_size()))
        if flaw is None:
            break
        flaws[path] = flaw
    else:
        if flaws:
            raise UserError(
                f"{folder}: none of its checkpoints can be read ({'; '.join(flaws.values())}); put "
                "back a copy of one, or move the run's folder away to start again."
            )
        return 0
    for broken, flaw in flaws.items():
        print0(f"Warning: {flaw}; {broken.name} is set aside as .broken, {path.name} is used.")
        on_main(lambda broken=broken: _set_aside(broken))
    return _load(engine, path, settings, result_settings)


def _flaw(path: Path, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with this rank's share of the files: one is missing, cut short or changed."""
    try:
        files = read_list(path)["files"]
        for name in sorted(files)[rank::world]:
            size, crc = files[name]
            if (found := (path / name).stat().st_size) != size:
                return f"{path / name} has {found:,} of {size:,} bytes"
            found = 0
            with open(path / name, "rb") as file:
                while block := file.read(2**24):
                    found = zlib.crc32(block, found)
            if found != crc:
                return f"{path / name} has changed since it was written"
    except UserError as error:
        return str(error).rstrip(".")
    except OSError as error:
        return f"{path / name} cannot be read ({error.strerror})"
    except (AttributeError, TypeError, ValueError) as error:
        return f"{path / LIST} has changed since it was written ({error})"
    return None


def _set_aside(path: Path):
    names = (path.with_suffix(f".broken{number or ''}") for number in itertools.count())
    try:
        path.rename(next(name for name in names if not name.exists()))
    except OSError as error:
        raise UserError(
            f"{path}: is broken and cannot be set aside ({error.strerror}); move it away."
        ) from error


def _load(engine, path: Path, settings: dict, result_settings: Callable[[dict], dict]) -> int:
    facts, now = read_list(path), json.loads(json.dumps(settings))
    if differ := differences(result_settings(facts["run"]), now):
        raise UserError(
            f"{path}: is a checkpoint of another run ({differ}); move it away, or name another "
            "--out."
        )
    stage, world, source = engine.zero_optimization_stage(), dist.get_world_size(), path
    if (facts["stage"], facts["world"]) != (stage, world):
        if (facts["run"].get("ds_config.optimizer") or {}).get("type", "").lower() == "adamw8bit":
            raise UserError(
                f"{path}: was written by {facts['world']} rank(s) with ZeRO-{facts['stage']}, and "
                f"AdamW8bit's moments cannot be converted for {world} with ZeRO-{stage}; resume as "
                "it was."
            )
        source = path.with_suffix(".universal") / "converted"
        print0(
            f"{path.name} was written by {facts['world']} rank(s) with ZeRO-{facts['stage']}; "
            f"converting it for {world} with ZeRO-{stage}."
        )
        try:
            on_main(lambda: _convert(path, source, facts["stage"], stage))
        except UserError as error:
            raise UserError(
                f"{path}: cannot be converted ({error}); make twice its size free on the disk, or "
                f"resume with {facts['world']} rank(s) and ZeRO-{facts['stage']}."
            ) from error
    engine._config.load_universal_checkpoint = source != path  # for the next call alone, 0.19.8
    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints
        options = {"tag": source.name, "load_module_strict": False}
        _, state = engine.load_checkpoint(str(source.parent), **options)
    engine._config.load_universal_checkpoint = False
    for moments in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(moments.get("step")):  # else all sub-groups count in one tensor
            moments["step"] = moments["step"].clone()
    first(None)  # all have read it
    on_main(lambda: _clean(path.parent))
    return state["step"]


def _convert(path: Path, target: Path, before: int, now: int):
    """Write `path`, of ZeRO stage `before`, as `target`, which stage `now` can load on any ranks.

    It may take an hour: SDXL's 31 GB are read and written three times."""
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(path), output_folder=str(target), inject_missing_state=True, strict=True,
        num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False,
    )  # fmt: skip
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            ds_to_universal.main(options)
        _translate(target, before, now)
    except Exception as error:  # of any kind: the other ranks wait for rank 0
        shutil.rmtree(target.parent, ignore_errors=True)
        raise UserError(f"{type(error).__name__}: {error}") from error


def _translate(folder: Path, before: int, now: int):
    """Turn DeepSpeed 0.19's universal files of stage 3 into those of stages 1 and 2, or back.

    They differ in the name of the model's file, in where AdamW's step is, and in whether a tensor
    has a dictionary around it. Those of stage 3 hold all of rank 0's optimizer in the file that
    every rank reads, which is dropped."""
    common = folder / "zero" / "optimizer_state.pt"
    state = torch.load(common, map_location="cpu", weights_only=False)
    parameters = [path for path in (folder / "zero").iterdir() if path.is_dir()]
    if before == 3:
        del state["fp32_flat_groups"]
        step = state.pop("optimizer_state_dict")["state"][0]["step"]
    else:
        step = next(torch.load(file) for path in parameters for file in path.glob("step.pt"))
    if now == 3:
        groups = state["param_groups"]
        state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": groups}
    elif before == 3:
        state["ds_version"] = deepspeed.__version__
        for path in parameters:
            for file in path.glob("*.pt"):
                torch.save({"param": torch.load(file)}, file)
            torch.save(step, path / "step.pt")
    torch.save(state, common)
    os.replace(folder / _model_file(before), folder / _model_file(now))


def _model_file(stage: int) -> str:
    name = "mp_rank_00_model_states.pt"
    return f"zero_pp_rank_0_{name}" if stage == 3 else name


# -------------------------------------------------------------------------------------------------
# The master weights of a run that has no checkpoint yet.


def set_master_weights(engine, weights: dict[str, torch.Tensor]):
    """Make fp32 tensors, by name and whole on every rank, the master weights of what is trained.

    DeepSpeed has made them of the engine's half-precision weights, so that they are rounded. The
    engine's own weights stay as they are, and must be `weights` rounded."""
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() < 3:
            safe_set_full_fp32_param(parameter, weights[name])
        else:  # under ZeRO-3 that function refuses a tensor that the ranks do not divide
            size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
            padding = size * dist.get_world_size(group) - parameter.ds_numel
            padded = torch.nn.functional.pad(weights[name].flatten(), (0, padding))
            safe_set_local_fp32_param(parameter, padded.split(size)[dist.get_rank(group)])


# -------------------------------------------------------------------------------------------------
# Weights without an engine.


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The fp32 master weights of a checkpoint by name, whatever its ranks and ZeRO stage; of a LoRA
    run, the adapters'. Raises UserError where it is broken."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if flaw := _flaw(path):
        raise UserError(f"{flaw}; name another checkpoint.")
    quiet = io.StringIO()  # DeepSpeed prints lines and progress bars
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        return get_fp32_state_dict_from_zero_checkpoint(
            str(path.parent), tag=path.name, exclude_frozen_parameters=True
        )
