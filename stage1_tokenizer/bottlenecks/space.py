"""The space in which codes are compared, the way there and back, and what all quantizers do between."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import Codebook


class CodeSpace(nn.Module):
    """From latents of D channels to vectors of d dimensions and back: 1x1 convolutions where d differs from D, else
    nothing."""

    def __init__(self, latent_channels: int, code_dim: int | None) -> None:
        super().__init__()
        self.dim = code_dim or latent_channels
        same = self.dim == latent_channels
        self.project_in = nn.Identity() if same else nn.Conv2d(latent_channels, self.dim, 1)
        self.project_out = nn.Identity() if same else nn.Conv2d(self.dim, latent_channels, 1)

    def into(self, z: Tensor) -> Tensor:
        """z (B, D, h, w) -> (B * h * w, d) float32: in bfloat16 the distances of near codes would be equal."""
        return rearrange(self.project_in(z).float(), "B d h w -> (B h w) d")

    def back(self, vectors: Tensor, grid: tuple[int, ...]) -> Tensor:
        """vectors (B * h * w, d), grid (B, h, w) -> z_q (B, D, h, w).

        In channels_last, whatever the strides of the vectors: the last bit of a convolution depends on its input's
        layout, and what the forward pass decodes must be what its codes decode to.
        """
        B, h, w = grid
        return self.project_out(rearrange(vectors.contiguous(), "(B h w) d -> B d h w", B=B, h=h, w=w))


class Quantized(NamedTuple):
    """N vectors of the code space after quantization."""

    through: Tensor
    """(N, d), the value of the codes, with a gradient path to the vectors."""
    codes: Tensor
    """(N, K) or, where K is 1, (N,) int64."""
    loss: Tensor
    """() float32."""
    stats: dict[str, Tensor]


class Quantizer(Bottleneck):
    """A bottleneck with codes: z (B, D, h, w) -> Bottlenecked with codes (B, h, w, K). A kind quantizes vectors (N, d),
    N = B * h * w; the `Codebook`s among its parts learn at the end of each step."""

    def __init__(self, latent_channels: int, code_dim: int | None, codebook_size: int, depth: int = 1) -> None:
        super().__init__()
        self.codebook_size, self.depth = codebook_size, depth
        self.space = CodeSpace(latent_channels, code_dim)

    @abstractmethod
    def quantize(self, vectors: Tensor) -> Quantized:
        """vectors (N, d) float32 -> Quantized."""

    @abstractmethod
    def values(self, codes: Tensor) -> Tensor:
        """codes (N, K) -> (N, d), exactly the values that `quantize` gives them in eval mode."""

    def forward(self, z: Tensor) -> Bottlenecked:
        grid = (z.shape[0], z.shape[2], z.shape[3])
        vectors = self.space.into(z)  # (N, d)
        # float32 with autocast off on every device: in bf16 the distances of near codes are equal, and a sum of many
        # small numbers loses them.
        with torch.autocast(z.device.type, enabled=False):
            through, codes, loss, stats = self.quantize(vectors)
        return Bottlenecked(self.space.back(through, grid), codes.view(*grid, self.depth), loss, stats)

    def vectors(self, codes: Tensor) -> Tensor:
        return self.space.back(self.values(codes.flatten(0, 2)), codes.shape[:3])

    def learned_buffers(self) -> list[Tensor]:
        return [buffer for part in self._parts() for name, buffer in part.named_buffers() if name == "weight"]

    def finish_step(self) -> None:
        for part in self._parts():
            part.finish_step()

    def drop_step(self) -> None:
        for part in self._parts():
            part.drop_step()

    def _parts(self) -> list[Codebook]:
        return [part for part in self.modules() if isinstance(part, Codebook)]
