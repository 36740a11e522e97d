"""Laws of lab/real.py: what it expects, what it checks first, what it resumes, what it sends."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import png, refusal
from PIL import Image

from lab import architectures, expected, machine, real, sending, taking
from system import hub
from system.files import ROOT, UserError
from training.folder import read_metrics

LOG2 = math.log(2)
GPU = {
    "device": "NVIDIA Some", "memory": 48 * 2**30, "free": 47 * 2**30, "driver": "570.1",
    "cuda": "13.0", "bf16": True, "rate": 200e12, "packages": {"torch": "2.13.0"}, "cores": 8,
}  # fmt: skip


def line(step: int, **other) -> dict:
    usual = {
        "step": step, "loss": LOG2 if step == 1 else 0.68, "grad_norm": 0.1, "skipped_steps": 0,
        "implicit_accuracy": 0.5 if step == 1 else 0.6, "err_winner": 0.1, "err_loser": 0.2,
        "err_ref_winner": 0.1, "err_ref_loser": 0.2, "waiting": 0.01, "seconds": 18.0,
        "pairs_per_second": 0.55, "margin": 0.02,
    }  # fmt: skip
    return usual | other


def facts(lines: list[dict] | None = None, **other) -> dict:
    """Of a run on a GPU in which nothing is odd."""
    win = {"scorer": "pickscore", "n": 50, "rate": 0.6, "low": 0.45, "high": 0.73, "ties": 0}
    usual = {
        "lines": [line(n) for n in range(1, 51)] if lines is None else lines, "toy": False,
        "architecture": "sdxl", "batch": 10, "beta": 5000.0, "memory": 10 * 2**30,
        "flops": 50 * 720e12, "all_flops": 60e15, "steps": 50, "machine": GPU, "win_rates": [win],
        "cost": {"peak_memory": 10.5 * 2**30}, "pictures": {"drawn": 100, "flat": 0, "same": 0},
        "seconds": {"training": 900.0, "pictures": 600.0},
    }  # fmt: skip
    return usual | other


# -------------------------------------------------------------------------------------------------
# What is expected.


def test_a_run_in_which_nothing_is_odd_is_inside_every_range():
    rows = expected.judge(facts())
    assert len(rows) == 14 and all(row.inside for row in rows), expected.outside(rows)


def every(**other) -> list[dict]:
    return [line(n, **other) for n in range(1, 51)]


NAN = None  # in metrics.jsonl
ODD = {
    "Loss of the first step": (facts(every(loss=0.70)), "before anything was learnt"),
    "Loss, second half": (facts([line(1), *every(loss=0.75)[1:]]), "without learning"),
    "Implicit accuracy, second half": (
        facts(every(loss=LOG2, implicit_accuracy=0.40)), "the right way round"),
    "Steps without a finite loss or gradient": (
        facts([*every()[:40], line(41, grad_norm=NAN), *every()[41:]]), "overflows"),
    "Steps skipped": (facts(every(skipped_steps=3)), "overflows"),
    "Reference's error of the winners": (
        facts(every(err_ref_winner=1.3, err_winner=1.3)), "worse than nothing"),
    "Both errors over the reference's, second half": (
        facts(every(err_winner=0.13, err_loser=0.25)), "falls apart"),
    "Share of a step that waits for pictures": (facts(every(waiting=0.4)), "too slow"),
    "Peak GPU memory, GiB": (
        facts(cost={"peak_memory": 13 * 2**30}), "the memory is 30% over the plan; please send"),
    "Seconds of a step, median": (facts(every(seconds=60.0)), "the step runs at 6.0% of"),
    "Minutes of training and pictures": (
        facts(seconds={"training": 3600.0, "pictures": 60.0}), "longer than it should"),
    "Pictures of one colour": (
        facts(pictures={"drawn": 100, "flat": 50, "same": 0}), "VAE overflows"),
    "Pictures that are the same before and after": (
        facts(pictures={"drawn": 100, "flat": 0, "same": 50}), "does not reach"),
    "Win rate by PickScore over the start": (
        facts(win_rates=[{"scorer": "pickscore", "n": 50, "rate": 0.3}]), "become worse"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_each_fault_is_outside_its_own_range_alone_and_is_said_in_words(what):
    found, words = ODD[what]
    wrong = expected.outside(expected.judge(found))
    assert [row.what for row in wrong] == [what]
    assert words in wrong[0].words() and wrong[0].words().endswith("please send this report.")
    assert wrong[0].verdict() == "NO"


def test_ranges_stand_where_arithmetic_puts_them():
    rows = {row.what: row for row in expected.judge(facts())}
    loss, accuracy = rows["Loss of the first step"], rows["Implicit accuracy, second half"]
    assert (loss.low + loss.high) / 2 == pytest.approx(LOG2)
    # 25 steps of 10 pairs: 1.96 sqrt(p (1 - p) / 250) around 0.5 and PickScore's 0.705
    assert accuracy.low == pytest.approx(0.5 - 0.0620, abs=1e-4)
    assert accuracy.high == pytest.approx(0.705 + 0.0565, abs=1e-4)
    memory, step = rows["Peak GPU memory, GiB"], rows["Seconds of a step, median"]
    assert (memory.low, memory.high) == (7.5, 12.5)
    # 720 TFLOP a step, at 60 % and 10 % of 200 TFLOP/s
    assert (step.low, step.high) == (pytest.approx(6.0), pytest.approx(36.0))
    # 60 PFLOP at 20 % of 20 TFLOP/s are 250 min
    assert rows["Minutes of training and pictures"].high == 60
    slow = expected.judge(facts(machine=GPU | {"rate": 20e12}))
    assert next(row for row in slow if "Minutes" in row.what).high == pytest.approx(375)
    rate = rows["Win rate by PickScore over the start"]
    # 50 pictures know 50 % to 13.9 points, and the published 79.25 % to 11.2
    assert rate.low == pytest.approx(0.361, abs=1e-3) and rate.high == pytest.approx(
        0.905, abs=1e-3
    )
    page = (ROOT / "docs" / "real.md").read_text()
    assert all(f"| {row.range()} |" in page for row in expected.judge(facts())[:3])
    toy = expected.judge(facts(toy=True))
    assert next(row for row in toy if "Implicit" in row.what).high == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_in_no_range(bad):
    assert expected.Row("x", 0, 1, bad, "{:.3f}", "").inside is False


def test_what_was_not_measured_is_not_judged():
    cpu = facts(machine={"device": "CPU"}, memory=None, win_rates=[], pictures={})
    unknown = [row for row in expected.judge(cpu) if row.inside is None]
    assert len(unknown) == 5 and all("nan" not in row.range() for row in unknown)
    nothing = expected.judge(facts([], cost={}, win_rates=[], pictures={}, seconds={}))
    assert not expected.outside(nothing)
    nan = [line(1), *every(loss=NAN, implicit_accuracy=NAN)[1:]]
    assert {"Loss, second half", "Implicit accuracy, second half"} <= {
        row.what for row in expected.outside(expected.judge(facts(nan)))
    }


# -------------------------------------------------------------------------------------------------
# What is sent.


@pytest.fixture
def somebody(monkeypatch):
    monkeypatch.setenv("USER", "mallory")
    monkeypatch.setenv("HOME", "/home/mallory")
    monkeypatch.setattr("socket.gethostname", lambda: "node17.secret.example")
    return ["mallory", "node17", "secret", "/home", "hf_ABCDEFGHIJKL", "acme", "C:\\Users"]


def test_a_text_loses_what_names_its_user_and_keeps_the_rest(somebody):
    text = (
        "evaluate.py failed: /home/mallory/acme/x.parquet and ~/acme/y, ../acme/z.png on "
        "node17.secret.example by mallory with hf_ABCDEFGHIJKL, C:\\Users\\mallory\\acme; mine/acme"
    )
    said = sending.nameless(text, ["mine/acme"])
    assert not [word for word in somebody if word in said], said
    kept = "see docs/memory.md, training/budget.py, stabilityai/stable-diffusion-xl-base-1.0, "
    kept += "https://huggingface.co/a/b/c, 790 TFLOP/s, 10 / 20, malloryish, determined"
    assert sending.nameless(kept, ["mine"]) == kept


def test_names_of_the_users_own_are_not_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("acme").mkdir()
    Path("acme.txt").touch()
    given = {"model": "acme", "data": "owner/pairs", "prompts": "acme.txt"}
    given |= {"scorers": ["pickscore", "acme/judge.py:f"]}
    told, secret = sending.settings(given)
    assert secret == ["acme", "acme.txt", "acme/judge.py"] and "acme" not in str(told)
    assert told["data"] == "owner/pairs" and told["scorers"].startswith("pickscore, ")
    given = {"model": "tiny", "data": "toy", "prompts": "parti=acme", "scorers": ["clip"]}
    told, secret = sending.settings(given)
    assert told["prompts"] == "parti" and secret == ["acme"] and told["model"] == "tiny"


def packed(out: Path) -> dict[str, str]:
    """The texts of report.zip."""
    with zipfile.ZipFile(out / "report.zip") as file:
        assert file.testzip() is None
        return {
            name: file.read(name).decode() for name in file.namelist() if not name.endswith(".png")
        }


def test_the_report_has_the_table_and_says_that_it_was_never_run(tmp_path, somebody):
    found = facts(cost={"peak_memory": 13 * 2**30})
    rows = expected.judge(found)
    about = {"failed": "", "settings": {"model": "sdxl"}, "machine": GPU, "scores": []}
    about |= {key: found[key] for key in ("seconds", "win_rates", "cost")}
    about["note"] = "/home/mallory/acme"
    (tmp_path / "a.png").write_bytes(png((1, 2, 3)))
    pictures = {"curves.png": tmp_path / "a.png", "samples.png": tmp_path / "no.png"}
    sending.pack(tmp_path, about, rows, found["lines"], pictures, [])
    texts = packed(tmp_path)
    assert not [word for word in somebody for text in texts.values() if word in text]
    text = texts["report.md"]
    assert "not yet been run on SDXL or SD1.5" in text
    assert "1 of 14 values are outside" in text and "30% over the plan" in text
    assert text.count("| NO |") == 1 and text.count("| yes |") == 13
    assert all(f"| {row.what} | {row.range()} |" in text for row in rows)
    assert "NVIDIA Some" in text and "570.1" in text and "![curves.png]" in text
    assert "samples.png" not in text and "60.0% [45.0%, 73.0%]" in text
    assert len(json.loads(texts["report.json"])["rows"]) == 14
    assert len(texts["metrics.jsonl"].splitlines()) == 50


# -------------------------------------------------------------------------------------------------
# What is checked first.


@pytest.fixture
def asked(tmp_path, pairs):
    """asked(flag, ...) -> the arguments of a test on the tiny model and 24 pairs."""

    def parse(*flags):
        usual = "--model tiny --pairs 12 --steps 3 --limit 4".split()
        return real.parse([*usual, "--data", str(pairs), "--out", str(tmp_path / "out"), *flags])

    return parse


def test_a_gpu_that_cannot_do_it_is_refused(asked):
    args = asked("--model", "sdxl")
    taking.check_gpu(args, GPU, True)
    taking.check_gpu(args, {"device": "CPU"}, False)
    assert "--model tiny" in refusal(taking.check_gpu, args, {"device": "CPU"}, True)
    assert "no bf16" in refusal(taking.check_gpu, args, GPU | {"bf16": False}, True)
    taking.check_memory(GPU, 46 * 2**30)
    assert "47.0 GiB free" in refusal(taking.check_memory, GPU, 48 * 2**30)


def test_a_disk_that_is_too_small_is_refused(asked, monkeypatch):
    free = SimpleNamespace(free=3 * 10**9)
    monkeypatch.setattr(taking.shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr(taking, "missing", lambda _: 10**9)
    taking.check_room(asked(), 100, True)
    monkeypatch.setattr(taking, "missing", lambda _: 14 * 10**9)
    assert "make room" in refusal(taking.check_room, asked(), 100, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data nowhere.parquet", "no file or folder of that name"),
        ("--data owner/pairs", "the hub cannot be reached"),
        ("--model owner/model", "the hub cannot be reached"),
        ("--prompts parti", "the hub cannot be reached"),
        ("--scorers pickscore", "the hub cannot be reached"),
        ("--scorers preference --prompts {tmp}/p.txt", "scorer preference"),
        ("--pairs 200 --steps 100", "fewer than --steps"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_trained(
    flags, words, asked, tmp_path, monkeypatch, capsys
):
    (tmp_path / "p.txt").write_text("a house\n")
    monkeypatch.setattr(taking, "about_machine", lambda: {"device": "CPU"})
    monkeypatch.setattr(real, "run", lambda *_: pytest.fail("a program was started"))
    with pytest.raises(SystemExit) as stop:
        real.main(vars_of(asked(*flags.format(tmp=tmp_path).split())))
    said = [one for one in capsys.readouterr().err.splitlines() if "error: " in one]
    assert stop.value.code == 2 and len(said) == 1 and words in said[0]


def vars_of(args) -> list[str]:
    """The flags again."""
    words = []
    for key, value in vars(args).items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            words += [f"--{key.replace('_', '-')}", *([] if value is True else map(str, values))]
    return words


def test_wrong_numbers_are_refused_at_once(asked, capsys):
    for flags in (["--steps", "0"], ["--limit", "0"], ["--pairs", "10", "--steps", "11"]):
        with pytest.raises(SystemExit):
            asked(*flags)
    assert capsys.readouterr().err.count("must be at least") == 3


def test_this_machine_is_described_without_its_name():
    found = machine.about()
    assert found["device"] == "CPU" and found["packages"]["torch"].startswith("2.")
    assert os.uname().nodename not in json.dumps(found)


def test_what_is_downloaded_is_counted_first_and_is_what_the_programs_read(asked, monkeypatch):
    """Files like those of stabilityai/stable-diffusion-xl-base-1.0."""
    there = {
        "model_index.json": 609, "sd_xl_base_1.0.safetensors": 6_940_000_000,
        "scheduler/scheduler_config.json": 479, "tokenizer/merges.txt": 525_000,
        "unet/config.json": 1680, "unet/diffusion_pytorch_model.safetensors": 10_300_000_000,
        "unet/diffusion_pytorch_model.fp16.safetensors": 5_140_000_000, "unet/model.onnx": 7_000,
        "vae/diffusion_pytorch_model.safetensors": 335_000_000,
        "vae_1_0/diffusion_pytorch_model.safetensors": 335_000_000,
        "text_encoder/model.safetensors": 492_000_000,
        "text_encoder_2/model.safetensors": 2_780_000_000,
    }  # fmt: skip
    got = []

    def snapshot(repository, allow_patterns, dry_run=False):
        got.append((repository, dry_run))
        files = there if "sdxl" not in repository and "Pick" not in repository else {}
        files = [*huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns)]
        cached = "text_encoder/model.safetensors"
        return [SimpleNamespace(file_size=there[f], will_download=f != cached) for f in files]

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(taking.huggingface_hub, "snapshot_download", snapshot)
    args = asked("--model", "sdxl", "--scorers", "pickscore", "--data", "owner/pairs")
    weights = 10_300_000_000 + 335_000_000 + 2_780_000_000
    assert taking.missing(args) - taking.FILE == weights + 609 + 479 + 525_000 + 1680
    taking.load_weights(args)
    repositories = [hub.PRESETS["sdxl"], "madebyollin/sdxl-vae-fp16-fix", taking.scorers.PICKSCORE]
    assert got == [(one, dry) for dry in (True, False) for one in repositories]


# -------------------------------------------------------------------------------------------------
# The pairs.


def taken(args) -> list[dict]:
    return pq.read_table(args.out / "pairs.parquet").to_pylist()


def test_pairs_are_spread_over_the_source_whole_and_as_many_as_the_steps_divide(asked, pairs):
    args = asked("--pairs", "11", "--steps", "3")
    assert taking.take(args) == 9
    there, found = pq.read_table(pairs).to_pylist(), taken(args)
    at = [there.index(pair) for pair in found]
    assert at == sorted(at) and at[0] == 0 and at[-1] == 23 and max(np.diff(at)) <= 4


def test_ties_and_broken_pairs_are_left_out_and_others_take_their_places(asked, pairs, tmp_path):
    rows = pq.read_table(pairs).to_pylist()
    rows[0]["label_0"] = rows[5]["label_0"] = 0.5
    rows[1]["jpg_0"] = rows[23]["jpg_1"] = b"no picture"
    odd = tmp_path / "odd.parquet"
    pq.write_table(pa.Table.from_pylist(rows), odd)
    args = asked("--data", str(odd), "--pairs", "20", "--steps", "5")
    assert taking.take(args) == 20
    whole = [row for n, row in enumerate(rows) if n not in (0, 1, 5, 23)]
    assert taken(args) == whole


def test_pairs_are_written_once(asked):
    args = asked()
    taking.take(args)
    before = (args.out / "pairs.parquet").stat().st_mtime_ns
    assert taking.take(args) == 12
    assert (args.out / "pairs.parquet").stat().st_mtime_ns == before


def test_of_a_large_folder_one_file_is_read(asked, pairs, tmp_path):
    table, folder = pq.read_table(pairs), tmp_path / "large"
    folder.mkdir()
    for n in (1, 2):
        pq.write_table(table, folder / f"train-0000{n}-of-00645-abc.parquet")
    pq.write_table(table, folder / "test-00000-of-00001.parquet")
    args = asked("--data", str(folder), "--pairs", "12")
    assert taking.source_of(args) == (str(folder / "train-00001-of-00645-abc.parquet"), taking.KEPT)
    args = asked("--data", str(folder), "--pairs", "20")
    assert taking.source_of(args) == (str(folder), taking.KEPT)


@pytest.mark.parametrize(
    "style", ["data/{}-0000{}-of-00645-abc.parquet", "default/{}/000{}.parquet"]
)
def test_of_a_set_on_the_hub_one_file_of_train_is_downloaded(style, asked, pairs, monkeypatch):
    names = [style.format(split, n) for split in ("test", "validation", "train") for n in (2, 0, 1)]
    got = []

    def get(repository, what, *files, repo_type, instead):
        got.append((repository, files, repo_type))
        return Path(pairs), files[0]

    api = SimpleNamespace(list_repo_files=lambda repository, repo_type: [*names, "README.md"])
    monkeypatch.setattr(taking.huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(hub, "check_pairs", lambda _: None)
    monkeypatch.setattr(hub, "download", get)
    args = asked("--data", "owner/large")
    assert taking.take(args) == 12
    assert got == [("owner/large", (style.format("train", 0),), "dataset")]
    names.clear()
    assert "no parquet file" in refusal(taking.first_file, "owner/large")


# -------------------------------------------------------------------------------------------------
# What is done is not done again.


CHECKED = {
    "machine": GPU, "batch": 4, "large": False, "beta": 1000.0, "toy": True, "memory": None,
    "architecture": "sdxl", "flops": {"training": 1e12, "pictures": 1e12}, "prompts_drawn": 4,
    "summary": "all there",
}  # fmt: skip


@pytest.fixture
def programs(monkeypatch):
    """What is started; `fails`: the name of the program that fails."""
    found = SimpleNamespace(started=[], fails="")

    def run(words, log, *_):
        found.started.append(words[0])
        if words[0] == found.fails:
            log.write_text("0%\r50%\rTraceback:\n  in /home/mallory/x\nout of memory\n")
            raise UserError(f"{words[0]} failed: out of memory in /home/mallory/x.")

    def check(args, _):
        found.started.append("checks")
        return CHECKED

    monkeypatch.setattr(real, "run", run)
    monkeypatch.setattr(taking, "check", check)
    return found


def test_the_same_command_resumes_at_the_phase_that_failed(asked, programs, capsys):
    args = asked()
    args.out.mkdir()
    programs.fails = "evaluate.py"
    said = refusal(real.run_all, args)
    assert "out of memory" in said and "report.zip" in said
    texts = packed(args.out)
    assert "It did not finish" in texts["report.md"] and "out of memory" in texts["report.md"]
    assert "50%\nTraceback:\n  in PATH\nout of memory" in texts["log.txt"]
    assert not any("mallory" in text for text in texts.values())
    assert programs.started == ["checks", "train_inpo.py", "evaluate.py"]
    programs.fails = ""
    real.run_all(args)
    assert programs.started[3:] == ["evaluate.py"]
    texts = packed(args.out)
    assert "It did not finish" not in texts["report.md"] and "log.txt" not in texts
    real.run_all(args)
    assert programs.started[4:] == []
    said = capsys.readouterr().out
    assert said.count("[2/4] Next, training: 3 steps of 4 pairs; about 1 min") == 1
    assert "Nothing was measured" in said and "it names neither you nor your machine" in said


def test_another_test_in_the_same_folder_is_refused(asked, programs):
    args = asked()
    args.out.mkdir()
    real.run_all(args)
    assert "limit: 4 there, 5 now" in refusal(real.run_all, asked("--limit", "5"))


def test_a_dry_run_stops_after_the_checks(asked, programs, capsys):
    args = asked("--dry-run")
    args.out.mkdir()
    real.run_all(args)
    assert programs.started == ["checks"] and "all there" in capsys.readouterr().out


def test_a_program_that_fails_is_named_with_its_last_line(tmp_path):
    program, log = tmp_path / "fails.py", tmp_path / "log"
    program.write_text("import sys; print('one'); sys.exit('error: no room.')")
    said = refusal(real.run, [str(program)], log, 1, lambda: 0, "step")
    assert "fails.py failed: error: no room (see" in said


def test_a_signal_to_stop_reaches_the_program(tmp_path, monkeypatch):
    program, log = tmp_path / "long.py", tmp_path / "log"
    program.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved')))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )

    def ready() -> int:
        if log.exists() and "ready" in log.read_text():
            raise KeyboardInterrupt
        return 0

    with pytest.raises(KeyboardInterrupt):
        real.run([str(program)], log, 1, ready, "step")
    assert log.read_text() == "ready\nsaved\n"


def test_pictures_of_one_colour_and_pictures_that_are_the_same_are_counted(tmp_path):
    for name, colours in {"before": "rgb", "after": "rkb"}.items():
        folder = tmp_path / "images" / "parti" / name
        folder.mkdir(parents=True)
        for n, letter in enumerate(colours):
            picture = Image.new("RGB", (8, 8), {"r": "red", "g": "green"}.get(letter, "black"))
            if letter != "k":
                picture.putpixel((1, 1), (255, 255, 255))
            picture.save(folder / f"{n}.png")
    assert real.look(tmp_path) == {"drawn": 6, "flat": 1, "same": 2}
    assert real.look(tmp_path / "nowhere") == {}


# -------------------------------------------------------------------------------------------------
# All of it.

JUDGE = """
def brightness(images, prompts):
    return [sum(image.resize((1, 1)).getpixel((0, 0))) for image in images]
