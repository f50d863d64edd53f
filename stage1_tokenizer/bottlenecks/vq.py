"""Vector quantization: each latent vector becomes the nearest of V code vectors.

van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning" (2017), equation 3:

    loss = |sg[z] - e|^2  (codebook)  +  beta * |z - sg[e]|^2  (commitment)

With an EMA codebook (its appendix A.1) the first term is replaced by running means of the vectors assigned to a code;
codebook.py has those. `code_dim` and `cosine` are ViT-VQGAN's: codes of few dimensions on the sphere (Yu et al. 2021).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import Codebook, CodebookConfig
from stage1_tokenizer.bottlenecks.space import CodeSpace, grid_of
from stage1_tokenizer.bottlenecks.straight import rotate, straight_through
from stage1_tokenizer.config.base import Channels


class VqConfig(CodebookConfig):
    """Vector quantizer with one codebook."""

    kind: Literal["vq"] = "vq"
    code_dim: Channels | None = None
    """Dimension of the code vectors; null: that of the latent. A small one (8) keeps large codebooks in use."""
    cosine: bool = False
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


class VectorQuantizer(Bottleneck):
    """z (B, D, h, w) -> Bottlenecked with codes (B, h, w, 1)."""

    depth = 1

    def __init__(self, config: VqConfig, latent_channels: int, processes: int = 1) -> None:
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        self.space = CodeSpace(latent_channels, config.code_dim)
        self.codebook = Codebook(config, self.space.dim, config.cosine, processes)

    def forward(self, z: Tensor) -> Bottlenecked:
        vectors = self._vectors(z)  # (N, d), N = B * h * w
        with torch.autocast(z.device.type, enabled=False):
            nearest, ids = self.codebook.look_up(vectors)  # (N, d), (N,)
            self.codebook.note(vectors, ids)
            loss, commitment = vq_loss(vectors, nearest, self.config.beta, by_gradient=self.config.update == "gradient")
            through = rotate(vectors, nearest) if self.config.rotation else straight_through(vectors, nearest)
            stats = {"commitment": commitment, "latent_norm": vectors.detach().norm(dim=-1).mean()}
        grid = grid_of(z)
        return Bottlenecked(self.space.back(through, grid), ids.view(*grid, 1), loss, stats)

    def vectors(self, codes: Tensor) -> Tensor:
        return self.space.back(F.embedding(codes.flatten(), self.codebook.vectors), codes.shape[:3])

    def codebooks(self) -> list[Tensor]:
        return [self.codebook.vectors.detach()]

    def start(self, z: Tensor) -> None:
        self.codebook.start(self._vectors(z))

    def finish_step(self) -> None:
        self.codebook.finish_step()

    def drop_step(self) -> None:
        self.codebook.drop_step()

    def _vectors(self, z: Tensor) -> Tensor:
        """z (B, D, h, w) -> (N, d) float32, of length one where cosine."""
        vectors = self.space.into(z)
        return F.normalize(vectors, dim=-1) if self.config.cosine else vectors
