"""One run's folder: configuration, metrics, sample pictures, checkpoints, and the pipeline at last.

    run.json                what was asked for; the same command resumes, another one is refused
    card.json               what the model card says of it
    metrics.jsonl           one line an optimizer step
    tensorboard/            the same, through DeepSpeed's monitor
    samples/                pictures of fixed prompts and seeds, the start beside the current model
    scores.jsonl, best/     how --judge likes these pictures, and the model that it liked best
    checkpoints/            of all ranks; see checkpoint.py
    .lock                   held by the job that writes here
    unets/                  models exported on the way, fp32
    nonfinite/              what to look at where steps failed; see guard.py
    curves.png, README.md   training curves, model card
    cost.json               UNet calls, FLOPs, time, memory; see cost.py
    model_index.json, ...   the aligned pipeline in diffusers layout, written at the end; of a LoRA
                            run pytorch_lora_weights.safetensors, for load_lora_weights

Every method is called by all ranks and is safe there: files are written by rank 0, except for
checkpoints, whose writing is collective. Randomness is a function of (seed, step), so a checkpoint
holds engine and step, no more. A full disk costs files, with a warning, but not the run.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

import model
from evaluation import figures
from system import checkpoint
from system.files import UserError
from system.processes import Stop, agree, code_version, is_main, on_main, print0, shares_folder
from training import card, guard, lora
from training.preview import Preview, replace

# What may differ when a run goes on: flags, and keys of ds_config.json.
HARMLESS = {"steps", "workers", "micro_batch", "judge", "keep", "keep_every"}
HARMLESS |= {"sample_every", "checkpoint_every", "export_every", "code"}
ENGINE = {"zero_optimization", "communication_data_type", "zero_force_ds_cpu_optimizer"}
ENGINE |= {"tensorboard", "csv_monitor", "wandb", "steps_per_print", "wall_clock_breakdown"}
KERNELS = {"torch_adam", "fused", "foreach"}  # of ds_config's optimizer: how, not what
LOCK = ".lock"  # in a run's folder
FOUND = {"data_fingerprint", "start_identity"}  # in run.json, beside what was asked for


# -------------------------------------------------------------------------------------------------
# The folder.


def essence(asked: dict) -> dict:
    """What decides the result, of what was asked for: flat, and without what may change. An essence
    is its own essence."""
    kept = {key: asked[key] for key in asked if key not in HARMLESS and key != "ds_config"}
    config = asked.get("ds_config") or {}
    kept |= {f"ds_config.{key}": config[key] for key in config if key not in ENGINE}
    if optimizer := kept.get("ds_config.optimizer"):
        adamw = optimizer.get("type", "").lower() == "adamw"  # adam_w_mode is for Adam alone
        how = KERNELS | ({"adam_w_mode"} if adamw else set())
        params = {k: v for k, v in optimizer.get("params", {}).items() if k not in how}
        kept["ds_config.optimizer"] = optimizer | {"params": params}
    return kept


def differences(there: dict, now: dict) -> str:
    """Keys that differ, with both values, in words; "" where the two decide the same result."""
    there, now = essence(there), essence(now)
    found = FOUND - (there.keys() & now.keys())  # not known yet on one side
    return "; ".join(
        f"{key}: {there.get(key)} there, {now.get(key)} now"
        for key in sorted((there.keys() | now.keys()) - found)
        if there.get(key) != now.get(key)
    )


def check_folder(out: Path, asked: dict):
    """Raises UserError where `out` cannot be written to, holds something else, or a run that was
    asked for differently."""
    record, place = out / "run.json", out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder.")
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise UserError(f"--out {out}: {place} cannot be written to; name another folder.")
    if not record.exists():
        if out.exists() and not all(map(is_ours, out.iterdir())):
            raise UserError(f"--out {out}: holds files of something else; name an empty folder.")
        return
    try:
        there = json.loads(record.read_text())
    except ValueError as error:
        raise UserError(
            f"--out {out}: its run.json is damaged ({error}); name another folder."
        ) from error
    if differ := differences(there, asked):
        raise UserError(
            f"--out {out}: holds another run ({differ}); name another folder, or repeat that run's "
            "command to resume it."
        )


def is_ours(path: Path) -> bool:
    """Whether a start that came to nothing may have left it: no more than a name."""
    empty = path.name in ("samples", "checkpoints") and path.is_dir() and not any(path.iterdir())
    return empty or path.name in (LOCK, "run.json.new")


@contextlib.contextmanager
def alone(out: Path):
    """Be the one job that writes to `out` while inside. Raises UserError where another one is
    (collective). The lock is rank 0's and ends with it, however it ends."""
    with contextlib.ExitStack() as held:
        on_main(lambda: held.callback(os.close, lock(out)) and None)
        yield


