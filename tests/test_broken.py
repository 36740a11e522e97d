"""Laws of broken.py: how pairs that cannot be read are counted and listed, and stop a run."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import metrics, refusal, small_disk, weights
from launch import launch

import train_inpo
from training import plan
from training.broken import BrokenPairs


def spoiled(pairs, folder, rows):
    """A copy of the pairs of which these rows have a broken picture."""
    table = pq.read_table(pairs)
    bad = [b"no picture" if i in rows else v.as_py() for i, v in enumerate(table["jpg_1"])]
    folder.mkdir(exist_ok=True)
    pq.write_table(table.set_column(1, "jpg_1", pa.array(bad)), folder / "spoiled.parquet")
    return folder / "spoiled.parquet"


def listed(out):
    return [json.loads(line) for line in (out / "broken.jsonl").read_text().splitlines()]


@pytest.fixture
def unchecked(monkeypatch):
    """No sample is looked at before the run."""
    monkeypatch.setattr(plan, "check_sample", lambda *_: None)


def test_rows_are_counted_once_and_listed_with_their_reason(argv, pairs, tmp_path, capsys):
    """24 pairs, 3 of them broken, in two epochs of 6 steps of 4."""
    data, out = spoiled(pairs, tmp_path, (2, 7, 19)), tmp_path / "run"
    train_inpo.main(argv(data=data, steps=12, max_broken=0.5))
    lines, rows = metrics(out), listed(out)
    for epoch in (lines[:6], lines[6:]):
        assert sum(line["broken_pairs"] for line in epoch) == 3
    assert sorted(row["row"] for row in rows) == [2, 7, 19]
    for row in rows:
        assert row["file"] == str(data) and row["file_row"] == row["row"]
        assert row["reason"].startswith("jpg_1: is no picture that can be read")
    said = capsys.readouterr()
    assert said.err.count("pairs drawn so far are broken") == 1
    assert "Warning: 12.5% of the pairs drawn so far are broken (3 of 24)" in said.err
    assert "Warning: 3 of 24 pairs are broken (row " in said.out  # of the plan


def test_too_many_broken_pairs_stop_a_run_which_resumes_with_a_larger_limit(
    argv, pairs, tmp_path, capsys, unchecked
):
    flags = {"data": spoiled(pairs, tmp_path, (2, 7)), "steps": 7, "checkpoint_every": 2}
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train_inpo.main(argv(**flags))
    bar, said = capsys.readouterr().err.split("train_inpo.py: error: rank 0: ")
    assert stop.value.code == 2 and "Traceback" not in bar + said
    assert (
        "8.3% of the pairs drawn so far are broken (2 of 24), more than --max-broken 0.05" in said
    )
    assert f"{out}/broken.jsonl has their rows" in said and "larger --max-broken" in said
    assert len(metrics(out)) == 6 and len(listed(out)) == 2  # once all rows have been drawn
    with open(out / "broken.jsonl", "a") as log:
        log.write('{"row": 5, "rea')  # a kill in writing
    train_inpo.main(argv(**flags, max_broken=0.1))
    assert [line["step"] for line in metrics(out)] == [*range(1, 8)]
    assert sorted(row["row"] for row in listed(out)) == [2, 7]
    other = tmp_path / "other"
    train_inpo.main(argv(**flags | {"out": other, "max_broken": 1}))
    for name, weight in weights(out).items():
        assert weight.equal(weights(other)[name])


def test_the_count_of_a_resumed_run_is_that_of_its_steps(tmp_path):
    pairs = BrokenPairs(tmp_path, 0.05, batch=4, pairs=10**6)
    lines = [{"step": 1, "broken_pairs": 2}, {"step": 2, "broken_pairs": 0}, {"step": 3}]
    assert pairs.resume(lines) == 2 and not (tmp_path / "broken.jsonl").exists()


@pytest.mark.parametrize("share, said", [(0.009, ""), (0.02, "2.0%"), (0.06, None)])
def test_a_share_is_judged_from_a_thousand_pairs_on(share, said, tmp_path):
    pairs, steps = BrokenPairs(tmp_path, 0.05, batch=100, pairs=10**6), range(1, 13)
    for step in steps:
        bad = range(round(100 * share * (step - 1)), round(100 * share * step))
        pairs.note([{"n": 100 * step, "row": row, "reason": ""} for row in bad])
        assert pairs.drawn() <= 1  # one pair, in whose place others came that are broken too
        if said is None and step == 10:
            assert "(60 of 1,000)" in refusal(pairs.after_step, step, len(bad))
            return
        words = pairs.after_step(step, len(bad))
        assert (words != "") == (said != "" and step == 10)
        assert not words or words.startswith(said)
    assert len(listed(tmp_path)) == round(1200 * share)


def test_a_full_disk_keeps_the_list_for_later(tmp_path):
    pairs = BrokenPairs(tmp_path, 1, batch=1, pairs=10)
    with small_disk(0):
        pairs.note([{"n": 0, "row": 3, "reason": "x"}])
        pairs.after_step(1, 1)
    pairs.note([{"n": 1, "row": 4, "reason": "x"}, {"n": 1, "row": 3, "reason": "x"}])
    pairs.after_step(2, 1)
    assert [row["row"] for row in listed(tmp_path)] == [3, 4]


def test_two_ranks_list_what_either_met_and_stop_together(argv, pairs, tmp_path):
    """Of 96 pairs 6 are broken. Each rank has half of them, and says the same sentence."""
    table = pq.read_table(spoiled(pairs, tmp_path, (2,)))
    copies = pa.concat_tables([table] * 3 + [pq.read_table(spoiled(pairs, tmp_path, (2, 7, 19)))])
    pq.write_table(copies, tmp_path / "four.parquet")
    flags = {"data": tmp_path / "four.parquet", "batch": 24, "micro_batch": 12, "steps": 5}
    for said in launch(argv(**flags), 2, code=2):
        assert "6.2% of the pairs drawn so far are broken (6 of 96), more than --max-brok" in said
        assert "another rank is gone" not in said
    out = tmp_path / "run"
    assert sum(line["broken_pairs"] for line in metrics(out)) == 6 and len(metrics(out)) == 4
    assert sorted(row["row"] for row in listed(out)) == [2, 26, 50, 74, 79, 91]
