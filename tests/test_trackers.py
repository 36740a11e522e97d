"""Laws of trackers.py: one run, each step once, every picture, before and after a resume."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import launch
import pytest
from conftest import metrics, refusal, refuse
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.monitor import MonitorMaster
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

import train_inpo
from training import plan, trackers

ALL = {name: {"enabled": True} for name in ("tensorboard", "csv_monitor", "wandb")}

# -------------------------------------------------------------------------------------------------
# Before the run.


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    """No key of W&B in the environment, and none in the home folder."""
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))


def test_wandb_without_a_login_is_refused_before_weights_unless_it_is_offline(
    no_login, argv, ds_config, monkeypatch, capsys
):
    config = ds_config(wandb={"enabled": True})
    monkeypatch.setattr(train_inpo, "train", None)
    said = refuse(argv(ds_config=config), capsys)
    assert f"{config}: wandb is enabled, but W&B refuses (No API key configured. " in said
    assert said.endswith("WANDB_MODE=offline, and send the run with `wandb sync`.")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert "(WANDB_API_KEY invalid: " in refusal(trackers.check_login, "file.json")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check("file.json", {"wandb": {"enabled": True}})


def test_ranks_other_than_0_need_no_login(no_login, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    trackers.check("file.json", {"wandb": {"enabled": True}})


def test_wrong_keys_and_values_are_refused_by_name():
    wrong = {"wandb.name": {"wandb": {"enabled": True, "name": "mine"}}}
    wrong["csv_monitor.enabled"] = {"csv_monitor": {"enabled": "perhaps"}}
    for place, config in wrong.items():
        assert f"file.json: {place}: " in refusal(trackers.check, "file.json", config)
    assert "WANDB_NAME" in refusal(trackers.check, "file.json", wrong["wandb.name"])
    for name in trackers.NAMES:
        assert "must be an object" in refusal(trackers.check, "file.json", {name: True})


def test_what_a_library_says_at_the_start_is_a_sentence_and_other_errors_stay():
    class CommError(Exception):
        __module__ = "wandb.errors.errors"

    def fail(error: Exception):
        with trackers.starting("file.json"):
            raise error

    said = refusal(fail, CommError("entity ours not found\nand more"))
    assert said == "--ds-config file.json: wandb could not start (entity ours not found)."
    with pytest.raises(RuntimeError):
        fail(RuntimeError("of the engine"))


def test_the_plan_says_what_it_ignores(ds_config):
    assert not list(plan.ignored(ds_config()))
    place = {"output_path": "logs", "job_name": "mine"}
    config = ds_config(scheduler={"type": "WarmupLR"}, csv_monitor=place, train_batch_size=8)
    said = list(plan.ignored(config))
    keys = "scheduler", "train_batch_size", "csv_monitor.output_path", "csv_monitor.job_name"
    assert [sentence.split(" of ")[0] for sentence in said] == list(keys)
    assert (
        said[0]
        == f"scheduler of --ds-config {config} is ignored: it follows from --lr and --warmup."
    )


def test_the_id_is_the_folders_and_the_users_own_variables_win(tmp_path, monkeypatch):
    config = {"wandb": {"enabled": True}}

    def variables(name: str) -> dict[str, str]:
        (tmp_path / name).mkdir(exist_ok=True)
        for key in [key for key in os.environ if key.startswith("WANDB_")]:
            del os.environ[key]
        os.environ.update(given)
        trackers.set_variables(tmp_path / name, config)
        return {key[6:]: os.environ[key] for key in os.environ if key.startswith("WANDB_")}

    given = {}
    first, other = variables("one"), variables("two")
    assert first == {
        "NAME": "one", "RESUME": "allow", "DIR": str(tmp_path / "one"), "RUN_ID": first["RUN_ID"],
    }  # fmt: skip
    assert variables("one") == first and other["RUN_ID"] != first["RUN_ID"]
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert variables("moved")["RUN_ID"] == first["RUN_ID"]
    shutil.rmtree(tmp_path / "one")
    assert variables("one")["RUN_ID"] != first["RUN_ID"]  # another run at the same place
    given = {f"WANDB_{key}": "mine" for key in ("NAME", "RESUME", "DIR", "RUN_ID")}
    assert set(variables("one").values()) == {"mine"}
    given = {}
    assert variables("one")["RUN_ID"] == "mine"  # it is the folder's now
    config = {}
    assert variables("one") == {}


# -------------------------------------------------------------------------------------------------
# Steps and pictures.


def read_csv(file: Path) -> list[list[str]]:
    with file.open(newline="") as lines:
        return list(csv.reader(lines))


def start(out: Path, step: int) -> trackers.Trackers:
    """As a run that starts or resumes at this step, with DeepSpeed's own TensorBoard and CSV."""
    places = {"tensorboard": "tensorboard", "csv_monitor": "csv"}
    config = {
        name: {"enabled": True, "output_path": str(out), "job_name": place}
        for name, place in places.items()
    }
    said = []
    shown = trackers.Trackers(out, said.append)
    shown.resume(MonitorMaster(get_monitor_config(config)), step)
    shown.said = said
    return shown


