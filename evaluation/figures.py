"""Pictures for people: image grids and training curves.

A grid shows prompts as rows and models, or training steps, as columns; curves shows what
metrics.jsonl recorded. Needs Pillow and NumPy, and matplotlib for the curves alone.
"""

import math
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from system.text import printable

# --------------------------------------------------------------------------------------------------
# Image grids.

MARGIN, GAP = 16, 8  # pixels around the grid, and between its parts
SMALLEST, LARGEST = 128, 512  # pixels: pictures are enlarged to at least, reduced to at most this


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
    """Break text into at most `lines` lines of at most `width` pixels; a cut is marked "..."."""
    text = printable(" ".join(text.split()))
    for characters in range(max(4, min(len(text), int(width))), 3, -1):
        broken = textwrap.wrap(text, characters, max_lines=lines, placeholder="...")
        if all(font.getlength(line) <= width for line in broken):
            return broken
    return []


def grid(
    images: list[list[Image.Image]], rows: list[str] = (), columns: list[str] = ()
) -> Image.Image:
    """A labelled picture of images[row][column] on white, RGB.

    rows, columns: labels, usually prompts and models; () leaves no room for them. Small pictures
    are enlarged (64 px to 128 px), large ones reduced to 512 px. All cells are as large as the
    largest picture; smaller ones are fitted to it. Rows may differ in length. Raises ValueError
    without a picture, or where the number of labels is wrong."""
    pictures = [image for row in images for image in row]
    across = max((len(row) for row in images), default=0)
    if not pictures:
        raise ValueError("a grid needs at least one picture.")
    if (rows and len(rows) != len(images)) or (columns and len(columns) != across):
        raise ValueError(f"{len(rows)} x {len(columns)} labels for {len(images)} x {across} cells.")
    width, height = max(image.width for image in pictures), max(image.height for image in pictures)
    side = max(width, height)
    scale = max(1, math.ceil(SMALLEST / side)) * min(1, LARGEST / side)
    width, height = round(width * scale), round(height * scale)  # of a cell

    font = ImageFont.load_default(size=min(28, max(14, width / 10)))
    line = sum(font.getmetrics()) + 2
    label_width = min(260, max(110, width))
    heads = [wrap(text, font, width, 3) for text in columns]
    x0 = MARGIN + (label_width + GAP if rows else 0)  # (x0, y0): corner of the first picture
    y0 = MARGIN + (max(len(head) for head in heads) * line + GAP if columns else 0)
    canvas_size = (
        x0 + across * (width + GAP) - GAP + MARGIN,
        y0 + len(images) * (height + GAP) - GAP + MARGIN,
    )
    canvas = Image.new("RGB", canvas_size, "white")
    draw = ImageDraw.Draw(canvas)
    for j, head in enumerate(heads):  # text ends just above the pictures
        corner = x0 + j * (width + GAP) + width / 2, y0 - GAP - len(head) * line
        draw.text(corner, "\n".join(head), "black", font, "ma", spacing=4, align="center")
    for i, row in enumerate(images):
        y = y0 + i * (height + GAP)
        if rows:
            text = "\n".join(wrap(rows[i], font, label_width, max(1, height // line)))
            draw.text((MARGIN, y + height / 2), text, "#333333", font, "lm", spacing=4)
        for j, image in enumerate(row):
            larger = width >= image.width and height >= image.height
            how = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
            cell = ImageOps.pad(image.convert("RGB"), (width, height), how, "white")
            canvas.paste(cell, (x0 + j * (width + GAP), y))
    return canvas


def beside(pictures: list[Image.Image]) -> Image.Image:
    """Pictures in a row, their tops in a line, on white."""
    width, height = sum(p.width for p in pictures), max(p.height for p in pictures)
    canvas, x = Image.new("RGB", (width, height), "white"), 0
    for picture in pictures:
        canvas.paste(picture, (x, 0))
        x += picture.width
    return canvas


# --------------------------------------------------------------------------------------------------
# Training curves.

WINNER, LOSER, BOTH, GREY, HELD = "#1a7f5a", "#c8472b", "#2f5d9b", "#888888", "#d08a1d"
PANELS = [  # heading, y axis and its unit, value where policy == reference, (who, colour, keys)
    ("Loss", "loss (nats per pair)", math.log(2), "log 2",
     [("", BOTH, "loss"), ("held out, ", HELD, "held_out_loss")]),
    ("Implicit accuracy", "share of pairs", 0.5, "chance",
     [("", BOTH, "implicit_accuracy"), ("held out, ", HELD, "held_out_implicit_accuracy")]),
    ("Implicit rewards", "reward (nats)", 0.0, "reference",
     [("winner, ", WINNER, "reward_winner"), ("loser, ", LOSER, "reward_loser")]),
    ("Squared error against the reference", "err - err_ref (noise variance = 1)", 0.0, "reference",
     [("winner, ", WINNER, "err_winner - err_ref_winner"),
      ("loser, ", LOSER, "err_loser - err_ref_loser")]),
]  # fmt: skip


def series(metrics: list[dict], keys: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of "key" or "key - key" on the lines where all of it is a finite number."""
    first, *second = keys.split(" - ")
    y = np.array([line.get(first, math.nan) for line in metrics], dtype=float)
    for key in second:
        y -= np.array([line.get(key, math.nan) for line in metrics], dtype=float)
    x = np.array([line.get("step", i) for i, line in enumerate(metrics)], dtype=float)
    return x[np.isfinite(y)], y[np.isfinite(y)]


def running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values at each point, of as many as there are at the start."""
    return np.array([y[max(0, n - window) : n].mean() for n in range(1, len(y) + 1)])


LOSS = "nats per pair", (math.log(2), "log 2")  # of InPO: its unit, where policy == reference


def curves(
    metrics: list[dict],
    path: str | Path,
    title: str = "",
    loss: tuple[str, tuple[float, str] | None] = LOSS,
) -> None:
    """Draw the lines of metrics.jsonl into one PNG; a panel whose keys are missing says so.

    loss: the unit of the loss, and its value and that in words where policy == reference.

    Faint points are single steps, lines their running mean over a tenth of the run. Dashed: the
    value where the policy is the reference, where a run starts: loss log 2 (KTO: 1/2; SFT has no
    reference), accuracy 0.5 (ties count half), rewards and differences of error 0."""
    from matplotlib.figure import Figure  # unlike pyplot it keeps no global state

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        heading, unit, limit, limit_name, lines = panel
        if heading == "Loss":
            unit, (limit, limit_name) = f"loss ({loss[0]})", loss[1] or (None, "")
        for who, color, keys in lines:
            x, y = series(metrics, keys)
            window = max(1, len(y) // 10)
            label = f"{who}mean of {window} steps" if window > 1 else f"{who}single steps"
            axes.plot(x, y, ".", color=color, alpha=0.35, markersize=5, markeredgewidth=0)
            if len(y):
                axes.plot(x, running_mean(y, window), color=color, linewidth=1.8, label=label)
        if axes.get_legend_handles_labels()[1]:
            if limit is not None:
                axes.axhline(limit, color=GREY, linestyle="--", lw=1, label=limit_name, zorder=1)
            axes.legend(frameon=False, fontsize=9)
            axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
            axes.xaxis.get_major_locator().set_params(integer=True)
        else:
            axes.text(0.5, 0.5, "not recorded", color=GREY, ha="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
        axes.set_title(heading, loc="left", fontsize=11, fontweight="bold")
        axes.set(xlabel="optimizer step", ylabel=unit)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(printable(title), fontsize=13, parse_math=False)  # "$" may be in a name
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# --------------------------------------------------------------------------------------------------
# Trajectories: what happens to several models while they train.


def trajectories(panels: list[dict], path: str | Path, title: str = "", columns: int = 2) -> None:
    """Draw panels of trajectories into one PNG.

    A panel has "title", "x" and "y" (labels with units), "lines": {name: [(xs, ys), ...]}, a
    trajectory per run of a model, and perhaps "span": the y axis begins at most at its lower end
    and ends at its upper one; "limits": both ends of the y axis; "log": whether the x axis is
    logarithmic, with a tick at each point; "line", a y to compare with. Faint lines are single
    runs, thick ones the mean of runs, point by point. Colours follow the order in the panel."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, axes in zip(panels, places[: len(panels)], strict=True):
        for i, (name, runs) in enumerate(panel["lines"].items()):
            for xs, ys in runs:
                axes.plot(xs, ys, color=f"C{i}", alpha=0.25, linewidth=1)
            x, y = np.mean([r[0] for r in runs], axis=0), np.mean([r[1] for r in runs], axis=0)
            axes.plot(x, y, ".-", color=f"C{i}", linewidth=2, markersize=7, label=name)
        axes.set_title(panel["title"], loc="left", fontsize=11, fontweight="bold")
        axes.set(xlabel=panel["x"], ylabel=panel["y"])
        if "span" in panel:
            low, high = panel["span"]
            axes.set_ylim(min(low, axes.get_ylim()[0]), high)
        if "limits" in panel:
            axes.set_ylim(panel["limits"])
        if "line" in panel:
            axes.axhline(panel["line"], color=GREY, linestyle="--", linewidth=1, zorder=1)
        if panel.get("log"):
            points = sorted({x for runs in panel["lines"].values() for xs, _ in runs for x in xs})
            axes.set_xscale("log")
            axes.set_xticks(points, [f"{x:.0e}".replace("e-0", "e-") for x in points])
            axes.xaxis.minorticks_off()
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(printable(title), fontsize=13, parse_math=False)  # "$" may be in a name
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


# --------------------------------------------------------------------------------------------------
# Overlays: the curves of many runs over each other.

STYLES = "-", "--", ":"


def overlay(panels: list[dict], names: list[str], path: str | Path) -> None:
    """Draw panels of curves into one PNG, with one legend for all: a colour and style per name.

    A panel has "title", "y" (a label with its unit), "lines": {name: (steps, values)}, and perhaps
    "limit": (value, its name), dashed, "smooth": whether a curve is the running mean over a tenth
    of its points, and "log": whether the y axis is logarithmic. Curves may have different lengths;
    few points are marked. Raises ValueError without a panel."""
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("an overlay needs at least one panel.")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    longest = max(len(printable(name)) for name in names)
    across = max(1, min(len(names), 46 * columns // (longest + 6)))  # in a row of the legend
    inches = 4.6 * columns, 3.2 * rows + 0.3 * math.ceil(len(names) / across)
    figure = Figure(figsize=inches, layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    handles = {}
    for panel, axes in zip(panels, places[: len(panels)], strict=True):
        for i, name in enumerate(names):
            if name in panel["lines"]:
                x, y = panel["lines"][name]
                y = running_mean(y, max(1, len(y) // 10)) if panel.get("smooth") else y
                look = {"color": f"C{i % 10}", "linestyle": STYLES[i // 10 % len(STYLES)]}
                look["marker"] = "." if len(y) <= 30 else None
                handles[name] = axes.plot(x, y, alpha=0.85, linewidth=1.6, **look)[0]
        if limit := panel.get("limit"):
            axes.axhline(limit[0], color=GREY, linestyle="--", linewidth=1, zorder=1)
            where = {"xy": (1, limit[0]), "xycoords": ("axes fraction", "data")}
            axes.annotate(limit[1], **where, fontsize=8, ha="right", va="bottom", color=GREY)
        if panel.get("log"):
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axes.set_title(panel["title"], loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.set_ylabel(panel["y"], fontsize=9)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    shown = {name: handles[name] for name in names if name in handles}
    place = {"loc": "outside upper center", "frameon": False, "ncols": across}
    legend = figure.legend([*shown.values()], [printable(name) for name in shown], **place)
    for text in legend.get_texts():
        text.set_parse_math(False)  # "$" may be in a name
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


# --------------------------------------------------------------------------------------------------
# Dots: estimates and their intervals, a row for each name.


def dots(panels: list[dict], path: str | Path, title: str = "") -> None:
    """Draw panels of estimates side by side into one PNG, with the names at the left.

    A panel has "title", "x" (a label with its unit), "rows": {name: (value, low, high)}, of the
    same names in the same order, from the top, and perhaps "line", a value to compare with. A value
    that is NaN leaves its row empty."""
    from matplotlib.figure import Figure

    names = list(panels[0]["rows"])
    figure = Figure(figsize=(3.1 * len(panels) + 1.6, 0.9 + 0.3 * len(names)), layout="constrained")
    places = figure.subplots(1, len(panels), squeeze=False, sharey=True).ravel()
    for panel, axes in zip(panels, places, strict=True):
        value, low, high = np.array([panel["rows"][name] for name in names], dtype=float).T
        error = np.array([value - low, high - value])
        axes.errorbar(value, names, xerr=error, fmt="o", color="C0", markersize=5, capsize=2)
        if "line" in panel:
            axes.axvline(panel["line"], color=GREY, linestyle="--", linewidth=1, zorder=1)
        axes.set_title(panel["title"], loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel(panel["x"], fontsize=9)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    places[0].set_ylim(len(names) - 0.5, -0.5)
    for label in places[0].get_yticklabels():
        label.set_parse_math(False)  # "$" may be in a name
    figure.suptitle(printable(title), fontsize=12, parse_math=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


# --------------------------------------------------------------------------------------------------
# Bars: what a whole is made of.


def bars(panels: list[dict], path: str | Path, title: str = "") -> None:
    """Draw panels of horizontal bars into one PNG, a bar in coloured parts, its sum at its end.

    A panel has "title", "x" (a label with its unit) and "bars": {name: {part: length}}, from the
    top. All bars have the same parts, in one order."""
    from matplotlib.figure import Figure

    rows = sum(1.6 + 0.45 * len(panel["bars"]) for panel in panels)
    figure = Figure(figsize=(8, rows), layout="constrained")
    heights = [1 + len(panel["bars"]) for panel in panels]
    places = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).ravel()
    for panel, axes in zip(panels, places, strict=True):
        left = dict.fromkeys(panel["bars"], 0.0)
        for i, part in enumerate(next(iter(panel["bars"].values()), {})):
            lengths = {name: parts[part] for name, parts in panel["bars"].items()}
            axes.barh(
                [*lengths], [*lengths.values()], left=[*left.values()], color=f"C{i}", label=part
            )
            left = {name: left[name] + length for name, length in lengths.items()}
        for i, total in enumerate(left.values()):
            axes.text(total, i, f" {total:.2f}", va="center", fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.set_title(panel["title"], loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(panel["x"])
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(printable(title), fontsize=13, parse_math=False)  # "$" may be in a name
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
