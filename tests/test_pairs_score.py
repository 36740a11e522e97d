"""Laws of pairs.py score, on drawings of toy.py and plain colours."""

import io
import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from launch import start
from PIL import Image

import data
import pairs
import toy
from evaluation import scorers, winrate
from preparing import table

JUDGES = ("pickscore", "hps", "hps-v2.0", "preference")
SCALE = {"pickscore": 1, "hps": 100, "hps-v2.0": 100, "preference": 20}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """40 pairs of toy.py in pairs.parquet, some of them ties; their rows that are none."""
    monkeypatch.chdir(tmp_path)
    toy.write_pairs(Path("pairs.parquet"), 40, tie=0.05)
    found = pq.read_table("pairs.parquet").to_pylist()
    kept = [row for row in found if row["label_0"] != 0.5]
    assert len(kept) < len(found)
    return kept


def score(*options, source="pairs.parquet", judge="preference", out="out.parquet") -> list[dict]:
    pairs.main(["score", str(source), "--judge", judge, "--out", str(out), *options])
    return pq.read_table(out).to_pylist()


def write(rows: list[dict], path="pairs.parquet"):
    pq.write_table(pa.Table.from_pylist(rows), path)


def brightness(folder, device):
    """A judge in 0..0.02, so that no judge's softmax saturates."""
    return lambda images, texts: torch.tensor(
        [np.asarray(image).mean() / 12_800 for image in images], dtype=torch.float64
    )


def brightness_of(data: bytes) -> float:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean() / 12_800


