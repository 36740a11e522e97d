"""Laws of pairs.py make. Most run on a stub that draws toy pictures where a model samples; those of
kills and of ranks on a random pipeline, judged by brightness."""

import io
import json
import math
import signal
import time
import types
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import refusal
from launch import start
from PIL import Image

import data
import model
import pairs
import toy
from evaluation import gallery, models, prompts, scorers
from preparing import make, parts
from weights import loading

CAPTIONS = toy.prompts("train")


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A model that draws toy pictures, its calls in stub.calls; it is interrupted after `stop`."""
    monkeypatch.chdir(tmp_path)
    stub = types.SimpleNamespace(calls=[], stop=math.inf, weights="0" * 16)
    config = types.SimpleNamespace(sample_size=16)
    unet = types.SimpleNamespace(config=config, dtype=torch.float32)
    pipeline = types.SimpleNamespace(unet=unet, vae_scale_factor=4)
    pipeline.to = lambda device: pipeline

    def sample(pipeline, texts, seeds, *how):
        stub.calls.append(seeds)
        if len(stub.calls) > stub.stop:
            raise KeyboardInterrupt
        return [drawn(text, seed) for text, seed in zip(texts, seeds, strict=True)]

    monkeypatch.setattr(loading, "load_any", lambda *given: pipeline)
    monkeypatch.setattr(model, "identity", lambda pipeline: stub.weights)
    monkeypatch.setattr(model, "sample", sample)
    return stub


def drawn(caption: str, seed: int) -> Image.Image:
    return toy.draw(caption, np.random.default_rng(seed))


def run(*options, judge=("preference",), chosen="toy-train", out="out.parquet"):
    given = ["--model", "tiny", "--prompts", chosen, "--judge", *judge, "--out", str(out)]
    pairs.main(["make", *given, *map(str, options)])


def rows(out="out.parquet") -> list[dict]:
    return pq.read_table(out).to_pylist()


def refused(capsys, *options, code: int = 2, **given) -> str:
    """The sentence of a command that must not come to its end."""
    with pytest.raises(SystemExit) as stop:
        run(*options, **given)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == code and said.startswith("pairs.py: ")
    return said


def write_prompts(*texts) -> str:
    Path("some.txt").write_text("".join(f"{text}\n" for text in texts))
    return "some.txt"


# --------------------------------------------------------------------------------------------------
# What a pair is.


def test_the_winner_is_the_best_picture_of_its_prompt_and_the_loser_the_worst(stub):
    """By the judge, by pixels, and by the seeds that draw them again."""
    run("--limit", 9, "--per-prompt", 4, "--first-seed", 500)
    found = rows()
    assert len(found) == 9 and {row["label_0"] for row in found} == {0.0, 1.0}
    for row in found:
        win, lose = ("0", "1") if row["label_0"] else ("1", "0")
        for side in "01":
            image = Image.open(io.BytesIO(row[f"jpg_{side}"]))
            again = drawn(row["caption"], row[f"seed_{side}"])
            assert image.format == "PNG" and image.tobytes() == again.tobytes()
        place = [gallery.spaced(54, 9)[k] for k in range(9)].index(CAPTIONS.index(row["caption"]))
        seeds = [500 + 54 * i + gallery.spaced(54, 9)[place] for i in range(4)]
        values = {seed: toy.preference(drawn(row["caption"], seed)) for seed in seeds}
        ranked = sorted(seeds, key=values.get)
        assert (row[f"seed_{win}"], row[f"seed_{lose}"]) == (ranked[-1], ranked[0])
        margin = values[ranked[-1]] - values[ranked[0]]
        assert row["margin_preference"] == pytest.approx(margin) and row["model"] == "tiny"
        assert row["strength"] == pytest.approx(1 / (1 + math.exp(-20 * margin)))


def test_training_reads_the_file_as_any_other(stub):
    run("--limit", 8)
    read = data.read_pairs("out.parquet")
    assert len({row["label_0"] for row in read}) == 2
    for pair, row in zip(read, rows(), strict=True):
        assert pair == {key: row[key] for key in pair}
        winner, loser, caption, _ = data.read_pair(pair, 64)
        kept = [drawn(caption, row[f"seed_{i}"]) for i in range(2)]
        best, worst = sorted(kept, key=toy.preference, reverse=True)
        for pixels, image in ((winner, best), (loser, worst)):
            assert (pixels.permute(1, 2, 0).numpy() == np.asarray(image)).all()


def test_each_occurrence_of_a_prompt_and_each_round_has_a_pair_of_its_own_pictures(stub):
    chosen = write_prompts(CAPTIONS[0], CAPTIONS[1], CAPTIONS[0])
    run("--per-prompt", 2, "--rounds", 2, chosen=chosen)
    found = rows()
    assert [row["caption"] for row in found] == [CAPTIONS[i] for i in (0, 1, 0) * 2]
    seeds = [{row["seed_0"], row["seed_1"]} for row in found]
    assert seeds == [
        {1_000_000 + 6 * r + p + 3 * i for i in (0, 1)} for r in (0, 1) for p in range(3)
    ]


def test_of_several_judges_all_agree_and_the_first_ones_margin_is_the_largest():
    rng = np.random.default_rng(0)
    for _ in range(300):
        scores = rng.integers(4, size=(rng.integers(1, 4), rng.integers(2, 6))).astype(float)
        places = range(scores.shape[1])
        agreed = {(a, b): scores[0, a] - scores[0, b] for a in places for b in places
                  if all(row[a] > row[b] for row in scores)}  # fmt: skip
        best = make.best_pair(scores)
        assert best is None if not agreed else agreed[best] == max(agreed.values())


def test_prompts_on_which_the_judges_disagree_or_tie_are_left_out_and_counted(
    stub, monkeypatch, capsys
):
    """Here the second judge is against the first one for crosses, and ties for squares."""

    def second(folder, device):
        def judge(images, texts):
            signs = [("square" not in t) * (1 - 2 * ("cross" in t)) for t in texts]
            values = map(toy.preference, images)
            return torch.tensor([s * v for s, v in zip(signs, values, strict=True)])

        return judge

    monkeypatch.setitem(scorers.SCORERS, "clip", second)
    some = CAPTIONS[:12]
    run(judge=("preference", "clip"), chosen=write_prompts(*some))
    kept = [text for text in some if "cross" not in text and "square" not in text]
    found = rows()
    assert [row["caption"] for row in found] == kept
    ties, others = (sum(word in text for text in some) for word in ("square", "cross"))
    said = capsys.readouterr().out
    assert f"{len(kept)} pairs in out.parquet; groups without a pair: {ties} in which all" in said
    assert f"pictures tie, {others} on which the judges disagree" in said
    for row in found:
        assert row["margin_clip"] == pytest.approx(row["margin_preference"], rel=1e-6)
        first = make.winner_is_first(1_000_000, some.index(row["caption"]))
        assert row["label_0"] == first  # by its number among all groups
    chosen = write_prompts("a red cross on a white background")
    said = refused(capsys, judge=("preference", "clip"), chosen=chosen, out="none.parquet")
    assert "there is no pair in 1 groups" in said
    assert not Path("none.parquet").exists()


def test_the_winner_stands_on_each_side_equally_often():
    firsts = np.array([[make.winner_is_first(seed, n) for n in range(400)] for seed in (0, 1)])
    assert (abs(firsts.mean(1) - 0.5) < 0.1).all() and 0.4 < (firsts[0] == firsts[1]).mean() < 0.6


def test_a_first_judge_without_a_probability_leaves_strength_out(stub, monkeypatch):
    monkeypatch.setitem(scorers.SCORERS, "aesthetic", scorers.SCORERS["preference"])
    run("--limit", 2, judge=("aesthetic", "preference"))
    assert {"margin_aesthetic", "margin_preference"} <= rows()[0].keys()
    assert "strength" not in rows()[0]


# --------------------------------------------------------------------------------------------------
# The same command again, and another one.


def test_an_interrupted_command_goes_on_to_the_same_bytes(stub, monkeypatch, capsys):
    """Amid drawing and amid judging; parts that are there are not judged again."""
    run("--limit", 17)
    whole, calls = Path("out.parquet").read_bytes(), len(stub.calls)
    stub.calls.clear()
    stub.stop = 2
    assert "interrupted" in refused(capsys, "--limit", 17, out="again.parquet", code=130)
    stub.stop = math.inf
    judged, judge = [], toy.preference

    def stop_after(limit):
        def counted(image, caption=""):
            judged.append(caption)
            if len(judged) > limit:
                raise KeyboardInterrupt
            return judge(image)

        monkeypatch.setitem(scorers.SCORERS, "preference", lambda *_: by(counted))

    def by(function):
        return lambda images, texts: torch.tensor(
            [function(*both) for both in zip(images, texts, strict=True)], dtype=torch.float64
        )

    stop_after(parts.PART + 3)
    refused(capsys, "--limit", 17, out="again.parquet", code=130)
    assert len(stub.calls) == calls + 1  # the batch that was interrupted
    stop_after(math.inf)
    judged.clear()
    run("--limit", 17, out="again.parquet")
    assert len(judged) == 68 - parts.PART
    assert Path("again.parquet").read_bytes() == whole


def test_what_is_complete_is_said_to_be_and_not_drawn_again(stub, capsys):
    run("--limit", 2)
    before, calls = Path("out.parquet").stat().st_mtime_ns, len(stub.calls)
    run("--limit", 2)
    assert capsys.readouterr().out.endswith("out.parquet is complete.\n")
    assert Path("out.parquet").stat().st_mtime_ns == before and len(stub.calls) == calls


OTHER = {
    "steps: 12 there, 3 now": ["--steps", "3"],
    "images: 8 there, 16 now": ["--rounds", "2"],
    "seed of image 0: 1000000 there, 9 now": ["--first-seed", "9"],
}


def test_a_changed_command_is_refused(stub, capsys):
    run("--limit", 2)
    whole = Path("out.parquet").read_bytes()
    for sentence, options in OTHER.items():
        assert sentence in refused(capsys, "--limit", "2", *options)
    assert "per_prompt: 4 there, 2 now; rounds: 1 there, 2 now" in refused(
        capsys, "--limit", "2", "--per-prompt", "2", "--rounds", "2"
    )  # of the same pictures
    assert "judge: ['preference'] there, ['preference', 'faithfulness'] now" in refused(
        capsys, "--limit", "2", judge=("preference", "faithfulness")
    )
    stub.weights = "1" * 16
    assert "identity: 0000000000000000 there, 1111111111111111 now" in refused(capsys, "--limit", 2)
    assert Path("out.parquet").read_bytes() == whole
    toy.write_pairs(Path("theirs.parquet"), 2)
    assert "another program wrote it" in refused(capsys, "--limit", 2, out="theirs.parquet")


def test_scores_of_other_pictures_are_refused(stub, capsys):
    run("--limit", 2)
    Path("out.parquet").unlink()
    for picture in Path("out.pictures").glob("*.png"):
        picture.unlink()
    said = refused(capsys, "--limit", 2, "--first-seed", 9)
    assert "'out.pictures/preference' holds values of another command (images: " in said


def test_a_rank_that_fails_stops_the_others_before_their_next_part(tmp_path, monkeypatch):
    """What another rank does, whose GPU is too small, happens here amid this one's second part."""
    monkeypatch.setattr(parts, "PART", 4)
    others = iter([None, (tmp_path / "failed").touch])

    def work(numbers):
        if fail := next(others, None):
            fail()
        return list(numbers)

    parts.work_in_parts(tmp_path, {}, 18, work, "parts")
    assert len(list(tmp_path.glob("0*.json"))) == 2
    parts.work_in_parts(tmp_path, {}, 18, work, "parts")  # the next try begins without it
    assert parts.read_parts(tmp_path, 18) == list(range(18))
    (tmp_path / "00002.json").write_text('{"values": [8]}')
    said = refusal(parts.read_parts, tmp_path, 18)
    assert "00002.json' is damaged: it has no list of 4 values; delete it and repeat" in said


