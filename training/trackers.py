"""What TensorBoard, W&B, CSV files and Comet show of a run, through DeepSpeed's monitors.

    check(args.ds_config, config)        before weights are loaded
    set_variables(args.out, config)      before the engine, which starts the monitors
    trackers = Trackers(out, warn)
    trackers.resume(engine.monitor, step)
    trackers.note({"train/loss": 0.69}, step)      numbers, and paths of pictures
    trackers.flush()                               the end of a step

A step is written once, when all of it is there, also what was drawn after its checkpoint: a run
that is stopped while it draws resumes at this step and draws again. So a run that resumes at step s
writes s and all later steps again, and before that

    TensorBoard   is told to forget them, as by SummaryWriter's purge_step;
    CSV           loses their rows;
    W&B           forgets nothing: steps that it has are not sent again. Steps that it lacks are
                  sent from the folder. Offline it lacks all of them, since there each start writes
                  a file of its own; so the newest has the whole run;
    Comet         gets them again, in a new experiment unless "experiment_key" names one.

DeepSpeed's own numbers (Train/Samples/...) are off: they count pairs where ours count steps, and
W&B ignores a step that is lower than its last.
"""

import contextlib
import csv
import json
import os
import secrets
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.utils import (
    check_comet_availability,
    check_tb_availability,
    check_wandb_availability,
)
from PIL import Image
from pydantic import ValidationError

from system.files import UserError, read_json, read_log, replacing, warn_once, write
from system.hub import one_sentence, reason
from training import folder, preview

NAMES = "tensorboard", "wandb", "csv_monitor", "comet"  # of the blocks in a configuration
NEEDS = {
    "tensorboard": check_tb_availability,
    "wandb": check_wandb_availability,
    "comet": check_comet_availability,
}
FOLDERS = {"tensorboard": "tensorboard", "csv_monitor": "csv"}  # in the run's
SAMPLES = "samples"  # the name of the pictures
PATIENCE = 120  # seconds for W&B to answer

# -------------------------------------------------------------------------------------------------
# Before the run.


def check(file: str, config: dict):
    """Raises UserError for a monitor that DeepSpeed could not start: a wrong key or value, a
    library that is not there, W&B without a login. The last two are for rank 0 alone."""
    for name in NAMES:
        if not isinstance(config.get(name, {}), dict):
            raise UserError(
                f'--ds-config {file}: {name} must be an object, as {{"enabled": true}}.'
            )
    try:
        monitors = get_monitor_config(config)
    except ValidationError as error:
        flaw = error.errors()[0]
        place = ".".join(map(str, flaw["loc"]))
        hint = "; W&B's run name and id are WANDB_NAME and WANDB_RUN_ID" * place.startswith("wandb")
        raise UserError(f"--ds-config {file}: {place}: {flaw['msg']}{hint}.") from error
    if os.environ.get("RANK", "0") != "0":
        return
    for name, is_there in NEEDS.items():
        if getattr(monitors, name).enabled:
            with contextlib.redirect_stdout(None):  # what the exception says, too
                sentence = f"--ds-config {file}: {name} is enabled, and cannot be imported"
                one_sentence(is_there, sentence)
    if monitors.wandb.enabled:
        check_login(file)


def check_login(file: str):
    """Raises UserError where W&B would ask for a key, or not take the one it has.

    W&B itself says so, in a process that cannot ask: it looks for keys in many places."""
    command = [sys.executable, "-c", "import wandb; wandb.login(verify=True)"]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    options |= {"env": os.environ | {"WANDB_SILENT": "true"}, "timeout": PATIENCE}
    try:
        tried = subprocess.run(command, **options)
        if tried.returncode == 0:
            return
        *_, last = tried.stderr.strip().splitlines() or ["no reason given"]
    except subprocess.TimeoutExpired:
        last = f"no answer within {PATIENCE} s"
    why = last.partition("Error: ")[2] or last
    raise UserError(
        f"--ds-config {file}: wandb is enabled, but W&B refuses ({why.rstrip('.')}); log in with "
        "`wandb login`, or set WANDB_MODE=offline, and send the run with `wandb sync`."
    )


def set_variables(out: Path, config: dict):
    """W&B's variables, which DeepSpeed leaves alone: what the user has set stays. The id is made
    once, and kept in wandb.json of the run's folder. Rank 0; raises UserError, OSError."""
    if not get_monitor_config(config).wandb.enabled:
        return
    file, recorded = out / "wandb.json", None
    if file.exists():
        try:
            recorded = read_json(file).get("run_id")
        except UserError as error:
            warn_once(f"{error} W&B shows the rest as another run.")
    run_id = os.environ.get("WANDB_RUN_ID") or recorded or secrets.token_hex(4)
    if run_id != recorded:
        write(file, json.dumps({"run_id": run_id}) + "\n")
    out, variables = out.absolute(), {"RUN_ID": run_id, "RESUME": "allow"}
    for name, value in (variables | {"NAME": out.name, "DIR": str(out)}).items():
        os.environ.setdefault(f"WANDB_{name}", value)


@contextlib.contextmanager
def starting(file: str) -> Iterator[None]:
    """Where the engine starts: what W&B or Comet raise, as of a wrong team, is a UserError."""
    try:
        yield
    except Exception as error:
        library = type(error).__module__.split(".")[0]
        if library not in ("wandb", "comet_ml"):
            raise
        words = reason(error)
        raise UserError(f"--ds-config {file}: {library} could not start ({words}).") from error