"""


def whole(*flags: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "lab.real", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_the_whole_command_on_both_layouts_resumes_after_a_kill(kind, checkpoint, pairs, tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "mine.txt").write_text("a red circle\na blue circle\na circle\n")
    out = tmp_path / "out"
    flags = ["--model", checkpoint(kind), "--data", pairs, "--pairs", 24, "--steps", 12]
    flags += ["--prompts", tmp_path / "mine.txt", "--scorers", f"{tmp_path}/judge.py:brightness"]
    flags += ["--limit", 2, "--out", out]
    first = whole(*flags)
    while first.poll() is None and not len(read_metrics(out / "run")):
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (out / "report.zip").exists()
    checked = (out / "pairs.parquet").stat().st_mtime_ns
    second = whole(*flags)
    said = second.communicate()[0].decode()
    assert second.returncode == 0, said
    assert "Next, checks" not in said and (out / "pairs.parquet").stat().st_mtime_ns == checked
    assert [one["step"] for one in read_metrics(out / "run")] == [*range(1, 13)]
    texts = packed(out)
    about = json.loads(texts["report.json"])
    assert about["win_rates"][0]["n"] == 2 and about["pictures"]["drawn"] == 4
    assert about["settings"]["model"] == about["settings"]["prompts"] == "the user's own"
    assert about["rows"][0]["found"] == pytest.approx(LOG2, abs=1e-6)
    for secret in (str(tmp_path), tmp_path.name, "mine", "judge.py", os.uname().nodename):
        assert not any(secret in text for text in texts.values()), secret
    with zipfile.ZipFile(out / "report.zip") as file:
        assert {"curves.png", "samples.png", "pictures.png"} < set(file.namelist())
    third = whole(*flags)
    assert b"Next, training" not in third.communicate()[0] and third.returncode == 0


@pytest.mark.slow
def test_the_tiny_model_is_inside_every_range(tmp_path):
    flags = ["--model", "tiny", "--pairs", 96, "--steps", 12, "--out", tmp_path / "out"]
    process = whole(*flags)
    said = process.communicate()[0].decode()
    assert process.returncode == 0, said
    assert "All 11 values that could be judged are inside their ranges." in said
    assert "| NO |" not in packed(tmp_path / "out")["report.md"]


@pytest.mark.slow
def test_sdxl_of_full_size_is_planned_and_a_gpu_that_is_too_small_is_refused(
    checkpoint, asked, tmp_path, monkeypatch
):
    """Its configuration alone, without weights: nothing is loaded before the memory is checked."""
    model = tmp_path / "sdxl"
    shutil.copytree(checkpoint("sdxl"), model)
    (model / "unet" / "config.json").write_text(json.dumps(architectures.CONFIGS["sdxl"]))
    vae = json.loads((model / "vae" / "config.json").read_text())
    vae["block_out_channels"] = [128, 256, 512, 512]  # a factor of 8
    (model / "vae" / "config.json").write_text(json.dumps(vae))
    args = asked("--model", str(model), "--prompts", "toy", "--scorers", "preference")
    args.out.mkdir()
    gpu = dict(GPU)
    monkeypatch.setattr(taking, "about_machine", lambda: gpu)
    found = taking.check(args, real.training_words)
    assert found["large"] and found["batch"] == 4
    assert 7 < found["memory"] / 2**30 < 11  # docs/small_sets.md: 8.2, and the stock VAE in fp32
    # 12 pairs of 2 x (5.5 + 1 + 2) calls, and 8 pictures of 25 steps with guidance; 6,761 GFLOP
    assert found["flops"]["training"] == pytest.approx(12 * 17 * 6.761e12, rel=0.01)
    assert found["flops"]["pictures"] == pytest.approx(8 * 25 * 2 * 6.761e12, rel=0.01)
    gpu["free"] = 6 * 2**30
    assert "6.0 GiB free" in refusal(taking.check, args, real.training_words)
    words = real.training_words(args, 10, True)
    assert (
        words[words.index("--lr") + 1] == "1e-4" and words[words.index("--micro-batch") + 1] == "1"
    )