def lock(out: Path) -> int:
    """The descriptor of out/.lock, locked; Python keeps it from programs that are started."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise unwritten(out, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise UserError(
            f"--out {out}: another job is writing there; wait for it, or name another folder."
        ) from error
    except OSError:
        pass  # a file system without locks
    return file


def unwritten(out: Path, error: OSError) -> UserError:
    return UserError(
        f"--out {out}: {error.filename} cannot be written ({error.strerror}); mend that and repeat "
        "the command, or name another folder."
    )


def finished(out: Path, steps: int) -> bool:
    """Whether the run in `out` has written its pipeline after that many steps."""
    lines = read_metrics(out)
    return (out / "README.md").exists() and bool(lines) and lines[-1]["step"] >= steps


def read_metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, without a last one that a kill cut short."""
    file = out / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def due(step: int, every: int, last: int) -> bool:
    """Whether something done `every` steps (0: never) and after the last one is to be done now."""
    return every > 0 and (step % every == 0 or step == last)


class Run:
    """The folder of a run in progress, seen from every rank.

    record: what was asked for, with FOUND. facts: of card.py. limit: of skipped steps in a row.
    stop: knows whether a signal came."""

    def __init__(self, args: argparse.Namespace, record: dict, facts: dict, limit: int, stop: Stop):
        self.args, self.out, self.record, self.stop = args, args.out, record, stop
        self.card, self.code = facts, code_version()  # of the run's first step, once resumed
        self.bar, self.clock, self.unwritten = None, time.time(), ""
        self.micro, self.broken_pairs = [], 0
        self.watch, self.broken = guard.Watch(), guard.Broken(args.out, dist.get_rank(), limit)
        self.preview = Preview(args)
        agree(record | {"prompts": self.preview.prompts})  # record has the model's identity, too
        on_main(self.claim)
        shares_folder(self.out)

    def claim(self):
        check_folder(self.out, self.record)
        try:
            for name, content in {"run.json": self.record, "card.json": self.card}.items():
                replace(self.out / name, json.dumps(content, indent=2) + "\n")
            for folder in ("samples", "checkpoints"):  # last: then run.json says whose they are
                (self.out / folder).mkdir(exist_ok=True)
        except OSError as error:
            raise unwritten(self.out, error) from error
        (self.out / "README.md").unlink(missing_ok=True)  # it comes last, and says: all is there

    # ----- metrics

    def note(self, batch: dict, t, losses, err, err_ref, diagnostics: dict):
        """Remember a micro-step; nothing here waits for the GPU."""
        self.micro.append({"loss": losses.detach().mean(), **diagnostics})
        self.broken_pairs += batch["skipped"]
        seen = batch["n"], batch["row"], batch["captions"]
        self.broken.note(*seen, t, err, err_ref, losses)

    def log(self, engine, step: int, lr: float):
        """Average over micro-steps and ranks; write to file, monitor and bar; say what looks wrong.

        Raises UserError where too many steps in a row failed."""
        names = list(self.micro[0])
        means = torch.stack([torch.stack([one[name] for name in names]) for one in self.micro])
        means = means.mean(0) / dist.get_world_size()
        values = torch.cat([means, means.new_tensor([self.broken_pairs])])
        dist.all_reduce(values)
        values = values.tolist()  # the one point in a step where the CPU waits
        self.micro, self.broken_pairs = [], 0
        line = {"step": step + 1, **dict(zip(names, values, strict=False))}
        norm, now = engine.get_global_grad_norm(), time.time()
        line |= {
            "broken_pairs": int(values[-1]),
            "lr": lr,
            "grad_norm": None if norm is None or not math.isfinite(norm) else float(norm),
            "skipped_steps": engine.skipped_steps,
            "seconds": now - self.clock,
            "pairs_per_second": self.args.batch / (now - self.clock),
        }
        self.clock = now
        if is_main():
            self.write(engine, line)
        self.broken.after_step(step + 1, engine)

    def write(self, engine, line: dict):
        bad = {k: None for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
        self.unwritten += json.dumps(line | bad) + "\n"  # JSON has no nan
        self.careful("metrics.jsonl", self.append)
        shown = {f"train/{key}": value for key, value in line.items() if value is not None}
        self.monitor(engine, shown, line["step"])
        for words in self.watch(line):
            self.say(f"Warning: {words}")
        shown = {"loss": "loss", "acc": "implicit_accuracy"}
        self.bar.set_postfix({k: f"{line[v]:.4f}" for k, v in shown.items() if v in line})
        self.bar.update()

    def append(self):
        """The new lines at the end of metrics.jsonl: all of them or none."""
        file = self.out / "metrics.jsonl"
        size = file.stat().st_size if file.exists() else 0
        try:
            with open(file, "a") as lines:
                lines.write(self.unwritten)
            self.unwritten = ""
        except OSError:
            os.truncate(file, size)
            raise

    def monitor(self, engine, values: dict, step: int):
        """TensorBoard and the other monitors of ds_config.json; rank 0."""
        events = [(name, value, step) for name, value in values.items() if name != "train/step"]
        try:
            engine.monitor.write_events(events)
        except Exception as error:
            self.say(f"Warning: a monitor failed ({error}); metrics.jsonl goes on.")
            engine.monitor.write_events = lambda events: None

    def careful(self, name: str, action):
        """Do it, and turn what a full disk raises into a warning; rank 0."""
        try:
            action()
        except OSError as error:
            self.say(f"Warning: {self.out / name} was not written ({error.strerror}).")

    def say(self, words: str):
        """A line above the progress bar; rank 0."""
        tqdm.write(words, file=sys.stderr)

    # ----- pictures and models on the way

    def show(self, engine, pipeline, step: int):
        """Export and draw, where `step` is due: after its checkpoint, for which a signal to stop
        does not have to wait then. A run that resumes at `step` does it again, to the same end."""
        if step and due(step, self.args.export_every, self.args.steps):
            self.export(engine, self.out / "unets" / f"step_{step:06d}")
        if due(step, self.args.sample_every, self.args.steps):
            self.sample(engine, pipeline, step)

    def sample(self, engine, pipeline, step: int):
        """Draw pictures; keep the model whose pictures --judge likes best."""
        clock, stop = time.time(), functools.partial(self.stop_if_asked, engine, step)
        scores, best = self.preview.draw(pipeline, step, stop)
        if is_main() and scores:
            shown = {f"judge/{key}": scores[key] for key in ("mean", "start", "win_rate")}
            self.monitor(engine, shown, step)
        if best:
            weights = full_weights(engine)
            if is_main():
                write = functools.partial(write_model, engine.module, weights)
                self.careful("best", lambda: self.preview.keep(scores, write))
        self.clock += time.time() - clock  # drawing is not training

    def export(self, engine, folder: Path):
        """Write the model as it is, for evaluate.py: a UNet, or the adapters (collective)."""
        clock, weights = time.time(), full_weights(engine)
        if is_main():
            name = str(folder.relative_to(self.out))
            self.careful(name, lambda: write_model(engine.module, weights, folder))
        self.clock += time.time() - clock

    # ----- checkpoints

    def save(self, engine, step: int) -> str | None:
        """Write a checkpoint (collective); where that fails, say so, go on, and return why."""
        clock, keep, every = time.time(), self.args.keep, self.args.keep_every
        folder, run = self.out / "checkpoints", essence(self.record) | {"code": self.code}
        failure = checkpoint.save(engine, step, folder, run, keep, every)
        if failure and is_main():
            self.say(
                f"Warning: no checkpoint of step {step} ({failure}); the older ones are untouched "
                "and training goes on."
            )
        self.clock += time.time() - clock
        return failure

    def resume(self, engine, begun: Callable) -> int:
        """Load the newest checkpoint that is whole; its step. Later metrics are dropped.

        Without one, where the engine has half precision, its master weights become those of
        begun(), the pipeline that training starts from in fp32: the engine made them of its own."""
        folder = self.out / "checkpoints"
        start = checkpoint.resume(engine, folder, essence(self.record), essence)
        if start:
            print0(f"Resuming {self.out} at step {start} of {self.args.steps}.")
            now, loaded = self.code, checkpoint.read_list(folder / f"step_{start:06d}")
            self.code = loaded["run"].get("code", now)
            if self.code != now:
                print0(f"The code has changed since this run began ({self.code} there, {now} now).")
        elif engine.module.dtype != torch.float32:
            checkpoint.begin(engine, begun().unet.state_dict())

        def drop():
            kept = [line for line in read_metrics(self.out) if line["step"] <= start]
            replace(self.out / "metrics.jsonl", "".join(json.dumps(one) + "\n" for one in kept))

        on_main(drop)
        options = {"desc": self.out.name, "unit": "step", "total": self.args.steps}
        self.bar = tqdm(**options, initial=start, disable=not is_main())
        self.clock = time.time()
        return start

    def stop_if_asked(self, engine, step: int):
        """Where SIGTERM or SIGINT came, on any rank: save `step` and leave (collective)."""
        if signum := self.stop.asked():
            where = "the last checkpoint" if self.save(engine, step) else "there"
            name = signal.Signals(signum).name
            print0(f"\nStopped by {name} at step {step}; the same command goes on from {where}.")
            sys.exit(128 + signum)

    # ----- the end

    def finish(self, engine, start: Callable, work: Callable[[], dict]):
        """Write curves, cost, model card and the aligned pipeline in fp32. start(): the pipeline
        that training started from, since what else it has is rounded in memory."""
        weights, memory = full_weights(engine), peak_memory(engine.device)

        @as_os_error()
        def write():
            self.bar.close()
            self.append()  # lines that a full disk kept back
            if lora.attached(engine.module):
                write_model(engine.module, weights, self.out)
            else:
                model.save_pipeline(start(), weights, self.out)
            lines = read_metrics(self.out)
            spent = measured(lines, engine.device, memory)
            (self.out / "cost.json").write_text(json.dumps(work() | spent, indent=2) + "\n")
            title, method = self.card["title"], self.card["method"]
            figures.curves(lines, self.out / "curves.png", title, method)
            (self.out / "README.md").write_text(card.render(self.card, lines))

        try:
            on_main(write)
        except UserError as error:
            raise UserError(
                f"--out {self.out}: the aligned model was not written ({error}); make room and "
                "repeat the command, which continues from the last checkpoint."
            ) from error
        print0(f"Wrote the aligned model to {self.out}.")


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU's, or on a CPU the process's, at their highest on any rank (collective)."""
    gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    peak = torch.tensor(peak, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)


def measured(lines: list[dict], device: torch.device, memory: int) -> dict:
    """The measured part of cost.json. Time is that of the steps alone: without start, sampling and
    saving, nor steps that were lost with a crash."""
    seconds, ranks = sum(line["seconds"] for line in lines), dist.get_world_size()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    spent = {"seconds": seconds, "devices": ranks, "device": name}
    return spent | {"device_hours": seconds * ranks / 3600, "peak_memory": memory}


def full_weights(engine) -> dict[str, torch.Tensor]:
    """What was trained, by name: fp32 master weights on the CPU, gathered from all ranks; for full
    fine-tuning with the buffers.

    Collective, whatever the ZeRO stage; rank 0 has the result."""
    from deepspeed.utils import safe_get_full_fp32_param

    adapters = lora.attached(engine.module)
    weights = {} if adapters else {name: buffer for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)  # None: the parameter itself is fp32
            if is_main():
                weights[name] = (parameter if full is None else full).detach().float().cpu()
    return weights


@contextlib.contextmanager
def as_os_error():
    """What safetensors raises of a full disk, an Exception, as the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error


@as_os_error()
def write_model(unet, weights: dict[str, torch.Tensor], folder: Path):
    """A UNet, or its adapters as a LoRA file, in diffusers layout."""
    if lora.attached(unet):
        lora.save(weights, unet.peft_config["default"], folder)
    else:
        model.save_unet(dict(unet.config), weights, folder)
