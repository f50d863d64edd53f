"""Grids larger than the trained grid: a window of at most the trained size slides over the grid of codes.

Each position is generated from the codes before it that lie inside the window (Esser et al., "Taming Transformers",
2021, section 3.3 and figure 3). The window is centred on the position, but stays inside the grid. So at the borders of
the grid the prior sees borders, as in training.

    +-------------------+
    | +-------+         |     x depends on the codes marked by dots: all rows of the window above x, and the codes to
    | | . . . |         |     the left of x in its row
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
    """Rows and columns of codes, of any size; None: the trained grid."""
    window: Grid | None = None
    """Rows and columns of the window; None: the trained grid, or `grid` where that is smaller."""
    stride: int = 1
    """Columns by which the window moves at once."""

    def resolve(self, trained: Grid) -> tuple[Grid, Grid]:
        """Return the grid and the window for a prior that was trained on the grid `trained`.

        Raises:
            ConfigError: the window is larger than the trained grid, or the stride is too large for the window.
        """
        grid = self.grid or trained
        return grid, check_window(self.window or trained, trained, grid, self.stride)


class Placement(NamedTuple):
    """One place of the window, and the positions that are generated there."""

    top: int
    """First row of the window in the grid."""
    left: int
    """First column of the window in the grid."""
    row: int
    """Row in the grid of the positions to generate."""
    columns: range
    """Columns in the grid of the positions to generate."""


def placements(grid: Grid, window: Grid, stride: int) -> Iterator[Placement]:
    """Yield the placements that together generate every position of the grid once, row by row.

    stride: columns by which the window moves at once. 1 centres it on every position, as the paper does. A larger
    stride lets neighbouring positions share a placement, and so the cache of the positions before them.
    """
    height, width = grid
    for row in range(height):
        top = _window_start(row, height, window[0], 1)
        begin = 0
        while begin < width:
            left = _window_start(begin, width, window[1], stride)
            end = begin + 1
            while end < width and _window_start(end, width, window[1], stride) == left:
                end += 1
            yield Placement(top, left, row, range(begin, end))
            begin = end


def _window_start(position: int, size: int, window: int, stride: int) -> int:
    """Return the window's first index along one axis: centred on the position, a multiple of the stride, in the
    grid."""
    start = max(0, position - window // 2)
    return min(start // stride * stride, size - window)


def check_window(window: Grid, trained: Grid, grid: Grid, stride: int) -> Grid:
    """Return the window, cut to the size of the grid.

    Raises:
        ConfigError: the window is larger than the trained grid, or the stride is so large that positions would lie
            outside the window.
    """
    if window[0] > trained[0] or window[1] > trained[1]:
        raise ConfigError(
            f"window {window[0]}x{window[1]}: the prior was trained on a grid of {trained[0]}x{trained[1]} codes; "
            "choose a window of at most that size"
        )
    most = window[1] - window[1] // 2
    if stride > most:
        raise ConfigError(
            f"stride {stride}: a window of {window[0]}x{window[1]} codes can move by 1 to {most} at once, or positions "
            "would lie outside it; choose a smaller stride"
        )
    return min(window[0], grid[0]), min(window[1], grid[1])
