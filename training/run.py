"""A run in progress: metrics, pictures, checkpoints, and the aligned model at the end.

Every method is called by all ranks and is safe there: files are written by rank 0, except for
checkpoints, whose writing is collective. Randomness is a function of (seed, step), so a checkpoint
holds engine and step, no more. A full disk costs files, with a warning, but not the run.
"""

import argparse
import contextlib
import errno
import functools
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from evaluation import figures
from system import checkpoint
from system.files import UserError, is_full, replacing, write
from system.hub import KOHYA_LORA, LORA
from system.processes import (
    Stop,
    agree,
    code_version,
    is_main,
    on_main,
    print0,
    share,
    shares_folder,
)
from system.text import printable
from training import budget, cache, card, folder, lora, pages, trackers
from training.broken import BrokenPairs
from training.guard import NonFiniteSteps, Watch
from training.methods import loss_of
from training.plan import Plan
from training.preview import Preview
from weights import saving

PATIENCE, PAUSE = 30 * 60, 60  # seconds: how long the end waits for room; between two tries


def due(step: int, every: int, last: int) -> bool:
    """Whether `step` is a multiple of `every` or the last step; never if `every` is 0."""
    return every > 0 and (step % every == 0 or step == last)


class Run:
    """record: the settings, with FROM_INPUTS and the prompts of the pictures. facts: of card.py.
    limit: how many skipped steps in a row are too many. stop: knows whether a signal came.

    Its attribute held_out is a HeldOut where there are such pairs."""

    def __init__(self, args: argparse.Namespace, record: dict, facts: dict, limit: int, stop: Stop):
        self.args, self.out, self.record, self.stop = args, args.out, record, stop
        self.facts, self.code = facts, code_version()  # after resume, the code of step 1
        self.bar, self.clock, self.lr = None, time.monotonic(), 0.0
        self.micro, self.pending, self.waited = [], "", 0.0
        self.broken = BrokenPairs(args.out, args.max_broken, args.batch, facts["pairs"])
        self.watch, self.nonfinite = Watch(), NonFiniteSteps(args.out, dist.get_rank(), limit)
        self.preview, self.held_out = Preview(args, record["prompts"]), None
        agree(record)  # it has the model's identity, too
        on_main(lambda: folder.claim(self.out, record, facts))
        on_main(lambda: trackers.set_variables(self.out, record["ds_config"]))
        self.trackers = trackers.Trackers(self.out, self.print_above_bar)
        shares_folder(self.out)

    # ----- metrics

    def timed(self, batches: Iterator[dict]) -> Iterator[dict]:
        """The batches; how long the loop waits for them is counted."""
        while True:
            since = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - since
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def aside(self):
        """What is done in it is no training: its time is that of no step."""
        clock = time.monotonic()
        yield
        self.clock += time.monotonic() - clock

    def note(self, batch: dict, t, losses, err, err_ref, diagnostics: dict):
        """Remember a micro-step; nothing here waits for the GPU."""
        self.micro.append({"loss": losses.detach().mean(), **diagnostics})
        self.broken.note(batch["broken"])
        pairs = batch["n"], batch["row"], batch["captions"]
        self.nonfinite.note(*pairs, t, err, err_ref, losses)

    def log(self, engine, step: int):
        """Average over micro-steps and ranks; write to file, monitor and bar; warn of what looks
        wrong. step: the one just taken, from 0. Raises UserError if too many in a row failed."""
        names = list(self.micro[0])
        means = torch.stack([torch.stack([one[name] for name in names]) for one in self.micro])
        means = means.mean(0) / dist.get_world_size()
        waited = self.waited / dist.get_world_size()
        values = torch.cat([means, means.new_tensor([self.broken.drawn(), waited])])
        dist.all_reduce(values)
        values = values.tolist()  # the one point in a step where the CPU waits
        self.micro, self.waited = [], 0.0
        line = {"step": step + 1, **dict(zip(names, values, strict=False))}
        norm, now = engine.get_global_grad_norm(), time.monotonic()
        line |= {
            "broken_pairs": int(values[-2]),
            "lr": self.lr,
            "grad_norm": None if norm is None or not math.isfinite(norm) else float(norm),
            "skipped_steps": engine.skipped_steps,
            "seconds": now - self.clock,
            "pairs_per_second": self.args.batch / (now - self.clock),
            "waiting": values[-1] / (now - self.clock),
        }
        if engine.fp16_enabled():
            line["loss_scale"] = float(engine.optimizer.loss_scale)
        self.clock, self.lr = now, engine.get_lr()[0]
        if is_main():
            self.write(line)
        if warning := self.broken.after_step(step + 1, line["broken_pairs"]):
            print0(f"Warning: {warning}", file=sys.stderr)
        self.nonfinite.after_step(step + 1, engine)

    def write(self, line: dict):
        self.pending += json_line(line)
        self.warn_if_disk_full("metrics.jsonl", self.append)
        self.trackers.note(trackers.named(line), line["step"])
        for sentence in self.watch(line):
            self.print_above_bar(f"Warning: {sentence}")
        shown = {"loss": "loss", "acc": "implicit_accuracy"}
        self.bar.set_postfix({k: f"{line[v]:.4f}" for k, v in shown.items() if v in line})
        self.bar.update()

    def append(self):
        """Write this step's line, and those that a full disk kept back."""
        folder.append_metrics(self.out, self.pending)
        self.pending = ""

    def warn_if_disk_full(self, name: str, action: Callable[[], None]):
        """action(); an OSError, as of a full disk, is printed as a warning; rank 0."""
        try:
            action()
        except OSError as error:
            self.print_above_bar(f"Warning: {self.out / name} was not written ({error.strerror}).")

    def print_above_bar(self, line: str):
        """Rank 0."""
        tqdm.write(printable(line), file=sys.stderr)

    # ----- pictures and models during training

    def show(self, engine, pipeline, step: int):
        """Export and draw where `step` is due: after its checkpoint, so that a signal to stop does
        not have to wait for them. A run that resumes at `step` does both again. Then the step is
        shown by the trackers."""
        if step and due(step, self.args.export_every, self.args.steps):
            self.export(engine, self.out / "unets" / f"step_{step:06d}")
        if step and self.held_out and due(step, self.args.sample_every or step, self.args.steps):
            self.look(engine, step)
        if due(step, self.args.sample_every, self.args.steps):
            self.sample(engine, pipeline, step)
        self.trackers.flush()

    def sample(self, engine, pipeline, step: int):
        """Draw pictures; keep the model whose pictures --judge likes best."""
        clock, stop = time.monotonic(), functools.partial(self.stop_if_asked, engine, step)
        eager = torch.compiler.set_stance("force_eager")  # each other shape would be compiled
        with cache.encoders_on(pipeline, engine.device), eager:
            scores, best = self.preview.draw(pipeline, step, stop)
        picture = self.out / "samples" / f"step_{step:06d}.png"
        if is_main() and picture.exists():
            self.trackers.note({trackers.SAMPLES: picture}, step)
            self.write_page()
        self.keep_best(engine, scores, best)
        self.clock += time.monotonic() - clock  # drawing is not training

    def write_page(self):
        """samples.html; a page that fails costs a warning. Rank 0."""
        try:
            pages.write_samples(self.out, self.preview.prompts, self.facts)
        except Exception as error:
            said = f"Warning: {self.out / pages.NAME} was not written ({error})."
            self.print_above_bar(said)

    def look(self, engine, step: int):
        """Log what becomes of the held-out pairs; keep the best model, if they are the judge."""
        clock, stop = time.monotonic(), functools.partial(self.stop_if_asked, engine, step)
        found, scores, best = self.held_out.measure(stop), None, False
        start = found.pop("start")
        if is_main():
            line = {"step": step, **{f"held_out_{key}": found[key] for key in found}}
            self.pending += json_line(line)
            self.warn_if_disk_full("metrics.jsonl", self.append)
            self.trackers.note(trackers.named(line), step)
            if self.args.judge == "held-out" and math.isfinite(found["loss"]):
                means = {"mean": -found["loss"], "start": None if start is None else -start}
                scores = {"step": step, "scorer": "held-out", **means}
                scores["win_rate"] = found.get("implicit_accuracy")
                with contextlib.suppress(OSError):  # a full disk costs the line
                    scores, best = self.preview.add(scores)
        self.keep_best(engine, scores, share(best))
        self.clock += time.monotonic() - clock

    def keep_best(self, engine, scores: dict | None, best: bool):
        """Show the judge's scores; where they are the best, keep the model (collective)."""
        if is_main() and scores:
            self.trackers.note(trackers.judged(scores), scores["step"])
        if best:
            weights, title = full_weights(engine), self.facts["title"]
            if is_main():
                write_best = functools.partial(write_model, engine.module, weights, title)
                self.warn_if_disk_full("best", lambda: self.preview.keep(scores, write_best))

    def export(self, engine, target: Path):
        """Write the current model, for evaluate.py: a UNet, or the adapters."""
        clock, weights = time.monotonic(), full_weights(engine)

        def put_in_place():
            with replacing(target) as scratch:
                write_model(engine.module, weights, self.facts["title"], scratch)
                shutil.rmtree(target, ignore_errors=True)  # of a run that resumes

        if is_main():
            self.warn_if_disk_full(str(target.relative_to(self.out)), put_in_place)
        self.clock += time.monotonic() - clock

    # ----- checkpoints

    def save_if_due(self, engine, step: int):
        """Write a checkpoint where `step` is due."""
        if due(step, self.args.checkpoint_every, self.args.steps):
            self.save(engine, step)

    def save(self, engine, step: int) -> str | None:
        """Write a checkpoint. Where that fails, warn, and return why."""
        clock, keep, every = time.monotonic(), self.args.keep, self.args.keep_every
        settings = folder.result_settings(self.record) | {"code": self.code}
        failure = checkpoint.save(engine, step, self.out / "checkpoints", settings, keep, every)
        if failure and is_main():
            self.print_above_bar(
                f"Warning: no checkpoint of step {step} ({failure}); the newest one is untouched "
                "and the run continues."
            )
        self.clock += time.monotonic() - clock
        return failure

    def resume(self, engine) -> int:
        """Load the newest checkpoint that is whole, and drop later metrics. Returns its step, or 0.

        Without one, the master weights of an engine in half precision become those of the start in
        fp32: the engine has made them of its own weights, which are rounded."""
        path, settings = self.out / "checkpoints", folder.result_settings(self.record)
        start = checkpoint.resume(engine, path, settings, folder.result_settings)
        if start:
            print0(f"Resuming {self.out} at step {start} of {self.args.steps}.")
            saved = checkpoint.read_list(path / f"step_{start:06d}")["run"]
            now, self.code = self.code, saved.get("code", self.code)
            if self.code != now:
                print0(
                    f"The code has changed since this run started ({self.code} there, {now} now)."
                )
        elif engine.module.dtype != torch.float32:
            unet = lora.load_start(self.args, torch.float32).unet
            checkpoint.set_master_weights(engine, unet.state_dict())
        on_main(lambda: folder.drop_metrics(self.out, start))
        if is_main():
            self.trackers.resume(engine.monitor, start)
        self.broken.count = on_main(lambda: self.broken.resume(folder.read_metrics(self.out)))
        options = {"desc": self.out.name, "unit": "step", "total": self.args.steps}
        self.bar = tqdm(**options, initial=start, disable=not is_main())
        self.clock, self.lr = time.monotonic(), engine.get_lr()[0]
        return start

    def stop_if_asked(self, engine, step: int):
        """Save `step` and exit if a signal to stop has come, on any rank."""
        if signum := self.stop.asked():
            where = "the last checkpoint" if self.save(engine, step) else "there"
            name = signal.Signals(signum).name
            print0(f"\nStopped by {name} at step {step}; the same command resumes from {where}.")
            sys.exit(128 + signum)

    # ----- the end

    def finish(self, engine, plan: Plan):
        """Write the aligned pipeline in fp32, curves, cost and model card. Parts of the pipeline
        that were not trained are read again in fp32, since they are rounded in memory."""
        weights, memory = full_weights(engine), peak_memory(engine.device)
        title, loss = self.facts["title"], loss_of(self.facts)

        @as_os_error()
        def write_all():
            self.bar.close()
            self.append()
            if lora.attached(engine.module):
                write_model(engine.module, weights, title, self.out)
                names = [LORA, KOHYA_LORA]
            else:
                start = lora.load_start(self.args, torch.float32)
                saving.save_pipeline(start, weights, self.out)
                names = ["model_index.json", *start.components]
            lines = folder.read_metrics(self.out)
            cost = budget.work_done(self.args, plan) | measured(lines, engine.device, memory)
            write(self.out / "cost.json", json.dumps(cost, indent=2) + "\n")
            figures.curves(lines, self.out / "curves.png", title, loss)
            self.write_page()
            folder.list_result(self.out, [*names, "cost.json", "curves.png"], self.args.steps)
            write(self.out / "README.md", card.render(self.facts, lines))

        try:
            self.when_there_is_room(engine, write_all)
        except UserError as error:
            raise UserError(
                f"--out {self.out}: the aligned model was not written ({error}); make room and "
                "repeat the command, which resumes from the last checkpoint."
            ) from error
        print0(f"Wrote the aligned model to {self.out}.")
        if best := self.preview.best():
            why = f"whose pictures {best['scorer']} liked best"
            if best["scorer"] == "held-out":
                why = "whose loss on the held-out pairs was the lowest"
            print0(f"The model of step {best['step']}, {why}, is in {self.out / 'best'}.")

    def when_there_is_room(self, engine, action: Callable[[], None]):
        """action() on rank 0 (collective); an OSError becomes a UserError. Where the disk is full,
        an older checkpoint makes room, or all ranks wait for it, and leave where a signal asks."""

        def attempt() -> tuple[str, bool] | None:
            try:
                return action()
            except OSError as error:
                return str(error), is_full(error)

        keep, steps = self.args.keep_every, self.args.steps
        make_room = functools.partial(checkpoint.make_room, self.out / "checkpoints", keep)
        end = time.monotonic() + PATIENCE
        while failure := on_main(attempt):
            words, full = failure
            self.save(engine, steps)  # where it has none yet, so that the model is safe
            left = share(end - time.monotonic())
            if not full or left <= 0:
                raise UserError(words)
            if on_main(make_room):
                continue
            print0(
                f"Warning: the aligned model was not written yet ({words}); waiting for room, at "
                f"most {math.ceil(left / 60)} more minute(s). SIGTERM or Ctrl-C ends the waiting.",
                file=sys.stderr,
            )
            pause = time.monotonic() + min(PAUSE, left)
            while share(time.monotonic() < pause):
                self.stop_if_asked(engine, steps)
                time.sleep(min(1, PAUSE))


