"""Fast linear maps y = x W^T + b for generation: `prepare` converts and reorders a weight once, so that many small
products with it are fast.

    product = prepare(weight, bias, "int8")
    y = product(x)                                 x (n, i) -> y (n, o), in the dtype of x

float32    equal to `nn.Linear` up to the order of the sum: 1e-6 relative
bfloat16   weights and inputs are rounded to 8 bits of mantissa; the sum is in float32
int8       weights are rounded to 255 levels per output, inputs to 127 levels per row; the sum of integers is exact

torch's operators for oneDNN are private (its compiler emits them). Only `pack` and `multiply` of processor.py call
them. Code that is compiled, exported, traced or counted gets plain operators instead (`processor.is_traced`).
"""

import warnings
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.engine import processor
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.processor import multiply, pack

Precision = Literal["float32", "bfloat16", "int8"]
"""Precision of the products of generation."""
Product = Callable[[Tensor], Tensor]
"""A linear map with a prepared weight: (n, i) -> (n, o)."""

INT8_STEPS = 63
"""Largest magnitude of a rounded input, so that inputs use 7 of 8 bits. On a processor without VNNI, FBGEMM adds pairs
of products in 16 bits, which hold at most two products of an 8-bit weight and a 7-bit input."""


def prepare(weight: Tensor, bias: Tensor | None, precision: Precision) -> Product:
    """Prepare the linear map of `weight` (o, i) and `bias` (o,) for one precision, on their device.

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
    """Return the product by oneDNN with a packed copy of the weight; None where oneDNN is not used."""
    path: processor.FastPath = "bfloat16" if weight.dtype == torch.bfloat16 else "packed"
    if weight.dtype not in (torch.float32, torch.bfloat16) or processor.is_traced(weight):
        return None
    if not (processor.takes_fast_path(path) and processor.has_onednn()):
        return None
    try:
        packed = pack(weight)
    except RuntimeError:  # the user turned bfloat16 on, but oneDNN does not support it on this processor
        return None

    def product(x: Tensor) -> Tensor:
        if processor.is_traced(x):  # only the packed weight is kept
            return F.linear(x, packed.to_dense(), bias)
        return multiply(x, packed, bias)

    return product


def _quantized_engines() -> list[str]:
    """Return the libraries for integer products in this build of torch."""
    return list(torch.backends.quantized.supported_engines)


def _int8(weight: Tensor, bias: Tensor | None) -> Product:
    """Return the product by FBGEMM with an int8 copy of the weight."""
    if weight.device.type != "cpu":
        raise ConfigError("precision int8: works on a CPU only; use bfloat16 on a GPU")
    if "fbgemm" not in _quantized_engines():
        raise ConfigError("precision int8: this build of torch lacks FBGEMM, which int8 needs; use float32")
    tiny = torch.finfo(torch.float32).tiny
    steps = weight.abs().amax(dim=1).clamp_min(tiny) / 127  # (o,) difference between neighbouring levels
    with warnings.catch_warnings():
        # Deprecated since torch 2.15; its successors (torch.ops.onednn) take three times as long without VNNI.
        warnings.filterwarnings("ignore", message=r"torch\.quantize_per_", category=UserWarning)
        rounded = torch.quantize_per_channel(
            weight, steps.double(), torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8
        )
    packed = torch.ops.quantized.linear_prepack(rounded, None)
    multiply_int8 = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32

    def product(x: Tensor) -> Tensor:
        # One scale per row. torch's dynamic quantization has one scale per batch, but an image must not depend on the
        # other images of its batch.
        largest = x.abs().amax(dim=1, keepdim=True).clamp_min_(tiny)
        y: Tensor = multiply_int8(x / largest, 1.0 / INT8_STEPS, INT8_STEPS + 1, packed).mul_(largest)
        return y if bias is None else y.add_(bias)

    return product
