"""Laws of lab/compare.py: whose curves it draws, where, and what it refuses."""

import json

import pytest
from conftest import refusal
from matplotlib.colors import to_rgb
from PIL import Image

from evaluation import figures
from lab import compare


@pytest.fixture
def run(tmp_path):
    """run(name, method, lines, scores) -> the folder of a run."""

    def write(name: str, method: str = "inpo", lines: list = (), scores: list = ()):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"method": method}))
        for file, rows in {"metrics.jsonl": lines, "scores.jsonl": scores}.items():
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


ERRORS = {"err_winner": 0.2, "err_ref_winner": 0.3, "err_loser": 0.8, "err_ref_loser": 0.7}


def test_each_run_is_in_the_panels_that_it_has_something_for(run, tmp_path, monkeypatch):
    inpo = [{"step": n, "loss": 0.6, "implicit_accuracy": 0.7} | ERRORS for n in (1, 2, 3)]
    inpo += [{"step": 2, "held_out_loss": 0.65}]
    sft = [{"step": n, "loss": 0.1, "err_winner": 0.1, "lr": 1e-5} for n in range(1, 6)]
    score = {"step": 2, "scorer": "clip", "mean": 1.5, "start": 1.0, "win_rate": 0.75}
    runs = [run("a/one", "inpo", inpo, [score]), run("b/one", "sft", sft), run("c", "dpo", inpo)]
    drawn = []
    monkeypatch.setattr(figures, "overlay", lambda *given: drawn.append(given))
    compare.compare([*runs, runs[0]], tmp_path / "all.png")
    compare.compare(runs[::2], tmp_path / "pairs.png")
    panels, names, path = drawn[0]
    assert names == ["a/one", "b/one", "c"] and path == tmp_path / "all.png"
    found = {
        panel["title"]: {name: (x.tolist(), y.tolist()) for name, (x, y) in panel["lines"].items()}
        for panel in panels
    }
    both = "a/one", "c"
    assert found == {
        "Loss": {
            **{name: ([1, 2, 3], [0.6] * 3) for name in both},
            "b/one": ([1, 2, 3, 4, 5], [0.1] * 5),
        },
        "Implicit accuracy": {name: ([1, 2, 3], [0.7] * 3) for name in both},
        "Winner's error": {name: ([1, 2, 3], [pytest.approx(-0.1)] * 3) for name in both},
        "Loser's error": {name: ([1, 2, 3], [pytest.approx(0.1)] * 3) for name in both},
        "Drift of both errors": {name: ([1, 2, 3], [1.0] * 3) for name in both},
        "Learning rate": {"b/one": ([1, 2, 3, 4, 5], [1e-5] * 5)},
        "Held-out loss": {name: ([2], [0.65]) for name in both},
        "Judge's score": {"a/one": ([2], [1.5])},
        "Judge's win rate": {"a/one": ([2], [0.75])},
    }
    losses = [next(p for p in given[0] if p["title"] == "Loss") for given in drawn]
    assert [loss["y"] for loss in losses] == ["loss, each method's own", "loss (nats per pair)"]
    assert losses[0]["limit"] is None and losses[1]["limit"][1] == "log 2"


def test_what_is_no_run_is_refused_by_name(run, tmp_path):
    good, out = run("good", lines=[{"step": 1, "loss": 0.7}]), tmp_path / "out.png"
    (tmp_path / "file").touch()
    for name, words in {"no": "is no folder", "file": "is no folder"}.items():
        assert f"{tmp_path / name}: {words}" in refusal(
            compare.compare, [good, tmp_path / name], out
        )
    assert "not taken its first step" in refusal(compare.compare, [good, run("empty")], out)
    assert "no value" in refusal(compare.compare, [run("null", lines=[{"step": 1}])], out)
    assert "end in .png" in refusal(compare.compare, [good], tmp_path / "out.pdf")
    assert "cannot be written" in refusal(compare.compare, [good], tmp_path / "file" / "out.png")
    assert not out.exists()


def test_an_overlay_has_a_curve_of_each_run_in_its_colour(run, tmp_path):
    """Ten colours, of curves that lie apart; then more runs than there are colours."""
    runs = [
        run(f"run_${n}$", lines=[{"step": s, "loss": 0.1 * n + s / 1e4} for s in range(40 * n)])
        for n in range(1, 12)
    ]
    compare.main([*map(str, runs[:10]), "--out", str(tmp_path / "new" / "ten.png")])
    picture = Image.open(tmp_path / "new" / "ten.png").convert("RGB")
    for n in range(10):
        wanted = [round(255 * (1 - 0.85 * (1 - part))) for part in to_rgb(f"C{n}")]  # alpha
        near = sum(
            count
            for count, color in picture.getcolors(1 << 24)
            if max(abs(a - b) for a, b in zip(color, wanted, strict=True)) < 12
        )
        assert near > 30 * (n + 1), n
    compare.main([*map(str, runs), "--out", str(tmp_path / "eleven.png")])
    assert (tmp_path / "eleven.png").stat().st_size > 10_000
