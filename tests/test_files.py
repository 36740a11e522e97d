"""Laws of files.py: what is damaged is one sentence or skipped, what is written is on the disk."""

import json
import os
from pathlib import Path

import pytest
from conftest import refusal

from system.files import read_json, read_log, replacing, write
from training.folder import read_metrics
from training.preview import is_score

DAMAGED = {
    "empty": b"",
    "nothing but NULs": b"\0" * 64,
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "cut short": b'{"a": 1',
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "nested too deeply": b"[" * 200_000,
    "a number of 5,000 digits": b'{"a": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_one_sentence_that_names_it(kind, tmp_path):
    file = tmp_path / "run.json"
    file.write_bytes(DAMAGED[kind])
    sentence = refusal(read_json, file, "name another folder")
    assert f"{file} cannot be read (" in sentence and "name another folder" in sentence


def test_what_is_no_file_is_one_sentence_and_is_not_waited_for(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, why in {"folder": "no file", "pipe": "no file", "absent": "No such file"}.items():
        assert why in refusal(read_json, tmp_path / name)
        if name != "absent":
            assert why in refusal(read_log, tmp_path / name, bool)
    assert read_log(tmp_path / "absent", bool) == []


def test_damaged_lines_of_a_log_are_skipped_and_counted_in_one_warning(tmp_path, capsys):
    file, odd = tmp_path / "metrics.jsonl", [*DAMAGED.values()]
    odd += [b"{}", b'{"step": "2"}', b'{"step": null}', b'{"step": true}', b'{"step": 1.5}']
    odd += [b'{"step": -1}', b'{"step": NaN}', b'{"step": 2, "loss": []}']
    good = [json.dumps({"step": step, "loss": None}).encode() for step in (1, 2, 3)]
    file.write_bytes(b"\n".join([good[0], *odd, good[1], b" ", good[2], b'{"step": 4, "lo']))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert [line["step"] for line in read_metrics(tmp_path, until=2)] == [1, 2]
    said = f"{file}: {len(odd) + 1} of {len(odd) + 4} lines are damaged and were skipped."
    assert capsys.readouterr().err == f"Warning: {said}\n"  # once, however often it is read


def test_what_was_measured_of_a_step_later_on_is_part_of_its_line(tmp_path):
    lines = [{"step": 1, "loss": 2}, {"step": 2, "loss": 1}, {"step": 2, "held_out_loss": 3}]
    lines += [{"step": 3, "loss": 0}, {"step": 2, "held_out_loss": 4}]  # a resumed run's
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = [lines[0], {"step": 2, "loss": 1, "held_out_loss": 4}, lines[3]]
    assert read_metrics(tmp_path) == expected and read_metrics(tmp_path, until=1) == lines[:1]


def test_a_line_of_scores_has_a_step_a_scorer_and_a_mean():
    line = {"step": 3, "scorer": "clip", "mean": 0.5}
    assert is_score(line)
    for key, value in {"step": "3", "scorer": None, "mean": "0.5"}.items():
        assert not is_score(line | {key: value})
        assert not is_score({k: v for k, v in line.items() if k != key})


def test_a_file_and_every_file_of_a_folder_are_on_the_disk_before_their_name_is(
    tmp_path, monkeypatch
):
    done, fsync, replace = [], os.fsync, Path.replace

    def synced(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".")[0])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    write(tmp_path / "run.json", "{}")
    assert done == ["run", "rename", tmp_path.name]
    done.clear()
    with replacing(tmp_path / "best") as scratch:
        (scratch / "unet").mkdir(parents=True)
        (scratch / "unet" / "weights").write_text("w")
    assert done == ["unet", "weights", "best", "rename", tmp_path.name]


def test_text_that_is_not_unicode_is_written_with_escapes(tmp_path):
    write(tmp_path / "card.md", "out/\udcff")  # the name of a folder that is not UTF-8
    assert (tmp_path / "card.md").read_text() == "out/\\udcff"
