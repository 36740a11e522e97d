"""Laws of study.py, measure.py and report.py: equal work, jobs that continue, what tables say."""

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal
from launch import start
from PIL import Image

import toy
from evaluation import figures
from lab import half, measure, report, studies, study, tuning, writers
from system.files import UserError
from system.lock import alone
from training.flags import parse
from training.recipes import recipe_of
from weights import loading

PROMPTS = toy.prompts("heldout")


# -------------------------------------------------------------------------------------------------
# What is run.


@pytest.mark.parametrize("name", study.STUDIES)
def test_commands_of_a_study_are_understood_and_folders_differ(name, entries, tmp_path):
    jobs = study.jobs_of(study.STUDIES[name](), tmp_path)
    assert len({job.folder for job in jobs}) == len(jobs)
    for job in jobs:
        args = measure.parse(job.commands()[-1][2:])
        assert (args.folder, args.images, tuple(args.exports)) == (
            job.folder, job.images, job.judged()
        )  # fmt: skip
    for job in jobs[1:]:
        words = job.commands()[0]
        if job.variant.precision != "fp32":
            precision, words = half.parse(words[2:])
            assert precision == job.variant.precision
            words = ["", *words]
        args = parse("", words[1:])
        assert (args.model, args.method, args.seed) == ("tiny", job.variant.method, job.seed)
        exported = {*range(0, args.steps, args.export_every), args.steps} - {0}
        assert args.steps == max(job.judged()) and exported >= set(job.judged())
        assert len(exported) <= 40  # 9 MB each
        assert Path(args.out) == job.folder and args.batch == 16


def test_entries_take_equal_compute_and_are_tuned_with_at_most_ten_runs_on_an_unused_seed(entries):
    tuned, board = studies.tune_study(), studies.leaderboard_study()
    groups = [variant.group for variant in tuned.variants]
    assert {groups.count(group) for group in studies.ENTRIES} <= {6, 8, 10}
    assert set(groups) == set(studies.ENTRIES)
    assert not set(tuned.seeds) & set(board.seeds)
    work = {v.name: v.steps * v.calls_per_step for v in tuned.variants}
    work |= {v.name: v.equal * v.calls_per_step for v in board.variants}
    assert all(0.985 < calls / (60 * 16 * 2 * 9.5) < 1.015 for calls in work.values()), work
    for variant in board.variants:
        assert 60 in variant.judged and variant.equal in variant.judged
        assert variant.steps == max(60, variant.equal)


def test_calls_of_a_step_follow_from_the_latents_and_the_objective():
    """By hand: 16 pairs; a reference is a call an image, training three."""
    per_image = {
        "InPO": 2 * (5.5 + 4), "DPO": 2 * 4, "KTO": 2 * 4, "SFT": 3, "MaPO": 2 * 3,
        "SmPO": 2 * (11 + 4), "SFT, inverted": 5.5 + 3, "InPO, log sigma": 2 * (4 + 4),
    }  # fmt: skip
    for name, calls in per_image.items():
        assert studies.calls_per_step(studies.ENTRIES[name][0]) == 16 * calls, name


def test_the_leaderboard_trains_with_the_flags_that_were_chosen(entries):
    for variant in studies.leaderboard_study().variants:
        best = tuning.chosen(entries, variant.name)
        assert variant.flags == best["flags"]
        tried = [s for s in entries if s["group"] == variant.name]
        faithful = [s for s in tried if s["faithfulness"][0] >= 0.97]
        assert len(faithful) == len(tried) - 1  # the best has lost captions
        assert best["preference"][0] == max(s["preference"][0] for s in faithful)


def test_what_no_setting_has_made_better_than_the_base_is_not_on_the_leaderboard(entries):
    assert [v.name for v in studies.leaderboard_study().variants] == list(studies.ENTRIES)
    for worse in (s for s in entries if s["group"] == "DPO"):
        worse["preference"][0] = 0.39
    assert {*studies.ENTRIES} - {v.name for v in studies.leaderboard_study().variants} == {"DPO"}


def test_jobs_of_another_task_train_on_its_pairs_and_are_judged_by_it(entries, tmp_path):
    jobs = study.jobs_of(study.STUDIES["red"](), tmp_path)
    clean = study.jobs_of(study.STUDIES["leaderboard"](), tmp_path)
    assert not {job.folder for job in jobs} & {job.folder for job in clean}
    for job in jobs:
        *train, judge = job.commands()
        assert measure.parse(judge[2:]).task == "red"
        assert all(Path(parse("", words[1:]).data).name.endswith("-red.parquet") for words in train)


