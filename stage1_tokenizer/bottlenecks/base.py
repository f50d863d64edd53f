"""What every bottleneck returns, and what it must be able to do."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Bottlenecked:
    """The latent after the bottleneck.

    `loss` is already weighted and enters the total as it is; `stats` are scalars for the log.
    """

    z_q: Tensor
    """(B, D, h, w), with the gradient path that the bottleneck defines (straight-through for a quantizer)."""
    codes: Tensor | None
    """(B, h, w, K) int64 in 0..V-1, or None where the bottleneck is continuous."""
    loss: Tensor
    """() float32."""
    stats: dict[str, Tensor] = field(default_factory=dict)


class Bottleneck(Protocol):
    """A module between encoder and decoder."""

    depth: int
    """K, the codes per position; 0 where the bottleneck is continuous."""
    codebook_size: int
    """V; 0 where the bottleneck is continuous."""

    def __call__(self, z: Tensor) -> Bottlenecked:
        """z (B, D, h, w) -> Bottlenecked."""
        ...

    def vectors(self, codes: Tensor) -> Tensor:
        """codes (B, h, w, K) -> z_q (B, D, h, w), exactly what the forward pass in eval mode decodes."""
        ...