MISTAKES = {
    "--per-prompt must be at least 2.": ["--per-prompt", "1"],
    "--out 'pairs.json' must be named *.parquet.": ["--out", "pairs.json"],
    "is a folder, or lies in a file; name another one.": ["--out", "some.txt/a.parquet"],
    "one of the captions that the tiny model is judged on; take toy-train.": ["--prompts", "toy"],
    "'a fox' is not a toy caption, such as": ["--prompts", "some.txt"],
    "--base 'part' is no pipeline; name a folder or hub id of one.": ["--base", "part"],
    "Unknown model 'no/such/model': there is no folder": ["--model", "no/such/model"],
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_each_mistake_is_one_sentence_before_anything_is_drawn(sentence, stub, capsys):
    write_prompts("a fox")
    Path("part").mkdir()
    Path("part/config.json").write_text("{}")  # a UNet alone
    assert sentence in refused(capsys, *MISTAKES[sentence])
    assert not stub.calls and not Path("out.pictures").exists()


def test_benchmarks_may_be_drawn_with_a_note(stub, monkeypatch, capsys):
    some = prompts.PromptSet("parti", CAPTIONS[:2], None)
    monkeypatch.setattr(prompts, "read", lambda source: some)
    run(chosen="parti")
    assert "do not judge a model of these pairs on it." in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# A random pipeline: a real kill, and two real processes.

BRIGHT = """
import sys
import numpy as np, torch
import pairs
from evaluation import scorers
from preparing import parts

parts.PART = 4
scorers.SCORERS["hps"] = lambda folder, device: lambda images, texts: torch.tensor(
    [np.asarray(image).mean() / 255 for image in images], dtype=torch.float64
)
pairs.main(["make", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def real(checkpoint, tmp_path_factory):
    """(a command line without --out, what it writes in one go)."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "some.txt").write_text("a red circle\na blue square\na red circle\n")
    argv = ["--model", checkpoint(), "--prompts", folder / "some.txt", "--judge", "hps"]
    argv += ["--steps", 2, "--batch", 5, "--per-prompt", 3, "--rounds", 2]
    (child,) = start([*argv, "--out", folder / "whole.parquet"], 1, BRIGHT)
    said = child.communicate()
    assert child.returncode == 0 and "6 pairs in" in said[0], said
    return argv, (folder / "whole.parquet").read_bytes()


def test_two_ranks_give_the_file_of_one(real, tmp_path):
    argv, whole = real
    children = start([*argv, "--out", tmp_path / "out.parquet"], 2, BRIGHT)
    ends = [child.communicate(timeout=200) for child in children]
    assert [child.returncode for child in children] == [0, 0], ends
    assert (tmp_path / "out.parquet").read_bytes() == whole
    assert ends[0][0].count("6 pairs in") == 1 and ends[1][0] == ""


def test_a_killed_command_goes_on_to_the_same_bytes(real, tmp_path):
    argv, whole = real
    out = tmp_path / "out.parquet"
    (child,) = start([*argv, "--out", out], 1, BRIGHT)
    while not (tmp_path / "out.pictures/00007.png").exists() and child.returncode is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL and not out.exists()
    (child,) = start([*argv, "--out", out], 1, BRIGHT)
    said = child.communicate()
    assert child.returncode == 0, said
    assert out.read_bytes() == whole and not list(tmp_path.rglob("*.new"))
    kept = json.loads(pq.read_schema(out).metadata[b"pairs.py"])
    assert kept["judge"] == ["hps"] and kept["identity"] == model.identity(
        models.load({"model": str(argv[1]), "base": None, "dtype": "float32"})
    )