def test_only_some_groups_of_a_study_are_trained_and_an_unknown_one_is_named(tmp_path, capsys):
    every = study.STUDIES["tune"]()
    jobs = study.jobs_of(every, tmp_path, ["MaPO", "KTO"])
    assert [job.variant.group for job in jobs[1:]] == ["KTO"] * 6 + ["MaPO"] * 8
    one = study.jobs_of(every, tmp_path, ["MaPO, lr 2e-5, beta 0.1"])[1:]
    assert [job.variant.flags for job in one] == ["--method mapo --lr 2e-5 --beta 0.1"]
    told = refusal(study.jobs_of, every, tmp_path, ["KT0"])
    assert told.startswith("--only KT0: there are the groups DMPO, ")
    page = tmp_path / "page.md"
    page.touch()
    with pytest.raises(SystemExit):
        study.parse(["noisy", "--only", "KTO", "--report", str(page)])
    assert "--only: with --report it would replace the whole section" in capsys.readouterr().err
    assert study.parse(["tune", "--only", "KTO", "--report", str(page)]).only == ["KTO"]


# -------------------------------------------------------------------------------------------------
# The settings that were tried.


@pytest.fixture
def entries(monkeypatch):
    """Settings of a tuning that has not taken place; the last of each group has lost captions."""
    found = [setting("base", "", 0.4)]
    found[0]["faithfulness"][0] = 0.99
    for variant in studies.tune_study().variants:
        k = sum(s["group"] == variant.group for s in found)
        found.append(setting(variant.group, variant.flags, 0.41 + k / 100))
    for name in studies.ENTRIES:
        [s for s in found if s["group"] == name][-1]["faithfulness"][0] = 0.9
    monkeypatch.setattr(tuning, "read", lambda *_: found)
    for dtype in ("bf16", "fp16"):  # as if this processor had kernels for both
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", lambda: True)
    monkeypatch.setattr(toy, "write_pairs", lambda path, *_, **__: path)  # 2,048 take a while
    return found


def setting(group: str, flags: str, preference: float) -> dict:
    share, mean = [1.0, 0.8, 1.0], [preference, preference - 0.02, preference + 0.02]
    found = {"group": group, "flags": flags, "steps": 60, "seed": 100, "wins": list(share)}
    return found | {"preference": mean, "faithfulness": list(share), "drift": 0.001}


def test_settings_are_kept_and_the_same_ones_replaced(tmp_path):
    file = tmp_path / "settings.json"
    first = [setting("base", "", 0.4), setting("A", "--lr 1", 0.5), setting("B", "--lr 2", 0.5)]
    assert tuning.merge(file, first) == tuning.read(file) == first
    second = [setting("base", "", 0.4), setting("B", "--lr 1", 0.5), setting("B", "--lr 2", 0.6)]
    merged = [*first[:2], second[2], second[1]]  # a setting tried again keeps its place
    assert tuning.merge(file, second) == tuning.read(file) == merged
    text = tuning.tables_of(tuning.read(file))
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## A", "## B"]
    marked = [line for line in text.splitlines() if line.startswith("| chosen")]
    assert [line.split(" | ")[1] for line in marked] == ["--lr 1", "--lr 2"]
    panels = tuning.panels(tuning.read(file))
    assert [panel["lines"] for panel in panels] == [
        {"no beta": [((1,), (0.5,))]}, {"no beta": [((1, 2), (0.5, 0.6))]}
    ]  # fmt: skip
    for panel in panels:  # by one measure, which shows the base and the best
        assert panel["line"] == 0.4 and panel["limits"] == pytest.approx((0.3, 0.62))


def test_what_cannot_be_chosen_from_is_named(tmp_path):
    start, lost = setting("base", "", 0.4), setting("A", "--lr 1", 0.5)
    lost["faithfulness"][0] = 0.969
    assert "every setting has lost" in refusal(tuning.chosen, [start, lost], "A")
    text = tuning.tables_of([start, lost])
    assert "## A" in text and "| --lr 1 |" in text and "chosen" not in text
    assert "tune --only 'B'" in refusal(tuning.chosen, [start, lost], "B")
    assert "tune --only 'A'" in refusal(tuning.chosen, [lost], "A")
    for content in ('{"group": 1}', '{"settings": [{"group": 1}]}', '{"settings": [3]}'):
        (tmp_path / "settings.json").write_text(content)
        told = refusal(tuning.read, tmp_path / "settings.json")
        assert "settings.json holds no list of settings; delete it" in told


