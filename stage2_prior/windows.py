"""Pictures larger than the prior was trained on: a window of at most the trained grid slides over the codes, and a
position is generated from what the window shows of those before it (Esser et al., "Taming Transformers", 2021, figure 3
and section 3.3).

The window stands so that the position is in its middle, or as near to it as the picture's borders let it: at the top
and left border the context is that of training, and at the right and bottom border too.

    +-------------------+
    | +-------+         |     known to x: all of the window above it, and left of it in its own row
    | | . . . |         |
    | | . x   |         |
    | +-------+         |
    +-------------------+
"""

from collections.abc import Iterator
from typing import NamedTuple

from stage1_tokenizer.engine.errors import ConfigError
from stage2_prior.base import Grid


class Canvas(NamedTuple):
    """The grid of codes to generate, and the window that slides over it."""

    grid: Grid | None = None
    """Rows and columns, of any size; None: those of training."""
    window: Grid | None = None
    """None: the trained grid, as far as the canvas has room for it."""
    stride: int = 1
    """Columns by which the window moves at once."""

    def fitted(self, trained: Grid) -> tuple[Grid, Grid]:
        """The grid and the window to use, which is no larger, for a prior that was trained on such a grid.

        Raises:
            ConfigError: the window is larger than the trained grid, or the stride carries positions out of it.
        """
        grid = self.grid or trained
        return grid, check_window(self.window or trained, trained, grid, self.stride)


class Placement(NamedTuple):
    """A place of the window, and the positions that are generated while it stands there."""

    top: int
    left: int
    row: int
    """Of the whole grid. All positions of a placement are neighbours in row-major order of the *window*."""
    columns: range
    """Of the whole grid."""


def placements(grid: Grid, window: Grid, stride: int) -> Iterator[Placement]:
    """Every position of the grid once, row by row, under the window that it is generated in.

    stride: how far the window moves at once along a row. 1 centres it on every position, as the paper does; more lets
    positions share a placement, and with it what was computed for the ones before.
    """
    height, width = grid
    for row in range(height):
        top = _start(row, height, window[0], 1)
        begin = 0
        while begin < width:
            left = _start(begin, width, window[1], stride)
            end = begin + 1
            while end < width and _start(end, width, window[1], stride) == left:
                end += 1
            yield Placement(top, left, row, range(begin, end))
            begin = end


def _start(place: int, size: int, window: int, stride: int) -> int:
    """Where the window begins along one axis: centred on the place, in whole strides, inside the picture."""
    start = max(0, place - window // 2)
    # A window that lags behind by up to stride - 1 still has to hold the place itself.
    return min(start // stride * stride, size - window)


def check_window(window: Grid, trained: Grid, grid: Grid, stride: int) -> Grid:
    """The window to use: no larger than the picture.

    Raises:
        ConfigError: it is larger than what the prior was trained on, or a stride carries positions out of it.
    """
    if window[0] > trained[0] or window[1] > trained[1]:
        raise ConfigError(
            f"window {window[0]}x{window[1]}: the prior was trained on a grid of {trained[0]}x{trained[1]} codes and "
            "knows no places beyond it; choose a window up to that size"
        )
    most = window[1] - window[1] // 2
    if stride > most:
        raise ConfigError(
            f"stride {stride}: a window of {window[0]}x{window[1]} codes can move by 1 to {most} at once, or positions "
            "would lie outside it"
        )
    return min(window[0], grid[0]), min(window[1], grid[1])