# -------------------------------------------------------------------------------------------------
# What a run measures and writes.


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU's, or on a CPU the process's, at their highest on any rank (collective)."""
    gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    peak = torch.tensor(peak, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)


def measured(lines: list[dict], device: torch.device, memory: int) -> dict:
    """The measured part of cost.json. Its time is that of the steps that count: start, sampling,
    saving and what a crash lost are left out."""
    seconds, ranks = sum(line.get("seconds") or 0 for line in lines), dist.get_world_size()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    spent = {"seconds": seconds, "devices": ranks, "device": name}
    return spent | {"device_hours": seconds * ranks / 3600, "peak_memory": memory}


def json_line(line: dict) -> str:
    bad = {k: None for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps(line | bad) + "\n"  # JSON has no nan


def full_weights(engine) -> dict[str, torch.Tensor]:
    """What was trained, by name: fp32 master weights on the CPU, gathered from all ranks, and for
    full fine-tuning the buffers. Collective, whatever the ZeRO stage; rank 0 has the result."""
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
def as_os_error() -> Iterator[None]:
    """Raise what safetensors raises on a full disk, an Exception, as the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error


@as_os_error()
def write_model(unet, weights: dict[str, torch.Tensor], title: str, target: Path):
    """A UNet in diffusers layout, or its adapters as LoRA files of that title."""
    if lora.attached(unet):
        lora.save(weights, unet, target, title)
    else:
        saving.save_unet(dict(unet.config), weights, target)