def test_no_best_setting_has_an_untried_neighbour_before_ten_were_tried():
    settings, before = tuning.read(), {"MaPO": 2, "DSPO": 2}  # not in the file, see docs/tune.md
    rate = lambda s: float(s["flags"].split("--lr ")[1].split()[0])  # noqa: E731
    assert {s["group"] for s in settings} == {"base", *studies.ENTRIES}
    for name in studies.ENTRIES:
        tried = [s for s in settings if s["group"] == name]
        best, rates = rate(tuning.chosen(settings, name)), {rate(s) for s in tried}
        ends = best in (min(rates), max(rates)) and tuning.gains(settings, name)
        assert len(tried) + before.get(name, 0) == 10 if ends else len(tried) <= 10, name
        assert [s["preference"] for s in tried].count(
            tuning.chosen(settings, name)["preference"]
        ) == 1


def test_the_committed_settings_choose_the_recipes_of_the_tiny_model():
    settings = tuning.read()
    for name in {setting["group"] for setting in settings} & set(studies.PRESETS):
        asked = parse("", ["--model", "tiny", *tuning.chosen(settings, name)["flags"].split()])
        recipe = recipe_of("tiny", asked.method)
        assert {key: vars(asked)[key] for key in recipe} == recipe, name


def test_ablation_changes_one_thing_at_a_time():
    recipe = vars(parse("", ["--model", "tiny", *studies.PAPER.split()]))
    for variant in studies.ablation_study().variants:
        asked = vars(parse("", ["--model", "tiny", *variant.flags.split()]))
        differ = {key for key in recipe if asked[key] != recipe[key]} - {"out"}
        if variant.name == "random noise":
            path = {"inversion_spacing", "inversion_steps", "eta", "inverter"}
            assert differ == path | {"method", "latents", "strata"}
            assert asked["strata"] == recipe["inversion_steps"]
        else:
            assert len(differ) == (variant.name != "recipe"), variant


# -------------------------------------------------------------------------------------------------
# Running.

