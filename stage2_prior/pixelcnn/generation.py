"""Generation with a PixelCNN: one step per position, with a cache of the features of both stacks.

The vertical stack of a row depends on the rows above only. It is computed once per row, for all columns at once. The
horizontal stack of a position depends on the vertical stack and on the positions to the left. It is computed once per
position. So the whole generation does the arithmetic of one forward pass. (The usual loop does a forward pass per
position, which is h*w times as much.)

The cached features have their channels last and a margin of zeros as wide as a kernel reaches. So kernels at a border
need no special case, and the inputs of a kernel lie side by side in memory: a convolution at one position is one matrix
product on a view. Products of a few dozen rows cost as much as the call itself, so the horizontal stack makes as few
calls as possible.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage2_prior.base import Generation, Grid, PreparedPrior, Prior
from stage2_prior.pixelcnn.layer import GatedLayer, gate

SMALL_BATCH = 32
"""Largest batch for which one CPU thread is faster than several: the horizontal stack of 15 layers of width 128 took
1.1 s per image at a batch of 16 on one thread, and 2.8 s on two threads of two virtual cores."""


class PreparedPixelCnn(PreparedPrior):
    """A PixelCNN for generation in float32."""

    def __init__(self, prior: Prior, layers: Iterable[GatedLayer], output: nn.Conv2d) -> None:
        """Take the layers of a PixelCnn and its `output`, the 1x1 convolution after the last layer."""
        super().__init__(prior, "float32")
        self.layers, self.output = layers, output

    def _begin(self, labels: Tensor, grid: Grid) -> "PixelCnnGeneration":
        return PixelCnnGeneration(self, labels, grid)


class PixelCnnGeneration(Generation):
    """The state of a generation with a PixelCNN: the features of both stacks so far."""

    def __init__(self, prepared: PreparedPixelCnn, labels: Tensor, grid: Grid) -> None:
        super().__init__(prepared)
        self._w = grid[1]
        self._layers = [LayerState(layer, labels, grid) for layer in prepared.layers]
        self._output = linear_weight(prepared.output.weight), prepared.output.bias
        self._is_small = labels.device.type == "cpu" and len(labels) <= SMALL_BATCH
        self._position = 0  # first position whose codes are not known
        self._rows_done = 0  # rows whose vertical stack is computed
        self._columns_done = 0  # columns of the present row whose horizontal stack is computed
        self._features = torch.empty(0)  # (B, width) of the last layer at the last computed column

    def _next_context(self) -> Tensor:
        row, column = divmod(self._position, self._w)
        if self._rows_done <= row:
            self._vertical(self._rows_done, row + 1)
            self._rows_done = row + 1
        with one_thread(self._is_small):
            for next_column in range(self._columns_done, column + 1):
                self._features = self._horizontal(next_column)
            self._columns_done = column + 1
            return F.relu(F.linear(F.relu(self._features), *self._output))

    def _add_positions(self, embedded: Tensor) -> None:
        first = self._layers[0]
        while embedded.shape[1]:
            row, column = divmod(self._position, self._w)
            count = min(embedded.shape[1], self._w - column)  # at most the rest of this row
            first.put_above(row, column, embedded[:, :count])
            first.put_left(column, embedded[:, :count])
            self._position += count
            if column + count == self._w:  # the next row overwrites the features of this row before it reads them
                self._columns_done = 0
            embedded = embedded[:, count:]

    def _vertical(self, start: int, stop: int) -> None:
        """Compute the vertical stack of rows start..stop-1 in all layers; the last one is the present row."""
        for index, state in enumerate(self._layers):
            features = state.vertical(start, stop)  # (B, rows, w, width)
            if index + 1 < len(self._layers):
                for row in range(start, stop):
                    self._layers[index + 1].put_above(row, 0, features[:, row - start])

    def _horizontal(self, column: int) -> Tensor:
        """Compute the horizontal stack at a column of the present row -> features (B, width) of the last layer."""
        features = torch.empty(0)
        for index, state in enumerate(self._layers):
            features = state.horizontal(column)
            if index + 1 < len(self._layers):
                self._layers[index + 1].put_left(column, features[:, None])
        return features


class LayerState:
    """The cached inputs of one layer, and the contribution of its vertical stack to the present row.

    The gate is computed as tanh(a) sigmoid(b) = 2 (sigmoid(2a) - 1/2) sigmoid(b), so that one call of sigmoid serves
    both halves. The weights before the gate contain the factor of a, the weights behind it the factor in front.
    """

    def __init__(self, layer: GatedLayer, labels: Tensor, grid: Grid) -> None:
        self._layer, self._reach = layer, layer.reach
        height, self._w = grid
        width, reach, batch = layer.residual.in_channels, layer.reach, len(labels)
        self._vertical_bias, horizontal_bias = layer.label(labels).chunk(2, dim=-1)  # (B, 2 width)
        assert layer.horizontal.bias is not None
        assert layer.residual.bias is not None
        double = torch.ones_like(layer.horizontal.bias)
        double[:width] = 2.0  # for a, the half of tanh
        self._across = linear_weight(layer.across.weight) * double[:, None]
        self._horizontal_bias = (horizontal_bias + layer.horizontal.bias) * double
        self._horizontal = (linear_weight(layer.horizontal.weight) * double[:, None]).t().contiguous()
        # The bias is the last row of the matrix, multiplied by a channel that is always 1.
        self._residual = torch.cat([2.0 * linear_weight(layer.residual.weight).t(), layer.residual.bias[None]])
        self._gated = self._horizontal_bias.new_ones(batch, width + 1)
        self._width, self._columns = width, layer.horizontal.kernel_size[1]
        self.above = self._gated.new_zeros(batch, reach + height, reach + self._w + reach, width)
        self.left = self._gated.new_zeros(batch, reach + self._w, width)
        self._from_vertical = self._gated.new_zeros(self._w, batch, 2 * width)  # of the present row, with all biases

    def put_above(self, row: int, column: int, features: Tensor) -> None:
        """Store the vertical stack's input (B, n, width) in a row, beginning at a column."""
        begin = self._reach + column
        self.above[:, self._reach + row, begin : begin + features.shape[1]] = features

    def put_left(self, column: int, features: Tensor) -> None:
        """Store the horizontal stack's input (B, n, width) in the present row, beginning at a column."""
        begin = self._reach + column
        self.left[:, begin : begin + features.shape[1]] = features

    def vertical(self, start: int, stop: int) -> Tensor:
        """Compute rows start..stop-1 of the vertical stack -> (B, rows, w, width); the last one is the present row."""
        layer = self._layer
        kernel_rows = layer.vertical.kernel_size[0]
        # Output row i reads padded input rows from i on: grid rows i - reach..i, in the first layer ..i - 1.
        rows = rearrange(self.above[:, start : stop - 1 + kernel_rows], "B r c D -> B D r c")
        v = rearrange(layer.vertical(rows), "B D r c -> B r c D")  # (B, rows, w, 2 width)
        from_vertical = F.linear(v[:, -1], self._across) + self._horizontal_bias[:, None]  # (B, w, 2 width)
        self._from_vertical = rearrange(from_vertical, "B c D -> c B D").contiguous()
        return gate(v + self._vertical_bias[:, None, None], dim=-1)

    def horizontal(self, column: int) -> Tensor:
        """Compute the horizontal stack at one column of the present row -> (B, width)."""
        windows = self.left[:, column : column + self._columns].flatten(1)  # (B, columns * width), a view
        halves = torch.addmm(self._from_vertical[column], windows, self._horizontal).sigmoid_()  # (B, 2 width)
        torch.mul(halves[:, : self._width] - 0.5, halves[:, self._width :], out=self._gated[:, : self._width])
        if self._layer.first:
            return self._gated @ self._residual
        return torch.addmm(self.left[:, self._reach + column], self._gated, self._residual)


def linear_weight(kernel: Tensor) -> Tensor:
    """Return a kernel (out, in, 1, columns) as a matrix (out, columns * in) for inputs of all columns side by side."""
    return rearrange(kernel, "o i 1 c -> o (c i)").contiguous()


@contextmanager
def one_thread(is_wanted: bool) -> Iterator[None]:
    """Compute on one CPU thread inside this context, if `is_wanted`."""
    threads = torch.get_num_threads()
    if not is_wanted or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
