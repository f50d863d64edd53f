"""The parts of a transformer's layer that are no linear maps: normalising, scaling and rotating; gating; attention.

On a CPU a layer's time beyond its matrix products is that of passes over memory. Written as a chain of torch's
operators, scaling and gating keep several results for the backward pass; so there each has a backward pass of its own,
keeps its input, and computes in place what it can. On a GPU what counts is how many kernels are launched, and what is
compiled is merged by the compiler: both get the chain of torch's operators, the same sums.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT = 160
"""Up to as many positions attention by plain products is faster on a CPU than torch's fused one, which works in blocks:
a step of 64 positions took 34 ms against 42, of 128 57 against 68, and of 256 386 against 252 (Zen 3)."""
TINY = 1e-12
"""A vector shorter than this is not lengthened to one."""


def scaled_unit(x: Tensor, scale: Tensor, turns: Tensor | None = None) -> Tensor:
    """Vectors (..., D) to length one, times scale (D) or (..., H, D), in the dtype of scale; then neighbouring channels
    are turned, for x (B, n, ..., H, D). turns (n, D / 2, 2): cosine and sine of each position's angles; they get no
    gradient."""
    x = x.to(scale.dtype)
    if turns is not None:
        turns = turns.view(len(turns), *(1,) * (x.ndim - 3), *turns.shape[1:])  # (n, ..., 1, D / 2, 2)
    if _in_passes(x):
        y: Tensor = _ScaledUnit.apply(x, scale, None if turns is None else torch.view_as_complex(turns))
        return y
    D = x.shape[-1]
    y = F.rms_norm(x, (D,), eps=TINY**2) * (scale * D**-0.5)
    return y if turns is None else _turned(y, turns)


def gated(x: Tensor) -> Tensor:
    """(..., 2 * D) -> (..., D): the first half times the second's SiLU (Shazeer, "GLU Variants Improve Transformer",
    2020, equation 6)."""
    if _in_passes(x):
        y: Tensor = _Gated.apply(x)
        return y
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Causal attention over positions: each (B, n, H, D) -> (B, n, H, D)."""
    if _in_passes(q) and q.shape[1] <= SHORT and not dropout and not torch.is_autocast_enabled("cpu"):
        return _attend_by_products(q, k, v, scale)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale).transpose(1, 2)


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention by plain products: see attend."""
    B, n, H, _ = q.shape
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (q * scale, k, v))  # (B H, n, D), copied
    later = torch.full((n, n), -torch.inf, dtype=q.dtype).triu_(1)
    weights = torch.baddbmm(later, q, k.transpose(1, 2)).softmax(dim=-1)  # (B H, n, n)
    return torch.bmm(weights, v).view(B, H, n, -1).transpose(1, 2)


def _in_passes(x: Tensor) -> bool:
    """Return True if x goes through the parts that are written for a CPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _turned(y: Tensor, turns: Tensor) -> Tensor:
    """y (B, n, ..., H, D) with its neighbouring channels turned by turns (n, ..., 1, D / 2, 2)."""
    pairs = y.reshape(*y.shape[:-1], -1, 2)  # (B, n, ..., H, D / 2, 2)
    if not torch.compiler.is_compiling():  # one kernel; the compiler has none for complex numbers
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns)).flatten(-2)
    (one, other), (cos, sin) = pairs.unbind(dim=-1), turns.unbind(dim=-1)
    return torch.stack([one * cos - other * sin, one * sin + other * cos], dim=-1).flatten(-2)


def _complex(x: Tensor) -> Tensor:
    """(..., D) -> (..., D / 2): a view."""
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


class _ScaledUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, turns: Tensor | None) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(TINY).reciprocal_()  # (..., 1)
        ctx.save_for_backward(x, scale, turns, inverse)
        y = (x * inverse).mul_(scale)
        if turns is not None:
            _complex(y).mul_(turns)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, turns, inverse = ctx.saved_tensors
        if turns is not None:
            gradient = torch.view_as_real(_complex(gradient.contiguous()) * turns.conj()).flatten(-2)
        unit = x * inverse
        of_scale = (gradient * unit).sum_to_size(scale.shape)
        along = gradient * scale
        parallel = (along * unit).sum(dim=-1, keepdim=True)
        return along.addcmul_(unit, parallel, value=-1).mul_(inverse), of_scale, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        of_x = torch.empty_like(x)
        of_value, of_gate = of_x.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=of_value)
        torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        return of_x