def other_bytes(data: bytes) -> bytes:
    """Of the same pixels: the same bytes twice would be a broken pair."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, "BMP")
    return buffer.getvalue()


def refused(capsys, *options, code: int = 2, **given) -> str:
    with pytest.raises(SystemExit) as stop:
        score(*options, **given)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == code and said.startswith("pairs.py: ")
    return said


# --------------------------------------------------------------------------------------------------
# What strength is.


@pytest.mark.parametrize("judge", JUDGES)
def test_strength_is_the_softmax_of_both_scores_at_the_winner(judge, drawn, monkeypatch):
    monkeypatch.setitem(scorers.SCORERS, judge, brightness)
    found = score(judge=judge)
    assert len(found) == len(drawn)
    for row, before in zip(found, drawn, strict=True):
        assert row | {"strength": 0} == before | {"strength": 0}  # the toy's own is replaced
        both = torch.tensor([brightness_of(row["jpg_0"]), brightness_of(row["jpg_1"])])
        won = torch.softmax(SCALE[judge] * both.double(), 0)[0 if row["label_0"] == 1 else 1]
        assert row["strength"] == pytest.approx(won.item(), abs=1e-7)
    assert {row["strength"] > 0.5 for row in found} == {True, False}


def test_log_odds_take_the_place_of_the_judges_own_and_give_one_to_any(drawn, capsys):
    own = [row["strength"] for row in score()]
    half = [row["strength"] for row in score("--log-odds", "10", out="b.parquet")]
    odds = np.log(own) - np.log1p(-np.array(own))
    assert half == pytest.approx(1 / (1 + np.exp(-odds / 2)))
    assert "log_odds: 10.0 there, None now" in refused(capsys, out="b.parquet")
    given = [
        row["strength"] for row in score("--log-odds", "1", judge="faithfulness", out="c.parquet")
    ]
    assert {*np.round(given, 6)} <= {0.5, *np.round([1 / (1 + math.e), math.e / (1 + math.e)], 6)}
    with pytest.raises(SystemExit):
        score("--log-odds", "0")
    assert "--log-odds: 0 is not above 0" in capsys.readouterr().err


def test_swapping_pictures_and_label_leaves_the_strength_and_the_label_alone_turns_it(drawn):
    before = [row["strength"] for row in score()]
    write([row | {"jpg_0": row["jpg_1"], "jpg_1": row["jpg_0"], "label_0": 1 - row["label_0"]}
           for row in drawn], "swapped.parquet")  # fmt: skip
    write([row | {"label_0": 1 - row["label_0"]} for row in drawn], "turned.parquet")
    assert [r["strength"] for r in score(source="swapped.parquet", out="a.parquet")] == before
    turned = [row["strength"] for row in score(source="turned.parquet", out="b.parquet")]
    assert turned == pytest.approx([1 - strength for strength in before])


def test_the_judge_that_labelled_the_pairs_agrees_with_all(drawn, capsys):
    assert min(row["strength"] for row in score()) > 1 / (1 + math.exp(-20 * 0.05))
    assert "preference agrees with 100.0% [" in capsys.readouterr().out


def test_agreement_is_the_share_above_one_half_with_its_interval(drawn, capsys):
    """A pair of equal pictures has strength 0.5, and does not count."""
    turned = [row | ({"label_0": 1 - row["label_0"]} if i % 3 == 0 else {})
              for i, row in enumerate(drawn)]  # fmt: skip
    turned.append(drawn[0] | {"jpg_1": other_bytes(drawn[0]["jpg_0"])})
    write(turned)
    right = [i % 3 > 0 for i in range(len(drawn))] + [False]
    low, high = winrate.interval(right, [row["caption"] for row in turned], share=True)
    assert score()[-1]["strength"] == 0.5
    said = f"agrees with {np.mean(right):.1%} [{low:.1%}, {high:.1%}] of the labels"
    assert said in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# What is read and written.


def test_broken_pairs_are_listed_with_their_place_and_left_out(drawn, capsys):
    tie = drawn[0] | {"label_0": 0.5}
    write([tie, drawn[0] | {"jpg_1": b"no picture"}, *drawn[1:5], drawn[5] | {"jpg_0": None}])
    found = score()
    assert [row["jpg_0"] for row in found] == [row["jpg_0"] for row in drawn[1:5]]
    assert all(row["strength"] > 0.5 for row in found)
    lines = [json.loads(line) for line in Path("out.broken.jsonl").read_text().splitlines()]
    places = [(line["row"], line["file"], line["file_row"]) for line in lines]
    assert places == [(0, "pairs.parquet", 1), (5, "pairs.parquet", 6)]
    assert [line["reason"].split(":")[0] for line in lines] == ["jpg_1", "jpg_0"]
    said = capsys.readouterr().out
    assert "4 pairs in out.parquet; 2 broken ones are left out, see out.broken.jsonl" in said
    write([drawn[0] | {"jpg_1": b""}])
    assert "all 1 pairs of pairs.parquet are broken: jpg_1: " in refused(capsys, out="b.parquet")


def test_a_row_group_is_written_as_soon_as_it_is_large(drawn, monkeypatch):
    monkeypatch.setattr(table, "GROUP_BYTES", 1)
    one_each = score()
    monkeypatch.setattr(table, "GROUP_BYTES", 2**26)
    monkeypatch.setattr(table, "GROUP_ROWS", 7)
    assert score(out="b.parquet") == one_each
    groups = [pq.ParquetFile(file).num_row_groups for file in ("out.parquet", "b.parquet")]
    assert groups == [len(drawn), math.ceil(len(drawn) / 7)]


def test_training_reads_what_score_has_written(drawn):
    found = score()
    read = data.read_pairs("out.parquet")
    assert [read[i] for i in range(len(read))] == found


def test_what_cannot_be_weighed_is_one_sentence(drawn, capsys, monkeypatch):
    for judge in ("clip", "aesthetic", "faithfulness"):
        said = refused(capsys, judge=judge)
        assert f"--judge {judge} orders pictures, but gives no probability" in said
    assert "would become one of the pairs of ." in refused(capsys, source=".")
    assert "another program wrote it" in refused(capsys, out="pairs.parquet")
    nan = lambda *_: lambda images, texts: torch.full((len(images),), math.nan)  # noqa: E731
    monkeypatch.setitem(scorers.SCORERS, "hps", nan)
    said = refused(capsys, judge="hps")
    assert said.endswith("the score of jpg_0 of row 0 (from 0) is nan, no finite number.")
    assert not Path("out.parquet").exists()


def test_a_changed_command_is_refused_and_a_complete_one_says_so(drawn, capsys, monkeypatch):
    score()
    score()
    assert capsys.readouterr().out.endswith("out.parquet is complete.\n")
    monkeypatch.setitem(scorers.SCORERS, "hps", brightness)
    assert "judge: preference there, hps now" in refused(capsys, judge="hps")
    write(drawn[1:])
    assert "fingerprint: " in refused(capsys)
    assert not Path("out.parts").exists()


# --------------------------------------------------------------------------------------------------
# A kill, and two ranks.

SLOW = """
import sys, time
import pairs, toy
from preparing import parts

parts.PART, judge = 4, toy.preference
if sys.argv[1] == "slow":
    wait = lambda image: time.sleep(0.02) or judge(image)
    from evaluation import scorers
    scorers.SCORERS["preference"] = lambda *_: scorers.exact(lambda image, _: wait(image), *_)
pairs.main(["score", *sys.argv[2:]])
"""


def test_killed_and_continued_by_two_ranks_it_writes_the_bytes_of_one(drawn, tmp_path):
    score()
    argv = [tmp_path / "pairs.parquet", "--judge", "preference", "--out", tmp_path / "b.parquet"]
    (child,) = start(["slow", *argv], 1, SLOW)
    while not (tmp_path / "b.parts/00001.json").exists() and child.returncode is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL and not (tmp_path / "b.parquet").exists()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "b.parts").glob("0*.json")}
    kept = {file.name: when for file, when in kept.items()}
    assert len(kept) < len(drawn) // 4
    children = start(["fast", *argv], 2, SLOW)
    ends = [child.communicate(timeout=200) for child in children]
    assert [child.returncode for child in children] == [0, 0], ends
    assert Path("b.parquet").read_bytes() == Path("out.parquet").read_bytes()
    assert ends[0][0].count("pairs in") == 1 and ends[1][0] == ""
