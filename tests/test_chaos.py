"""Killed at random instants and started again, programs end with the files of undisturbed ones."""

import json
import subprocess
import time

import pytest

from lab import chaos
from lab.chaos import Program
from system.files import UserError
from training.folder import read_metrics

# In the place of a program: 150 steps, a line and a checkpoint each, resumed by its lines.
PROGRAM = """
import json, signal, sys, time
from pathlib import Path

flags, out = sys.argv[1:-1], Path(sys.argv[-1])
if "failing" in flags:
    sys.exit("no data")
if "stubborn" in flags and out.exists():
    sys.exit("another job is writing there")
(out / "checkpoints").mkdir(parents=True, exist_ok=True)
log, asked = out / "metrics.jsonl", []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
lines = log.read_text().split(chr(10))[:-1] if log.exists() else []
log.write_text("".join(line + chr(10) for line in lines))
first = len(lines)
if lines and "careless" in flags:
    first = first - 1  # this step is logged twice
for step in range(first, 150):
    if asked:
        sys.exit(143)
    partial = out / "checkpoints" / "step.partial"
    partial.mkdir(exist_ok=True)
    time.sleep(0.01)
    with open(log, "a") as file:
        file.write(json.dumps({"step": step + 1, "seconds": time.time()}) + chr(10))
    partial.rmdir()
for step in range(50):
    (out / "end.new").write_text("half")
    time.sleep(0.01)
(out / "end.new").rename(out / "end")
"""
MOMENTS = {"its start": "", "a step": "metrics.jsonl", "its end": "end.new"}


@pytest.fixture
def small(tmp_path):
    """small(flag) -> what four kills of the program above did."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*flags, kills=4):
        program = Program(lambda out: [tmp_path / "program.py", *flags, out], MOMENTS)
        return chaos.storm(program, tmp_path / "all", kills, span=0.02)

    return run


def test_a_program_is_killed_in_every_way_at_every_moment_and_started_again(small, tmp_path):
    done = small()
    assert {one["kind"] for one in done} == {
        f"{number.name}, {whom}" for number, whom in chaos.KINDS
    }
    assert [one["moment"] for one in done] == ["its start", "its start", "a step", "its end"]
    assert done[-1]["left"] == ["end.new"]
    for name in ("calm", "storm"):
        assert len(read_metrics(tmp_path / "all" / name)) == 150


@pytest.mark.parametrize(
    "flag, words",
    [("careless", "storm/metrics.jsonl differs from .*calm/metrics.jsonl, which nobody disturbed"),
     ("failing", r"the undisturbed one failed; see .*calm\.log"),
     ("stubborn", r"it failed by itself \(\[1\]\); see .*storm\.log")],
)  # fmt: skip
def test_a_program_that_differs_or_fails_is_told(flag, words, small):
    with pytest.raises(UserError, match=words):
        small(flag)


def test_the_comparison_sees_one_bit_and_what_is_left_but_no_time(tmp_path):
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    line = {"step": 1, "seconds": 1.25, "pairs_per_second": 3, "loss": 0.5}
    for out in (calm, storm):
        (out / "checkpoints" / "step_000001").mkdir(parents=True)
        (out / "checkpoints" / "step_000001" / "of.pt").write_text(out.name)
        (out / "weights").write_bytes(b"\0\1")
        (out / "README.md").write_text(f"--out {out}\n| seconds | {len(out.name)} |\n")
        line["seconds"] += 1e-9
        (out / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert chaos.difference(calm, storm) is None
    for name, wrong in {
        "weights": b"\0\0",
        "README.md": b"--out elsewhere",
        "metrics.jsonl": (json.dumps(line | {"step": 2}) + "\n").encode(),
        "unets.0a1b2c3d.new": b"half",
    }.items():
        kept = (storm / name).read_bytes() if (storm / name).exists() else None
        (storm / name).write_bytes(wrong)
        assert chaos.difference(calm, storm) == name
        (storm / name).unlink() if kept is None else (storm / name).write_bytes(kept)
    assert chaos.difference(calm, storm) is None


def test_a_process_that_does_not_end_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    code = "import subprocess, sys, time\nsubprocess.Popen(['sleep', '60'])\ntime.sleep(60)"
    child = chaos.start(Program(lambda out: ["-c", code], {}), tmp_path / "out")
    monkeypatch.setattr(chaos, "LATE", 0.5)
    with pytest.raises(UserError, match="a process was still there after 0.5 s"):
        chaos.wait(child, tmp_path / "out")
    end = time.monotonic() + 10
    while alive(child[0].pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child[0].pid)


def alive(group: int) -> bool:
    """Whether a process of that group lives."""
    states = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True).stdout
    return any(not state.startswith(b"Z") for state in states.split())


@pytest.mark.slow
def test_kills_of_a_real_run_and_its_export_change_nothing(argv, tmp_path, monkeypatch):
    flags = argv(out=None, steps=16, checkpoint_every=1, export_every=2)
    given = ["--programs", "train", "export", "--kills=5", "--out", str(tmp_path)]
    done = chaos.chaos(chaos.parse([*given, f"--flags={' '.join(flags)}"]))
    assert done.keys() == {"train", "export"} and len(done["train"]) >= 4
    assert done["export"]
    assert len(read_metrics(tmp_path / "train" / "calm")) == 16
