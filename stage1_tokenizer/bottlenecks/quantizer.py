"""The base of all bottlenecks with codes: latents to vectors, quantization of vectors, and back to latents.

    z (B, D, h, w) -> vectors (N, d) -> quantize: codes (N, K) and their vectors (N, d) -> z_q (B, D, h, w)

with N = B * h * w. A kind implements the step in the middle.
"""

from abc import abstractmethod
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import Codebook


class CodeSpace(nn.Module):
    """The map between latents of D channels and vectors of d dimensions: 1x1 convolutions, or the identity if d = D
    and no convolutions are asked for.

    Factorized codes: Yu et al., "Vector-quantized Image Modeling with Improved VQGAN" (ViT-VQGAN, 2021), section 3.2.
    """

    def __init__(self, latent_channels: int, code_dim: int | None, project: bool = False) -> None:
        super().__init__()
        self.dim = code_dim or latent_channels
        same = self.dim == latent_channels and not project
        self.project_in = nn.Identity() if same else nn.Conv2d(latent_channels, self.dim, 1)
        self.project_out = nn.Identity() if same else nn.Conv2d(self.dim, latent_channels, 1)

    def to_vectors(self, z: Tensor) -> Tensor:
        """Return z (B, D, h, w) as vectors (N, d) float32. In bfloat16, distances to similar vectors would be equal."""
        return rearrange(self.project_in(z).float(), "B d h w -> (B h w) d")

    def to_latents(self, vectors: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Return vectors (B * h * w, d) on a grid (B, h, w) as z_q (B, D, h, w).

        The convolution's input is always in channels_last: its last bit depends on the memory layout, and decoding
        codes must give exactly the result of the forward pass.
        """
        B, h, w = grid
        return self.project_out(rearrange(vectors.contiguous(), "(B h w) d -> B d h w", B=B, h=h, w=w))


class Quantized(NamedTuple):
    """N vectors after quantization."""

    vectors: Tensor
    """(N, d), the values of the codebook vectors, with a gradient path to the vectors before quantization."""
    codes: Tensor
    """(N, K) int64; (N,) is allowed if K is 1."""
    loss: Tensor
    """() float32, already weighted."""
    stats: dict[str, Tensor]
    """Scalars () for the log, detached."""


class Quantizer(Bottleneck):
    """A bottleneck with codes (B, h, w, K).

    A kind implements `quantize`, `codes_to_vectors` and `codebooks`. Submodules of class `Codebook` learn in
    `finish_step`.
    """

    def __init__(
        self, latent_channels: int, code_dim: int | None, codebook_size: int, depth: int = 1, project: bool = False
    ) -> None:
        """project: 1x1 convolutions around the codebook also if d = D."""
        super().__init__()
        self.codebook_size, self.depth = codebook_size, depth
        self.space = CodeSpace(latent_channels, code_dim, project)

    @abstractmethod
    def quantize(self, vectors: Tensor) -> Quantized:
        """Quantize vectors (N, d) float32."""

    @abstractmethod
    def codes_to_vectors(self, codes: Tensor) -> Tensor:
        """Return the vectors (N, d) of codes (N, K), equal bit for bit to those of `quantize` in eval mode."""

    def forward(self, z: Tensor) -> Bottlenecked:
        """Quantize the latent z (B, D, h, w)."""
        grid = (z.shape[0], z.shape[2], z.shape[3])
        vectors = self.space.to_vectors(z)  # (N, d)
        # float32, with autocast off on every device: in bfloat16 the distances to similar vectors are equal, and a sum
        # of many small numbers loses them.
        with torch.autocast(z.device.type, enabled=False):
            quantized, codes, loss, stats = self.quantize(vectors)  # (N, d), (N, K), (), {name: ()}
        return Bottlenecked(self.space.to_latents(quantized, grid), codes.view(*grid, self.depth), loss, stats)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Return z_q (B, D, h, w) of codes (B, h, w, K)."""
        return self.space.to_latents(self.codes_to_vectors(codes.flatten(0, 2)), codes.shape[:3])

    def learned_buffers(self) -> list[Tensor]:
        """Return the vectors (V, d) of the codebooks that are running means."""
        return [
            buffer for codebook in self._learning() for name, buffer in codebook.named_buffers() if name == "weight"
        ]

    def finish_step(self) -> None:
        """Let the codebooks learn from the vectors of this step."""
        for codebook in self._learning():
            codebook.finish_step()

    def drop_step(self) -> None:
        """Let the codebooks forget the vectors of this step."""
        for codebook in self._learning():
            codebook.drop_step()

    def _learning(self) -> list[Codebook]:
        return [module for module in self.modules() if isinstance(module, Codebook)]
