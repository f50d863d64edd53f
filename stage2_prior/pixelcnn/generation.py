"""Generation with a PixelCNN: one step per position, with a cache of the features of both stacks.

The vertical stack of a row depends on the rows above only. It is computed once per row, for all columns at once. The
horizontal stack of a position depends on the vertical stack and on the positions to the left. It is computed once per
position. So the whole generation does the arithmetic of one forward pass. (The usual loop does a forward pass per
position, which is h*w times as much.)

The cached features have their channels last and a margin of zeros as wide as a kernel reaches. So kernels at a border
need no special case, and a convolution is a matrix product.

A product of few rows takes little longer than the call itself, so the horizontal stack makes few calls. What other
positions contribute to its gates is computed for all layers in one call: the vertical stack's contribution once per
row, that of the columns to the left once per position. Then a layer makes five calls, in memory that is allocated once:

    gate's inputs += features of the layer before * weight -> sigmoid -> - 1/2 -> product of both halves
    features = features of the layer before + gate's output * weight

The gate is computed as tanh(a) sigmoid(b) = 2 (sigmoid(2a) - 1/2) sigmoid(b), so that one call of sigmoid serves both
halves. The weights before the gate contain the factor of a, the weights behind it the factor in front.

    L layers, D width, B batch, h w latent grid
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage2_prior.base import Generation, Grid, PreparedPrior, Prior
from stage2_prior.fast_linear import prepare
from stage2_prior.pixelcnn.layer import GatedLayer, gate

SMALL_BATCH = 32
"""Largest batch for which one CPU thread is faster than several: the horizontal stack of 15 layers of width 128 took
1.1 s per image at a batch of 16 on one thread, and 2.8 s on two threads of two virtual cores."""


class PreparedPixelCnn(PreparedPrior):
    """A PixelCNN with its weights arranged for generation in float32."""

    @torch.no_grad()
    def __init__(self, prior: Prior, layers: Iterable[GatedLayer], output: nn.Conv2d) -> None:
        """Take the layers of a PixelCnn and its `output`, the 1x1 convolution after the last layer."""
        super().__init__(prior, "float32")
        self.layers, self.width = list(layers), output.in_channels
        self.double = output.weight.new_tensor([2.0, 1.0]).repeat_interleave(self.width)  # (2 D,)
        self.vertical = [prepare(matrix(layer.vertical), layer.vertical.bias, "float32") for layer in self.layers]
        self.across = torch.stack([matrix(layer.across).t() * self.double for layer in self.layers])  # (L, 2 D, 2 D)
        self.first, *later = (matrix(layer.horizontal).t() * self.double for layer in self.layers)  # (columns * D, 2 D)
        self.reach = self.layers[-1].reach
        left = self.first.new_empty(len(later), self.reach * self.width, 2 * self.width)
        self.left = torch.stack([weight[: -self.width] for weight in later], out=left) if later else left
        self.present = [weight[-self.width :] for weight in later]  # (D, 2 D) each
        # The bias is the last row of the matrix, multiplied by a channel that is always 1.
        self.residual = [
            torch.cat([2.0 * matrix(layer.residual).t(), bias(layer.residual)[None]]) for layer in self.layers
        ]  # (D + 1, D) each
        self.output = matrix(output), bias(output)

    def _begin(self, labels: Tensor, grid: Grid) -> "PixelCnnGeneration":
        return PixelCnnGeneration(self, labels, grid)


class PixelCnnGeneration(Generation):
    """The state of a generation with a PixelCNN: the features of both stacks so far."""

    def __init__(self, prepared: PreparedPixelCnn, labels: Tensor, grid: Grid) -> None:
        super().__init__(prepared)
        self._w, self._output = grid[1], prepared.output
        vertical_bias, horizontal_bias = torch.stack([layer.label(labels) for layer in prepared.layers]).chunk(2, -1)
        self._vertical = VerticalStack(prepared, vertical_bias, horizontal_bias, grid)
        self._horizontal = HorizontalStack(prepared, len(labels), grid[1])
        self._is_small = labels.device.type == "cpu" and len(labels) <= SMALL_BATCH
        self._position = 0  # first position whose codes are not known
        self._rows_done = 0  # rows whose vertical stack is computed
        self._columns_done = 0  # columns of the present row whose horizontal stack is computed

    def _next_context(self) -> Tensor:
        row, column = divmod(self._position, self._w)
        for next_row in range(self._rows_done, row + 1):
            self._vertical.compute(next_row)
        self._rows_done = row + 1
        with one_thread(self._is_small):
            for next_column in range(self._columns_done, column + 1):
                self._horizontal.compute(next_column, self._vertical.contribution[:, :, next_column])
            self._columns_done = column + 1
            return F.relu(F.linear(F.relu(self._horizontal.features), *self._output))

    def _add_positions(self, embedded: Tensor) -> None:
        while embedded.shape[1]:
            row, column = divmod(self._position, self._w)
            count = min(embedded.shape[1], self._w - column)  # at most the rest of this row
            self._horizontal.put(column, embedded[:, :count])
            self._position += count
            if column + count == self._w:  # the next row overwrites the features of this row before it reads them
                self._vertical.put(0, row, self._horizontal.codes)
                self._columns_done = 0
            embedded = embedded[:, count:]


class VerticalStack:
    """The cached inputs of the vertical stack, and its contribution to the horizontal stack in the present row."""

    def __init__(self, prepared: PreparedPixelCnn, vertical_bias: Tensor, horizontal_bias: Tensor, grid: Grid) -> None:
        """Take the biases (L, B, 2 D) of the labels in both stacks."""
        self._prepared, self._bias = prepared, vertical_bias[:, :, None]
        own_bias = torch.stack([bias(layer.horizontal) for layer in prepared.layers])[:, None]
        self._horizontal_bias = ((horizontal_bias + own_bias) * prepared.double)[:, :, None]
        (h, w), batch = grid, vertical_bias.shape[1]
        self._inputs = [
            own_bias.new_zeros(batch, layer.reach + h, layer.reach + w + layer.reach, prepared.width)
            for layer in prepared.layers
        ]
        self.contribution = own_bias.new_empty(0)
        """To the gates of the horizontal stack in the row that was computed last, with all biases: (L, B, w, 2 D)."""

    def put(self, layer: int, row: int, features: Tensor) -> None:
        """Store a row (B, w, D) of the inputs of a layer."""
        reach = self._prepared.layers[layer].reach
        self._inputs[layer][:, reach + row, reach : reach + features.shape[1]] = features

    def compute(self, row: int) -> None:
        """Compute a row, after all rows before it."""
        outputs = []
        for index, layer in enumerate(self._prepared.layers):
            rows, columns = layer.vertical.kernel_size
            # The row reads padded rows from `row` on: grid rows row - reach..row, in the first layer ..row - 1.
            windows = self._inputs[index][:, row : row + rows].unfold(2, columns, 1)  # (B, rows, w, D, columns)
            flat = rearrange(windows, "B r w D c -> (B w) (r c D)")
            outputs.append(self._prepared.vertical[index](flat).view(len(windows), -1, 2 * self._prepared.width))
            if index + 1 < len(self._prepared.layers):
                self.put(index + 1, row, gate(outputs[-1] + self._bias[index], dim=-1))
        stacked = torch.stack(outputs)  # (L, B, w, 2 D)
        across = torch.bmm(stacked.flatten(1, 2), self._prepared.across)
        self.contribution = across.view_as(stacked).add_(self._horizontal_bias)


class HorizontalStack:
    """The cached inputs of the horizontal stack in the present row."""

    def __init__(self, prepared: PreparedPixelCnn, batch: int, w: int) -> None:
        self._prepared, layers, width = prepared, len(prepared.layers), prepared.width
        self._first_reach, zeros = prepared.layers[0].reach, prepared.first.new_zeros
        self._codes = zeros(batch, self._first_reach + w, width)  # inputs of the first layer
        self.codes = self._codes[:, self._first_reach :]
        """The embedded codes (B, w, D) of the present row, which `put` stores."""
        self._left = zeros(layers - 1, batch, prepared.reach + w, width)  # inputs of the other layers
        # Of the present position. The first layer has no residual connection: the features before it stay 0.
        features, gates = zeros(layers + 1, batch, width), zeros(layers, batch, 2 * width)
        self._present, self._first_gate, self._later_gates = features[1:-1], gates[0], gates[1:]
        self._features, self._gates = list(features), [(both, *both.chunk(2, dim=-1)) for both in gates]
        self._gated = zeros(batch, width + 1).add_(1.0)
        self._gated_part = self._gated[:, :width]
        self._half = zeros(()).add_(0.5)  # a number would become such a tensor in each call

    @property
    def features(self) -> Tensor:
        """The features (B, D) of the last layer at the column that was computed last."""
        return self._features[-1]

    def put(self, column: int, embedded: Tensor) -> None:
        """Store embedded codes (B, n, D) of the present row, beginning at a column."""
        begin = self._first_reach + column
        self._codes[:, begin : begin + embedded.shape[1]] = embedded

    def compute(self, column: int, from_vertical: Tensor) -> None:
        """Compute a column, after all columns before it, with the vertical stack's contribution (L, B, 2 D)."""
        prepared, features = self._prepared, self._features
        codes = self._codes[:, column : column + self._first_reach].flatten(1)  # (B, reach * D), a view
        left = self._left[:, :, column : column + prepared.reach].flatten(2)  # (L - 1, B, reach * D), a view
        torch.addmm(from_vertical[0], codes, prepared.first, out=self._first_gate)
        torch.baddbmm(from_vertical[1:], left, prepared.left, out=self._later_gates)
        for index, (both, first, second) in enumerate(self._gates):
            if index:
                torch.addmm(both, features[index], prepared.present[index - 1], out=both)
            both.sigmoid_()
            first.sub_(self._half)
            torch.mul(first, second, out=self._gated_part)
            torch.addmm(features[index], self._gated, prepared.residual[index], out=features[index + 1])
        self._left[:, :, prepared.reach + column] = self._present


def matrix(convolution: nn.Conv2d) -> Tensor:
    """Return a kernel as a matrix (out, rows * columns * in), for the inputs of all its positions side by side."""
    return rearrange(convolution.weight, "o i r c -> o (r c i)")


def bias(convolution: nn.Conv2d) -> Tensor:
    """Return the bias (out,) of a convolution that has one."""
    assert convolution.bias is not None
    return convolution.bias


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
