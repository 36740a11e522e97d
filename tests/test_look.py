"""preparing/survey.py and preparing/look.py: what is counted, listed, drawn and written."""

import io
import json
from argparse import Namespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data
from preparing import look
from preparing.survey import report, survey
from system.files import UserError


def solid(level, size=(8, 8)):
    Image.new("L", size, level).convert("RGB").save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path):
    """Ten pairs and a tie. Pair 3 has no loser, pair 4 one picture twice, pair 5 is pair 0 again,
    pair 6 is pair 0 judged the other way, pair 7 is wide, pair 8 has no caption, pair 9 an empty
    one."""
    lines = []
    for i in range(11):
        both = [solid(10 * i), solid(10 * i + 5, (16, 8) if i == 7 else (8, 8))]
        if i in (5, 6):
            both = [solid(0), solid(5)]
        if i == 4:
            both[1] = both[0]
        paths = [f"{i}-{k}.png" for k in range(2)]
        for path, picture in zip(paths, both, strict=True):
            (tmp_path / path).write_bytes(picture)
        label = {6: 0, 10: 0.5}.get(i, 1)
        caption = {8: None, 9: ""}.get(i, f"caption {i}")
        lines.append(
            dict(
                zip(("jpg_0", "jpg_1", "label_0", "caption"), (*paths, label, caption), strict=True)
            )
        )
    (tmp_path / "3-1.png").unlink()
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_a_survey_counts_what_was_put_in(source):
    rows = data.read_pairs(str(source))
    found = survey(rows, range(len(rows)))
    assert [seen.row for seen in found if seen.reason] == [3, 4, 8]
    text = report(rows, found, lambda captions: [len(caption) + 70 for caption in captions])
    for words in (
        "10 pairs; 1 of 11 rows are ties",
        "read        all",
        "broken      3 (30.0%), the first is row 3 (from 0) of",
        "the first picture won in 9 (90.0%)",
        "2 of 10 pictures are in several pairs; 1 pairs are there again; 1 are judged both ways",
        "8 x 8 93%, 16 x 8 7%; 7% are not square; shorter side 8 to 8",
        "7 different; 1 empty",
        "longest 79; 6 (85.7%) of the captions are cut at 77",
    ):
        assert words in text, (words, text)


def test_workers_see_what_one_process_sees(source):
    rows = data.read_pairs(str(source))
    numbers = [7, 1, 3, 0]
    assert survey(rows, numbers, workers=2) == survey(rows, numbers)


def asked(source, out, **more):
    options = {"split": "train", "columns": [], "workers": 0, "model": "tiny"}
    return Namespace(source=str(source), out=out, **options | {"sample": 100, "seed": 0} | more)


def test_look_draws_winner_left_and_loser_right(source, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        look.figures, "grid", lambda rows, *_: drawn.extend(rows) or Image.new("RGB", (9, 9))
    )
    look.look(asked(source, tmp_path / "out" / "look.png"))
    assert (tmp_path / "out" / "look.png").is_file()
    levels = {tuple(int(np.asarray(image)[0, 0, 0]) for image in row) for row in drawn}
    assert levels == {(10 * i, 10 * i + 5) for i in (0, 1, 2, 7, 9)} | {(5, 0)}
    said = capsys.readouterr().out
    assert "Look at" in said and "tokens      median" in said


def test_check_lists_every_pair_that_is_left_out_with_its_reason(source, tmp_path):
    look.check(asked(source, tmp_path / "rejected.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(line["row"], line["file"]) for line in lines] == [(i, str(source)) for i in (3, 4, 8)]
    reasons = [line["reason"] for line in lines]
    assert reasons[0].startswith("jpg_1: there is no file") and reasons[2] == "it has no caption"
    assert reasons[1] == "both pictures are the same"


def test_check_lists_rows_without_a_valid_label(source, tmp_path):
    lines = source.read_text().splitlines() * 20
    lines[12] = lines[12].replace('"label_0": 1', '"label_0": 3')
    source.write_text("\n".join(lines))
    look.check(asked(source, tmp_path / "rejected.jsonl"))
    found = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert {"file": str(source), "row": 12, "reason": "it has no valid label"} in found
    assert len(found) == 20 * 3 + 1


def test_a_converted_file_has_the_same_pairs(source, tmp_path, capsys):
    out = tmp_path / "converted.parquet"
    look.convert(asked(source, out))
    assert pq.read_schema(out).names == ["jpg_0", "jpg_1", "label_0", "caption"]
    before, after = data.read_pairs(str(source)), data.read_pairs(str(out))
    whole = [i for i in range(10) if i not in (3, 4, 8)]
    assert [after[k] for k in range(len(after))] == [before[i] for i in whole]
    assert "7 pairs in" in (said := capsys.readouterr().out) and "3 broken ones" in said
    look.convert(asked(source, out))
    assert "is there already" in capsys.readouterr().out
    source.write_text(source.read_text().replace("caption 1", "other"))
    with pytest.raises(UserError, match="was written by another command"):
        look.convert(asked(source, out))


def test_without_the_model_tokens_are_not_counted_and_it_is_said(source, tmp_path, capsys):
    look.look(asked(source, tmp_path / "look.png", model=str(tmp_path)))
    said = capsys.readouterr()
    assert "tokens  " not in said.out and "tokens are not counted" in said.err
