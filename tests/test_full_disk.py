"""Laws of a full disk: it costs lines of the log, and older checkpoints, but not the trained model.

test_preview.py and test_checkpoint.py have what a full disk costs on the way."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import distance, metrics, weights
from launch import start
from safetensors import SafetensorError

import train_inpo
from system import checkpoint
from training import run
from weights import saving

FULL = {
    "Python": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "a quota": lambda: OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "safetensors": lambda: SafetensorError("I/O error: No space left on device (os error 28)"),
    "tokenizers": lambda: OSError(errno.EIO, "No space left on device (os error 28)"),
}


def test_a_log_on_a_full_disk_ends_no_run(argv, tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open("/dev/full", "w", buffering=1))
    train_inpo.main(argv(steps=2, sample_every=1))
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "README.md").exists()


# -------------------------------------------------------------------------------------------------
# The end of a run.


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """A run of two steps, and a checkpoint of each."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train_inpo.main(command(out, steps=2, checkpoint_every=1))
    (out / "README.md").unlink()
    return out


@pytest.fixture
def full(trained, tmp_path, monkeypatch):
    """full(until, error) -> the folder of that run, whose pipeline can be written once until(tries)
    is true."""

    def make(until, error=FULL["Python"]):
        tries, save = [], saving.save_pipeline

        def refuse(*given):
            tries.append(given)
            if not until(len(tries)):
                raise error()
            save(*given)

        monkeypatch.setattr(saving, "save_pipeline", refuse)
        monkeypatch.setattr(run, "PAUSE", 0.01)
        return shutil.copytree(trained, tmp_path / "run")

    return make


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("kind", FULL)
def test_the_end_of_a_run_waits_for_room(kind, full, trained, argv, capsys):
    out = full(lambda tries: tries > 3, FULL[kind])
    train_inpo.main(argv(steps=2, checkpoint_every=1))
    said = capsys.readouterr()
    waits = [line for line in said.err.splitlines() if "waiting for room" in line]
    assert len(waits) == 2 and all("at most 30 more minute(s)" in line for line in waits)
    assert "Wrote the aligned model" in said.out and distance(weights(out), weights(trained)) == 0
    # The first thing that makes room is the checkpoint before the last one.
    assert f"{out / 'checkpoints' / 'step_000001'} is deleted to make room" in said.out
    assert checkpoints(out) == ["step_000002"]


def test_checkpoints_that_are_to_be_kept_make_no_room(full, argv):
    out = full(lambda tries: tries > 2)
    train_inpo.main(argv(steps=2, checkpoint_every=1, keep_every=1))
    assert checkpoints(out) == ["step_000001", "step_000002"]


def test_after_its_time_the_run_ends_with_a_sentence_and_a_checkpoint_of_the_model(
    full, trained, argv, monkeypatch, capsys
):
    out = full(lambda tries: False)
    shutil.rmtree(out / "checkpoints" / "step_000002")
    monkeypatch.setattr(run, "PATIENCE", 0.1)
    with pytest.raises(SystemExit) as stop:
        train_inpo.main(argv(steps=2))  # without --checkpoint-every
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    assert "No space left on device" in said and "resumes from the last checkpoint" in said
    assert "step_000002" in checkpoints(out)
    monkeypatch.undo()
    train_inpo.main(argv(steps=2))
    assert distance(weights(out), weights(trained)) == 0


def test_what_is_no_full_disk_is_not_waited_for(full, argv, capsys):
    out = full(lambda tries: False, lambda: PermissionError(13, "Permission denied"))
    with pytest.raises(SystemExit):
        train_inpo.main(argv(steps=2, checkpoint_every=1))
    assert "waiting" not in capsys.readouterr().err
    assert checkpoints(out) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_waiting_in_the_usual_way(number, full, argv, capsys):
    def until(tries: int) -> bool:
        if tries == 3:
            os.kill(os.getpid(), number)
        return False

    out = full(until)
    with pytest.raises(SystemExit) as stop:
        train_inpo.main(argv(steps=2, checkpoint_every=1))
    said = capsys.readouterr().out
    assert stop.value.code == 128 + number
    assert f"Stopped by {number.name} at step 2; the same command resumes from there." in said
    assert checkpoints(out) == ["step_000002"]


TOGETHER = """
import errno, json, os, signal, sys
import model, train_inpo
from training import run
from weights import saving

def refuse(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

saving.save_pipeline, run.PAUSE, wait = refuse, 0.2, run.Run.stop_if_asked
polls = []

def poll(self, engine, step):
    polls.append(step)
    if os.environ["RANK"] == "1" and polls[-3:] == [1, 1, 1]:
        os.kill(os.getpid(), signal.SIGTERM)
    wait(self, engine, step)

run.Run.stop_if_asked = poll
train_inpo.main(json.loads(sys.argv[1]))
"""


@pytest.mark.slow
def test_all_ranks_wait_and_leave_together_wherever_the_signal_comes(argv, tmp_path):
    command = json.dumps(argv(steps=1, checkpoint_every=1, micro_batch=1))
    pair = start([command], 2, TOGETHER)
    said = ["".join(rank.communicate(120)) for rank in pair]
    assert [rank.returncode for rank in pair] == [143, 143], said
    assert "waiting for room" in said[0] and "waiting for room" not in said[1]
    assert checkpoints(tmp_path / "run") == ["step_000001"]


# -------------------------------------------------------------------------------------------------
# Checkpoints. The disk has room for `size` bytes.


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """disk(size): what a checkpoint's files may take; those that are there take 100 each."""
    folder = tmp_path / "checkpoints"

    def taken() -> int:
        return 100 * len(checkpoint.complete(folder))

    def make(size: int, **steps: str):
        monkeypatch.setattr(checkpoint, "_flaw", lambda path: steps.get(path.name))
        monkeypatch.setattr(checkpoint, "_size", lambda path: 100)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - taken()))

        def write(engine, path, settings):
            if taken() + 100 > size:
                return f"{path}: No space left on device", True
            path.mkdir(parents=True)

        monkeypatch.setattr(checkpoint, "_write", write)
        return lambda step, **options: checkpoint.save(
            None, step, folder, {}, options.get("keep", 3), options.get("every", 0)
        )

    return make


def left(folder: Path) -> list[int]:
    return sorted(map(checkpoint.step_of, checkpoint.complete(folder / "checkpoints")))


def test_the_oldest_checkpoints_make_room_for_the_newest(disk, tmp_path, capsys):
    save = disk(300)
    for step in (1, 2, 3, 4):
        assert save(step) is None
    assert left(tmp_path) == [2, 3, 4] and capsys.readouterr().out.count("make room") == 1
    save = disk(100)  # another program has taken the rest
    assert "No space" in save(5) and left(tmp_path) == [2, 3, 4]  # deleting would not help


def test_the_newest_checkpoint_a_broken_ones_elder_and_every_nth_make_no_room(disk, tmp_path):
    save = disk(100)
    assert save(1) is None and "No space" in save(2) and left(tmp_path) == [1]
    save = disk(200)
    assert save(2) is None
    assert "No space" in disk(200, step_000002="it is broken")(3) and left(tmp_path) == [1, 2]
    assert "No space" in save(3, every=1) and left(tmp_path) == [1, 2]
    assert disk(200)(3) is None and left(tmp_path) == [2, 3]
