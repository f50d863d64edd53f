"""Dropout (Srivastava et al., 2014), on a CPU with 16 random bits per element.

torch draws each element of a mask by itself on a CPU, which took a sixth of a training step. Here one draw of 64 bits
from the same generator serves four elements. So the mask is still a function of the generator's state, which a resumed
run and a layer that is computed twice restore.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 2**16
"""Values of 16 bits. The share of zeros is a multiple of 1 / LEVELS."""


def dropout(x: Tensor, share: float) -> Tensor:
    """Set a random `share` of x (0 <= share < 1) to 0 and divide the rest by the share kept."""
    if not share:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, share)
    dropped = min(round(share * LEVELS), LEVELS - 1)
    # A compiler never merges `empty`, and so no two masks. By itself, torch 2.9 merges equal calls of `draw_mask`.
    room = torch.empty(x.shape, dtype=x.dtype)
    return (x * draw_mask(room, dropped)).mul_(LEVELS / (LEVELS - dropped))


class Dropout(nn.Dropout):
    """`dropout` in training, as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop a share p of x, of any shape."""
        return dropout(x, self.p * self.training)


# The compiler takes an operator of ours as it is. The tag forbids it to draw a mask again for the backward pass.
@torch.library.custom_op("tessera::draw_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_mask(x: Tensor, dropped: int) -> Tensor:
    """Draw a mask of zeros and ones in the shape and dtype of x, whose values do not count.

    `dropped` of LEVELS equally likely values make a 0.
    """
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return torch.ge(bits, dropped - LEVELS // 2, out=torch.empty(x.shape, dtype=x.dtype))  # without a bool between


@draw_mask.register_fake
def _(x: Tensor, dropped: int) -> Tensor:
    del dropped
    return torch.empty(x.shape, dtype=x.dtype)
