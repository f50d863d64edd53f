"""A sheet of paper: every picture is laid out on one, in inches from its top left corner, with title and caption."""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from torch import Tensor

from stage1_tokenizer.diagnostics.report.charts import Chart, fit_frame, tick_label
from stage1_tokenizer.diagnostics.report.embedded_images import BRIGHTEST, pixels

# matplotlib is imported when a sheet is drawn: it looks for fonts, and a training, which imports this, draws none.
# ruff: noqa: PLC0415
if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 120
WIDTH = 10.0
"""Width of every sheet."""
MARGIN = 0.4
TOP = 1.2
"""Where the title and the caption (of two lines at most) have ended."""
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
    """A figure of its own (no pyplot, whose figures are global). It is made, drawn on and saved within STYLE."""

    def __init__(self, height: float, title: str, caption: str, footer: str) -> None:
        """`caption`: one or two lines under the title; `footer`: one line, the same on all pictures of a run."""
        from matplotlib.figure import Figure

        self.height = round((height + 0.35) * DPI) / DPI  # whole dots, so that pictures lie on whole dots
        self.figure = Figure(figsize=(WIDTH, self.height), dpi=DPI, facecolor="white")
        # One frame over the whole sheet in inches, y downwards, carries pictures and words.
        self._page = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self._page.set(xlim=(0.0, WIDTH), ylim=(self.height, 0.0))
        self._page.set_axis_off()
        self.text(MARGIN, 0.48, title, size=14, weight="bold")
        self.text(MARGIN, 0.62, caption, size=8.5, color=GREY, va="top", linespacing=1.4)
        self.text(WIDTH - MARGIN, self.height - 0.14, footer, size=7, color=GREY, ha="right")

    def text(self, x: float, y: float, words: str, **options: Any) -> None:
        """Words whose baseline starts at (x, y). A `$` is a dollar sign."""
        self._page.text(x, y, words.replace("$", r"\$"), **options)

    def image(self, image: Tensor | NDArray[Any], x: float, y: float, width: float, **options: Any) -> float:
        """An image, (C, H, W) in [-1, 1] or an array (H, W[, 3]), at (x, y), on whole dots; returns its height.
        Enlarged pixels keep their edges."""
        picture = pixels(image) if isinstance(image, Tensor) else image
        picture = picture[..., 0] if picture.shape[2:] == (1,) else picture
        H, W = picture.shape[:2]
        height = width * H / W
        x, y = round(x * DPI) / DPI, round(y * DPI) / DPI
        enlarged = "nearest" if width * DPI >= W else "antialiased"
        options = {"cmap": "gray", "vmin": 0, "vmax": 255, "interpolation": enlarged, **options}
        self._page.imshow(picture, extent=(x, x + width, y + height, y), aspect="auto", **options)
        self._page.set(xlim=(0.0, WIDTH), ylim=(self.height, 0.0))  # imshow moves the limits
        return height

    def error(self, error: Tensor, x: float, y: float, width: float) -> None:
        """A map of errors (H, W), as shares of the range of values: black for none."""
        self.image(error.numpy(), x, y, width, cmap="inferno", vmin=0.0, vmax=BRIGHTEST)

    def box(self, x: float, y: float, width: float, height: float, **options: Any) -> None:
        """The outline of a rectangle."""
        from matplotlib.patches import Rectangle

        style: dict[str, Any] = {"fill": False, "edgecolor": GREY, "lw": 0.7, **options}
        self._page.add_patch(Rectangle((x, y), width, height, **style))

    def plot(self, x: float, y: float, width: float, height: float) -> "Axes":
        """Axes whose frame is this rectangle."""
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
        """A `drawable` chart in this rectangle. `smooth`: draw curves without dots faint, and smoothed over it."""
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
        """The picture file; the same sheet gives the same bytes."""
        file = io.BytesIO()
        self.figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


def fitting(size: tuple[int, int], largest: float) -> tuple[float, float]:
    """Width and height in inches of an image of H, W pixels, up to `largest` in either direction, at which a pixel
    covers a whole number of dots."""
    H, W = size
    dots = largest * DPI / max(H, W)
    dots = int(dots) if dots >= 1 else dots
    return W * dots / DPI, H * dots / DPI
