"""Laws of held_out.py: nothing held out is trained on, looking at it changes no weight, and what is
seen is the training objective, the same on any number of ranks.

Runs hold out the 8 pairs of the caption "a blue circle", or take 6 pairs of a second source."""

import json
import math
import shutil
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from conftest import distance, metrics, png, refusal, refuse, weights
from launch import launch
from safetensors.torch import load_file

import data
import model
import train_inpo
from invert import ddim_invert
from training import folder, held_out, plan, preview
from training.flags import parse
from training.latents import generators
from weights import loading

# -------------------------------------------------------------------------------------------------
# Which pairs.


def pair(caption: str | None, one: int, two: int) -> dict:
    """Of pictures by number."""
    return {"caption": caption, "jpg_0": b"picture %d" % one, "jpg_1": b"picture %d" % two}


@pytest.fixture(scope="module")
def recurring() -> list[dict]:
    """400 rows; every caption recurs, and so does every third picture."""
    rng, rows = np.random.default_rng(0), []
    for i in range(400):
        one, two = (
            int(rng.integers(80)) if rng.random() < 0.1 else 100 + 2 * i + k for k in (0, 1)
        )
        rows.append(pair(f"caption {rng.integers(150)}", one, two))
    return rows


def contents(rows: list[dict]) -> set:
    return {row[name] for row in rows for name in ("caption", "jpg_0", "jpg_1")}


def test_nothing_that_is_held_out_occurs_in_training_by_caption_or_picture(recurring):
    group = held_out.groups(recurring)
    for seed in range(5):
        rows = held_out.choose(group, 0.1, seed)
        held = [recurring[row] for row in rows]
        trained = [recurring[row] for row in range(400) if row not in set(rows)]
        assert not contents(held) & contents(trained)
        assert 30 <= len(held) <= 40 and len(held) + len(trained) == 400
        assert rows == sorted(rows) == held_out.choose(group, 0.1, seed)
    assert held_out.choose(group, 0.1, 0) != held_out.choose(group, 0.1, 1)
    assert 50 < len(np.unique(group)) < 150  # rows of different captions hang together, not all


def test_rows_hang_together_over_others_and_an_empty_caption_joins_nothing():
    rows = [
        pair("a fox", 0, 1), pair("A  fox ", 2, 3), pair("a cat", 3, 4), pair("", 4, 5),  # a chain
        pair("", 6, 7), pair(None, 8, 9), pair("a dog", 10, 11),
    ]  # fmt: skip
    group = held_out.groups(rows)
    assert len(set(group[:4])) == 1 and len(set(group)) == 4


def test_pictures_are_one_where_length_and_both_ends_are_equal():
    long = b"x" * 20_000
    other = [
        long,
        b"y" + long[1:],
        long[:-1] + b"y",
        long + b"x",
        long[:9_000] + b"y" + long[9_001:],
    ]
    rows = [{"caption": "", "jpg_0": picture, "jpg_1": None} for picture in other]
    group = held_out.groups(rows)
    assert len(set(group[:4])) == 4 and group[4] == group[0]  # the middle is not read


def test_a_row_that_cannot_be_read_is_a_group_of_its_own():
    class Damaged(list):
        def __getitem__(self, row):
            if row == 1:
                raise OSError("a damaged cell")
            return super().__getitem__(row)

    assert held_out.groups(Damaged([pair("a", 0, 0)] * 3)).tolist() == [0, 1, 0]


def test_groups_that_are_larger_than_the_share_are_refused_and_training_keeps_a_pair():
    together = np.zeros(50, dtype=int)
    assert "smallest group that has captions or pictures in common has 50" in refusal(
        held_out.choose, together, 0.5, 0
    )
    assert len(held_out.choose(np.arange(2), 0.99, 0)) == 1


# -------------------------------------------------------------------------------------------------
# Places.


