"""Finite scalar quantization: each coordinate of a short latent vector is bounded and rounded to one of a few levels.

Mentzer, Minnen, Agustsson and Tschannen, "Finite Scalar Quantization: VQ-VAE Made Simple" (2023), section 3.1 and
appendix A.1, for a coordinate of L levels:

    z_q = round(f(z)) / floor(L / 2)    with f(z) = tanh(z + shift) * (L - 1) / 2 - offset

The codebook is the product of all levels, so nothing in it is learned or unused, and the loss is zero. Bounding,
rounding and numbering of codes are vector_quantize_pytorch's.
"""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from vector_quantize_pytorch import FSQ

from stage1_tokenizer.bottlenecks.base import BaseBottleneckConfig
from stage1_tokenizer.bottlenecks.quantizer import Quantized, Quantizer

# Above these limits the library gives wrong codes: it numbers them in float32, and bounds 0.1 % wider than the levels.
MOST_LEVELS = 999
MOST_CODES = 2**20


class FsqConfig(BaseBottleneckConfig):
    """Finite scalar quantizer: a grid of levels instead of a codebook, and no auxiliary loss."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = Field((8, 5, 5, 5), max_length=16)
    """Levels of each coordinate of the codebook vectors; V is their product (here 1000). The paper's table 1 advises
    8,6,5 for about 2^8 codes, 8,5,5,5 for 2^10, 7,5,5,5,5 for 2^12, 8,8,8,6,5 for 2^14, 8,8,8,5,5,5 for 2^16; five or
    more levels each."""

    @model_validator(mode="after")
    def _check(self) -> "FsqConfig":
        if not self.levels or not all(3 <= level <= MOST_LEVELS for level in self.levels):
            raise ValueError(
                f"levels must be one or more numbers from 3 to {MOST_LEVELS}, e.g. 8,5,5,5; "
                f"got {','.join(map(str, self.levels))} (for two levels, which are a sign, take kind: lfq)"
            )
        if math.prod(self.levels) > MOST_CODES:
            raise ValueError(f"the product of levels is V = {math.prod(self.levels)}; it must be at most {MOST_CODES}")
        return self


class FiniteScalarQuantizer(Quantizer):
    """One code per position; its codebook is a fixed grid in [-1, 1]."""

    def __init__(self, config: FsqConfig, latent_channels: int) -> None:
        code_dim = len(config.levels)
        super().__init__(latent_channels, code_dim, math.prod(config.levels))
        with torch.device("cpu"):  # the library reads values of its buffers, and the meta device has none
            self.library = FSQ(
                levels=config.levels,
                dim=code_dim,  # equal to the number of levels, so the library adds no projections
                num_codebooks=1,
                preserve_symmetry=False,  # a later variant (arXiv 2411.19842), like the next three
                noise_dropout=0.0,
                bound_hard_clamp=False,
                orthogonal_rotation=False,
                force_quantization_f32=False,  # Quantizer.forward does this on every device
            )

    def quantize(self, vectors: Tensor) -> Quantized:
        """Quantize vectors (N, d) float32 to codes (N,), with a loss of 0."""
        # The gradient is that of the tanh; rounding passes it straight through. (The library's x + (round(x) - x) is
        # exactly round(x), since the difference of two numbers within a factor of two of each other is exact.)
        quantized, codes = self.library(vectors[None])  # (1, N, d), (1, N) int32
        # If |z| > 2, the tanh passes less than 7 % of the gradient, so these coordinates hardly move any more.
        stats = {"saturation": (vectors.detach().abs() > 2).float().mean()}
        return Quantized(quantized[0], codes.long(), vectors.new_zeros(()), stats)

    def codes_to_vectors(self, codes: Tensor) -> Tensor:
        """Return the codebook vectors (N, d) of codes (N, 1)."""
        vectors: Tensor = self.library.implicit_codebook[codes[:, 0]]
        return vectors

    def codebooks(self) -> list[Tensor]:
        """Return the one codebook (V, d), the grid of all levels."""
        return [self.library.implicit_codebook]
