"""Generation with a PixelCNN: its contexts one position at a time, computing only what a new position needs.

The vertical stack of a row depends on the rows above alone, so it is computed once per row, for all columns at once.
The horizontal stack of a position depends on that and on what lies left of it, so it is computed once per position. No
feature is ever computed twice: together that is the work of one forward pass, where a forward pass per position, as in
every tutorial, is h*w times as much.

Features are kept with channels last, behind a margin of zeros as wide as a kernel reaches, so that a kernel at a border
needs no special case, and what it covers lies side by side in memory: a convolution at one position is one matrix
product over a view. With a few dozen rows in a product, what costs is the number of calls, so the horizontal stack
makes as few as it can.
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
"""Up to this many rows a product is too small to share: at 16 rows, 15 layers of 128, two threads on two virtual cores
took 2.8 s per picture for the horizontal stack, and one took 1.1 s."""


class PreparedPixelCnn(PreparedPrior):
    """A PixelCNN that begins generations."""

    def __init__(self, prior: Prior, layers: Iterable[GatedLayer], output: nn.Conv2d) -> None:
        """Take the modules of a PixelCnn; `output` is the map after the last layer."""
        super().__init__(prior, "float32")
        self.layers, self.output = layers, output

    def _begin(self, labels: Tensor, grid: Grid) -> "PixelCnnGeneration":
        return PixelCnnGeneration(self, labels, grid)


class PixelCnnGeneration(Generation):
    """A generation with both stacks' features so far."""

    def __init__(self, prepared: PreparedPixelCnn, labels: Tensor, grid: Grid) -> None:
        super().__init__(prepared)
        self._w = grid[1]
        self._layers = [LayerState(layer, labels, grid) for layer in prepared.layers]
        self._output = linear_weight(prepared.output.weight), prepared.output.bias
        self._few = labels.device.type == "cpu" and len(labels) <= SMALL_BATCH
        self._position = 0  # codes of the positions before it are known
        self._rows_done = 0  # rows of which the vertical stack was computed
        self._columns_done = 0  # columns of the present row of which the horizontal stack was computed
        self._features = torch.empty(0)  # (B, width) of the last layer, at the column computed last

    def _next_context(self) -> Tensor:
        row, column = divmod(self._position, self._w)
        if self._rows_done <= row:
            self._vertical(self._rows_done, row + 1)
            self._rows_done = row + 1
        with one_thread(self._few):
            for each in range(self._columns_done, column + 1):
                self._features = self._horizontal(each)
            self._columns_done = column + 1
            return F.relu(F.linear(F.relu(self._features), *self._output))

    def _add_positions(self, embedded: Tensor) -> None:
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
        """The vertical stack of these rows; the last of them is the present one."""
        for index, state in enumerate(self._layers):
            features = state.vertical(start, stop)  # (B, rows, w, width)
            if index + 1 < len(self._layers):
                for row in range(start, stop):
                    self._layers[index + 1].put_above(row, 0, features[:, row - start])

    def _horizontal(self, column: int) -> Tensor:
        """The horizontal stack at a column of the present row: (B, width) of the last layer."""
        features = torch.empty(0)
        for index, state in enumerate(self._layers):
            features = state.horizontal(column)
            if index + 1 < len(self._layers):
                self._layers[index + 1].put_left(column, features[:, None])
        return features


class LayerState:
    """A layer's inputs so far, and what its vertical stack says to its horizontal one in the present row.

    tanh(a) sigmoid(b) is 2 (sigmoid(2a) - 1/2) sigmoid(b). With 2a made by the weights before the gate, and the 2 in
    front by those behind it, one call computes both halves.
    """

    def __init__(self, layer: GatedLayer, labels: Tensor, grid: Grid) -> None:
        self._layer, self._reach = layer, layer.reach
        height, self._w = grid
        width, reach, batch = layer.residual.in_channels, layer.reach, len(labels)
        self._for_vertical, for_horizontal = layer.label(labels).chunk(2, dim=-1)  # (B, 2 width)
        assert layer.horizontal.bias is not None
        assert layer.residual.bias is not None
        double = torch.ones_like(layer.horizontal.bias)
        double[:width] = 2.0
        self._across = linear_weight(layer.across.weight) * double[:, None]
        self._from_label = (for_horizontal + layer.horizontal.bias) * double
        self._horizontal = (linear_weight(layer.horizontal.weight) * double[:, None]).t().contiguous()
        # The bias is a row of the matrix, for a channel that is always 1.
        self._residual = torch.cat([2.0 * linear_weight(layer.residual.weight).t(), layer.residual.bias[None]])
        self._gated = self._from_label.new_ones(batch, width + 1)
        self._width, self._columns = width, layer.horizontal.kernel_size[1]
        self.above = self._gated.new_zeros(batch, reach + height, reach + self._w + reach, width)
        self.left = self._gated.new_zeros(batch, reach + self._w, width)
        self._of_row = self._gated.new_zeros(self._w, batch, 2 * width)

    def put_above(self, row: int, column: int, features: Tensor) -> None:
        """The vertical stack's input (B, n, width) in a row, from a column on."""
        begin = self._reach + column
        self.above[:, self._reach + row, begin : begin + features.shape[1]] = features

    def put_left(self, column: int, features: Tensor) -> None:
        """The horizontal stack's input (B, n, width) in the present row, from a column on."""
        begin = self._reach + column
        self.left[:, begin : begin + features.shape[1]] = features

    def vertical(self, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 of the vertical stack, the last of which is the present one: (B, rows, w, width)."""
        layer = self._layer
        kernel_rows = layer.vertical.kernel_size[0]
        # Row i of the output begins at row i of the padded input: rows i - reach..i, or ..i - 1 in the first layer.
        rows = rearrange(self.above[:, start : stop - 1 + kernel_rows], "B r c D -> B D r c")
        v = rearrange(layer.vertical(rows), "B D r c -> B r c D")  # (B, rows, w, 2 width)
        of_row = F.linear(v[:, -1], self._across) + self._from_label[:, None]
        self._of_row = rearrange(of_row, "B c D -> c B D").contiguous()
        return gate(v + self._for_vertical[:, None, None], dim=-1)

    def horizontal(self, column: int) -> Tensor:
        """One column of the horizontal stack: (B, width)."""
        windows = self.left[:, column : column + self._columns].flatten(1)  # (B, columns * width), a view
        halves = torch.addmm(self._of_row[column], windows, self._horizontal).sigmoid_()  # (B, 2 width)
        torch.mul(halves[:, : self._width] - 0.5, halves[:, self._width :], out=self._gated[:, : self._width])
        if self._layer.first:
            return self._gated @ self._residual
        return torch.addmm(self.left[:, self._reach + column], self._gated, self._residual)


def linear_weight(kernel: Tensor) -> Tensor:
    """A kernel (out, in, 1, columns) as the matrix (out, columns * in) that acts on its columns side by side."""
    return rearrange(kernel, "o i 1 c -> o (c i)").contiguous()


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Compute on one thread of the CPU, where that is wanted."""
    threads = torch.get_num_threads()
    if not wanted or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
