"""Products of matrices: by oneDNN where `processor.py` says that it is faster than torch's default, MKL; and prepared
once, so that the many small ones of generation are fast.

    y = linear(x, weight, bias)                    x (..., i), weight (o, i), bias (o) or None -> y (..., o)

    product = prepare(weight, bias, "int8")
    y = product(x)                                 x (n, i) -> y (n, o), in the dtype of x

float32    the sum that `nn.Linear` computes, in another order: equal to 1e-6 relative
bfloat16   weights and inputs rounded to 8 bits of mantissa; the sum in float32
int8       weights rounded to 255 steps per output, inputs to 127 steps per row; the sum of integers is exact

The way to oneDNN is private to torch (it is what its compiler emits), and `pack` and `multiply` alone call it. What is
compiled, exported, traced or counted meets plain operators in its place (`processor.is_traced`).
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.engine import processor
from stage1_tokenizer.engine.errors import ConfigError

Precision = Literal["float32", "bfloat16", "int8"]
Product = Callable[[Tensor], Tensor]

MIN_ROWS = 128
"""Fewest rows of an input for `linear`: the weight is packed at each call, and fewer rows would not pay that
back."""

INT8_STEPS = 63
"""Inputs take 7 of 8 bits: where the processor has no instructions for 8-bit sums (VNNI), FBGEMM adds pairs of
products in 16 bits, and twice 127 * 127 is the most that fits."""


def prepare(weight: Tensor, bias: Tensor | None, precision: Precision) -> Product:
    """The product with `weight`, plus `bias`, on the device that they are on.

    Raises:
        ConfigError: int8 on a GPU, or in a build of torch without FBGEMM.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if precision == "int8":
        return _int8(weight, bias)
    if precision == "bfloat16":
        weight, bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
    packed = _packed(weight, bias) if weight.device.type == "cpu" else None
    product = packed or (lambda x: F.linear(x, weight, bias))
    return product if precision == "float32" else lambda x: product(x.bfloat16()).to(x.dtype)


def _packed(weight: Tensor, bias: Tensor | None) -> Product | None:
    """The product by oneDNN from a packed copy of the weight; None where that path is not taken."""
    path: processor.FastPath = "bfloat16" if weight.dtype == torch.bfloat16 else "packed"
    if weight.dtype not in (torch.float32, torch.bfloat16) or processor.is_traced(weight):
        return None
    if not (processor.takes(path) and processor.has_onednn()):
        return None
    try:
        packed = pack(weight)
    except RuntimeError:  # bfloat16 was turned on where oneDNN does not have it
        return None

    def product(x: Tensor) -> Tensor:
        if processor.is_traced(x):  # the plain weight is not kept beside the packed one
            return F.linear(x, packed.to_dense(), bias)
        return multiply(x, packed, bias)

    return product


def _quantized_engines() -> list[str]:
    return list(torch.backends.quantized.supported_engines)


def _int8(weight: Tensor, bias: Tensor | None) -> Product:
    if weight.device.type != "cpu":
        raise ConfigError("precision int8 is for sampling on a CPU; on a GPU take bfloat16")
    if "fbgemm" not in _quantized_engines():
        raise ConfigError("precision int8: this build of torch has no FBGEMM, which computes it; take float32")
    tiny = torch.finfo(torch.float32).tiny
    steps = weight.abs().amax(dim=1).clamp_min(tiny) / 127  # (o,)
    with warnings.catch_warnings():
        # Deprecated since torch 2.15, with successors (torch.ops.onednn) that take three times as long without VNNI.
        warnings.filterwarnings("ignore", message=r"torch\.quantize_per_", category=UserWarning)
        rounded = torch.quantize_per_channel(
            weight, steps.double(), torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8
        )
    ordered = torch.ops.quantized.linear_prepack(rounded, None)
    multiply_int8 = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32

    def product(x: Tensor) -> Tensor:
        # One scale for each row and not for the batch, as torch's dynamic quantization has it: what an image becomes
        # must not depend on those that it is computed together with.
        largest = x.abs().amax(dim=1, keepdim=True).clamp_min_(tiny)
        y: Tensor = multiply_int8(x / largest, 1.0 / INT8_STEPS, INT8_STEPS + 1, ordered).mul_(largest)
        return y if bias is None else y.add_(bias)

    return product


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


def use_onednn_linear(module: nn.Module) -> None:
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
