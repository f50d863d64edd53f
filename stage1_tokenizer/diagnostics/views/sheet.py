"""The sheet on which each PNG of analyze.py is drawn: positions in inches from its top left corner, title, caption."""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from torch import Tensor

from stage1_tokenizer.diagnostics.report.charts import Chart, fit_frame, tick_label
from stage1_tokenizer.diagnostics.report.embedded_images import BRIGHTEST, pixels

# matplotlib is imported only when a sheet is drawn: its import searches for fonts, and a training imports this module.
# ruff: noqa: PLC0415
if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 120
WIDTH = 10.0
"""Width of every sheet in inches."""
MARGIN = 0.4
TOP = 1.2
"""Height of the title and a caption of two lines in inches."""
INK, GREY, FAINT = "#1f2430", "#6b7280", "#d5d9e0"
COLOURS = ("#2f6fb0", "#d1602f", "#3c9a5f", "#8457a8", "#b8892b", "#3aa6a6", "#c04d7b", "#7a7f87")
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaee",
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


class Sheet:
    """A matplotlib Figure with methods that place text, images and charts. Create and save it within STYLE."""

    def __init__(self, height: float, title: str, caption: str, footer: str) -> None:
        """`caption`: one or two lines under the title; `footer`: the last line, the same on all sheets of a run."""
        from matplotlib.figure import Figure  # not pyplot, which keeps its figures in memory

        self.height = round((height + 0.35) * DPI) / DPI  # whole dots, so that the pixels of images are whole dots
        self.figure = Figure(figsize=(WIDTH, self.height), dpi=DPI, facecolor="white")
        # One frame over the whole sheet, in inches with y downwards, holds images and text.
        self._page = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self._page.set(xlim=(0.0, WIDTH), ylim=(self.height, 0.0))
        self._page.set_axis_off()
        self.text(MARGIN, 0.48, title, size=14, weight="bold")
        self.text(MARGIN, 0.62, caption, size=8.5, color=GREY, va="top", linespacing=1.4)
        self.text(WIDTH - MARGIN, self.height - 0.14, footer, size=7, color=GREY, ha="right")

    def text(self, x: float, y: float, words: str, **options: Any) -> None:
        """Write text whose baseline starts at (x, y). A `$` is a dollar sign, not mathematics."""
        self._page.text(x, y, words.replace("$", r"\$"), **options)

    def image(self, image: Tensor | NDArray[Any], x: float, y: float, width: float, **options: Any) -> float:
        """Draw an image, (C, H, W) in [-1, 1] or an array (H, W[, 3]), at (x, y) and return its height in inches.

        Enlarged pixels keep sharp edges.
        """
        array = pixels(image) if isinstance(image, Tensor) else image
        array = array[..., 0] if array.shape[2:] == (1,) else array
        H, W = array.shape[:2]
        height = width * H / W
        x, y = round(x * DPI) / DPI, round(y * DPI) / DPI
        interpolation = "nearest" if width * DPI >= W else "antialiased"
        options = {"cmap": "gray", "vmin": 0, "vmax": 255, "interpolation": interpolation, **options}
        self._page.imshow(array, extent=(x, x + width, y + height, y), aspect="auto", **options)
        self._page.set(xlim=(0.0, WIDTH), ylim=(self.height, 0.0))  # imshow changes the limits
        return height

    def error(self, error: Tensor, x: float, y: float, width: float) -> None:
        """Draw an error map (H, W) in 0..1: black for 0, brightest from BRIGHTEST on."""
        self.image(error.numpy(), x, y, width, cmap="inferno", vmin=0.0, vmax=BRIGHTEST)

    def box(self, x: float, y: float, width: float, height: float, **options: Any) -> None:
        """Draw the outline of a rectangle."""
        from matplotlib.patches import Rectangle

        style: dict[str, Any] = {"fill": False, "edgecolor": GREY, "lw": 0.7, **options}
        self._page.add_patch(Rectangle((x, y), width, height, **style))

    def plot(self, x: float, y: float, width: float, height: float) -> "Axes":
        """Return axes whose frame is this rectangle."""
        return self.figure.add_axes((x / WIDTH, 1.0 - (y + height) / self.height, width / WIDTH, height / self.height))

    def chart(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        chart: Chart,
        smooth: Callable[[Sequence[float]], Sequence[float]] | None = None,
    ) -> None:
        """Draw a chart (after `with_drawable_points`) in this rectangle.

        smooth: draw each curve without dots twice, faint as it is and bold after this function.
        """
        from matplotlib.ticker import NullLocator

        axes, frame = self.plot(x, y, width, height), fit_frame(chart)
        axes.set_title(chart.title)
        axes.set_title(chart.unit, loc="right", fontsize=8, fontweight="normal", color=GREY)
        axes.set_xlabel(chart.x_name, loc="right", color=GREY)
        axes.set_yscale("log" if chart.log else "linear")
        for ticks, axis in zip(frame.ticks(), (axes.xaxis, axes.yaxis), strict=True):
            axis.set_ticks(ticks, [tick_label(tick) for tick in ticks])
            axis.set_minor_locator(NullLocator())
        axes.set(xlim=frame.x, ylim=frame.y)
        for series in chart.series:
            steps, values = series.curve
            colour = COLOURS[(series.colour or 0) % len(COLOURS)]
            if series.dots:
                style: dict[str, Any] = {"marker": "o", "lw": 1.2, "ms": 4, "mfc": "white", "clip_on": False}
            else:
                style = {"marker": "o" if len(steps) == 1 else "", "lw": 1.6}
            if smooth and not series.dots:
                axes.plot(steps, values, color=colour, lw=0.8, alpha=0.35)
                values = list(smooth(values))
            axes.plot(steps, values, color=colour, label=series.name, **style)
            if chart.fill:
                axes.fill_between(steps, values, frame.y[0], color=colour, alpha=0.25, lw=0)
        if chart.level:
            axes.axhline(chart.level[1], color=INK, lw=1, ls="--", label=chart.level[0])
        if chart.shade:
            axes.axvspan(chart.shade[1], frame.x[1], color="#f3f4f6", lw=0, label=chart.shade[0])
        axes.legend(loc="best")

    def png(self) -> bytes:
        """Return the PNG file; equal sheets give equal bytes."""
        file = io.BytesIO()
        self.figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


def fitting(size: tuple[int, int], largest: float) -> tuple[float, float]:
    """Return width and height in inches of an image of H, W pixels, up to `largest` in either direction.

    A pixel covers a whole number of dots.
    """
    H, W = size
    dots = largest * DPI / max(H, W)
    dots = int(dots) if dots >= 1 else dots
    return W * dots / DPI, H * dots / DPI