def take(shown: trackers.Trackers, step: int, loss: float):
    """A step of a run, whose pictures are drawn where it is even."""
    if step:
        line = {"step": step, "loss": loss}
        with (shown.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown.note(trackers.named(line), step)
    if step % 2 == 0:
        picture = shown.out / "samples" / f"step_{step:06d}.png"
        Image.new("RGB", (8, 8), (step, 0, 0)).save(picture)
        shown.note({trackers.SAMPLES: picture}, step)
    shown.flush()


def test_steps_that_are_taken_again_take_the_place_of_those_of_the_kill(tmp_path):
    (tmp_path / "samples").mkdir()
    shown = start(tmp_path, 0)
    for step in range(8):  # killed after step 7
        take(shown, step, loss=step)
    (tmp_path / "csv" / "train_loss.csv").open("a").write("8,0.")  # ... while it wrote
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:4]))  # as the run drops the lines
    again = start(tmp_path, 4)
    assert again.row == {"train/loss": 4, "samples": tmp_path / "samples" / "step_000004.png"}
    again.flush()
    for step in range(5, 9):
        take(again, step, loss=10 * step)
    losses = [1, 2, 3, 4, 50, 60, 70, 80]
    assert read_csv(tmp_path / "csv" / "train_loss.csv") == [
        ["step", "loss"], *([str(n), str(loss)] for n, loss in enumerate(losses, start=1))
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard"), {IMAGES: 0}).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == list(enumerate(losses, start=1))
    assert [event.step for event in events.Images("samples")] == [0, 2, 4, 6, 8]
    assert not shown.said + again.said


def test_wandb_gets_what_it_lacks_and_nothing_twice(tmp_path, monkeypatch):
    """run.step: W&B's next. Online it has the steps of before the kill, offline none."""
    (tmp_path / "samples").mkdir()
    lines = [{"step": step, "loss": step / 10} for step in range(1, 6)]
    lines += [{"step": 4, "held_out_loss": 9.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = {"step": 2, "scorer": "clip", "mean": 1.5, "start": 1.0, "win_rate": 0.5}
    (tmp_path / "scores.jsonl").write_text(json.dumps(score) + "\n")
    for step in (0, 2, 4, 6):
        Image.new("RGB", (8, 8)).save(tmp_path / "samples" / f"step_{step:06d}.png")

    def resumed(at: int) -> dict[int, dict]:
        run, sent = SimpleNamespace(step=at), {}

        def log(row: dict, step: int, commit: bool):
            assert commit and step >= run.step
            sent[step], run.step = row, step + 1

        fake = SimpleNamespace(run=run, Image=lambda path: Path(path).name)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        monitors = dict.fromkeys(trackers.KINDS) | {"wandb_monitor": SimpleNamespace(log=log)}
        shown = trackers.Trackers(tmp_path, pytest.fail)
        shown.resume(SimpleNamespace(**monitors), 5)
        for step in (6, 7):
            shown.note({"train/loss": step / 10}, step)
        shown.flush()
        return sent

    offline = resumed(at=0)
    assert [*offline] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [row.get("train/loss") for row in offline.values()] == [
        None, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7,
    ]  # fmt: skip
    pictures = {step: row["samples"] for step, row in offline.items() if "samples" in row}
    assert pictures == {step: f"step_{step:06d}.png" for step in (0, 2, 4)}
    assert offline[2]["judge/mean"] == 1.5 and offline[4]["held_out/loss"] == 9
    assert [*resumed(at=7)] == [7] and [*resumed(at=5)] == [5, 6, 7] and [*resumed(at=3)][0] == 3


def test_a_tracker_that_fails_is_off_and_the_others_go_on(tmp_path):
    shown = start(tmp_path, 0)
    (board, table) = shown.monitors
    table.monitor.log_dir = str(tmp_path / "nowhere")
    for step in (1, 2):
        shown.note({"train/loss": 0.7}, step)
        shown.flush()
    assert shown.monitors == [board] and len(shown.said) == 1
    assert "csvMonitor failed (" in shown.said[0] and "is off now" in shown.said[0]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def test_zero3_starts_its_monitors_once_and_deepspeeds_own_numbers_are_off(
    argv, ds_config, tmp_path, monkeypatch
):
    started, make = [], csvMonitor.__init__
    monkeypatch.setattr(
        csvMonitor, "__init__", lambda self, config: started.append(config) or make(self, config)
    )
    config = ds_config(stage=3, csv_monitor={"enabled": True, "job_name": "mine"})
    train_inpo.main(argv(ds_config=config, steps=1))
    assert len(started) == 1
    names = {path.stem for path in (tmp_path / "run" / "csv").iterdir()}
    line = metrics(tmp_path / "run")[0]
    assert names == {f"train_{key}" for key in line if key != "step" and line[key] is not None}


# -------------------------------------------------------------------------------------------------
# A run that is killed and resumed, with all trackers.

DIES = """
import os, signal, sys
import train_inpo
from training import preview
from training.run import Run

preview.STEPS = 2
step, number, *argv = sys.argv[1:]
log, draw = Run.log, preview.Preview.draw
def log_and_die(run, engine, at):
    log(run, engine, at)
    if number == "9" and at + 1 == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
def draw_and_stop(self, pipeline, at, pause):
    if number == "15" and at == int(step):
        os.kill(os.getpid(), signal.SIGTERM)
    return draw(self, pipeline, at, pause)
Run.log, preview.Preview.draw = log_and_die, draw_and_stop
train_inpo.main(argv)
"""


def read_wandb(file: Path) -> tuple[set[str], dict[int, list[str]]]:
    """(ids, {step: names of its values}) of W&B's own records; pictures by their files."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store, ids, rows = DataStore(), set(), {}
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
        if record.WhichOneof("record_type") == "history":
            names = [item.key or "/".join(item.nested_key) for item in record.history.item]
            assert record.history.step.num not in rows
            rows[record.history.step.num] = names
    return ids, rows


@pytest.mark.slow
def test_a_run_that_was_killed_and_stopped_has_each_step_once_and_every_picture(
    command, ds_config, tmp_path
):
    """Killed after step 5, with a checkpoint of 3; stopped while it draws the pictures of 6."""
    pytest.importorskip("wandb")
    out = tmp_path / "run"
    config = ds_config(stage=3, **ALL)
    argv = command(out, ds_config=config, steps=8, checkpoint_every=3, sample_every=2)
    env = {"WANDB_MODE": "offline"}
    for how, code in ((["5", "9"], -9), (["6", "15"], 143), (["0", "0"], 0)):
        (rank,) = launch.start([*how, *argv], 1, DIES, **env)
        said = "".join(rank.communicate())
        assert rank.returncode == code, said[-3000:]
        assert said.count("Warning") <= said.count("Warning: one step of ")  # of random weights
        assert "Traceback" not in said
    lines, pictures = metrics(out), sorted((out / "samples").glob("step_*.png"))
    assert [line["step"] for line in lines] == [*range(1, 9)]
    drawn = [0, 2, 4, 6, 8]
    assert [int(path.stem[5:]) for path in pictures] == drawn

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={IMAGES: 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [*range(1, 9)]
    assert [event.step for event in events.Images("samples")] == drawn
    assert read_csv(out / "csv" / "train_loss.csv") == [
        ["step", "loss"],
        *([str(line["step"]), str(line["loss"])] for line in lines),
    ]
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 3
    (found,) = {tuple(read_wandb(file)[0]) for file in files} - {()}
    assert [*found] == [json.loads((out / "wandb.json").read_text())["run_id"]]
    _, rows = read_wandb(files[-1])
    assert [*rows] == [*range(9)]
    assert [step for step in rows if "train/loss" in rows[step]] == [*range(1, 9)]
    assert [step for step in rows if "samples/path" in rows[step]] == drawn
