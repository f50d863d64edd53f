"""Vector quantization: each latent vector becomes the nearest of V code vectors.

van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning" (2017), equation 3:

    loss = |sg[z] - e|^2  (codebook)  +  beta * |z - sg[e]|^2  (commitment)

With an EMA codebook (its appendix A.1) the first term is replaced by running means of the vectors assigned to a code.
The lookup, the running means, k-means and the bookkeeping of dead codes are vector_quantize_pytorch's. Ours are the
losses and the straight-through step, since the library weighs both terms with one factor, and the choice of the vectors
to which dead codes are moved, since the library takes any: where most of an image is background, most of those are
copies of the background's code, which take its place for a moment and are dead again.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from stage1_tokenizer.bottlenecks.base import Bottlenecked
from stage1_tokenizer.config import Config


class VqConfig(Config):
    """Vector quantizer with one codebook."""

    kind: Literal["vq"] = "vq"
    codebook_size: PositiveInt = 256
    """V, the number of codes."""
    code_dim: PositiveInt | None = None
    """Dimension of the code vectors; null: that of the latent. A small one (8) keeps large codebooks in use."""
    update: Literal["ema", "gradient"] = "ema"
    """How the codebook learns: running means of the vectors assigned to each code, or the codebook loss."""
    beta: NonNegativeFloat = 0.25
    """Weight of the commitment term, which pulls the encoder to the codes; it does not touch the codebook term."""
    decay: float = 0.99
    """Decay of the running means (update: ema)."""
    cosine: bool = False
    """Nearest by cosine: vectors and codes are scaled to length one (update: ema only)."""
    kmeans_init: bool = True
    """Start the codebook from k-means over the first training batch."""
    kmeans_iterations: PositiveInt = 10
    revive_below: NonNegativeFloat = 0.05
    """A code whose running count of uses per step falls below this is moved to a badly served vector of the batch, one
    drawn in proportion to its squared distance from its code (as in k-means++); 0: never."""

    @model_validator(mode="after")
    def _check(self) -> "VqConfig":
        if self.cosine and self.update == "gradient":
            raise ValueError("cosine: true needs update: ema (the library has no gradient codebook on the sphere)")
        if not 0.0 < self.decay < 1.0:
            raise ValueError(f"decay must lie between 0 and 1, got {self.decay}")
        return self


class VectorQuantizer(nn.Module):
    """z (B, D, h, w) -> Bottlenecked with codes (B, h, w, 1)."""

    depth = 1

    def __init__(self, config: VqConfig, latent_channels: int, processes: int = 1) -> None:
        super().__init__()
        code_dim = config.code_dim or latent_channels
        self.config = config
        self.codebook_size = config.codebook_size
        # 1x1 convolutions into and out of the space of the codes, where its dimension differs from D.
        same = code_dim == latent_channels
        self.project_in = nn.Identity() if same else nn.Conv2d(latent_channels, code_dim, 1)
        self.project_out = nn.Identity() if same else nn.Conv2d(code_dim, latent_channels, 1)
        # The library's defaults are not the paper's, so every option that matters is stated.
        self.library = VectorQuantize(
            dim=code_dim,
            codebook_size=config.codebook_size,
            decay=config.decay,
            eps=1e-5,
            kmeans_init=config.kmeans_init,
            kmeans_iters=config.kmeans_iterations,
            use_cosine_sim=config.cosine,
            threshold_ema_dead_code=config.revive_below,
            ema_update=config.update == "ema",
            learnable_codebook=config.update == "gradient",
            rotation_trick=False,
            route_gradients_to_input=False,  # straight-through is done below
            commitment_weight=0.0,  # both loss terms are computed below
            sync_codebook=processes > 1,
        )
        self._several_processes = processes > 1
        self.library._codebook.replace_sample_fn = self._badly_served

    @property
    def codebook(self) -> Tensor:
        """(V, code_dim) float32."""
        return self.library.codebook

    def forward(self, z: Tensor) -> Bottlenecked:
        projected = self.project_in(z)  # (B, code_dim, h, w)
        # float32 with autocast off on every device: in bf16 the distances of near codes are equal. (The library
        # switches it off for CUDA alone.)
        with torch.autocast(z.device.type, enabled=False):
            vectors = rearrange(projected.float(), "B d h w -> B (h w) d")
            if self.config.cosine:
                vectors = F.normalize(vectors, dim=-1)
            if not self.training and not self.library._codebook.initted:
                raise ValueError(
                    "the codebook starts from k-means over the first training batch, and there was none yet"
                )
            nearest, codes, _ = self.library(vectors)  # (B, h*w, code_dim), (B, h*w)
            commitment = F.mse_loss(vectors, nearest.detach())
            loss = self.config.beta * commitment
            if self.config.update == "gradient":
                loss = loss + F.mse_loss(nearest, vectors.detach())
            # Straight-through: forward the code, backward as if it were the vector. (Written as nearest + (x - x), so
            # that the forward value is exactly the code.)
            through = nearest.detach() + (vectors - vectors.detach())
            stats = {"commitment": commitment.detach(), "latent_norm": vectors.detach().norm(dim=-1).mean()}
        h, w = z.shape[2:]
        z_q = self.project_out(rearrange(through, "B (h w) d -> B d h w", h=h))
        return Bottlenecked(z_q, rearrange(codes, "B (h w) -> B h w 1", h=h, w=w), loss, stats)

    def vectors(self, codes: Tensor) -> Tensor:
        """codes (B, h, w, 1) -> z_q (B, D, h, w)."""
        return self.project_out(rearrange(self.codebook[codes[..., 0]], "B h w d -> B d h w"))

    def _badly_served(self, vectors: Tensor, n: int) -> Tensor:
        """n of the vectors (1, N, d), drawn in proportion to their squared distance from their code: (1, n, d)."""
        distances = torch.cdist(vectors[0], self.codebook.detach()).amin(dim=1).square()  # (N,)
        # The small constant lets exactly served vectors fill up where there are fewer others than dead codes.
        drawn = torch.multinomial(distances + 1e-12, n, replacement=n > len(distances))
        chosen = vectors[:, drawn].contiguous()
        if self._several_processes:
            torch.distributed.broadcast(chosen, src=0)  # each process has its own vectors, and all need the same codes
        return chosen
