"""Laws of a run's folder: what is damaged is restored, skipped or one sentence."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import distance, metrics, refusal, refuse, weights
from test_files import DAMAGED

import train_inpo
from lab import measure
from system.lock import alone
from training import folder, preview
from training.folder import check_folder, finished, read_record

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def done(command, tmp_path_factory):
    """The folder of a finished run of two steps, which only the copies below may change."""
    out = tmp_path_factory.mktemp("done") / "run"
    train_inpo.main(command(out, steps=2, checkpoint_every=1, export_every=1))
    return out


@pytest.fixture
def again(done, tmp_path):
    return shutil.copytree(done, tmp_path / "run")


# -------------------------------------------------------------------------------------------------
# run.json.


def damage(file: Path, kind: str):
    file.unlink()
    if kind == "a folder":
        file.mkdir()
        (file / "thesis.txt").write_text("years of work")
    elif kind != "absent":
        file.write_bytes(DAMAGED.get(kind, kind.encode()))


KINDS = [*DAMAGED, "a folder", "absent", "{}", '{"model": "tiny", "ds_config": "x"}']
KINDS += ['{"model": "tiny", "ds_config": {"optimizer": 3}}', '{"model": [], "ds_config": {}}']


def test_a_run_of_before_the_log_sigma_path_goes_on_with_its_own():
    there = {"method": "inpo", "inversion_steps": 10}
    assert folder.differences(there, there | {"inversion_spacing": "uniform"}) == ""
    other = {"inversion_spacing": "log-sigma", "inversion_steps": 3}
    assert "inversion_spacing: uniform there, log-sigma now" in folder.differences(
        there, there | other
    )
    baseline = {"method": "dpo", "inversion_steps": None}
    assert folder.differences(baseline, baseline | {"inversion_spacing": None}) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_record_is_that_of_the_newest_checkpoint_that_has_one(kind, again, capsys):
    record = json.loads((again / "run.json").read_text())
    damage(again / "run.json", kind)
    (again / "checkpoints" / "step_000002" / "checkpoint.json").write_text("[]")
    found = read_record(again)
    assert folder.result_settings(found) == folder.result_settings(record)
    assert found["ds_config"]["gradient_clipping"] == record["ds_config"]["gradient_clipping"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "run.json cannot be read" in said and "step_000001" in said
    check_folder(again, record)
    assert "beta: 500.0 there, 1 now" in refusal(check_folder, again, record | {"beta": 1})
    shutil.rmtree(again / "checkpoints")
    assert ("something else" if kind == "absent" else "no checkpoint has its settings") in refusal(
        check_folder, again, record
    )


def test_a_run_with_every_file_of_its_own_damaged_ends_with_the_same_weights(
    argv, done, again, capsys
):
    (again / "README.md").unlink()
    damage(again / "run.json", "a folder")
    shutil.rmtree(again / "checkpoints" / "step_000002")
    first, _ = (again / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (again / "metrics.jsonl").write_bytes(b"\0\0\n\n" + first + b'[]\n{"loss": 1}\n\xff\n')
    for name in ("card.json", "cost.json", "best.json", "result.json", "scores.jsonl"):
        (again / name).write_bytes(b"\0\xff\n")
    train_inpo.main(argv(steps=2, checkpoint_every=1, export_every=1))
    said = capsys.readouterr()
    assert "at step 1 of 2" in said.out and "Traceback" not in said.err
    assert "5 of 6 lines are damaged and were skipped" in said.err
    assert "best.json cannot be read" in said.err
    assert distance(weights(again), weights(done)) == 0
    assert [line["step"] for line in metrics(again)] == [1, 2]
    assert json.loads((again / "run.json").read_text()) == json.loads(
        (done / "run.json").read_text()
    )
    kept = [path for path in again.iterdir() if (path / "thesis.txt").exists()]
    assert len(kept) == 1 and kept[0].name.startswith("run-20")  # nobody's work is deleted
    assert finished(again, 2)


def test_scores_are_added_where_lines_of_the_log_are_damaged(tmp_path, monkeypatch):
    log = tmp_path / "scores.jsonl"
    log.write_bytes(b'\0\n{"step": 1, "scorer": "x", "mean": 9.0}\n[]\n{"step": 0}\n')
    one = object.__new__(preview.Preview)
    one.out, one.name, one.prompts = tmp_path, "x", []
    monkeypatch.setattr(one, "score", lambda images: preview.np.array([len(images) + 1.0]))
    line, best = one.compare(2, ["a picture"])
    assert line["mean"] == 2 and not best  # the earlier 9 still counts
    assert [json.loads(text)["step"] for text in log.read_text().splitlines()] == [1, 2]


# -------------------------------------------------------------------------------------------------
# The result.


def test_the_list_has_every_file_of_the_result_and_readme_comes_after_it(done):
    listed = json.loads((done / "result.json").read_text())
    assert listed["step"] == 2
    ours = {"README.md", "result.json", "run.json", "card.json", "metrics.jsonl", ".lock"}
    runs = {"samples", "checkpoints", "unets", "tensorboard"}
    there = {
        str(path.relative_to(done)): path.stat().st_size
        for path in done.rglob("*")
        if path.is_file() and path.relative_to(done).parts[0] not in ours | runs
    }
    assert listed["files"] == there and UNET in there and "curves.png" in there
    times = [(done / name).stat().st_mtime_ns for name in ("result.json", "README.md")]
    assert times[0] <= times[1]


def test_a_result_that_is_not_whole_is_not_finished_and_the_same_command_writes_it_again(
    argv, done, again, capsys
):
    size = (again / UNET).stat().st_size
    os.truncate(again / UNET, 100)
    flags = {"steps": 2, "checkpoint_every": 1, "export_every": 1}
    train_inpo.main(argv(**flags))
    said = capsys.readouterr()
    assert f"{again / UNET} has 100 of {size} bytes; the result is written again" in said.err
    assert "has finished" not in said.out and distance(weights(again), weights(done)) == 0
    train_inpo.main(argv(**flags))
    assert "has finished its 2 steps" in capsys.readouterr().out
    shutil.rmtree(again / "checkpoints")
    os.truncate(again / UNET, 100)
    assert "no checkpoint to write the result again from" in refuse(argv(**flags), capsys)


@pytest.mark.parametrize(
    "name, content",
    [(UNET, None), ("cost.json", b""), ("curves.png", b"PNG"), ("tokenizer/vocab.json", None)]
    + [("result.json", content) for content in (b"", b"[]", b'{"step": 2}', b'{"files": {}}')]
    + [("result.json", b'{"step": "2", "files": {}}'), ("result.json", b"\xff")],
)
def test_each_file_that_is_missing_or_damaged_is_named(name, content, again, capsys):
    assert finished(again, 2) and finished(again, 1) and not finished(again, 3)
    (again / name).unlink()
    if content is not None:
        (again / name).write_bytes(content)
    assert not finished(again, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(again / name) in said and "of step 2" in said
    shutil.rmtree(again / "checkpoints")
    assert name in refusal(finished, again, 2)


def test_a_run_without_a_list_or_with_an_edited_card_has_finished_as_before(again):
    (again / "README.md").write_text("My model.")
    assert finished(again, 2)
    (again / "metrics.jsonl").write_text("\0\n")  # the list knows the step
    assert finished(again, 2)
    (again / "result.json").unlink()
    assert not finished(again, 2)
    (again / "metrics.jsonl").write_text('{"step": 2}\n')
    assert finished(again, 2) and not finished(again, 3)


# -------------------------------------------------------------------------------------------------
# Leftovers, exports and time.


def test_who_holds_the_lock_deletes_what_a_killed_job_left_in_the_folder(tmp_path):
    (tmp_path / "toy.png.0a1b2c3d.new").write_bytes(b"half")
    (tmp_path / "best.0a1b2c3d.new" / "unet").mkdir(parents=True)
    (tmp_path / "toy.png").write_bytes(b"whole")
    with alone(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "toy.png"}


def test_a_half_written_export_is_no_result_and_the_next_run_deletes_it(argv, again):
    for name in ("unets/step_000001.0a1b2c3d.new", "unets/step_000003.0a1b2c3d.new"):
        (again / name).mkdir()
        (again / name / "config.json").write_text("{")
    assert measure.exports(again).keys() == {"1", "2"}
    (again / "unets" / "step_000002" / "config.json").write_text("{")  # of an older release
    (again / "README.md").unlink()
    train_inpo.main(argv(steps=2, checkpoint_every=1, export_every=1))
    assert [path.name for path in sorted(again.glob("unets/*"))] == ["step_000001", "step_000002"]
    assert json.loads((again / "unets/step_000002/config.json").read_text())


def test_a_wall_clock_that_stands_still_or_steps_back_changes_no_duration(
    argv, tmp_path, monkeypatch
):
    clock = iter(range(10**9, 0, -3600))
    for name, now in {"still": lambda: 1e9, "back": lambda: float(next(clock))}.items():
        monkeypatch.setattr(time, "time", now)
        train_inpo.main(argv(steps=1, out=tmp_path / name))
        (line,) = metrics(tmp_path / name)
        assert 0 < line["seconds"] < 600 and line["pairs_per_second"] > 0
        cost = json.loads((tmp_path / name / "cost.json").read_text())
        assert 0 < cost["device_hours"] < 1
