"""Products in float32 and bfloat16 by oneDNN, where `processor.py` says that they are faster than torch's default, MKL.

The way to oneDNN is private to torch (it is what its compiler emits), and this is the one place that calls it. What is
compiled, exported, traced or counted meets plain operators in its place (`processor.is_traced`). Both round alike, to
1e-6 relative in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.engine import processor

MIN_ROWS = 128
"""Fewest rows of an input for `linear`: the weight is packed at each call, and fewer rows would not pay that
back."""


def pack(weight: Tensor, rows: int | None = None) -> Tensor:
    """Copy a weight (o, i) into the order that oneDNN's kernels read; rows: of the inputs to come, if known.

    Raises:
        RuntimeError: oneDNN does not compute in the weight's dtype on this processor.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return packed


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (n, i), packed (o, i), bias (o,) -> (n, o)."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., i), weight (o, i), bias (o,) -> (..., o): F.linear, in exact float32 by oneDNN where that is faster."""
    if not _serves(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _Product.apply(x, weight, bias)
    return y


def _serves(x: Tensor, weight: Tensor) -> bool:
    return (
        not processor.is_traced(x)  # asked first, since the compiler cannot trace the other questions
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= MIN_ROWS * weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and processor.takes("onednn")
    )


class OneDnnLinear(nn.Linear):
    """nn.Linear by `linear`, with the same parameters, names and results."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


def give_to_onednn(module: nn.Module) -> None:
    """Make each nn.Linear within a module, which may be another library's, a OneDnnLinear; in place."""
    for each in module.modules():
        if type(each) is nn.Linear:
            each.__class__ = OneDnnLinear  # it adds no state, so parameters, hooks and names stay what they are


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(n, i), (o, i), (o,) -> (n, o)."""
    return multiply(x, pack(weight, len(x)), bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)  # (n, o)
        return (
            _product(rows, weight.t()).view_as(x) if of_x else None,
            _product(rows.t(), x.flatten(0, -2).t()) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )
