"""The operations of a transformer layer that are not linear maps: normalise, scale and rotate; SwiGLU; attention.

On a CPU, the time of these operations is the time of passes over memory. A chain of torch operators keeps several
results for the backward pass. So on a CPU each operation here has its own backward pass, keeps only its input, and
computes in place where it can. On a GPU the number of kernel launches matters, and the compiler merges operators by
itself; both use the plain chain of torch operators, which computes the same sums.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from stage2_prior.gpt.dropout import dropout

SHORT = {torch.float32: 160, torch.float64: 160, torch.bfloat16: 1024}
"""Longest sequence for which attention by plain products is faster on a CPU than torch's fused attention, which works
in blocks. Forward and back, in ms: in bfloat16 57 against 126 with 256 positions, 123 against 244 with 576, 188 against
269 with 1,024; in float32 128 against 103 with 256. With dropout torch has no fused attention: 74 against 197, and 137
against 201 in float32 (16 images, 256 positions, 8 heads of 64, one core of Zen 4)."""
TINY = 1e-12
"""Smallest length by which a vector is divided; shorter vectors are divided by this."""


def normalise_and_rotate(x: Tensor, scale: Tensor, rotation: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """Normalise vectors (..., D) to length 1, multiply them by `scale`, then rotate pairs of neighbouring channels.

    This is RMSNorm with `scale` = gain * sqrt(D), and the query/key norm with rotary positions.

    Args:
        x: (B, n, ..., H, D); without a rotation, any (..., D).
        scale: (D) or (..., H, D). Sums are in its dtype; the result has the dtype of x.
        rotation: (n, D / 2, 2), cosine and sine per position and pair (RoPE, Su et al. 2021, equation 34); it gets no
            gradient. None: no rotation.
        eps: number added to the mean square (RMSNorm); 0: none.
    """
    if rotation is not None:
        rotation = _per_vector(rotation, x)
    if _uses_cpu_path(x):
        turns = None if rotation is None else torch.view_as_complex(rotation)
        y: Tensor = _NormaliseAndRotate.apply(x, scale, turns, eps)
        return y
    D = x.shape[-1]
    y = F.rms_norm(x.to(scale.dtype), (D,), eps=eps or TINY**2) * (scale * D**-0.5)
    return (y if rotation is None else _rotate(y, rotation)).to(x.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels of x (B, n, ..., H, D) by rotation (n, D / 2, 2), in the latter's dtype;
    the result has the dtype of x."""
    return _rotate(x.to(rotation.dtype), _per_vector(rotation, x)).to(x.dtype)


def normalise_rms(x: Tensor, eps: float = 0.0) -> Tensor:
    """Scale vectors (..., D) to a mean square of 1, without a gradient, in as few calls as the device allows.

    eps: number added to the mean square; 0: none.
    """
    D = x.shape[-1]
    if x.is_cuda:  # one kernel on a GPU; on a CPU a chain of operators that takes twice as long as the line below
        return F.rms_norm(x, (D,), eps=eps or TINY**2)
    rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(D**-0.5)
    return x / (rms.square_().add_(eps).sqrt_() if eps else rms.clamp_min_(TINY))


def swiglu(x: Tensor) -> Tensor:
    """Multiply the first half of the channels by the SiLU of the second half: (..., 2 * D) -> (..., D).

    Shazeer, "GLU Variants Improve Transformer", 2020, equation 6.
    """
    if _uses_cpu_path(x):
        y: Tensor = _SwiGlu.apply(x)
        return y
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, share: float = 0.0) -> Tensor:
    """Compute softmax(scale * q k^T + causal mask) v per head: q, k, v (B, n, H, D) -> (B, n, H, D)."""
    if q.device.type == "cpu" and (share or q.shape[1] <= SHORT.get(q.dtype, 0)):
        return _attention_by_products(q, k, v, scale, share)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=share, is_causal=True, scale=scale).transpose(1, 2)


def _attention_by_products(q: Tensor, k: Tensor, v: Tensor, scale: float, share: float) -> Tensor:
    """Compute `causal_attention` by two batched products."""
    B, n, H, _ = q.shape
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))  # (B H, n, D), copied
    mask = torch.full((n, n), -torch.inf, dtype=q.dtype).triu_(1)
    weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(dim=-1)  # (B H, n, n)
    return torch.bmm(dropout(weights, share), v).view(B, H, n, -1).transpose(1, 2)


def _uses_cpu_path(x: Tensor) -> bool:
    """Return True if x takes the operations that are written for a CPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _per_vector(rotation: Tensor, x: Tensor) -> Tensor:
    """View a rotation (n, D / 2, 2) as (n, ..., 1, D / 2, 2), with as many dimensions as the pairs of x have after
    B."""
    return rotation.view(len(rotation), *(1,) * (x.ndim - 3), *rotation.shape[1:])


def _rotate(y: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels of y (B, n, ..., H, D) by rotation (n, ..., 1, D / 2, 2)."""
    pairs = y.reshape(*y.shape[:-1], -1, 2)  # (B, n, ..., H, D / 2, 2)
    if not torch.compiler.is_compiling():  # one kernel; the compiler has none for complex numbers
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation)).flatten(-2)
    (one, other), (cos, sin) = pairs.unbind(dim=-1), rotation.unbind(dim=-1)
    return torch.stack([one * cos - other * sin, one * sin + other * cos], dim=-1).flatten(-2)


def _as_complex(x: Tensor) -> Tensor:
    """View pairs of channels as complex numbers: (..., D) -> (..., D / 2)."""
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


class _NormaliseAndRotate(torch.autograd.Function):
    """`normalise_and_rotate` on a CPU, with its own backward pass; the rotation is complex (n, ..., 1, D / 2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, rotation: Tensor | None, eps: float) -> Tensor:
        """Compute rotation * scale * x / sqrt(|x|^2 + D eps)."""
        wide = x.to(scale.dtype)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (..., 1)
        length = length.square_().add_(x.shape[-1] * eps).sqrt_() if eps else length.clamp_min_(TINY)
        inverse = length.reciprocal_()
        ctx.save_for_backward(x, scale, rotation, inverse)
        y = (wide * inverse).mul_(scale)
        if rotation is not None:
            _as_complex(y).mul_(rotation)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Rotate the gradient g back; then with r = sqrt(|x|^2 + D eps) and u = x / r: dscale = g u,
        dx = (g scale - u <g scale, u>) / r."""
        x, scale, rotation, inverse = ctx.saved_tensors
        if rotation is not None:
            gradient = gradient.to(scale.dtype, memory_format=torch.contiguous_format, copy=True)
            _as_complex(gradient).mul_(rotation.conj())
        unit = x * inverse
        product = gradient * unit
        scale_gradient = product.sum_to_size(scale.shape)
        radial = product.mul_(scale).sum(dim=-1, keepdim=True)
        x_gradient = torch.mul(gradient, scale, out=product).addcmul_(unit, radial, value=-1).mul_(inverse)
        return x_gradient.to(x.dtype), scale_gradient, None, None


class _SwiGlu(torch.autograd.Function):
    """`swiglu` on a CPU, with its own backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Compute value * silu(gate)."""
        ctx.save_for_backward(x)
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Write both halves of the gradient into one tensor."""
        (x,) = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        x_gradient = torch.empty_like(x)
        value_gradient, gate_gradient = x_gradient.chunk(2, dim=-1)
        silu = F.silu(gate)
        torch.mul(gradient, silu, out=value_gradient)
        product = torch.mul(gradient, value, out=silu)
        torch.ops.aten.silu_backward.grad_input(product, gate, grad_input=gate_gradient)
        return x_gradient