TRAIN = """
import json, pathlib, sys
folder, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
lines = [json.dumps({"step": k + 1}) + chr(10) for k in range(steps)]
folder.joinpath("metrics.jsonl").write_text("".join(lines))
print("trained")
"""
MEASURE = """
import json, pathlib, sys
score = {"preference": [0.5] * 18, "faithfulness": [1.0] * 18, "drift": 0.1, "grain": [0.01] * 18}
measured = {"images": 1, "steps": dict.fromkeys(sys.argv[2:], score)}
pathlib.Path(sys.argv[1], "measured.json").write_text(json.dumps(measured))
print("judged")
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """The base and two variants, whose commands do in no time what training and judging leave."""

    def commands(job):
        judge = ["-c", MEASURE, str(job.folder), *map(str, job.judged())]
        if job.variant is None:
            return [judge]
        train = job.variant.flags or TRAIN
        return [["-c", train, str(job.folder), str(job.variant.steps)], judge]

    monkeypatch.setattr(study.Job, "commands", commands)
    monkeypatch.setattr(study.Job, "calls_per_step", lambda job: 10)
    variants = [study.Variant("a", "", (2, 3)), study.Variant("b", "", (1,))]
    return study.jobs_of(study.Study(variants, [0], images=1), tmp_path)


def test_a_study_trains_and_judges_and_keeps_what_is_done(jobs):
    assert [job.done() for job in jobs] == [0, 0, 0]
    study.run_all(jobs, 2)
    assert [job.done() for job in jobs] == [job.calls() for job in jobs]
    assert jobs[1].calls() == 3 * 10 + 2 * jobs[0].calls() and jobs[0].calls() == 18 * 15 * 2
    found = study.records(jobs)
    points = [(j["variant"], j["step"], j["calls"]) for j in found]
    assert points == [("base", 0, 0), ("a", 2, 20), ("a", 3, 30), ("b", 1, 10)]
    assert found[1]["drift"] == 0.1

    file = jobs[1].folder / "measured.json"
    measured = json.loads(file.read_text())
    del measured["steps"]["3"]  # as if it had been stopped there
    file.write_text(json.dumps(measured))
    assert jobs[1].done() == jobs[1].calls() - jobs[0].calls()
    study.run_all(jobs, 2)
    logs = [job.folder.with_suffix(".log").read_text().split() for job in jobs]
    assert logs == [["judged"], ["trained", "judged"] * 2, ["trained", "judged"]]


def test_a_run_that_fails_is_named_with_its_log_and_the_others_are_stopped(jobs, tmp_path):
    wrong = "import time; time.sleep(1); print('first'); exit('--eta: has no meaning')"
    variants = [study.Variant("endless", "import time; time.sleep(300)", (1,))]
    variants += [study.Variant("wrong", wrong, (1,))]
    jobs = study.jobs_of(study.Study(variants, [0], 1), tmp_path)
    with pytest.raises(UserError, match=r"failed: --eta: has no meaning \(see .*wrong-seed-0\.log"):
        study.run_all(jobs[1:], 2)
    assert not study.children


KILLED = """
import sys
from pathlib import Path
from lab import study
study.Job.commands = lambda job: [["-c", sys.argv[2], str(job.folder), sys.argv[3]]]
study.Job.calls_per_step = lambda job: 10
variants = [study.Variant(name, "", (1,)) for name in "ab"]
study.run_all(study.jobs_of(study.Study(variants, [0], images=1), Path(sys.argv[1]))[1:], 2)
"""
HOLD = """
import fcntl, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
lock = open(folder / ".lock", "w")  # as train_inpo.py holds it
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
folder.joinpath("pid.new").write_text(str(os.getpid()))
folder.joinpath("pid.new").rename(folder / "pid")
time.sleep(float(sys.argv[2]))
"""


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_study_that_is_killed_takes_its_runs_with_it_and_goes_on(tmp_path):
    (killed,) = start([tmp_path, HOLD, "300"], 1, KILLED)
    files = [tmp_path / "runs" / f"{name}-seed-0" / "pid" for name in "ab"]
    while not all(file.exists() for file in files) and killed.returncode is None:
        time.sleep(0.05)
    pids = [int(file.read_text()) for file in files]
    assert all(map(lives, pids))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    try:
        (again,) = start([tmp_path, HOLD, "0"], 1, KILLED)
        said = again.communicate()
        assert again.returncode == 0, said
        assert not any(map(lives, pids))
    finally:
        for pid in filter(lives, pids):
            os.kill(pid, signal.SIGKILL)


DAMAGED = ["", "null", "[]", "5", "{", '{"images": 1}', '{"images": 1, "steps": []}', "\0" * 50]
DAMAGED += ['{"images": 1, "steps": {"2": null, "3": {"preference": [1]}}}', "[" * 10**5]
DAMAGED += [json.dumps({"images": 1, "steps": {"2": {"drift": math.nan}}}), "\xff\xfe"]


@pytest.mark.parametrize("text", [*DAMAGED, None], ids=range(len(DAMAGED) + 1))
def test_a_damaged_judgement_is_made_again(text, jobs):
    folder = jobs[1].folder
    folder.mkdir(parents=True)
    if text is None:
        (folder / "measured.json").mkdir()
    else:
        (folder / "measured.json").write_text(text, "latin-1")
    assert jobs[1].done() == 0 and measure.read(folder, 1) == {}
    if text is None:
        assert "measured.json is a folder; move it away." in refusal(measure.measure, folder, 1)


def test_a_study_counts_and_takes_whole_judgements_alone(jobs):
    study.run_all(jobs, 2)
    file = jobs[1].folder / "measured.json"
    measured = json.loads(file.read_text())
    measured["steps"]["3"]["preference"].pop()
    file.write_text(json.dumps(measured))
    assert jobs[1].done() == jobs[1].calls() - jobs[0].calls()
    study.run_all(jobs, 2)
    assert [job.done() for job in jobs] == [job.calls() for job in jobs]


def test_two_studies_in_a_folder_are_one_too_many(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "run_all", lambda *_: pytest.fail("it has started"))
    with alone(tmp_path), pytest.raises(SystemExit) as stop:
        study.main(["tune", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"--out {tmp_path}: another job is writing there" in said


@pytest.mark.parametrize("cost", [None, "", "{}", '{"method": 5}'])
def test_a_run_whose_cost_is_not_known_is_named(cost, jobs):
    jobs[1].folder.mkdir(parents=True)
    if cost is not None:
        (jobs[1].folder / "cost.json").write_text(cost)
    told = refusal(writers.write_leaderboard, r60({"a": 0.1, "b": 0.1}), jobs[:2], jobs[1].folder)
    assert "cost.json" in told and "delete that folder; the same command trains again." in told


def test_the_command_line_writes_what_it_prints(jobs, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(study.STUDIES, "rates", lambda: study.Study([], [0], 1))
    monkeypatch.setattr(study, "jobs_of", lambda *_: jobs)
    text = "## One\n\na page\n\n## Two\n\n### A part\n\nand more\n"
    monkeypatch.setitem(writers.WRITERS, "rates", lambda results, jobs, out: text)
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("# Title\n\nProse.\n\n## Two\n\nold\n")
    study.main(["rates", "--out", str(tmp_path), "--jobs", "2", "--report", str(page)])
    assert (tmp_path / "rates.md").read_text() == text
    assert (
        page.read_text()
        == "# Title\n\nProse.\n\n## Two\n\n### A part\n\nand more\n\n## One\n\na page\n"
    )
    assert (page.parent / "rates.json").read_text() == (tmp_path / "rates.json").read_text()
    assert "a page" in capsys.readouterr().out
    wins = json.loads((tmp_path / "rates.json").read_text())
    pairs = [(w["model"], w["against"]) for w in wins]
    assert pairs == [("a", "base"), ("b", "base"), ("b", "a")]
    assert len(json.loads((tmp_path / "rates_judgements.json").read_text())) == 4


def test_a_report_that_is_not_there_is_refused_before_anything_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(study, "run_all", lambda *_: pytest.fail("it has started"))
    with pytest.raises(SystemExit) as stop:
        study.main(["tune", "--out", str(tmp_path), "--report", str(tmp_path / "none.md")])
    assert stop.value.code == 2 and "must be a Markdown file that exists" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_leaderboard_and_tuning_from_training_to_their_pages(monkeypatch, tmp_path):
    """In half precision, too, and on another task."""
    size, page = "--batch 2 --micro-batch 2 --lr 1e-5", tmp_path / "page.md"
    page.write_text("# Title\n")
    inpo = study.Variant("InPO", f"--inversion-steps 2 {size}", (2, 60), "Methods", 2)
    smpo = replace(inpo, name="SmPO", flags=f"--method smpo --inversion-steps 2 {size}")
    mapo = replace(inpo, name="MaPO", flags=f"--method mapo {size}", group="Crosses")
    halves = [replace(inpo, name=p, precision=p, judged=(2,)) for p in ("bf16", "fp16")]
    for name, variants, more in (
        ("tune", [replace(inpo, judged=(2,), group="InPO")], {}),
        ("red", [inpo, smpo, mapo], {"task": "red"}),
        ("precision", [replace(inpo, judged=(2,)), *halves], {}),
    ):
        made = study.Study(variants, [0], images=1, **more)
        monkeypatch.setitem(study.STUDIES, name, lambda made=made: made)
        study.main([name, "--out", str(tmp_path / "out"), "--report", str(page)])
    text = page.read_text()
    assert "| SmPO | --method smpo" in text and text.count("| fp16 |") == 2
    assert {"red.png", "red_curves.png", "red_samples.png", "page.png"} <= {
        file.name for file in tmp_path.glob("*.png")
    }
    found = json.loads((tmp_path / "out/precision_judgements.json").read_text())
    drift = {j["variant"]: j["drift"] for j in found}
    assert drift["fp16"] == 0  # its two steps are skipped: they look for the scale of the loss
    assert 0.5 < drift["bf16"] / drift["InPO"] < 2 and drift["bf16"] != drift["InPO"]


# -------------------------------------------------------------------------------------------------
# Judging.


@pytest.fixture
def few(monkeypatch):
    """Three captions, two sampling steps and four drawings: enough for what is counted and kept."""
    monkeypatch.setattr(toy, "prompts", lambda split="all", fold=0: PROMPTS[:3])
    monkeypatch.setattr(measure, "STEPS", 2)
    monkeypatch.setattr(measure, "DRAWINGS", 4)


def test_the_start_does_not_drift_and_its_pictures_are_kept(few, tmp_path):
    measure.main([str(tmp_path), "--images", "2", "--exports", "0"])
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured["images"] == 2 and list(measured["steps"]) == ["0"]
    scores = measured["steps"]["0"]
    assert scores["drift"] == 0 and len(scores["preference"]) == len(scores["faithfulness"]) == 6
    files = sorted((tmp_path / "images/step_000000").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    for k, file in enumerate(files):
        image = Image.open(file)
        assert scores["preference"][k] == pytest.approx(toy.preference(image), abs=1e-6)
        assert scores["faithfulness"][k] == toy.faithfulness(image, PROMPTS[k])


def test_every_export_is_judged_once(few, tmp_path):
    unet = loading.load_unet("tiny")
    for step in (2, 3):
        with torch.no_grad():
            unet.conv_out.bias += 0.01
        unet.save_pretrained(tmp_path / "unets" / f"step_{step:06d}")

    def judged(*flags) -> dict:
        measure.main([str(tmp_path), "--images", "1", *flags])
        return json.loads((tmp_path / "measured.json").read_text())["steps"]

    first = judged("--exports", "2")
    assert list(first) == ["2"] and first["2"]["drift"] == pytest.approx(1e-4, rel=1e-3)
    unet.save_pretrained(tmp_path / "unets/step_000002")  # if it were judged again, this would show
    both = judged()
    assert list(both) == ["2", "3"] and both["2"] == first["2"]
    assert both["3"]["drift"] == pytest.approx(4e-4, rel=1e-3)


def test_grain_is_the_mean_absolute_laplacian():
    def picture(pixels):
        return Image.fromarray(np.repeat(pixels[..., None], 3, -1).astype(np.uint8))

    rows, columns = np.indices((8, 8))
    assert measure.grain(picture(255 * ((rows + columns) % 2))) == 4  # each neighbour is opposite
    assert measure.grain(picture(20 * rows + 7 * columns)) < 1e-15  # a plane
    assert measure.grain(picture(255 * (columns > 3))) == 2 / 6  # two of six inner columns


def test_a_run_without_exports_is_refused_with_the_flag_that_makes_them(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        measure.main([str(tmp_path)])
    assert stop.value.code == 2 and "train with --export-every" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------
# Reports.


def results(gains: dict[str, float], images: int = 2, seeds=(0, 1), steps=(1, 4)):
    """Judgements where each variant's preference has risen by gain x step, drift (gain step)^2."""
    rng, n = np.random.default_rng(0), len(PROMPTS) * images
    base = rng.uniform(0.3, 0.5, n)

    def judged(variant, seed, step, gain):
        scores = {"preference": (base + gain * step).tolist(), "drift": (gain * step) ** 2}
        scores |= {"faithfulness": (np.arange(n) % 10 != 0).astype(float).tolist()}
        scores |= {"grain": [0.01] * n}
        return {"variant": variant, "seed": seed, "step": step, "calls": 7 * step, **scores}

    found = [judged("base", 0, 0, 0)]
    found += [judged(v, s, k, g) for v, g in gains.items() for s in seeds for k in steps]
    return report.Results(found, PROMPTS * images)


