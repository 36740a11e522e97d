"""preview.py: fixed prompts and seeds, honest scores, and a best/ that is what best.json says.

Run as a script, test_preview.py FILE, it is a rank of the run whose command FILE holds."""

import contextlib
import json
import os
import shutil
import signal
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import refuse, small_disk
from launch import launch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import model
import toy
import train_inpo
from evaluation import scorers
from system.files import UserError
from system.lock import delete_unfinished
from training import preview
from training.folder import read_metrics

PROMPTS = ["one", "two", "three", "four"]


def brightness(images, prompts) -> list[float]:
    return [image.convert("L").getpixel((0, 0)) / 100 for image in images]


def settings(out: Path, **flags) -> Namespace:
    defaults = {"guidance": 3.0, "micro_batch": 2, "judge": "clip", "scorer_folder": None}
    defaults["seed"] = 0
    return Namespace(**defaults | {"out": out, "sample_prompts": None, "data": "pairs"} | flags)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(step, [levels]) -> what draw says of grey pictures, which `brightness` scores."""
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    args = settings(tmp_path / "run", sample_prompts=str(tmp_path / "prompts.txt"))
    monkeypatch.setattr(scorers, "load", lambda name, folder: brightness)

    def draw(step: int, levels: list[int], **flags):
        images = [Image.new("RGB", (16, 16), (level,) * 3) for level in levels]
        monkeypatch.setattr(model, "sample", lambda *given: [images[seed] for seed in given[2]])
        one = preview.Preview(Namespace(**vars(args) | flags), PROMPTS)
        return one.draw(None, step, lambda: None)

    draw.out, draw.args = args.out, args
    return draw


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------
# Pictures.


def test_every_picture_has_the_same_prompts_and_seeds(drawn, monkeypatch):
    asked = []

    def sample(pipeline, prompts, seeds, steps, guidance, batch):
        asked.append((prompts, seeds, steps, guidance, batch))
        return [Image.new("RGB", (16, 16))] * len(prompts)

    monkeypatch.setattr(model, "sample", sample)
    one = preview.Preview(drawn.args, PROMPTS)
    for step in (0, 5, 10):
        one.draw(None, step, lambda: None)
    preview.Preview(drawn.args, PROMPTS).draw(None, 15, lambda: None)  # as after a crash
    batches = [(PROMPTS[:2], [0, 1], 25, 3.0, 2), (PROMPTS[2:], [2, 3], 25, 3.0, 2)]
    assert asked == batches * 4
    names = {path.name for path in (drawn.out / "samples").glob("step_*")}
    assert names == {f"step_{step:06d}.png" for step in (0, 5, 10, 15)}


def test_the_start_stands_beside_the_current_model(drawn):
    drawn(0, [50] * 4)
    alone = Image.open(drawn.out / "samples" / "step_000000.png")
    drawn(3, [200] * 4)
    picture = Image.open(drawn.out / "samples" / "step_000003.png").convert("L")
    middle = [picture.getpixel((x, picture.height // 2 + 30)) for x in range(picture.width)]
    shown = [level for level in dict.fromkeys(middle) if level in (50, 200)]
    assert shown == [50, 200] and alone.size == picture.size  # two columns each


def test_prompts_are_the_files_the_toys_those_of_the_data_or_the_four(drawn):
    def read(**flags):
        rows = [{"caption": caption} for caption in flags.pop("captions", ["one of the data"])]
        return preview.choose_prompts(Namespace(**vars(drawn.args) | flags), rows)

    assert read() == PROMPTS
    assert read(sample_prompts=None, data="toy") == toy.prompts("heldout")
    assert read(sample_prompts=None) == ["one of the data"]
    assert read(sample_prompts=None, captions=["", None]) == list(preview.PROMPTS)


# -------------------------------------------------------------------------------------------------
# Scores.


def test_means_and_win_rate_with_ties_half(drawn):
    start = [10, 20, 30, 40]
    assert drawn(0, start) == (lines(drawn.out)[0], False)
    line, best = drawn(7, [10, 30, 20, 50])  # a tie, a win, a loss, a win
    assert best and line == {
        "step": 7, "scorer": "clip", "mean": pytest.approx(0.275), "start": pytest.approx(0.25),
        "win_rate": pytest.approx(2.5 / 4),
    }  # fmt: skip
    assert [line["win_rate"] for line in lines(drawn.out)] == [0.5, line["win_rate"]]


def test_best_is_above_the_start_and_all_before(drawn):
    means = [25, 20, 25, 26, 26, 30, 29, 31]
    found = [drawn(step, [mean] * 4)[1] for step, mean in enumerate(means)]
    assert found == [False, False, False, True, False, True, False, True]


def test_scores_of_another_judge_do_not_count(drawn):
    drawn(0, [20] * 4)
    drawn(1, [90] * 4, judge="hps")
    assert drawn(2, [30] * 4)[1] and not drawn(3, [25] * 4)[1]


def test_without_a_judge_or_the_starts_pictures_there_are_pictures_alone(drawn):
    assert drawn(5, [20] * 4) == drawn(0, [20] * 4, judge=None) == (None, False)
    assert {path.name for path in drawn.out.iterdir()} == {"samples"}
    assert (drawn.out / "samples" / "step_000005.png").exists()


def test_a_toy_picture_that_does_not_show_its_caption_counts_0(tmp_path):
    captions = toy.prompts("heldout")[:2]
    one = preview.Preview(
        settings(tmp_path, judge="preference", data="toy"), toy.prompts("heldout")
    )
    one.prompts = captions
    shown = [toy.draw(caption, np.random.default_rng(0), 1.0, 0.0) for caption in captions]
    right, swapped = one.score(shown), one.score(shown[::-1])
    assert captions[0].split()[1:3] != captions[1].split()[1:3]
    assert right.tolist() == [toy.preference(image) for image in shown] and (right > 0.8).all()
    assert swapped.tolist() == [0, 0]


def test_lines_of_steps_that_a_crash_undid_vanish_and_do_not_block(drawn):
    levels = {0: 20, 10: 25, 20: 24, 30: 40, 40: 50}
    found = {step: drawn(step, [level] * 4) for step, level in levels.items()}
    whole = (drawn.out / "scores.jsonl").read_bytes()
    assert [found[step][1] for step in levels] == [False, True, False, True, True]
    assert drawn(30, [40] * 4) == found[30]  # the last checkpoint was that of step 20
    assert [line["step"] for line in lines(drawn.out)] == [0, 10, 20, 30]
    assert drawn(40, [50] * 4) == found[40]  # not "no better than the undone one"
    assert (drawn.out / "scores.jsonl").read_bytes() == whole


# -------------------------------------------------------------------------------------------------
# What goes wrong.


def test_a_full_disk_costs_pictures_or_scores_with_a_warning_but_nothing_older(
    drawn, monkeypatch, capsys
):
    drawn(0, [20] * 4)
    drawn(1, [30] * 4)
    before = (drawn.out / "scores.jsonl").read_bytes()
    starts = [path.read_bytes() for path in sorted(drawn.out.glob("samples/start_*.png"))]
    for step, size in ((0, 40), (2, 40), (2, len(before) + 20)):  # too small for a picture, a line
        with small_disk(size), monkeypatch.context() as only:
            if size > 40:
                only.setattr(preview.Preview, "save", lambda *_: None)
            assert drawn(step, [40] * 4) == (None, False)
        said = capsys.readouterr().err
        assert said.count(f"Warning: step {step} lacks pictures or scores (") == 1
        assert (drawn.out / "scores.jsonl").read_bytes() == before
        assert [p.read_bytes() for p in sorted(drawn.out.glob("samples/start_*.png"))] == starts
    assert drawn(2, [40] * 4)[1] and capsys.readouterr().err == ""


@pytest.mark.parametrize("spoil", [lambda data: data[:60], lambda data: data[:40] + bytes(40)])
def test_a_damaged_picture_of_the_start_costs_a_warning(drawn, capsys, spoil):
    drawn(0, [20] * 4)
    start = drawn.out / "samples" / "start_02.png"
    start.write_bytes(spoil(start.read_bytes()))
    assert drawn(1, [30] * 4) == (None, False)
    assert f"step 1 lacks pictures or scores ('{start}' cannot be read" in capsys.readouterr().err


def test_a_failing_scorer_and_pictures_that_are_not_finite_cost_a_warning(
    drawn, monkeypatch, capsys
):
    """Training has its own guard; a picture of the last step must not cost the model."""
    batches = []

    def fail(*given):
        batches.append(given[1])
        raise UserError("it is gone.")

    drawn(0, [20] * 4)
    with monkeypatch.context() as only:
        only.setattr(scorers, "load", fail)
        assert drawn(1, [30] * 4) == (None, False)
    batches.clear()
    monkeypatch.setattr(model, "sample", fail)
    assert preview.Preview(drawn.args, PROMPTS).draw(None, 2, lambda: None) == (None, False)
    assert batches == [PROMPTS[:2], PROMPTS[2:]]  # all are drawn: a forward may be collective
    said = capsys.readouterr().err
    for step in (1, 2):
        assert f"step {step} lacks pictures or scores (it is gone.)" in said


def test_other_ranks_write_nothing_and_take_rank_0s_answer(drawn, monkeypatch):
    monkeypatch.setattr(preview, "is_main", lambda: False)
    monkeypatch.setattr(preview, "share", lambda value: ("of rank 0", value))
    assert drawn(0, [20] * 4) == ("of rank 0", (None, False))
    assert not list(drawn.out.rglob("*.*"))


def test_a_kill_at_any_instant_leaves_best_as_best_json_says_or_no_best_json(tmp_path, monkeypatch):
    one, left = preview.Preview(settings(tmp_path), PROMPTS), []

    def interrupted(action):
        def act(*given, **options):
            nonlocal countdown
            countdown -= 1
            if countdown < 0:  # and what cleans up does not run either
                raise KeyboardInterrupt
            return action(*given, **options)

        return act

    def write(step: int, folder: Path):
        folder.mkdir()
        for name in ("a", "b"):
            interrupted((folder / name).write_text)(str(step))

    def keep(step: int):
        one.keep({"step": step}, lambda folder: write(step, folder))

    countdown = 10**6
    for owner, name in ((shutil, "rmtree"), (Path, "unlink"), (Path, "rename"), (Path, "replace")):
        monkeypatch.setattr(owner, name, interrupted(getattr(owner, name)))
    for instant in range(100):
        countdown = 10**6
        keep(1)
        countdown = instant
        with contextlib.suppress(KeyboardInterrupt):
            keep(2)
        file = tmp_path / "best.json"
        left.append(json.loads(file.read_text())["step"] if file.exists() else None)
        if file.exists():
            held = {p.name: p.read_text() for p in (tmp_path / "best").iterdir()}
            assert held == dict.fromkeys("ab", str(left[-1])), instant
        if countdown >= 0:
            break
    assert left[0] == 1 and left[-1] == 2 and None in left and 8 <= len(left) < 20
    monkeypatch.undo()
    delete_unfinished(tmp_path)  # as the next job does at its start
    assert {path.name for path in tmp_path.iterdir()} == {"best", "best.json"}


def test_scorers_and_prompts_that_cannot_be_used_are_refused_before_training(
    argv, tmp_path, capsys
):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("ein Bär".encode("latin-1"))
    (tmp_path / "free.txt").write_text("a bear\n")
    for flags, words in (
        ({"judge": "hps"}, ["scorer hps", "put the file at"]),
        ({"judge": "clip", "scorer_folder": tmp_path / "nowhere"}, ["scorer clip", "nowhere"]),
        ({"judge": "preference", "sample_prompts": tmp_path / "free.txt"}, ["scorer preference"]),
        ({"sample_prompts": tmp_path / "empty.txt"}, ["empty.txt", "no prompt"]),
        ({"sample_prompts": tmp_path / "latin.txt"}, ["latin.txt", "UTF-8"]),
        ({"sample_prompts": tmp_path / "no.txt"}, ["no.txt", "cannot be read"]),
    ):
        sentence = refuse(argv(sample_every=1, **flags), capsys)
        assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------
# In a run.

MEANS = {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.65, 4: 0.6}  # of the fake judge, by step; the start's is 0.5


def fake_judge(rank: int = 0):
    """(a judge that says MEANS, on other ranks 9; the draw that tells it the step)."""
    now, draw = [0], preview.Preview.draw

    def judge(images, prompts):  # the current pictures first, then the start's
        now.append(MEANS[0])
        return [now.pop(0) if rank == 0 else 9.0] * len(images)

    def spy(self, pipeline, step, pause):
        now[:] = [MEANS[step]]
        return draw(self, pipeline, step, pause)

    return judge, spy


@pytest.fixture
def judged(monkeypatch):
    """Runs in this process are judged by the fake judge, on pictures of two steps."""
    judge, draw = fake_judge()
    monkeypatch.setattr(scorers, "load", lambda name, folder, device="cpu": judge)
    monkeypatch.setattr(preview.Preview, "draw", draw)
    monkeypatch.setattr(preview, "STEPS", 2)


def bitwise(a: Path, b: Path) -> bool:
    a, b = (next(folder.glob("*.safetensors")) for folder in (a, b))
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


def test_best_is_the_model_of_its_step_also_after_a_crash(judged, argv, tmp_path, capsys):
    out = tmp_path / "run"

    def train(steps: int):
        each = {"sample_every": 1, "export_every": 1, "checkpoint_every": 1, "keep": 9}
        train_inpo.main(argv(steps=steps, judge="clip", guidance=2, **each))
        assert f"The model of step 2, whose pictures clip liked best, is in {out / 'best'}." in (
            capsys.readouterr().out
        )

    def check(step: int):
        assert json.loads((out / "best.json").read_text())["step"] == step
        assert bitwise(out / "best", out / "unets" / f"step_{step:06d}")
        others = {1, 2, 3} - {step}
        assert not any(bitwise(out / "best", out / "unets" / f"step_00000{n}") for n in others)

    train(3)
    check(2)
    for step in (2, 3):  # the checkpoints; so the run goes back to step 1
        (out / "checkpoints" / f"step_{step:06d}").rename(tmp_path / f"lost-{step}")
    (out / "best" / "made-by.txt").write_text("what step 2 left before the crash")
    train(4)
    check(2)
    assert not (out / "best" / "made-by.txt").exists()
    assert [line["step"] for line in lines(out)] == [0, 1, 2, 3, 4]
    assert [line["mean"] for line in lines(out)] == pytest.approx(list(MEANS.values()))
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert events.Scalars("judge/mean")[-1].value == pytest.approx(0.6)
    assert events.Scalars("train/loss")[-1].step == 4  # the monitor has not failed on a name
    assert all(line["seconds"] > 0 for line in read_metrics(out))


@pytest.mark.parametrize("instant", ["a kill after the checkpoint", "a signal amid drawing"])
def test_what_a_step_shows_is_made_on_resume_where_the_run_stopped_before(
    instant, judged, argv, tmp_path, monkeypatch, capsys
):
    (tmp_path / "four.txt").write_text("\n".join(PROMPTS))
    out, sample, drawn = tmp_path / "run", model.sample, []

    def train():
        each = {"sample_every": 1, "export_every": 2, "checkpoint_every": 2, "steps": 3}
        flags = {"judge": "clip", "guidance": 2, "sample_prompts": tmp_path / "four.txt"}
        train_inpo.main(argv(**each, **flags))

    def signal_at_the_first_of_step_2(*given):
        drawn.append(given[2])
        if len(drawn) == 5:  # two batches each of steps 0 and 1
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*given)

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as only, pytest.raises(SystemExit) as stop:
        if "kill" in instant:
            only.setattr(train_inpo.Run, "export", kill)
        else:
            only.setattr(model, "sample", signal_at_the_first_of_step_2)
        train()
    assert (out / "checkpoints" / "step_000002").exists()
    assert not (out / "samples" / "step_000002.png").exists()
    assert [line["step"] for line in lines(out)] == [0, 1]
    assert (out / "unets" / "step_000002").exists() == ("signal" in instant)
    if "signal" in instant:  # it did not wait for the second batch
        assert stop.value.code == 128 + signal.SIGTERM and len(drawn) == 5
        assert "Stopped by SIGTERM at step 2; the same command" in capsys.readouterr().out
    train()
    assert (out / "samples" / "step_000002.png").exists()
    assert [line["mean"] for line in lines(out)] == pytest.approx(list(MEANS.values())[:4])
    assert json.loads((out / "best.json").read_text())["step"] == 2
    assert bitwise(out / "best", out / "unets" / "step_000002")


def test_a_full_disk_costs_the_best_model_but_not_the_run(judged, argv, tmp_path, capsys):
    with small_disk(200_000), pytest.raises(SystemExit) as stop:  # less than a UNet
        train_inpo.main(argv(sample_every=1, export_every=1, judge="clip", guidance=2))
    out, said = tmp_path / "run", capsys.readouterr().err
    assert stop.value.code == 2 and said.count("the aligned model was not written") == 1
    for name in ("best", "unets/step_000001", "unets/step_000002"):
        assert f"Warning: {out / name} was not written" in said
    assert [line["step"] for line in read_metrics(out)] == [1, 2]
    assert [line["step"] for line in lines(out)] == [0, 1, 2]
    assert not list(out.glob("best*"))


@pytest.mark.slow
def test_under_zero_3_all_ranks_keep_the_best_adapters_together(argv, ds_config, tmp_path):
    each = {"sample_every": 1, "export_every": 1, "steps": 3, "judge": "clip", "guidance": 2}
    command = tmp_path / "command.json"
    command.write_text(json.dumps(argv(ds_config=ds_config(3), lora_rank=2, **each)))
    launch([str(command)], 2, "tests/test_preview.py")
    out = tmp_path / "run"
    assert json.loads((out / "best.json").read_text())["step"] == 2
    assert bitwise(out / "best", out / "unets" / "step_000002")


if __name__ == "__main__":
    judge, preview.Preview.draw = fake_judge(int(os.environ["RANK"]))
    scorers.load, preview.STEPS = lambda name, folder, device="cpu": judge, 2
    train_inpo.main(json.loads(Path(sys.argv[1]).read_text()))
