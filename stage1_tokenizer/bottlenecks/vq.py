"""Vector quantization (VQ-VAE): each latent vector becomes the nearest of V codebook vectors.

van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning" (2017), equation 3, with z a latent
vector, e its codebook vector, sg the stop-gradient, and |.|^2 the mean over the d coordinates:

    loss = |sg[z] - e|^2  (codebook)  +  beta * |z - sg[e]|^2  (commitment)

With `update: ema` (appendix A.1) running means replace the first term (codebook.py). `code_dim` and `cosine` are from
Yu et al., "Vector-quantized Image Modeling with Improved VQGAN" (ViT-VQGAN, 2021), section 3.2: short codebook vectors
on the unit sphere.
"""

from operator import not_
from typing import Annotated, Literal, Self

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from stage1_tokenizer.bottlenecks.base import Advice, CodeDim
from stage1_tokenizer.bottlenecks.codebook import Codebook, CodebookConfig
from stage1_tokenizer.bottlenecks.quantizer import Quantized, Quantizer
from stage1_tokenizer.bottlenecks.straight_through import rotation_trick, straight_through

Cosine = Annotated[
    bool,
    Advice("unused codes", "--bottleneck.cosine", not_),
    Advice("commitment", "keep latents and codes at length one with --bottleneck.cosine", not_),
]
"""True: vectors and codebook vectors are scaled to length one, so the nearest one has the greatest cosine."""


class VqConfig(CodebookConfig):
    """Vector quantizer with one codebook."""

    kind: Literal["vq"] = "vq"
    code_dim: CodeDim = None
    """Dimension of the codebook vectors; null: that of the latent. A small one (8) keeps large codebooks in use."""
    cosine: Cosine = False
    """Scale vectors and codebook vectors to length one, so that the nearest one has the greatest cosine."""
    dot_product: bool = False
    """Take the codebook vector with the greatest dot product instead of the nearest one, as in IBQ (Shi et al. 2024).
    Needs `update: gradient`, since a running mean is meant for the nearest vectors."""
    project: bool = False
    """1x1 convolutions before and behind the codebook also if its vectors have the channels of the latent."""
    rotation: bool = False
    """Rotate and scale the decoder's gradient by the rotation from the latent vector to its codebook vector (Fifty et
    al. 2024), instead of passing it straight through."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dot_product and (self.cosine or self.update == "ema"):
            raise ValueError("dot_product: true needs update: gradient, and excludes cosine: true")
        return self


def vq_loss(vectors: Tensor, nearest: Tensor, beta: float, by_gradient: bool) -> tuple[Tensor, Tensor]:
    """Compute equation 3 for vectors and their nearest codebook vectors (N, d): loss (), and the commitment () alone.

    Without `by_gradient` the codebook term is left out. The commitment is unweighted and detached. `nearest` must not
    have passed through `straight_through`.
    """
    commitment = F.mse_loss(vectors, nearest.detach())
    loss = beta * commitment
    if by_gradient:
        loss = loss + F.mse_loss(nearest, vectors.detach())
    return loss, commitment.detach()


def quantizer_stats(vectors: Tensor, commitment: Tensor) -> dict[str, Tensor]:
    """Return the scalars for the log of vectors (N, d) with this commitment ()."""
    return {"commitment": commitment, "latent_norm": vectors.detach().norm(dim=-1).mean()}


class VectorQuantizer(Quantizer):
    """One codebook, one code per position."""

    def __init__(self, config: VqConfig, latent_channels: int, processes: int = 1) -> None:
        super().__init__(latent_channels, config.code_dim, config.codebook_size, project=config.project)
        self.config = config
        self.codebook = Codebook(config, self.space.dim, config.cosine, processes)

    def quantize(self, vectors: Tensor) -> Quantized:
        """Quantize vectors (N, d) float32 to codes (N,)."""
        vectors = self._scale(vectors)
        nearest, codes = self.codebook.quantize(vectors, dot_product=self.config.dot_product)  # (N, d), (N,)
        self.codebook.remember(vectors, codes)
        loss, commitment = vq_loss(vectors, nearest, self.config.beta, by_gradient=self.config.update == "gradient")
        quantized = rotation_trick(vectors, nearest) if self.config.rotation else straight_through(vectors, nearest)
        return Quantized(quantized, codes, loss, quantizer_stats(vectors, commitment))

    def codes_to_vectors(self, codes: Tensor) -> Tensor:
        """Return the codebook vectors (N, d) of codes (N, 1)."""
        return F.embedding(codes[:, 0], self.codebook.vectors)

    def codebooks(self) -> list[Tensor]:
        """Return the one codebook (V, d)."""
        return [self.codebook.vectors.detach()]

    def start(self, z: Tensor) -> None:
        """Start the codebook from the latents z (B, D, h, w) of the first batch."""
        self.codebook.start(self._scale(self.space.to_vectors(z)))

    def _scale(self, vectors: Tensor) -> Tensor:
        """Scale vectors (N, d) to length one if `cosine`."""
        return F.normalize(vectors, dim=-1) if self.config.cosine else vectors
