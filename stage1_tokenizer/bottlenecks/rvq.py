"""Residual vector quantization: each codebook quantizes what those before it have left over.

Lee et al., "Autoregressive Image Generation using Residual Quantization" (RQ-VAE, 2022), section 3.1:

    r_0 = z     k_i = nearest code of r_{i-1}     r_i = r_{i-1} - e(k_i)     z_q = sum_i e(k_i)
    loss = beta * sum_i |z - sg[e(k_1) + ... + e(k_i)]|^2                                        equation 8

With K codes of V a position has V^K values, at the price of one codebook of V (or K of them) instead of V^K vectors.
"""

from abc import abstractmethod
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import CodeDim
from stage1_tokenizer.bottlenecks.codebook import Codebook, CodebookConfig
from stage1_tokenizer.bottlenecks.space import Quantized, Quantizer
from stage1_tokenizer.bottlenecks.straight import rotate, straight_through
from stage1_tokenizer.bottlenecks.vq import stats_of

MOST_CODES = 64
"""Per position and group, and as many groups."""


class ResidualConfig(CodebookConfig):
    """What residual quantizers have in common."""

    depth: int = Field(4, ge=1, le=MOST_CODES)
    """Codes per position and group, coarse to fine."""
    shared: bool = False
    """One codebook for all depths (as RQ-VAE has it) instead of one for each."""
    temperature: NonNegativeFloat = 0.0
    """In training a code is drawn with probability proportional to exp(-distance^2 / temperature) (RQ-VAE's stochastic
    sampling); 0: always the nearest."""
    code_dim: CodeDim = None
    """Dimension of the code vectors of all groups together; null: that of the latent."""
    rotation: bool = False
    """The rotation trick (see vq) instead of straight-through."""


class RvqConfig(ResidualConfig):
    """Residual vector quantizer: `depth` codes per position."""

    kind: Literal["rvq"] = "rvq"


class ResidualCodebooks(nn.Module):
    """Vectors (N, d) as sums of `depth` codes each."""

    def __init__(self, config: ResidualConfig, dim: int, processes: int) -> None:
        super().__init__()
        self._config = config
        self.codebooks = nn.ModuleList(
            Codebook(config, dim, processes=processes) for _ in range(1 if config.shared else config.depth)
        )

    def levels(self) -> list[Codebook]:
        """The codebook of each depth."""
        own = [cast("Codebook", codebook) for codebook in self.codebooks]
        return own * self._config.depth if self._config.shared else own

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """vectors (N, d) float32 -> their sums of codes (N, d), ids (N, depth), loss (), commitment ()."""
        temperature = self._config.temperature if self.training else 0.0
        residual, total = vectors, torch.zeros_like(vectors)
        residuals, ids_of = [], []
        commitment, codebook_loss = vectors.new_zeros(()), vectors.new_zeros(())
        for codebook in self.levels():
            nearest, ids = codebook.look_up(residual, temperature)  # (N, d), (N,)
            commitment = commitment + F.mse_loss(residual, nearest.detach())
            if self._config.update == "gradient":
                codebook_loss = codebook_loss + F.mse_loss(nearest, residual.detach())
            residuals.append(residual.detach())
            ids_of.append(ids)
            total = total + nearest.detach()
            residual = residual - nearest.detach()
        self._note(residuals, ids_of)
        through = rotate(vectors, total) if self._config.rotation else straight_through(vectors, total)
        ids = torch.stack(ids_of, dim=1)  # (N, depth)
        return through, ids, self._config.beta * commitment + codebook_loss, commitment.detach()

    def vectors(self, ids: Tensor) -> Tensor:
        """ids (N, depth) -> (N, d), summed in the order of the forward pass, so that it is the same to the last bit."""
        total = torch.zeros((), device=ids.device)
        for level, codebook in enumerate(self.levels()):
            total = total + F.embedding(ids[:, level], codebook.vectors)
        return total

    def start(self, vectors: Tensor) -> None:
        """k-means over vectors (N, d) for the first depth, over what that leaves for the second, and so on."""
        if not self._config.shared:
            for codebook in self.levels():
                codebook.start(vectors)
                vectors = vectors - codebook.look_up(vectors)[0].detach()
            return
        # One codebook has to serve the vectors and all that is left of them: first a codebook of the vectors alone
        # tells what would be left.
        (codebook,) = cast("list[Codebook]", list(self.codebooks))
        codebook.start(vectors)
        residuals = [vectors]
        for _ in range(self._config.depth - 1):
            residuals.append(residuals[-1] - codebook.look_up(residuals[-1])[0].detach())
        codebook.start(_interleaved(residuals))

    def _note(self, residuals: list[Tensor], ids_of: list[Tensor]) -> None:
        if self._config.shared:
            self.levels()[0].note(_interleaved(residuals), _interleaved(ids_of))
            return
        for codebook, residual, ids in zip(self.levels(), residuals, ids_of, strict=True):
            codebook.note(residual, ids)


def _interleaved(levels: list[Tensor]) -> Tensor:
    """depth times (N, ...) -> (N * depth, ...), all depths of a vector together: the order in which processes and
    micro-batches follow each other must not depend on their number."""
    return torch.stack(levels, dim=1).flatten(0, 1)


class AnyResidualQuantizer(Quantizer):
    """`depth` codes per position for each group of channels, the coarse codes of all groups first."""

    @abstractmethod
    def groups_of_codebooks(self) -> list[ResidualCodebooks]:
        """The codebooks of each group."""

    def quantize(self, vectors: Tensor) -> Quantized:
        quantized = [group(part) for group, part in self._with(vectors)]
        through, ids, losses, commitments = (list(part) for part in zip(*quantized, strict=True))
        # The mean over groups is the mean over all channels.
        loss, commitment = torch.stack(losses).mean(), torch.stack(commitments).mean()
        codes = torch.stack(ids, dim=2).flatten(1)  # (N, depth, G) -> (N, depth * G)
        return Quantized(torch.cat(through, dim=1), codes, loss, stats_of(vectors, commitment))

    def values(self, codes: Tensor) -> Tensor:
        groups = self.groups_of_codebooks()
        return torch.cat([group.vectors(codes[:, g :: len(groups)]) for g, group in enumerate(groups)], dim=1)

    def codebooks(self) -> list[Tensor]:
        by_group = [[codebook.vectors.detach() for codebook in group.levels()] for group in self.groups_of_codebooks()]
        return [codebook for level in zip(*by_group, strict=True) for codebook in level]

    def start(self, z: Tensor) -> None:
        for group, part in self._with(self.space.into(z)):
            group.start(part)

    def _with(self, vectors: Tensor) -> list[tuple[ResidualCodebooks, Tensor]]:
        """Each group and its share (N, d / G) of vectors (N, d)."""
        groups = self.groups_of_codebooks()
        return list(zip(groups, vectors.chunk(len(groups), dim=1), strict=True))


class ResidualQuantizer(AnyResidualQuantizer):
    """All channels in one group."""

    def __init__(self, config: RvqConfig, latent_channels: int, processes: int = 1) -> None:
        super().__init__(latent_channels, config.code_dim, config.codebook_size, config.depth)
        self.residual = ResidualCodebooks(config, self.space.dim, processes)

    def groups_of_codebooks(self) -> list[ResidualCodebooks]:
        return [self.residual]
