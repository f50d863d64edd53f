"""Dropout (Srivastava et al., 2014), on a CPU with 16 random bits per element.

torch draws each element of a mask by itself on a CPU, which took a sixth of a training step. Here one draw of 64 bits
from the same generator serves four elements. So the mask is still a function of the generator's state, which a resumed
run and a layer that is computed twice restore.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from stage1_tokenizer.engine.processor import is_traced

LEVELS = 2**16
"""Values of 16 bits. The share of zeros is a multiple of 1 / LEVELS."""


def dropout(x: Tensor, share: float) -> Tensor:
    """Set a random `share` of x (0 <= share < 1) to 0 and divide the rest by the share kept."""
    if not share or x.device.type != "cpu" or is_traced(x):
        return F.dropout(x, share) if share else x
    y: Tensor = _Dropout.apply(x, min(round(share * LEVELS), LEVELS - 1))
    return y


class _Dropout(torch.autograd.Function):
    """`dropout` on a CPU: `dropped` of LEVELS equally likely values set an element to 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        """Draw the mask of zeros and ones in the dtype of x, and multiply."""
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
        mask = torch.ge(bits, dropped - LEVELS // 2, out=torch.empty(x.shape, dtype=x.dtype))  # without a bool between
        ctx.save_for_backward(mask)
        ctx.scale = LEVELS / (LEVELS - dropped)
        return (x * mask).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Multiply the gradient by the same mask and scale."""
        (mask,) = ctx.saved_tensors
        return (gradient * mask).mul_(ctx.scale), None
