"""The vector quantizer of vq.py through vector_quantize_pytorch, whose search, running means and k-means it uses.

Tests compare vq.py with it: the same codes, and the same codebook after the same updates. Three things are not the
library's: the losses and the straight-through step, since the library has one weight for both loss terms; the moment at
which the codebook learns, once per optimizer step and not in each forward pass; and the vectors from which k-means
starts and to which unused codes are moved, since the library's choice depends on the number of processes.
"""

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from stage1_tokenizer.bottlenecks.base import CodeDim
from stage1_tokenizer.bottlenecks.codebook import CodebookConfig
from stage1_tokenizer.bottlenecks.nearest import find_nearest
from stage1_tokenizer.bottlenecks.process_group import ProcessGroup
from stage1_tokenizer.bottlenecks.quantizer import Quantized, Quantizer
from stage1_tokenizer.bottlenecks.straight_through import straight_through
from stage1_tokenizer.bottlenecks.vq import Cosine, quantizer_stats, vq_loss
from stage1_tokenizer.engine.processor import FastPath
from stage1_tokenizer.engine.seeds import derive_seed


class VqLibraryConfig(CodebookConfig):
    """Vector quantizer with one codebook, by vector_quantize_pytorch."""

    fast_paths: ClassVar[tuple[FastPath, ...]] = ()  # the library searches
    kind: Literal["vq_library"] = "vq_library"
    code_dim: CodeDim = None
    """Dimension of the codebook vectors; null: that of the latent."""
    cosine: Cosine = False
    """Scale vectors and codebook vectors to length one, so that the nearest one has the greatest cosine (needs
    `update: ema`)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cosine and self.update == "gradient":
            raise ValueError("cosine: true needs update: ema (the library has no gradient codebook on the sphere)")
        return self


class LibraryVectorQuantizer(Quantizer):
    """One codebook, one code per position."""

    steps: Tensor
    """() int64, the steps that were learned from."""

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
            route_gradients_to_input=False,  # straight_through does this
            commitment_weight=0.0,  # vq_loss has both terms
            sync_codebook=processes > 1,
        )
        self._group = ProcessGroup(processes)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        codebook = self.library._codebook
        codebook.sample_fn = codebook.replace_sample_fn = self._draw
        self._remembered: list[tuple[Tensor, Tensor]] = []  # vectors (n, d) and codes (n,) of this step
        self._codes: Tensor | None = None  # (N,) of the last step; None before the first one

    def quantize(self, vectors: Tensor) -> Quantized:
        """Quantize vectors (N, d) float32 to codes (N,). Raise ValueError if `start` was not called."""
        vectors = self._scale(vectors)
        if torch.compiler.is_exporting():  # the library's search branches on values, which torch.export cannot record
            codes = find_nearest(vectors, self.library.codebook.detach())  # (N,)
        elif self.library._codebook.initted:
            codes = self.library(vectors[None], freeze_codebook=True)[1][0]  # (N,)
        else:
            raise ValueError("the codebook starts from k-means over the first batch; call start with it")
        nearest = F.embedding(codes, self.library.codebook)  # (N, d)
        if self.training:
            self._remembered.append((vectors.detach(), codes))
        loss, commitment = vq_loss(vectors, nearest, self.config.beta, by_gradient=self.config.update == "gradient")
        return Quantized(straight_through(vectors, nearest), codes, loss, quantizer_stats(vectors, commitment))

    def codes_to_vectors(self, codes: Tensor) -> Tensor:
        """Return the codebook vectors (N, d) of codes (N, 1)."""
        return F.embedding(codes[:, 0], self.library.codebook)

    def learned_buffers(self) -> list[Tensor]:
        """Return the codebook (V, d) if it is a running mean."""
        return self.codebooks() if self.config.update == "ema" else []

    def codebooks(self) -> list[Tensor]:
        """Return the one codebook (V, d)."""
        return [self.library.codebook.detach()]

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Start the codebook from the latents z (B, D, h, w) of the first batch."""
        codebook = self.library._codebook
        codebook.init_embed_(self._scale(self.space.to_vectors(z))[None])
        if self.config.kmeans_init:  # counts as after one step, for the reason given in Codebook.start
            codebook.cluster_size.mul_(1.0 - self.config.decay)
            codebook.embed_avg.mul_(1.0 - self.config.decay)

    @torch.no_grad()
    def finish_step(self) -> None:
        """Let the library update its codebook from the remembered vectors, and forget them."""
        if self._remembered:
            vectors, self._codes = (torch.cat(parts) for parts in zip(*self._remembered, strict=True))
            self._remembered = []
            self.steps += 1
            self.library._codebook.update_indices(vectors, self._codes)

    def drop_step(self) -> None:
        """Forget the remembered vectors."""
        self._remembered = []

    def _scale(self, vectors: Tensor) -> Tensor:
        """Scale vectors (N, d) to length one if `cosine`."""
        return F.normalize(vectors, dim=-1) if self.config.cosine else vectors

    def _draw(self, vectors: Tensor, n: int) -> Tensor:
        """Draw n of the vectors (1, N, d) of all processes for the library: (1, n, d).

        Before the first step these are the first means of k-means, drawn with equal weights. Later they are vectors to
        which unused codes are moved, drawn in proportion to the squared distance from their codebook vector.
        """
        if self._codes is None:
            weights, purpose = vectors.new_ones(vectors.shape[1]), "k-means"
        else:
            weights, purpose = (vectors[0] - self.library.codebook[self._codes]).square().sum(dim=1), "revive"
        chosen = self._group.draw_vectors(vectors[0], weights, n, derive_seed(0, purpose, int(self.steps)))
        # The library needs exactly n, so vectors are repeated if there are fewer.
        return chosen[torch.arange(n, device=chosen.device) % len(chosen)][None]
