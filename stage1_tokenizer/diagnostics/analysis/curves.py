"""Training curves from a run's metrics.jsonl."""

from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from stage1_tokenizer.diagnostics.analysis.sheet import COLOURS, GREY, MARGIN, TOP, WIDTH, Sheet
from stage1_tokenizer.engine.log_file import Curve

SMOOTHING = 0.6
LOSSES = ("total", "l1", "l2", "perceptual", "adversarial", "bottleneck", "commitment")


def smooth(values: Iterable[float], weight: float = SMOOTHING) -> list[float]:
    """s_t = sum_i weight^(t-i) x_i / sum_i weight^(t-i): a running mean without a pull to where it starts."""
    smoothed: list[float] = []
    total = norm = 0.0
    for value in values:
        total, norm = weight * total + value, weight * norm + 1.0
        smoothed.append(total / norm)
    return smoothed


def _line(axes: Axes, curve: Curve, label: str, colour: str) -> None:
    """The curve as logged, faint, and smoothed."""
    axes.plot(*curve, color=colour, lw=0.8, alpha=0.35)
    axes.plot(curve.steps, smooth(curve.values), color=colour, lw=1.6, label=label)


def _points(axes: Axes, curve: Curve, label: str, colour: str) -> None:
    """A figure of the validations, which are few and whole: as it is."""
    axes.plot(*curve, "o-", color=colour, lw=1.2, ms=4, mfc="white", label=label)


def _log_axis(axes: Axes) -> None:
    """A logarithmic axis whose ticks are plain numbers; a short one has some between the powers of ten too."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    within = [factor for factor in (2, 3, 5) if high / low < 30]
    axes.yaxis.set_minor_locator(LogLocator(subs=within or "auto"))
    axes.yaxis.set_minor_formatter(axes.yaxis.get_major_formatter() if within else NullFormatter())


def _draw_losses(axes: Axes, curves: dict[str, Curve]) -> None:
    axes.set_title("Loss and its parts (training)")
    for colour, name in zip(COLOURS, LOSSES, strict=False):
        curve = curves.get(f"train/{name}")
        if curve and all(value > 0 for value in curve.values):
            _line(axes, curve, name, colour)
    _log_axis(axes)


def _draw_error(axes: Axes, curves: dict[str, Curve]) -> None:
    measured = [name for name in ("nmse", "l2") if {f"train/{name}", f"validation/{name}"} & curves.keys()]
    name = measured[0] if measured else "nmse"
    axes.set_title("NMSE: squared error over the data's variance" if name == "nmse" else "Mean squared error")
    if f"train/{name}" in curves:
        _line(axes, curves[f"train/{name}"], "training", COLOURS[0])
    if f"validation/{name}" in curves:
        _points(axes, curves[f"validation/{name}"], "validation", COLOURS[1])
    _log_axis(axes)


def _draw_use(axes: Axes, curves: dict[str, Curve], name: str, title: str) -> None:
    axes.set_title(title)
    if f"train/{name}" in curves:
        _line(axes, curves[f"train/{name}"], "training", COLOURS[0])
    if f"validation/{name}" in curves:
        _points(axes, curves[f"validation/{name}"], "validation", COLOURS[1])
    axes.set_ylim(bottom=0)


def draw_curves(curves: dict[str, Curve], codebook_size: int, footer: str) -> Sheet:
    """`codebook_size` V; 0 where the bottleneck is continuous: then without the panels of the codes' use."""
    width, height, gap = (WIDTH - 2 * MARGIN - 1.0) / 2, 2.4, 0.75
    rows = 2 if codebook_size else 1
    sheet = Sheet(
        TOP - 0.05 + rows * (height + gap),
        "How the training went",
        f"Faint: as logged. Bold: running mean, exponential with weight {SMOOTHING} per log entry, without bias at the "
        "start.\nDots: figures of the whole validation split, not smoothed.",
        footer,
    )
    with sheet:
        panels = []
        for panel in range(2 * rows):
            row, column = divmod(panel, 2)
            top = TOP + 0.25 + row * (height + gap)
            panels.append(sheet.plot(MARGIN + 0.4 + column * (width + 0.6), top, width, height))
        _draw_losses(panels[0], curves)
        _draw_error(panels[1], curves)
        if codebook_size:
            _draw_use(panels[2], curves, "code_perplexity", f"Perplexity of the codes (at most {codebook_size})")
            _draw_use(panels[3], curves, "code_usage", "Share of the codebook in use")
            panels[3].yaxis.set_major_formatter(PercentFormatter(1.0))
            panels[3].set_ylim(0, 1.05)
        for axes in panels:
            axes.set_xlabel("step", loc="right", color=GREY)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="best")
    return sheet
