"""Laws of figures.py: labelled grids and training curves."""

import math

import numpy as np
import pytest
from PIL import Image, ImageFont

from evaluation import figures

# --------------------------------------------------------------------------------------------------
# Image grids.


def solid(i, j, size=(64, 64)):
    return Image.new("RGB", size, (40 * i + 10, 60 * j + 10, 200))


def test_grid_puts_each_image_at_its_row_and_column():
    images = [[solid(i, j) for j in range(2)] for i in range(3)]
    bare = figures.grid(images)
    assert bare.size == (2 * 16 + 2 * 128 + 8, 2 * 16 + 3 * 128 + 2 * 8)
    long = "a very long prompt that has to be broken into several lines, or else it would not fit"
    labelled = figures.grid(images, [long, "b", "c"], ["base", "aligned"])
    dx, dy = labelled.width - bare.width, labelled.height - bare.height
    assert dx > 100 and dy > 14
    for i in range(3):
        for j in range(2):
            x, y = 16 + j * 136, 16 + i * 136
            for picture, left, top in ((bare, x, y), (labelled, x + dx, y + dy)):
                cell = picture.crop((left, top, left + 128, top + 128))
                assert cell.getcolors() == [(128 * 128, (40 * i + 10, 60 * j + 10, 200))]
    pixels = np.asarray(labelled.convert("L"))
    assert (pixels[:, :16] == 255).all() and (pixels[:, 16 + dx - 6 : 16 + dx] == 255).all()
    for i in range(3):  # something is written beside each row, more where the label is longer
        assert (pixels[16 + dy + i * 136 :][:128, 16 : 16 + dx] < 128).sum() > 5
    assert (pixels[: 16 + dy, 16 + dx : 144 + dx] < 128).any()


def test_grid_enlarges_small_pictures_and_reduces_large_ones():
    def side(size):
        return figures.grid([[solid(1, 1, size)]]).width - 2 * 16

    sizes = {10: 130, 64: 128, 100: 200, 128: 128, 300: 300, 512: 512, 1024: 512}
    assert {n: side((n, n)) for n in sizes} == sizes
    sharp = figures.grid([[Image.fromarray(np.eye(64, dtype=np.uint8) * 255)]])
    assert {color for _, color in sharp.getcolors()} == {(0, 0, 0), (255, 255, 255)}
    tall = figures.grid([[solid(0, 0, (128, 64)), solid(0, 1, (64, 128))]])  # shapes are kept
    assert [tall.getpixel((16 + 136 + x, 80))[1] for x in (10, 64, 118)] == [255, 70, 255]
    mixed = figures.grid([[solid(0, 0, (64, 64)), solid(0, 1, (128, 128))], [solid(1, 0)]])
    assert mixed.size == (2 * 16 + 2 * 128 + 8, 2 * 16 + 2 * 128 + 8)
    assert mixed.getpixel((16, 16)) == (10, 10, 200)
    assert mixed.getpixel((16 + 136 + 64, 16 + 136 + 64)) == (255, 255, 255)


def test_grid_refuses_labels_that_do_not_fit():
    one = [[solid(0, 0)]]
    for images, rows, columns in (([], (), ()), (one, ["a", "b"], ()), (one, (), ["a", "b"])):
        with pytest.raises(ValueError):
            figures.grid(images, rows, columns)


def test_labels_are_wrapped_to_their_width():
    font = ImageFont.load_default(size=14)
    text = "a magenta triangle on a black background, and Supercalifragilisticexpialidocious"
    lines = figures.wrap(text, font, 128, 9)
    assert all(font.getlength(line) <= 128 for line in lines) and 4 <= len(lines) <= 9
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = figures.wrap(text, font, 128, 2)
    assert len(cut) == 2 and cut[-1].endswith("...") and cut[0] in text


def count(path, color):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - rgb).max(-1) < 8).sum())


