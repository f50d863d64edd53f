"""Linear maps in exact float32 by oneDNN, forward and backward, on processors where torch's default is slower.

torch multiplies float32 matrices on a CPU by MKL, which on some of AMD's processors runs at half of oneDNN's rate. The
way to oneDNN is private to torch (it is what its compiler emits), so it may be gone in another version: then
everything here falls back on the default. Both round alike, to 1e-6 relative.
"""

from typing import Any

import torch
from torch import Tensor, nn

from stage1_tokenizer import processor

MIN_ROWS = 128
"""Of the input: the weight is put into oneDNN's order at each call, and fewer rows would not pay that back."""


class OneDnnLinear(nn.Linear):
    """nn.Linear, with the same parameters, names and results."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not self._serves(x):
            return super().forward(x)
        y: Tensor = _Product.apply(x, self.weight, self.bias)
        return y

    def _serves(self, x: Tensor) -> bool:
        return (
            not torch.compiler.is_compiling()  # the compiler makes that choice itself, and cannot trace the others
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.numel() >= MIN_ROWS * self.in_features
            and processor.prefers_onednn()
            and is_there()
            and not torch.is_autocast_enabled("cpu")
        )


def give_to_onednn(module: nn.Module) -> None:
    """Make each nn.Linear within a module, which may be another library's, a OneDnnLinear; in place."""
    for each in module.modules():
        if type(each) is nn.Linear:
            each.__class__ = OneDnnLinear  # it adds no state, so parameters, hooks and names stay what they are


def is_there() -> bool:
    """Whether this torch has the private operators, in its own namespace."""
    operators = torch.ops.mkldnn
    return hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(n, i), (o, i), (o,) -> (n, o)."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), len(x))
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)  # (n, o)
        return (
            _multiply(rows, weight.t()).view_as(x) if of_x else None,
            _multiply(rows.t(), x.flatten(0, -2).t()) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )
