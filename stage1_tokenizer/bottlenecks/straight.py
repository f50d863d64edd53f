"""Two ways past a step without a gradient: forward the code, backward something else."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Replace(torch.autograd.Function):
    """Forward the second argument, backward to the first. In arithmetic, nearest + (vectors - vectors) in some order,
    the value is only nearly the code or the memory is written three times."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, nearest: Tensor) -> Tensor:
        return nearest.view_as(nearest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(vectors: Tensor, nearest: Tensor) -> Tensor:
    """Forward `nearest`, exactly; backward as if it were `vectors` (Bengio et al. 2013). Any shape, both alike."""
    through: Tensor = _Replace.apply(vectors, nearest.detach())
    return through


def rotate(vectors: Tensor, nearest: Tensor) -> Tensor:
    """Forward `nearest`, exactly; backward turned and scaled as the code is to the vector: (..., d) twice -> (..., d).

    Fifty et al., "Restructuring Vector Quantization with the Rotation Trick" (2024), section 4.2: with unit vectors
    z, q of vector and code and r = (z + q) / |z + q|, the rotation of z to q is R = I - 2 r r' + 2 q z', held constant.
    """
    z = F.normalize(vectors.detach(), dim=-1)
    q = F.normalize(nearest.detach(), dim=-1)
    r = F.normalize(z + q, dim=-1)
    scale = nearest.detach().norm(dim=-1, keepdim=True) / vectors.detach().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    turned = scale * (
        vectors - 2 * r * (r * vectors).sum(dim=-1, keepdim=True) + 2 * q * (z * vectors).sum(dim=-1, keepdim=True)
    )  # lambda R z, which is the code but for rounding
    return straight_through(turned, nearest)
