"""Residual vector quantization: each codebook quantizes what the codebooks before it have left over.

Lee et al., "Autoregressive Image Generation using Residual Quantization" (RQ-VAE, 2022), section 3.1, with z a latent
vector, k_i the code at depth i, e(k_i) its codebook vector and sg the stop-gradient:

    r_0 = z     k_i = nearest code of r_{i-1}     r_i = r_{i-1} - e(k_i)     z_q = sum_i e(k_i)
    loss = beta * sum_i |z - sg[e(k_1) + ... + e(k_i)]|^2                                        equation 8

K codes of V give V^K values per position, with one codebook of V vectors (or K of them) instead of V^K vectors.
"""

from abc import abstractmethod
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import CodeDim
from stage1_tokenizer.bottlenecks.codebook import Codebook, CodebookConfig
from stage1_tokenizer.bottlenecks.quantizer import Quantized, Quantizer
from stage1_tokenizer.bottlenecks.straight_through import rotation_trick, straight_through
from stage1_tokenizer.bottlenecks.vq import quantizer_stats

LARGEST_DEPTH = 64
"""Largest number of codes per position and group, and of groups."""


class ResidualConfig(CodebookConfig):
    """The part of a config that residual quantizers share."""

    depth: int = Field(4, ge=1, le=LARGEST_DEPTH)
    """Codes per position and group, coarse to fine."""
    shared: bool = False
    """Use one codebook for all depths (as RQ-VAE does) instead of one for each depth."""
    temperature: NonNegativeFloat = 0.0
    """Draw each code in training with probability proportional to exp(-distance^2 / temperature) (RQ-VAE's stochastic
    sampling); 0: always take the nearest."""
    code_dim: CodeDim = None
    """Dimension of the codebook vectors of all groups together; null: that of the latent."""
    rotation: bool = False
    """Rotate and scale the decoder's gradient by the rotation from the latent vector to its sum of codebook vectors
    (Fifty et al. 2024), instead of passing it straight through."""


class RvqConfig(ResidualConfig):
    """Residual vector quantizer: `depth` codes per position."""

    kind: Literal["rvq"] = "rvq"