@pytest.mark.parametrize("rows, cells", [(3, 10), (50, 10), (500, 10), (40, 1)])
def test_places_are_even_in_t_in_cells_and_over_pairs(rows, cells):
    cell, row, t = held_out.layout(7, rows, cells, 1000)
    count = len(t)
    assert min(4 * rows, held_out.COUNT) <= count < min(4 * rows, held_out.COUNT) + cells
    assert (t // (1000 // cells) == cell).all() and len(set(Counter(cell.tolist()).values())) == 1
    assert (np.diff(t) >= 0).all() and t[0] < 1000 / count + 1 and t[-1] >= 999 - 1000 / count
    assert np.abs(t - (np.arange(count) + 0.5) * 1000 / count).max() <= 0.5 * 1000 / count + 1
    seen = Counter(row.tolist())
    assert len(seen) == min(rows, count) and max(seen.values()) - min(seen.values()) <= 1
    again = held_out.layout(7, rows, cells, 1000)
    assert all((a == b).all() for a, b in zip((cell, row, t), again, strict=True))


@pytest.mark.parametrize("world, micro", [(1, 1), (1, 4), (3, 2), (64, 4)])
def test_ranks_share_the_places_and_are_in_one_cell_at_a_time(world, micro, monkeypatch):
    one, shares = held_out.HeldOut.__new__(held_out.HeldOut), []
    one.args, one.plan = Namespace(micro_batch=micro), Namespace(strata=10)
    one.cell = held_out.layout(0, 5, 10, 1000)[0]
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shares.append(list(one.shares()))
    for batches in zip(*shares, strict=True):  # as many on every rank
        assert len({int(one.cell[place]) for places, _ in batches for place in places}) == 1
        assert all(len(places) == micro for places, _ in batches)
    counted = [places[counts].tolist() for share in shares for places, counts in share]
    assert sorted(sum(counted, [])) == list(range(len(one.cell)))


# -------------------------------------------------------------------------------------------------
# In a run.


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Six pairs whose winners are light, too, with captions and pictures of their own."""
    rows = {"jpg_0": [], "jpg_1": [], "label_0": [1.0] * 6, "caption": ["a green circle"] * 6}
    for i in range(6):
        rows["jpg_0"].append(png((220 + i, 255, 255)))
        rows["jpg_1"].append(png((0, 0, 20 + i)))
    path = tmp_path_factory.mktemp("second") / "pairs.parquet"
    pq.write_table(pa.table(rows), path)
    return path


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(preview, "STEPS", 1)


def logged(out: Path, training: bool) -> list[dict]:
    """What a run logged of training, or of its held-out pairs, without times."""
    keys = [k for k in metrics(out)[-1] if "second" not in k and k != "waiting"]
    keys = [key for key in keys if key == "step" or key.startswith("held_out") != training]
    return [{key: line.get(key) for key in keys} for line in metrics(out)]


@pytest.mark.parametrize(
    "flags",
    [
        {"checkpoint_every": 3},
        pytest.param({"lora_rank": 2, "method": "kto", "batch": 8}, marks=pytest.mark.slow),
    ],
)
def test_looking_at_held_out_pairs_changes_no_weight(flags, argv, ds_config, tmp_path, second):
    """Bitwise, though they are looked at between the steps."""
    flags = {"steps": 3, "sample_every": 1, **flags}
    for name, source in (("without", 0), ("with", second)):
        train_inpo.main(argv(out=tmp_path / name, held_out=source, **flags))
    one, two = tmp_path / "without", tmp_path / "with"
    assert logged(one, training=True) == logged(two, training=True)
    if "lora_rank" in flags:
        one, two = (load_file(next(out.glob("*.safetensors"))) for out in (one, two))
        assert distance(one, two) == 0
    else:
        assert distance(weights(one), weights(two)) == 0
    seen = logged(tmp_path / "with", training=False)
    assert [line["step"] for line in seen] == [1, 2, 3]
    assert all(isinstance(line["held_out_loss"], float) for line in seen)
    assert "held_out_loss" not in metrics(tmp_path / "without")[-1]


@pytest.mark.slow
def test_on_two_ranks_under_zero_3_the_values_are_those_of_one_and_no_weight_changes(
    argv, ds_config, tmp_path, second
):
    flags = {"steps": 2, "sample_every": 1}
    train_inpo.main(argv(out=tmp_path / "1", held_out=second, **flags))
    flags |= {"micro_batch": 1, "ds_config": ds_config(3)}
    launch(argv(out=tmp_path / "2", held_out=second, **flags), 2)
    launch(argv(out=tmp_path / "without", **flags), 2)
    one, two = (logged(tmp_path / name, training=False) for name in "12")
    assert len(one) == len(two) == 2 and len(one[0]) == 4
    for a, b in zip(one, two, strict=True):
        assert [*a.values()] == pytest.approx([*b.values()], rel=1e-3, abs=1e-4)
    assert distance(weights(tmp_path / "2"), weights(tmp_path / "without")) == 0


def test_a_share_is_kept_from_training_and_a_resumed_run_has_the_same(
    argv, tmp_path, monkeypatch, capsys
):
    out, drawn = tmp_path / "run", []
    read = data.read_pair

    def spy(pair, *given):
        drawn.append(pair["caption"])
        return read(pair, *given)

    def train(steps: int, **flags):
        each = {"held_out": 0.4, "sample_every": 2, "checkpoint_every": 1, "caption_dropout": 0}
        train_inpo.main(argv(steps=steps, **each | flags))

    monkeypatch.setattr(data, "read_pair", spy)
    train(2)
    trained, seen = drawn[24 : 24 + 8], drawn[24 + 8 :]  # the plan's sample; 2 steps; a look
    assert set(trained) == {"a red circle"} and set(seen) == {"a blue circle"}
    assert json.loads((out / "held_out.json").read_text())["rows"] == [*range(0, 24, 3)]
    first = logged(out, training=False)
    assert first[0].keys() == first[1].keys() and first[0]["held_out_loss"] is None

    monkeypatch.setattr(held_out, "groups", None)  # the pairs are not compared again
    train(4)
    assert logged(out, training=False)[:2] == first
    whole = tmp_path / "whole"
    monkeypatch.undo()
    monkeypatch.setattr(preview, "STEPS", 1)
    train(4, out=whole)
    for training in (True, False):
        assert logged(out, training) == logged(whole, training)
    capsys.readouterr()
    flags = {"steps": 5, "sample_every": 2, "caption_dropout": 0}
    assert "held_out: 0.4 there, 0.5 now" in refuse(argv(held_out=0.5, **flags), capsys)


def test_of_a_policy_that_is_the_reference_the_loss_is_log_2(argv, tmp_path, second):
    train_inpo.main(argv(held_out=second, lr=1e-12, steps=1))
    (line,) = metrics(tmp_path / "run")
    assert line["held_out_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(line["held_out_margin"]) < 1e-5
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| held_out_loss | 0.6931 |" in card


def test_what_is_logged_is_the_mean_over_places_taken_one_by_one(
    argv, checkpoint, tmp_path, second
):
    """With the policy that was saved and the start, image by image; 2 pairs, 10 places."""
    some = tmp_path / "some.parquet"
    pq.write_table(pq.read_table(second).slice(0, 2), some)
    train_inpo.main(argv(held_out=some, lr=1e-3))
    args, rows = parse("", argv(held_out=some)), data.read_pairs(str(some))
    start, trained = (loading.load_pipeline(str(path)) for path in (checkpoint(), args.out))
    abar, margins = model.alphas_cumprod(start), []
    with torch.no_grad():
        for place, (_, row, t) in enumerate(zip(*held_out.layout(0, 2, 10, 1000), strict=True)):
            *pictures, caption, _ = data.read_pair(rows[int(row)], 16)
            cond, t = model.encode_prompts(start, [caption], 16), torch.tensor([t])
            policy, frozen = (model.Denoiser(p.unet, cond, abar) for p in (trained, start))
            draws = [generators(0, [place], s) for s in (held_out.POSTERIOR, held_out.NOISE)]
            rewards = []
            for picture, drawn, noise in zip(pictures, *draws, strict=True):
                x0 = model.encode_images(start, picture[None], [drawn])
                xt, tau = ddim_invert(policy, x0, t, abar, 10, 0.1, [noise])
                err, err_ref = (((f(xt, t) - tau) ** 2).mean() for f in (policy, frozen))
                rewards.append(args.beta / 2 * (err_ref - err).item())
            margins.append(rewards[0] - rewards[1])
    line, margins = metrics(args.out)[-1], np.array(margins)
    assert line["held_out_margin"] == pytest.approx(margins.mean(), rel=1e-3, abs=1e-5)
    assert line["held_out_implicit_accuracy"] == pytest.approx((margins > 0).mean())
    losses = np.log1p(np.exp(-margins))
    assert line["held_out_loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert np.abs(margins).max() > 0.01


def test_a_broken_held_out_pair_is_left_out(argv, tmp_path, second):
    table = pq.read_table(second)
    pictures = table["jpg_1"].to_pylist()
    spoiled, less = tmp_path / "spoiled.parquet", tmp_path / "run"
    pq.write_table(table.set_column(1, "jpg_1", pa.array([b"none", *pictures[1:]])), spoiled)
    each = {"lr": 1e-12, "steps": 1, "max_broken": 0.5}
    sentence = refusal(plan.check, parse("", argv(held_out=spoiled)))
    assert sentence.startswith(f"--held-out {spoiled}: 1 of 6 pairs are broken")
    train_inpo.main(argv(held_out=spoiled, **each))
    assert metrics(less)[0]["held_out_loss"] == pytest.approx(math.log(2), abs=1e-6)
    table = table.set_column(1, "jpg_1", pa.array([b"none"] * 6))
    pq.write_table(table, spoiled)
    train_inpo.main(argv(held_out=spoiled, out=tmp_path / "none", **each | {"max_broken": 1}))
    assert metrics(tmp_path / "none")[0]["held_out_loss"] is None


def test_sft_logs_its_error_and_best_follows_the_held_out_loss(argv, tmp_path, second, capsys):
    out, flags = tmp_path / "run", {"method": "sft", "beta": None, "judge": "held-out"}
    each = {"sample_every": 1, "export_every": 1}
    train_inpo.main(argv(held_out=second, steps=3, lr=3e-3, **flags, **each))
    losses = {x["step"]: x["held_out_loss"] for x in metrics(out)}
    assert not any("held_out_margin" in line for line in metrics(out))
    best = min(losses, key=losses.get)
    line = json.loads((out / "best.json").read_text())
    assert (line["step"], line["mean"], line["start"]) == (best, -losses[best], None)
    names = [out / "best", out / "unets" / f"step_{best:06d}"]
    one, two = (load_file(next(name.glob("*.safetensors"))) for name in names)
    assert distance(one, two) == 0
    assert f"The model of step {best}, whose loss on the held-out" in capsys.readouterr().out
    assert "--judge held-out: no pairs are held out" in refuse(argv(judge="held-out"), capsys)


@pytest.mark.parametrize("value, words", [("1.0", "must lie between 0 and 1"), ("nan", "must lie")])
def test_a_share_that_is_none_is_refused(value, words, argv, capsys):
    assert words in refuse(argv(held_out=value), capsys)


def test_the_plan_tells_what_is_held_out_and_what_a_look_costs(argv, second):
    for value, words in ((0.4, "about 40.00% of the pairs"), (second, f"{second}, 6 pairs")):
        args = parse("", [*argv(held_out=value), "--dry-run"])
        places = len(held_out.layout(0, 10 if value == 0.4 else 6, 10, 1000)[0])
        cost = f"; {places * 2 * 7.5:.0f} UNet calls at each sample step"
        assert f"{words}{cost}" in plan.describe(args, plan.check(args))


def test_a_second_source_that_recurs_in_training_is_warned_about(argv, pairs, second, capsys):
    args = parse("", argv(held_out=pairs))
    held_out.split(args, plan.check(args))
    assert "24 of 24 held-out pairs have a caption or a picture" in capsys.readouterr().err
    args.held_out = str(second)
    held_out.split(args, plan.check(args))
    assert "have a caption" not in capsys.readouterr().err


def test_the_fingerprint_of_what_is_trained_on_tells_splits_apart(argv, pairs):
    """Also of such that differ in rows which data.fingerprint does not read."""
    args = parse("", argv(held_out=0.4))
    args.out.mkdir()
    whole = plan.check(args)
    found = [held_out.split(args, whole).fingerprint]
    file = args.out / "held_out.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"rows": [1, *said["rows"][1:]]}))
    found.append(held_out.split(args, whole).fingerprint)
    assert len({whole.fingerprint, *found}) == 3


# -------------------------------------------------------------------------------------------------
# Prompts of the pictures.


def test_prompts_are_captions_of_what_is_held_out_and_a_run_keeps_those_it_began_with(
    argv, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    command = argv(held_out=0.4, steps=1, sample_every=1, checkpoint_every=1)
    train_inpo.main(command)
    assert folder.read_record(out)["prompts"] == ["a blue circle"]
    assert len(list((out / "samples").glob("start_*"))) == 1
    args = parse("", command)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"prompts": ["a fox"]}))
    assert preview.choose_prompts(args, [{"caption": "other"}]) == ["a fox"]
    old = {k: v for k, v in record.items() if k not in ("prompts", "held_out", "recipe")}
    (out / "run.json").write_text(json.dumps(old))  # as a run of before has it
    assert preview.choose_prompts(args, [{"caption": "other"}]) == list(preview.PROMPTS)
    shutil.rmtree(out)
    assert preview.choose_prompts(args, [{"caption": "other"}]) == ["other"]


def test_captions_that_are_drawn_are_different_whole_and_a_function_of_data_and_seed():
    rows = [{"caption": text} for text in ("a", " a ", "b\n b", "", None, *"cdefgh")]
    found = preview.captions(rows, 0)
    assert found == preview.captions(rows, 0) and len(found) == len(set(found)) == 4
    assert any(preview.captions(rows, seed) != found for seed in range(1, 4))
    assert set(preview.captions(rows[:5], 0)) == {"a", "b b"}
    assert preview.captions(rows[3:5], 0) == []


def test_a_run_of_before_resumes(argv, tmp_path, pairs):
    """Its record knows neither recipe, nor prompts, nor what is held out."""
    out = tmp_path / "run"
    train_inpo.main(argv(steps=1, checkpoint_every=1))
    record = json.loads((out / "run.json").read_text())
    old = {k: v for k, v in record.items() if k not in ("prompts", "held_out", "recipe")}
    (out / "run.json").write_text(json.dumps(old))
    train_inpo.main(argv(steps=2, checkpoint_every=1))
    assert [line["step"] for line in metrics(out)] == [1, 2]