def test_curves_draw_what_was_recorded(tmp_path):
    signs = {"loss": -0.01, "reward_winner": 0.1, "reward_loser": -0.1, "err_winner": -0.01}
    signs |= {"err_loser": 0.01, "err_ref_winner": 0, "err_ref_loser": 0, "implicit_accuracy": 0.01}
    metrics = [
        {"step": i} | {key: 0.5 + i * slope for key, slope in signs.items()} for i in range(40)
    ]
    figures.curves(metrics, tmp_path / "new/all.png", "a title")
    colors = (figures.WINNER, figures.LOSER, figures.BOTH)
    assert Image.open(tmp_path / "new/all.png").size == (1500, 960)
    assert all(count(tmp_path / "new/all.png", color) > 500 for color in colors)
    partial = [{"step": 1, "loss": 0.7, "reward_winner": 0.0}, {"step": 2, "loss": math.nan}]
    partial += [{"step": 3, "loss": None, "reward_winner": 1.0}, {"step": 4, "loss": 0.5}]
    figures.curves(partial, tmp_path / "partial.png")
    assert [count(tmp_path / "partial.png", color) > 500 for color in colors] == [True, False, True]
    figures.curves(
        [{"step": i, "reward_loser": i, "implicit_accuracy": i} for i in range(9)],
        tmp_path / "two.png",
    )
    assert [count(tmp_path / "two.png", color) > 500 for color in colors] == [False, True, True]
    figures.curves([], tmp_path / "none.png")
    assert Image.open(tmp_path / "none.png").size == (1500, 960)
    assert [count(tmp_path / "none.png", color) for color in colors] == [0, 0, 0]


def test_curves_show_what_was_measured_of_held_out_pairs(tmp_path):
    lines = [{"step": i, "loss": 0.7 - i / 40, "implicit_accuracy": 0.5} for i in range(1, 21)]
    figures.curves(lines, tmp_path / "without.png")
    for line in lines[4::5]:
        line |= {"held_out_loss": 0.7, "held_out_implicit_accuracy": 0.4}
    figures.curves(lines, tmp_path / "with.png")
    drawn = [count(tmp_path / f"{name}.png", figures.HELD) for name in ("without", "with")]
    assert drawn[0] == 0 and drawn[1] > 1000


def test_dots_lie_at_their_values_in_the_order_of_the_rows(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    rows = {"b $2": (0.5, 0.4, 0.7), "a": (0.3, 0.25, 0.35)}
    empty = {"b $2": (math.nan,) * 3, "a": (0.9, 0.8, 0.95)}
    panels = [
        {"title": "one", "x": "share", "rows": rows, "line": 0.45},
        {"title": "two", "x": "share", "rows": empty},
    ]
    figures.dots(panels, tmp_path / "new" / "dots.png", "$")
    assert Image.open(tmp_path / "new" / "dots.png").width > 600
    one, two = drawn[0].axes
    assert [label.get_text() for label in one.get_yticklabels()] == ["b $2", "a"]
    assert one.get_ylim()[0] > one.get_ylim()[1]  # the first row is on top
    points, _, (bars,) = one.containers[0]
    assert points.get_xdata().tolist() == [0.5, 0.3]
    ends = [[segment[0][0], segment[1][0]] for segment in bars.get_segments()]
    assert np.array(ends) == pytest.approx(np.array([[0.4, 0.7], [0.25, 0.35]]))
    assert np.isnan(two.containers[0][0].get_xdata()[0]) and two.get_title(loc="left") == "two"


def test_series_leave_out_what_is_missing_and_subtract_the_reference():
    metrics = [{"step": 5, "err": 0.5, "ref": 0.2}, {"step": 6, "err": 0.4}]
    metrics += [{"step": 7, "ref": 0.4}, {"step": 8, "err": 0.1, "ref": 0.3}]
    metrics += [{"step": 9, "err": None, "ref": 1}]
    x, y = figures.series(metrics, "err - ref")
    assert x.tolist() == [5, 8] and y == pytest.approx([0.3, -0.2])
    assert figures.series(metrics, "err")[0].tolist() == [5, 6, 8]
    assert figures.running_mean(np.array([1.0, 3, 5, 7]), 2).tolist() == [1, 2, 4, 6]
    assert figures.running_mean(np.array([]), 1).tolist() == []
