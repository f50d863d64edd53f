"""Gradient paths through quantization, which has no gradient itself: straight-through and the rotation trick."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Replace(torch.autograd.Function):
    """Return the second argument; pass the gradient to the first.

    The usual `vectors + (nearest - vectors).detach()` rounds, so its value is only nearly `nearest`.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, nearest: Tensor) -> Tensor:
        """Return `nearest`."""
        return nearest.view_as(nearest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient for `vectors`, unchanged."""
        return gradient, None


def straight_through(vectors: Tensor, nearest: Tensor) -> Tensor:
    """Return exactly `nearest`, with the gradient passed unchanged to `vectors`. Both have the same shape.

    Bengio, Léonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons" (2013).
    """
    replaced: Tensor = _Replace.apply(vectors, nearest.detach())
    return replaced


def rotation_trick(vectors: Tensor, nearest: Tensor) -> Tensor:
    """Return exactly `nearest`, with the gradient to `vectors` rotated and scaled: (..., d), (..., d) -> (..., d).

    Fifty et al., "Restructuring Vector Quantization with the Rotation Trick" (2024), section 4.2: with unit vectors
    z, q of vector and nearest codebook vector and r = (z + q) / |z + q|, the rotation of z to q is
    R = I - 2 r r' + 2 q z', held constant in the backward pass.
    """
    z = F.normalize(vectors.detach(), dim=-1)
    q = F.normalize(nearest.detach(), dim=-1)
    r = F.normalize(z + q, dim=-1)
    scale = nearest.detach().norm(dim=-1, keepdim=True) / vectors.detach().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    rotated = scale * (
        vectors - 2 * r * (r * vectors).sum(dim=-1, keepdim=True) + 2 * q * (z * vectors).sum(dim=-1, keepdim=True)
    )  # equals `nearest` up to rounding
    return straight_through(rotated, nearest)
