"""One layer of the gated PixelCNN (van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016).

Two stacks of convolutions run side by side. The vertical one sees the rows above a position, the horizontal one what
lies left of it in its own row, and at each layer the former is added into the latter. So a position sees all that
comes before it and has no blind spot, which a single stack of masked convolutions has.

        vertical              horizontal
        . . . . .             . . . . .
        v v v v v             . . . . .         x: the position.  Only the first layer leaves out the row (vertical)
        v v v v v             . . . . .         or the position (horizontal) itself: in later layers what stands at
        . . x . .             h h x . .         x has not seen x.

Instead of masking taps we leave them out: a kernel has only the rows above, or only the columns to the left, and the
padding shifts it there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gate(x: Tensor, dim: int) -> Tensor:
    """tanh(a) * sigmoid(b) of the two halves of x along `dim` (equation 2)."""
    a, b = x.chunk(2, dim=dim)
    return torch.tanh(a) * torch.sigmoid(b)


class GatedLayer(nn.Module):
    """One layer of both stacks (figure 2), conditioned on a label (equation 4)."""

    def __init__(self, width: int, kernel: int, labels: int, dropout: float, first: bool) -> None:
        super().__init__()
        self.first, self.reach = first, kernel // 2
        rows = columns = self.reach if first else self.reach + 1  # the first layer leaves out the row, or the position
        self.vertical = nn.Conv2d(width, 2 * width, (rows, kernel))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, columns))
        self.across = nn.Conv2d(2 * width, 2 * width, 1, bias=False)  # from the vertical stack to the horizontal one
        self.residual = nn.Conv2d(width, width, 1)
        self.label = nn.Embedding(labels, 4 * width)  # a bias for each stack
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, above: Tensor, left: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Both stacks' features (B, width, h, w) twice, labels (B,) -> those of the next layer."""
        for_vertical, for_horizontal = self.label(labels)[:, :, None, None].chunk(2, dim=1)  # (B, 2 width, 1, 1)
        reach = self.reach
        v = self.vertical(F.pad(above, (reach, reach, reach, 0)))  # (B, 2 width, h or h + 1, w)
        h = self.horizontal(F.pad(left, (reach, 0)))
        if self.first:  # what was left out is the last row, or column, that would fit
            v, h = v[:, :, :-1], h[:, :, :, :-1]
        gated = gate(h + self.across(v) + for_horizontal, dim=1)
        out = self.residual(self.dropout(gated))
        # The first layer has no shortcut for the horizontal stack: its input is the position itself.
        return gate(v + for_vertical, dim=1), out if self.first else left + out
