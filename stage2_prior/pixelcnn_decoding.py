"""A PixelCNN's contexts one position at a time, computing only what a new position needs.

The vertical stack of a row depends on the rows above alone, so it is computed once per row, for all columns at once.
The horizontal stack of a position depends on that and on what lies left of it, so it is computed once per position. No
feature is ever computed twice: together that is the work of one forward pass, where a forward pass per position, as in
every tutorial, is h*w times as much.

Features are kept with channels last, behind a margin of zeros as wide as a kernel reaches, so that a kernel at a border
needs no special case. Columns whose codes came in at once (a known left part) are computed at once.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage2_prior.gated_layer import GatedLayer, gate


class PixelCnnContexts:
    """The stacks' features so far."""

    def __init__(self, layers: Iterable[GatedLayer], output: nn.Conv2d, labels: Tensor, grid: tuple[int, int]) -> None:
        """labels (B,); `output` is the map after the last layer."""
        self._w = grid[1]
        self._layers = [LayerState(layer, labels, grid) for layer in layers]
        self._output = linear_weight(output.weight), output.bias
        self._position = 0  # codes of the positions before it are known
        self._rows_done = 0  # rows of which the vertical stack was computed
        self._columns_done = 0  # columns of the present row of which the horizontal stack was computed

    def next(self) -> Tensor:
        """(B, width) of the next position."""
        row, column = divmod(self._position, self._w)
        if self._rows_done <= row:
            self._vertical(self._rows_done, row + 1)
            self._rows_done = row + 1
        features = self._horizontal(self._columns_done, column + 1)  # (B, n, width)
        self._columns_done = column + 1
        return F.relu(F.linear(F.relu(features[:, -1]), *self._output))

    def take(self, embedded: Tensor) -> None:
        """The embedded codes (B, n, width) of the next n positions."""
        first = self._layers[0]
        while embedded.shape[1]:
            row, column = divmod(self._position, self._w)
            now = min(embedded.shape[1], self._w - column)  # as many as are left in this row
            first.put_above(row, column, embedded[:, :now])
            first.put_left(column, embedded[:, :now])
            self._position += now
            if column + now == self._w:  # what `left` holds of this row is written over before it is read
                self._columns_done = 0
            embedded = embedded[:, now:]

    def _vertical(self, start: int, stop: int) -> None:
        """The vertical stack of these rows."""
        for index, state in enumerate(self._layers):
            features = state.vertical(start, stop)  # (B, rows, w, width)
            if index + 1 < len(self._layers):
                for row in range(start, stop):
                    self._layers[index + 1].put_above(row, 0, features[:, row - start])

    def _horizontal(self, start: int, stop: int) -> Tensor:
        """The horizontal stack of these columns of the present row: (B, columns, width) of the last layer."""
        row_in_slab = self._position // self._w - (self._rows_done - self._layers[0].across.shape[1])
        features = torch.empty(0)
        for index, state in enumerate(self._layers):
            features = state.horizontal(row_in_slab, start, stop)
            if index + 1 < len(self._layers):
                self._layers[index + 1].put_left(start, features)
        return features


class LayerState:
    """A layer's inputs so far, and what the vertical stack says to the horizontal one in the rows computed last."""

    def __init__(self, layer: GatedLayer, labels: Tensor, grid: tuple[int, int]) -> None:
        self._layer, self._reach = layer, layer.reach
        height, self._w = grid
        width, reach, batch = layer.residual.in_channels, layer.reach, len(labels)
        label = layer.label(labels)[:, None, None]  # (B, 1, 1, 4 width)
        self._for_vertical, self._for_horizontal = label.chunk(2, dim=-1)
        assert layer.vertical.bias is not None
        assert layer.horizontal.bias is not None
        self._across = linear_weight(layer.across.weight)
        self._horizontal = linear_weight(layer.horizontal.weight)
        self._residual = linear_weight(layer.residual.weight), layer.residual.bias
        self.above = label.new_zeros(batch, reach + height, reach + self._w + reach, width)
        self.left = label.new_zeros(batch, reach + self._w, width)
        self.across = label.new_zeros(batch, 0, self._w, 2 * width)

    def put_above(self, row: int, column: int, features: Tensor) -> None:
        """The vertical stack's input (B, n, width) in a row, from a column on."""
        begin = self._reach + column
        self.above[:, self._reach + row, begin : begin + features.shape[1]] = features

    def put_left(self, column: int, features: Tensor) -> None:
        """The horizontal stack's input (B, n, width) in the present row, from a column on."""
        begin = self._reach + column
        self.left[:, begin : begin + features.shape[1]] = features

    def vertical(self, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 of the vertical stack: (B, rows, w, width)."""
        layer = self._layer
        kernel_rows = layer.vertical.kernel_size[0]
        # Row i of the output begins at row i of the padded input: rows i - reach..i, or ..i - 1 in the first layer.
        rows = rearrange(self.above[:, start : stop - 1 + kernel_rows], "B r c D -> B D r c")
        v = rearrange(layer.vertical(rows), "B D r c -> B r c D")  # (B, rows, w, 2 width)
        self.across = F.linear(v, self._across, layer.horizontal.bias) + self._for_horizontal
        return gate(v + self._for_vertical, dim=-1)

    def horizontal(self, row: int, start: int, stop: int) -> Tensor:
        """Columns start..stop-1 of the horizontal stack: (B, columns, width); `row` counts in the rows of `across`."""
        columns = self._layer.horizontal.kernel_size[1]
        windows = self.left[:, start : stop - 1 + columns].unfold(1, columns, 1)  # (B, n, width, columns)
        h = F.linear(windows.transpose(2, 3).flatten(2), self._horizontal)  # (B, n, 2 width)
        out = F.linear(gate(h + self.across[:, row, start:stop], dim=-1), *self._residual)
        return out if self._layer.first else self.left[:, self._reach + start : self._reach + stop] + out


def linear_weight(kernel: Tensor) -> Tensor:
    """A kernel (out, in, 1, columns) as the matrix (out, columns * in) that acts on its columns side by side."""
    return rearrange(kernel, "o i 1 c -> o (c i)").contiguous()
