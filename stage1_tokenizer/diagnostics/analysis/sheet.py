"""A sheet of paper: every picture is laid out on one, in inches from its top left corner, with title and caption."""

import io
from types import TracebackType
from typing import Any, Self

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from stage1_tokenizer.data.pictures import to_uint8

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
    """A figure of its own (no pyplot, whose figures are global), within the project's style while it is drawn on."""

    def __init__(self, height: float, title: str, caption: str, footer: str) -> None:
        """`caption`: one or two lines under the title; `footer`: one line, the same on all pictures of a run."""
        self.height = round((height + 0.35) * DPI) / DPI  # whole dots, so that pictures lie on whole dots
        self._style = rc_context(STYLE)
        self._size = (title, caption, footer)

    def __enter__(self) -> Self:
        self._style.__enter__()
        self.figure = Figure(figsize=(WIDTH, self.height), dpi=DPI, facecolor="white")
        # One frame over the whole sheet in inches, y downwards, carries pictures and words.
        self._page = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self._page.set(xlim=(0.0, WIDTH), ylim=(self.height, 0.0))
        self._page.set_axis_off()
        title, caption, footer = self._size
        self.text(MARGIN, 0.48, title, size=14, weight="bold")
        self.text(MARGIN, 0.62, caption, size=8.5, color=GREY, va="top", linespacing=1.4)
        self.text(WIDTH - MARGIN, self.height - 0.14, footer, size=7, color=GREY, ha="right")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._style.__exit__(kind, error, trace)

    def text(self, x: float, y: float, words: str, **options: Any) -> None:
        """Words whose baseline starts at (x, y). A `$` is a dollar sign."""
        self._page.text(x, y, words.replace("$", r"\$"), **options)

    def image(self, picture: NDArray[Any], x: float, y: float, width: float, **options: Any) -> float:
        """A picture (H, W[, 3]) at (x, y), on whole dots; returns its height. Enlarged pixels keep their edges."""
        H, W = picture.shape[:2]
        height = width * H / W
        x, y = round(x * DPI) / DPI, round(y * DPI) / DPI
        enlarged = "nearest" if width * DPI >= W else "antialiased"
        options = {"cmap": "gray", "vmin": 0, "vmax": 255, "interpolation": enlarged, **options}
        self._page.imshow(picture, extent=(x, x + width, y + height, y), aspect="auto", **options)
        self._page.set(xlim=(0.0, WIDTH), ylim=(self.height, 0.0))  # imshow moves the limits
        return height

    def box(self, x: float, y: float, width: float, height: float, **options: Any) -> None:
        """The outline of a rectangle."""
        style: dict[str, Any] = {"fill": False, "edgecolor": GREY, "lw": 0.7, **options}
        self._page.add_patch(Rectangle((x, y), width, height, **style))

    def plot(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes whose frame is this rectangle."""
        return self.figure.add_axes((x / WIDTH, 1.0 - (y + height) / self.height, width / WIDTH, height / self.height))

    def png(self) -> bytes:
        """The picture file; the same sheet gives the same bytes."""
        file = io.BytesIO()
        self.figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


def width_of(image_size: tuple[int, int], largest: float) -> float:
    """The width in inches, up to `largest` in either direction, at which a pixel covers a whole number of dots."""
    H, W = image_size
    dots = largest * DPI / max(H, W)
    return W * (int(dots) if dots >= 1 else dots) / DPI


def pixels(image: Tensor) -> NDArray[np.uint8]:
    """(C, H, W) in [-1, 1] -> (H, W, 3) or, of one channel, (H, W) uint8."""
    picture: NDArray[np.uint8] = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    return picture[..., 0] if picture.shape[-1] == 1 else picture
