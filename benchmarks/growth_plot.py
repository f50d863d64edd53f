"""A chart of the curves of `growth.py`: points are measured, dashed lines are predictions of the plan."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.record import Results

MEASURED, PLANNED = "#1f5fa8", "#c2571a"
PARTS = ("#1f5fa8", "#6f9fd0", "#b5cde6", "#c2571a", "#e3a273", "#f2d3bd", "#7a7a7a")
DARK = (PARTS[0], PARTS[3], PARTS[6])
PANELS = (
    ("codes", "training step", "rows and columns of codes", "training step of 4,096 tokens, s"),
    ("codes", "training memory", "rows and columns of codes", "training step of 4,096 tokens, MiB"),
    ("codes", "drawing an image", "rows and columns of codes", "drawing an image, 4 at once, s"),
    ("codebook", "nearest", "codes in the codebook", "nearest codes of 4,096 vectors, s"),
    ("codebook", "training step", "codes in the codebook", "training step of 512 tokens, s"),
    ("codebook", "training memory", "codes in the codebook", "training step of 512 tokens, MiB"),
    ("batch", "training", "images in a batch", "training, tokens/s"),
    ("batch", "sampling", "images in a batch", "sampling, images/s"),
    ("processes", "tokenizer training", "processes on the same cores", "tokenizer training, images/s"),
)
"""Curve, measured quantity, name of the x axis, title with the unit of the y axis."""


def draw(results: Results, path: Path) -> None:
    """Draw the results of `growth.measure` as a PNG."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 11), layout="constrained", facecolor="white")
        rows = figure.subplots(4, 3, height_ratios=[1, 1, 1, 0.9], squeeze=False)
        for axes, (curve, what, x_name, title) in zip([each for row in rows[:3] for each in row], PANELS, strict=True):
            points = [row for row in results["rows"] if (row["curve"], row["what"]) == (curve, what)]
            _curve(axes, points, x_name, title)
        below = rows[3][0].get_gridspec()
        for axes in rows[3]:
            axes.remove()
        _stacks(figure.add_subplot(below[3, :]), results["memory"])
        machine = results["machine"]
        figure.suptitle(f"How cost grows: {machine['processor']}, {machine['threads']} threads", fontsize=12)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def _curve(axes: Axes, points: list[dict[str, Any]], x_name: str, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_name)
    axes.grid(visible=True, which="major", color="#e0e0e0", linewidth=0.6)
    measured = [(point["x"], point["measured"]) for point in points if point["measured"] is not None]
    # The plan does not model processes.
    planned = [(point["x"], point["predicted"]) for point in points if point["curve"] != "processes"]
    for drawn, colour, style, name, aside, place in (
        (measured, MEASURED, "o-", "measured", (-5, 6), "right"),
        (planned, PLANNED, "s--", "plan", (6, -11), "left"),
    ):
        if not drawn:
            continue
        axes.plot(*zip(*drawn, strict=True), style, color=colour, markersize=4, linewidth=1.2)
        middle = drawn[len(drawn) // 2]
        axes.annotate(name, middle, xytext=aside, textcoords="offset points", color=colour, ha=place)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [point["x"] for point in points]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, high * 1.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 30 else (1.0,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def _stacks(axes: Axes, stacks: list[dict[str, Any]]) -> None:
    """Draw the parts of each configuration's memory, as shares with their sizes."""
    axes.set_title("where memory goes in training, and sampling's cache, by the plan", fontsize=10, loc="left")
    for place, stack in enumerate(stacks):
        sizes = {part: size for part, size in stack.items() if part != "name"}
        whole, left = sum(sizes.values()), 0.0
        for (part, size), colour in zip(sizes.items(), PARTS, strict=True):
            share = size / whole
            axes.barh(place, share, left=left, color=colour, edgecolor="white", height=0.62)
            if share > 0.055:
                text = f"{part}\n{size:,.0f} MiB"
                ink = "white" if colour in DARK else "black"
                axes.text(left + share / 2, place, text, ha="center", va="center", fontsize=7.5, color=ink)
            left += share
    axes.set_yticks(range(len(stacks)), [stack["name"] for stack in stacks])
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.invert_yaxis()