def test_wins_of_a_over_b_and_of_b_over_a_and_ties_are_one():
    r = results({"a": 0.01, "b": 0.02, "c": 0.02})
    for a, b, ties in (("a", "b", 0), ("b", "base", 0), ("b", "c", 1)):
        ab, ba = r.wins(a, b, 1), r.wins(b, a, 1)
        assert ab["rate"] + ba["rate"] + ab["ties"] / ab["n"] == pytest.approx(1)
        assert ab["ties"] / ab["n"] == ties and ab["n"] == 72
    assert r.wins("b", "a", 4)["seeds"] == [1, 1]
    assert r.wins("b", "a") == r.wins("b", "a", 4)  # the last step, if none is named


def test_a_run_starts_at_one_half_against_itself():
    r = results({"a": 0.01})
    assert r.path("a", 0, "wins").tolist() == [0.5, 1, 1]
    assert r.path("a", 0, "calls").tolist() == [0, 7, 28]
    assert r.path("a", 1, "drift") == pytest.approx([0, 1e-4, 16e-4])


def test_at_drift_is_linear_in_the_distance_and_nan_where_nothing_was_judged():
    drift, values = np.array([0, 1, 9, 4, 25.0]), np.array([0, 10, 30, 0, 50.0])
    assert report.at_drift(drift, values, 1) == 10
    assert report.at_drift(drift, values, 4) == pytest.approx(20)  # half way from 1 to 3
    assert np.isnan(report.at_drift(drift, values, 0.25))  # before the first judgement
    assert report.at_drift(drift, values, 16) == pytest.approx(50 * 2 / 3)  # from 2 to 5
    assert report.at_drift(drift, values, 0) == 0
    assert np.isnan(report.at_drift(drift, values, 26))


