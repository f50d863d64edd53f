"""The vector quantizer of vq.py through vector_quantize_pytorch: lookup, running means and k-means are the library's.

Each is the other's oracle: the same ids, and the same codebook after the same updates. Ours are the losses and the
straight-through step, since the library weighs both terms with one factor; when it learns (once per optimizer step
and not in each forward pass); and the choice of the vectors that k-means starts from and that dead codes are moved
to, since the library takes any, and others on each number of processes.
"""

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from stage1_tokenizer.bottlenecks.base import CodeDim
from stage1_tokenizer.bottlenecks.codebook import CodebookConfig
from stage1_tokenizer.bottlenecks.group import Group
from stage1_tokenizer.bottlenecks.space import Quantized, Quantizer
from stage1_tokenizer.bottlenecks.straight import straight_through
from stage1_tokenizer.bottlenecks.vq import Cosine, stats_of, vq_loss
from stage1_tokenizer.engine.seeds import derive_seed


class VqLibraryConfig(CodebookConfig):
    """Vector quantizer with one codebook, by vector_quantize_pytorch."""

    kind: Literal["vq_library"] = "vq_library"
    code_dim: CodeDim = None
    """Dimension of the code vectors; null: that of the latent."""
    cosine: Cosine = False
    """Nearest by cosine: vectors and codes are scaled to length one (update: ema only)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cosine and self.update == "gradient":
            raise ValueError("cosine: true needs update: ema (the library has no gradient codebook on the sphere)")
        return self


class LibraryVectorQuantizer(Quantizer):
    """One codebook, one code per position."""

    steps: Tensor

    def __init__(self, config: VqLibraryConfig, latent_channels: int, processes: int = 1) -> None:
        super().__init__(latent_channels, config.code_dim, config.codebook_size)
        self.config = config
        # The library's defaults are not the paper's, so every option that matters is stated.
        self.library = VectorQuantize(
            dim=self.space.dim,
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
        self._group = Group(processes)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        codebook = self.library._codebook
        codebook.sample_fn = codebook.replace_sample_fn = self._draw
        self._seen: list[tuple[Tensor, Tensor]] = []  # vectors and ids of the step so far
        self._ids: Tensor | None = None  # those of the last step; none before the first

    def quantize(self, vectors: Tensor) -> Quantized:
        if not self.library._codebook.initted:
            raise ValueError("the codebook starts from k-means over the first batch; call start with it")
        vectors = self._scaled(vectors)
        ids = self.library(vectors[None], freeze_codebook=True)[1][0]  # (N,)
        nearest = F.embedding(ids, self.library.codebook)  # (N, d)
        if self.training:
            self._seen.append((vectors.detach(), ids))
        loss, commitment = vq_loss(vectors, nearest, self.config.beta, by_gradient=self.config.update == "gradient")
        return Quantized(straight_through(vectors, nearest), ids, loss, stats_of(vectors, commitment))

    def values(self, codes: Tensor) -> Tensor:
        return F.embedding(codes[:, 0], self.library.codebook)

    def learned_buffers(self) -> list[Tensor]:
        return self.codebooks() if self.config.update == "ema" else []

    def codebooks(self) -> list[Tensor]:
        return [self.library.codebook.detach()]

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        codebook = self.library._codebook
        codebook.init_embed_(self._scaled(self.space.into(z))[None])
        if self.config.kmeans_init:  # what codebook.py does at its start, and why, is said there
            codebook.cluster_size.mul_(1.0 - self.config.decay)
            codebook.embed_avg.mul_(1.0 - self.config.decay)

    @torch.no_grad()
    def finish_step(self) -> None:
        if self._seen:
            vectors, self._ids = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            self._seen = []
            self.steps += 1
            self.library._codebook.update_indices(vectors, self._ids)

    def drop_step(self) -> None:
        self._seen = []

    def _scaled(self, vectors: Tensor) -> Tensor:
        """(N, d) -> the same, of length one where cosine."""
        return F.normalize(vectors, dim=-1) if self.config.cosine else vectors

    def _draw(self, vectors: Tensor, n: int) -> Tensor:
        """n of the vectors (1, N, d) of all processes: (1, n, d). The library asks for the first means of k-means, and
        for vectors to move dead codes to: those are drawn in proportion to the squared distance from their code."""
        if self._ids is None:
            weights, purpose = vectors.new_ones(vectors.shape[1]), "k-means"
        else:
            weights, purpose = (vectors[0] - self.library.codebook[self._ids]).square().sum(dim=1), "revive"
        chosen = self._group.draw(vectors[0], weights, n, derive_seed(0, purpose, int(self.steps)))
        # The library wants n, whatever there is.
        return chosen[torch.arange(n, device=chosen.device) % len(chosen)][None]
