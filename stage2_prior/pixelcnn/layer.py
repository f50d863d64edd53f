"""One layer of the gated PixelCNN (van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016).

Two stacks of convolutions run side by side (section 2.2, figure 2). The vertical stack sees the rows above a position,
the horizontal stack the positions to the left in the same row. In each layer, the output of the vertical convolution
passes a 1x1 convolution and is added to the output of the horizontal one. So the horizontal stack depends on all
earlier positions and has no blind spot, which a single stack of masked convolutions has (figure 1).

        vertical              horizontal
        . . . . .             . . . . .         x: the position
        v v v v v             . . . . .         Only the first layer leaves out the row of x (vertical) or x itself
        v v v v v             . . . . .         (horizontal). In later layers the feature at x does not depend on
        . . x . .             h h x . .         the code at x, so their kernels include x.

The original masks the weights of square kernels. Here a kernel has only the rows above, or only the columns to the
left, and padding at the top or left moves it to its place: the same sums with fewer multiplications.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.base import LabelEmbedding


def gate(x: Tensor, dim: int) -> Tensor:
    """Compute tanh(a) * sigmoid(b) of the two halves a, b of x along `dim` (equation 2)."""
    a, b = x.chunk(2, dim=dim)
    return torch.tanh(a) * torch.sigmoid(b)


class GatedLayer(nn.Module):
    """One layer of both stacks (figure 2), conditioned on a label (equation 4)."""

    def __init__(self, width: int, kernel: int, classes: int, dropout: float, first: bool) -> None:
        super().__init__()
        self.first, self.reach = first, kernel // 2
        rows = columns = self.reach if first else self.reach + 1  # the first layer leaves out the row, or the position
        self.vertical = nn.Conv2d(width, 2 * width, (rows, kernel))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, columns))
        self.across = nn.Conv2d(2 * width, 2 * width, 1, bias=False)  # from the vertical stack to the horizontal one
        self.residual = nn.Conv2d(width, width, 1)
        self.label = LabelEmbedding(classes, 4 * width)  # a bias for the 2 * width channels of each stack
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, above: Tensor, left: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the layer: vertical and horizontal features (B, width, h, w), labels (B,) -> both (B, width, h,
        w)."""
        vertical_bias, horizontal_bias = self.label(labels)[:, :, None, None].chunk(2, dim=1)  # (B, 2 width, 1, 1)
        reach = self.reach
        v = self.vertical(F.pad(above, (reach, reach, reach, 0)))  # (B, 2 width, h, w), first layer: h + 1 rows
        h = self.horizontal(F.pad(left, (reach, 0)))  # (B, 2 width, h, w), first layer: w + 1 columns
        if self.first:  # drop the last row, or column: it belongs to positions outside the grid
            v, h = v[:, :, :-1], h[:, :, :, :-1]
        gated = gate(h + self.across(v) + horizontal_bias, dim=1)  # (B, width, h, w)
        out = self.residual(self.dropout(gated))
        # The first layer has no residual connection in the horizontal stack: its input is the code of the position.
        return gate(v + vertical_bias, dim=1), out if self.first else left + out