def test_matched_drift_makes_equal_what_differs_in_speed_alone():
    r = results({"slow": 0.01, "fast": 0.02})
    assert report.common_levels(r, ["slow", "fast"])[-1] == pytest.approx(0.04**2)
    rows = report.matched_table(r, ["slow", "fast"]).splitlines()[2:]
    slow, fast = (row.split(" | ")[1:] for row in rows)
    assert fast[:2] == ["not measured"] * 2  # at the slow one's first judgement, before its own
    assert slow[2:] == fast[2:]
    base, row = r.get("base", -1, "preference").mean(), rows[0].split(" | ")
    for cell, gain in zip(row[1::2], (0.01, 0.02, 0.04), strict=True):
        assert cell.startswith(f"{base + gain:.3f} (")
    assert all(cell.startswith("88.9 (88.9 to 88.9)") for cell in row[2::2])


def test_scores_at_equal_drift_are_those_of_each_image_on_the_way():
    r = results({"slow": 0.01, "fast": 0.02})
    base = r.get("base", -1, "preference")
    for variant in ("slow", "fast"):
        assert r.at_drift(variant, "preference", 0.03**2) == pytest.approx(base + 0.03)
    assert np.isnan(r.at_drift("fast", "preference", 0.01**2)).all()
    ranks = report.rank_table(r60({"slow": 0.01, "fast": 0.02}), 0.04**2).splitlines()
    names = [line.split(" | ")[0] for line in ranks[2:]]
    assert names == ["| fast", "| slow"]  # at equal compute, step 4
    cells = [line.strip("| ").split(" | ") for line in ranks[2:]]
    means = [[float(cell.split(" ")[0]) for cell in row[1:4]] for row in cells]
    start = base.mean()
    assert means[0] == pytest.approx([start + 0.02 * 60, start + 0.08, start + 0.04], abs=6e-4)
    assert means[1] == pytest.approx([start + 0.01 * 60, start + 0.04, start + 0.04], abs=6e-4)
    assert "[" in cells[0][3] and cells[0][4] == "+0.040" and len(cells[1]) == 4
    assert float(cells[0][5].split(" ")[0]) == 0  # at equal drift the faster one gains nothing
    panels = report.rank_panels(r60({"slow": 0.01, "fast": 0.02}), 0.04**2)
    assert [list(panel["rows"]) for panel in panels] == [["fast", "slow"]] * 4
    assert panels[1]["rows"]["slow"][0] == pytest.approx(start + 0.04)
    assert panels[1]["line"] == pytest.approx(start)
    assert report.equal_drift(r60({"slow": 0.01, "fast": 0.02})) == pytest.approx(0.6**2)
    far = r60({"slow": 0.01, "fast": 0.7})  # after one step farther than the other one ever
    assert report.equal_drift(far) is None
    assert "drift" not in report.rank_table(far, None)
    assert [panel["title"] for panel in report.rank_panels(far, None)][1:] == [
        "At equal compute", "Faithful, at equal compute"
    ]  # fmt: skip