# -------------------------------------------------------------------------------------------------
# While it runs.

Row = dict[str, float | Path]  # what is shown of a step: numbers, and pictures


def named(line: dict) -> Row:
    """A line of metrics.jsonl, under the names that trackers show."""
    held, values = "held_out_", {k: v for k, v in line.items() if k != "step" and v is not None}
    return {
        f"held_out/{k.removeprefix(held)}" if k.startswith(held) else f"train/{k}": v
        for k, v in values.items()
    }


def judged(scores: dict) -> Row:
    """A line of scores.jsonl, likewise."""
    shown = {f"judge/{key}": scores.get(key) for key in ("mean", "start", "win_rate")}
    return {name: value for name, value in shown.items() if value is not None}


def recorded(out: Path, until: int) -> dict[int, Row]:
    """What the run's folder has of the steps up to `until`, by step."""
    rows = defaultdict(dict)
    for line in folder.read_metrics(out, until=until):
        rows[line["step"]] |= named(line)
    for line in read_log(out / "scores.jsonl", preview.is_score):
        rows[line["step"]] |= judged(line)
    for path in (out / "samples").glob("step_*.png"):
        rows[int(path.stem[5:])][SAMPLES] = path
    return {step: rows[step] for step in sorted(rows) if step <= until}


class Monitor:
    """One of DeepSpeed's monitors, as it is: Comet's."""

    def __init__(self, monitor):
        self.monitor = monitor

    def resume(self, start: int, rows: dict[int, Row]):
        """Steps from `start` on come again; rows: what the folder has of those before."""

    def write(self, step: int, row: Row):
        numbers = [(k, v, step) for k, v in row.items() if not isinstance(v, Path)]
        self.monitor.write_events(numbers)


class TensorBoard(Monitor):
    def resume(self, start: int, rows: dict[int, Row]):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        begin = SessionLog(status=SessionLog.START)  # readers drop older events from this step on
        self.monitor.summary_writer.file_writer.add_event(Event(step=start, session_log=begin))

    def write(self, step: int, row: Row):
        for name, path in row.items():
            if isinstance(path, Path):
                pixels = np.asarray(Image.open(path).convert("RGB"))
                self.monitor.summary_writer.add_image(name, pixels, step, dataformats="HWC")
        super().write(step, row)  # which flushes


class CSV(Monitor):
    def resume(self, start: int, rows: dict[int, Row]):
        """Each file has the header that its first writer gave it, and no row from `start` on."""
        for path in Path(self.monitor.log_dir).glob("*.csv"):
            with path.open(newline="", errors="replace") as file:
                head, *lines = list(csv.reader(file)) or [[]]
            kept = [line for line in lines if line and line[0].isdigit() and int(line[0]) < start]
            if not kept:
                path.unlink()
                continue
            with replacing(path) as scratch, scratch.open("w", newline="") as file:
                csv.writer(file).writerows([head, *kept])
            self.monitor.filenames.append(path.stem)  # or DeepSpeed would write a second header


class WandB(Monitor):
    def resume(self, start: int, rows: dict[int, Row]):
        for step in [step for step in rows if step < start]:
            self.write(step, rows[step])

    def write(self, step: int, row: Row):
        import wandb

        if step >= wandb.run.step:  # W&B would drop a lower one, with a warning
            shown = {k: wandb.Image(str(v)) if isinstance(v, Path) else v for k, v in row.items()}
            self.monitor.log(shown, step=step, commit=True)


KINDS = {
    "tb_monitor": TensorBoard,
    "wandb_monitor": WandB,
    "csv_monitor": CSV,
    "comet_monitor": Monitor,
}


class Trackers:
    """What rank 0 notes of a step, and where it is shown; other ranks have nothing to note.

    warn: prints a line. A tracker that fails is off from then on."""

    def __init__(self, out: Path, warn: Callable[[str], None]):
        self.out, self.warn = out, warn
        self.monitors, self.step, self.row = [], 0, {}

    def resume(self, monitor, start: int):
        """monitor: of the engine, DeepSpeed's MonitorMaster. What the folder has of step `start`
        is noted again."""
        monitor.enabled = False  # of DeepSpeed's own numbers alone
        there = {name: getattr(monitor, name) for name in KINDS}
        self.monitors = [KINDS[name](one) for name, one in there.items() if one is not None]
        rows = recorded(self.out, start)
        self.each(lambda one: one.resume(start, rows))
        self.step, self.row = start, rows.get(start, {})

    def note(self, values: Row, step: int):
        if step != self.step:
            self.flush()
        self.step = step
        self.row |= values

    def flush(self):
        """Show what was noted."""
        step, row = self.step, self.row
        if row:
            self.each(lambda one: one.write(step, row))
        self.row = {}

    def each(self, action: Callable[[Monitor], None]):
        for one in list(self.monitors):
            try:
                action(one)
            except Exception as error:  # of libraries, disks and networks
                self.monitors.remove(one)
                self.warn(
                    f"Warning: {type(one.monitor).__name__} failed ({reason(error)}) and is off "
                    "now; metrics.jsonl has all values."
                )