class ResidualCodebooks(nn.Module):
    """The codebooks of one group of channels: vectors (N, d) become sums of `depth` codebook vectors."""

    def __init__(self, config: ResidualConfig, dim: int, processes: int) -> None:
        super().__init__()
        self._config = config
        self.codebooks = nn.ModuleList(
            Codebook(config, dim, processes=processes) for _ in range(1 if config.shared else config.depth)
        )

    def levels(self) -> list[Codebook]:
        """Return the codebook of each depth; with `shared`, the same one `depth` times."""
        own = [cast("Codebook", codebook) for codebook in self.codebooks]
        return own * self._config.depth if self._config.shared else own

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantize vectors (N, d) float32 to sums (N, d) and codes (N, depth); return loss () and commitment () too."""
        temperature = self._config.temperature if self.training else 0.0
        residual, total = vectors, torch.zeros_like(vectors)  # r_0 = z
        residuals, codes_by_level = [], []
        commitment, codebook_loss = vectors.new_zeros(()), vectors.new_zeros(())
        for codebook in self.levels():
            nearest, codes = codebook.quantize(residual, temperature)  # e(k_i) (N, d), k_i (N,)
            commitment = commitment + F.mse_loss(residual, nearest.detach())
            if self._config.update == "gradient":
                codebook_loss = codebook_loss + F.mse_loss(nearest, residual.detach())
            residuals.append(residual.detach())
            codes_by_level.append(codes)
            total = total + nearest.detach()
            residual = residual - nearest.detach()  # r_i (N, d)
        self._remember(residuals, codes_by_level)
        quantized = rotation_trick(vectors, total) if self._config.rotation else straight_through(vectors, total)
        codes = torch.stack(codes_by_level, dim=1)  # (N, depth)
        return quantized, codes, self._config.beta * commitment + codebook_loss, commitment.detach()

    def codes_to_vectors(self, codes: Tensor) -> Tensor:
        """Return the sums (N, d) of codes (N, depth). The order is that of `forward`, so they are equal bit for bit."""
        total = torch.zeros((), device=codes.device)
        for level, codebook in enumerate(self.levels()):
            total = total + F.embedding(codes[:, level], codebook.vectors)
        return total

    def start(self, vectors: Tensor) -> None:
        """Start the first codebook from k-means over vectors (N, d), the second from their residuals, and so on."""
        if not self._config.shared:
            for codebook in self.levels():
                codebook.start(vectors)
                vectors = vectors - codebook.quantize(vectors)[0].detach()
            return
        # A shared codebook serves vectors and residuals alike. A codebook of the vectors alone gives the residuals.
        (codebook,) = cast("list[Codebook]", list(self.codebooks))
        codebook.start(vectors)
        residuals = [vectors]
        for _ in range(self._config.depth - 1):
            residuals.append(residuals[-1] - codebook.quantize(residuals[-1])[0].detach())
        codebook.start(_interleave(residuals))

    def _remember(self, residuals: list[Tensor], codes_by_level: list[Tensor]) -> None:
        if self._config.shared:
            self.levels()[0].remember(_interleave(residuals), _interleave(codes_by_level))
            return
        for codebook, residual, codes in zip(self.levels(), residuals, codes_by_level, strict=True):
            codebook.remember(residual, codes)


def _interleave(levels: list[Tensor]) -> Tensor:
    """Put all depths of a vector side by side: depth times (N, ...) -> (N * depth, ...).

    In this order the concatenation over processes and micro-batches does not depend on their number.
    """
    return torch.stack(levels, dim=1).flatten(0, 1)


class BaseResidualQuantizer(Quantizer):
    """`depth` codes per position for each of G groups of channels: K = depth * G, the coarse codes first."""

    @abstractmethod
    def group_codebooks(self) -> list[ResidualCodebooks]:
        """Return the codebooks of each group."""

    def quantize(self, vectors: Tensor) -> Quantized:
        """Quantize vectors (N, d) float32 to codes (N, K)."""
        by_group = [codebooks(part) for codebooks, part in self._split(vectors)]
        quantized, codes, losses, commitments = (list(parts) for parts in zip(*by_group, strict=True))
        # The mean over groups of equal size is the mean over all channels.
        loss, commitment = torch.stack(losses).mean(), torch.stack(commitments).mean()
        stacked = torch.stack(codes, dim=2).flatten(1)  # (N, depth, G) -> (N, depth * G)
        return Quantized(torch.cat(quantized, dim=1), stacked, loss, quantizer_stats(vectors, commitment))

    def codes_to_vectors(self, codes: Tensor) -> Tensor:
        """Return the vectors (N, d) of codes (N, K)."""
        groups = self.group_codebooks()
        return torch.cat([group.codes_to_vectors(codes[:, g :: len(groups)]) for g, group in enumerate(groups)], dim=1)

    def codebooks(self) -> list[Tensor]:
        """Return the codebook (V, d / G) of each of the K codes, in their order."""
        by_group = [[codebook.vectors.detach() for codebook in group.levels()] for group in self.group_codebooks()]
        return [codebook for level in zip(*by_group, strict=True) for codebook in level]

    def start(self, z: Tensor) -> None:
        """Start the codebooks from the latents z (B, D, h, w) of the first batch."""
        for codebooks, part in self._split(self.space.to_vectors(z)):
            codebooks.start(part)

    def _split(self, vectors: Tensor) -> list[tuple[ResidualCodebooks, Tensor]]:
        """Return each group's codebooks with its share (N, d / G) of vectors (N, d)."""
        groups = self.group_codebooks()
        return list(zip(groups, vectors.chunk(len(groups), dim=1), strict=True))


class ResidualQuantizer(BaseResidualQuantizer):
    """A residual quantizer with all channels in one group."""

    def __init__(self, config: RvqConfig, latent_channels: int, processes: int = 1) -> None:
        super().__init__(latent_channels, config.code_dim, config.codebook_size, config.depth)
        self.residual = ResidualCodebooks(config, self.space.dim, processes)

    def group_codebooks(self) -> list[ResidualCodebooks]:
        """Return the codebooks of the one group."""
        return [self.residual]
