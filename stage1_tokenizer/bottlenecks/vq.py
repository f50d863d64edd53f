"""Vector quantization: each latent vector becomes the nearest of V code vectors.

van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning" (2017), equation 3:

    loss = |sg[z] - e|^2  (codebook)  +  beta * |z - sg[e]|^2  (commitment)

With an EMA codebook (its appendix A.1) the first term is replaced by running means of the vectors assigned to a code;
codebook.py has those. `code_dim` and `cosine` are ViT-VQGAN's: codes of few dimensions on the sphere (Yu et al. 2021).
"""

from operator import not_
from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.bottlenecks.base import Advice, CodeDim
from stage1_tokenizer.bottlenecks.codebook import Codebook, CodebookConfig
from stage1_tokenizer.bottlenecks.space import Quantized, Quantizer
from stage1_tokenizer.bottlenecks.straight import rotate, straight_through

Cosine = Annotated[
    bool,
    Advice("unused codes", "--bottleneck.cosine", not_),
    Advice("commitment", "keep latents and codes at length one with --bottleneck.cosine", not_),
]
"""Nearest by cosine: vectors and codes are scaled to length one."""


class VqConfig(CodebookConfig):
    """Vector quantizer with one codebook."""

    kind: Literal["vq"] = "vq"
    code_dim: CodeDim = None
    """Dimension of the code vectors; null: that of the latent. A small one (8) keeps large codebooks in use."""
    cosine: Cosine = False
    """Nearest by cosine: vectors and codes are scaled to length one."""
    rotation: bool = False
    """Turn and scale the decoder's gradient as the code is turned and scaled against the vector (the rotation trick of
    Fifty et al. 2024), instead of passing it straight through."""


def vq_loss(vectors: Tensor, nearest: Tensor, beta: float, by_gradient: bool) -> tuple[Tensor, Tensor]:
    """vectors and their codes (N, d) -> equation 3 (), without its codebook term unless the codes learn `by_gradient`,
    and the commitment () alone, unweighted and detached. Both from the raw codes, before the gradient is rerouted."""
    commitment = F.mse_loss(vectors, nearest.detach())
    loss = beta * commitment
    if by_gradient:
        loss = loss + F.mse_loss(nearest, vectors.detach())
    return loss, commitment.detach()


def stats_of(vectors: Tensor, commitment: Tensor) -> dict[str, Tensor]:
    """Return what is logged of vectors (N, d) and their commitment ()."""
    return {"commitment": commitment, "latent_norm": vectors.detach().norm(dim=-1).mean()}


class VectorQuantizer(Quantizer):
    """One codebook, one code per position."""

    def __init__(self, config: VqConfig, latent_channels: int, processes: int = 1) -> None:
        super().__init__(latent_channels, config.code_dim, config.codebook_size)
        self.config = config
        self.codebook = Codebook(config, self.space.dim, config.cosine, processes)

    def quantize(self, vectors: Tensor) -> Quantized:
        vectors = self._scaled(vectors)
        nearest, ids = self.codebook.look_up(vectors)  # (N, d), (N,)
        self.codebook.note(vectors, ids)
        loss, commitment = vq_loss(vectors, nearest, self.config.beta, by_gradient=self.config.update == "gradient")
        through = rotate(vectors, nearest) if self.config.rotation else straight_through(vectors, nearest)
        return Quantized(through, ids, loss, stats_of(vectors, commitment))

    def values(self, codes: Tensor) -> Tensor:
        return F.embedding(codes[:, 0], self.codebook.vectors)

    def codebooks(self) -> list[Tensor]:
        return [self.codebook.vectors.detach()]

    def start(self, z: Tensor) -> None:
        self.codebook.start(self._scaled(self.space.into(z)))

    def _scaled(self, vectors: Tensor) -> Tensor:
        """(N, d) -> the same, of length one where cosine."""
        return F.normalize(vectors, dim=-1) if self.config.cosine else vectors