def r60(gains: dict[str, float]) -> report.Results:
    """Judged at steps 1, 4 and 60, of which 4 has equal compute."""
    r = results(gains, steps=(1, 4, 60))
    r.equal = dict.fromkeys(gains, 4)
    return r


def test_tables_hold_what_was_judged():
    r = results({"a": 0.01, "b": 0.02})
    wins = report.wins_table(r, {"early": 1, "late": -1}).splitlines()
    assert [row.split(" | ")[:2] for row in wins[2:]] == [
        ["| a", "base"], ["| b", "base"], ["| b", "a"]
    ]  # fmt: skip
    assert wins[2].count("100.0 [82.4, 100.0]") == 2
    assert [cell.strip(" |") for cell in wins[4].split(" | ")[3::2]] == ["+0.010", "+0.040"]
    scores = report.scores_table(r).splitlines()
    assert len(scores) == 5 and "| 0 |" in scores[2]
    mean = r.get("b", -1, "preference").mean()
    assert f"{mean:.3f} [" in scores[4] and "| 0.00640 |" in scores[4]
    costs = {"steps": 60, "unet_calls": 18240, "flops": 6.8e12, "seconds": 51.2, "device": "CPU"}
    costs |= {"device_hours": 0.0142, "peak_memory": 2**30}
    text = report.cost_table({"a": [costs, costs | {"seconds": 52.8, "peak_memory": 2**31}]})
    assert "| a | 60 | 18,240 | 6.8e+12 | 52 | 0.014 | 2.00 |" in text and "CPU-hours" in text


def test_a_repeated_study_is_compared_with_the_committed_one():
    wins = report.all_wins(results({"a": 0.01, "b": 0.02}))
    assert [(w["model"], w["against"]) for w in wins] == [("a", "base"), ("b", "base"), ("b", "a")]
    text = report.compare(wins, wins[:2], "docs/x.json")
    assert text == "2 of 2 win rates lie in the intervals of docs/x.json; 2 are equal."
    wins[0] = wins[0] | {"rate": wins[0]["low"] - 0.01}
    assert "2 of 3 win rates" in report.compare(
        wins, report.all_wins(results({"a": 0.01, "b": 0.02})), ""
    )


