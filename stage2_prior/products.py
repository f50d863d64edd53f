"""Products with fixed matrices, prepared once so that the many small ones of generation are fast.

    product = prepare(weight, bias, "int8")        weight (o, i), bias (o) or None
    y = product(x)                                 x (n, i) -> y (n, o), in the dtype of x

float32    the sum that `nn.Linear` computes, in another order
bfloat16   weights and inputs rounded to 8 bits of mantissa; the sum in float32
int8       weights rounded to 255 steps per output, inputs to 127 steps per row; the sum of integers is exact
"""

import warnings
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.engine import processor
from stage1_tokenizer.engine.errors import ConfigError
from stage2_prior import onednn

Precision = Literal["float32", "bfloat16", "int8"]
Product = Callable[[Tensor], Tensor]

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
        packed = onednn.pack(weight)
    except RuntimeError:  # bfloat16 was turned on where oneDNN does not have it
        return None

    def product(x: Tensor) -> Tensor:
        if processor.is_traced(x):  # the plain weight is not kept beside the packed one
            return F.linear(x, packed.to_dense(), bias)
        return onednn.multiply(x, packed, bias)

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
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32

    def product(x: Tensor) -> Tensor:
        # One scale for each row and not for the batch, as torch's dynamic quantization has it: what an image becomes
        # must not depend on those that it is computed together with.
        largest = x.abs().amax(dim=1, keepdim=True).clamp_min_(tiny)
        y: Tensor = multiply(x / largest, 1.0 / INT8_STEPS, INT8_STEPS + 1, ordered).mul_(largest)
        return y if bias is None else y.add_(bias)

    return product