def test_spread_of_training_seeds_is_shown_where_there_is_any():
    stats = {"rate": 0.5, "low": 0.4, "high": 0.6, "seeds": [0.45, 0.55]}
    assert report.cell(stats, "rate") == "50.0 [40.0, 60.0] (45.0 to 55.0)"
    assert report.cell(stats | {"seeds": [0.5]}, "rate") == "50.0 [40.0, 60.0]"
    assert report.cell(stats | {"low": None, "seeds": [0.5]}, "rate") == "50.0"


def test_trajectories_draws_every_panel_and_line(tmp_path):
    lines = {"a": [([0, 1], [0, 1]), ([0, 1], [0, 0.5])], "b": [([0, 1], [1, 0])]}
    panels = [{"title": t, "x": "x", "y": "y", "lines": lines} for t in "pqr"]
    figures.trajectories(panels, tmp_path / "new/three.png", "title")
    picture = np.asarray(Image.open(tmp_path / "new/three.png").convert("RGB")).astype(int)
    assert picture.shape == (864, 1200, 3)
    for color in ((31, 119, 180), (255, 127, 14)):  # C0, C1
        near = np.abs(picture - color).max(-1) < 12
        quarters = [near[:432, :600], near[:432, 600:], near[432:, :600], near[432:, 600:]]
        assert [part.sum() > 200 for part in quarters] == [True, True, True, False]


def test_a_share_is_drawn_on_an_axis_that_ends_at_all_of_them(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    spans = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_, **how: spans.append(self.axes[0].get_ylim())
    )
    for lowest in (0.99, 0.4):
        lines = {"a": [([0, 1], [1.0, lowest])]}
        panel = {"title": "t", "x": "x", "y": "y", "lines": lines, "span": (0.8, 1.01)}
        figures.trajectories([panel], tmp_path / "one.png")
    assert spans[0] == pytest.approx((0.8, 1.01))
    assert spans[1][0] < 0.4 and spans[1][1] == pytest.approx(1.01)
    r = results({"a": 0.01})
    panels = report.panels(r, ["a"], [("drift", "preference"), ("preference", "faithfulness")])
    assert ["span" in panel for panel in panels] == [False, True]


def test_every_study_writes_its_pages_and_pictures(entries, monkeypatch, tmp_path):
    drawn = {}  # instead of drawing, which takes seconds and is tested above
    for kind, rows in (("trajectories", "lines"), ("dots", "rows")):
        monkeypatch.setattr(
            figures, kind, lambda panels, path, *_, r=rows, **__: drawn.update({path: (panels, r)})
        )
    for name, make in study.STUDIES.items():
        small = make()
        jobs = study.jobs_of(small, tmp_path / name)
        gains = {variant.name: 0.001 * (i + 1) for i, variant in enumerate(small.variants)}
        steps = {s for v in small.variants for s in (v.equal, v.steps) if s}
        r = results(gains, 1, tuple(small.seeds), (*sorted(steps | {60}),))
        r.equal = {v.name: v.equal for v in small.variants if v.equal}
        for job in jobs if name in ("inversion", "leaderboard", "noisy", "red") else []:
            step = (job.variant.equal or job.variant.steps) if job.variant else 0
            step = min(step, 60) if name == "inversion" else step
            for k in range(18):
                path = job.folder / "images" / f"step_{step:06d}" / f"{k:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (64, 64), (k, 0, 0)).save(path)
            spent = {"steps": step, "unet_calls": 1, "flops": 1, "seconds": 1, "device": "CPU"}
            spent |= {"device_hours": 1, "peak_memory": 1, "method": "x", "pairs": 1, "devices": 1}
            (job.folder / "cost.json").write_text(json.dumps(spent))
        (tmp_path / name).mkdir(exist_ok=True)
        text = writers.WRITERS[name](r, jobs, tmp_path / name)
        panels, rows = drawn.get(tmp_path / name / f"{name}.png", ([], ""))
        for variant in small.variants:
            assert (variant.flags if name == "tune" else variant.name) in text
            shown = any(variant.name in p[rows] for p in panels)
            hidden = {"confirm": True, "verdict": True, "precision": True, "tune": True}
            hidden["inversion"] = "eta" in variant.name
            assert shown != hidden.get(name, False)
    assert Image.open(tmp_path / "leaderboard" / "leaderboard_samples.png").width > 64
