"""A codebook: V vectors of dimension d that follow the vectors assigned to them.

    start(vectors)             before the first step: k-means over the first batch
    quantize(vectors)          the nearest codes and their codebook vectors
    remember(vectors, codes)   in train mode: keep what the codebook learns from
    finish_step()              after each optimizer step: running means (EMA), then unused codes are moved

van den Oord et al., "Neural Discrete Representation Learning" (2017), appendix A.1, for a code that n vectors x are
assigned to in a step:

    N <- decay N + (1 - decay) n        m <- decay m + (1 - decay) sum x        e = m / N

Everything is computed from the batches of all processes together and is equal in all of them: counts and sums are
all-reduced, and random draws are from the whole batch with seeds that depend only on the step. So two processes of B
images have the codebook of one process of 2B, and two micro-batches that of one batch.
"""

from operator import not_
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Advice, BaseBottleneckConfig, Beta
from stage1_tokenizer.bottlenecks.nearest import FAST_PATHS, find_nearest
from stage1_tokenizer.bottlenecks.process_group import ProcessGroup, draw_indices
from stage1_tokenizer.config.value_types import CodebookSize, Count
from stage1_tokenizer.engine.processor import FastPath
from stage1_tokenizer.engine.seeds import derive_seed

EPSILON = 1e-5
"""Laplace smoothing of the counts, so that a code without vectors does not divide by zero."""
KMEANS_VECTORS = 64
"""Largest number of vectors per code that k-means uses."""
KMEANS_ROUNDS = 16
"""Rounds in which the first means of k-means are drawn."""


class CodebookConfig(BaseBottleneckConfig):
    """The part of a config that says how a codebook starts, learns, and keeps its codes in use."""

    fast_paths: ClassVar[tuple[FastPath, ...]] = FAST_PATHS
    codebook_size: CodebookSize = 256
    """V, the number of codes."""
    update: Literal["ema", "gradient"] = "ema"
    """`ema`: each codebook vector is the running mean of the vectors assigned to it; `gradient`: the codebook loss."""
    beta: Beta = 0.25
    """Weight of the commitment term, which pulls the encoder to the codebook vectors; it does not move the codebook."""
    decay: float = Field(0.99, gt=0.0, lt=1.0)
    """Decay per step of the running means, and of each code's running count of uses."""
    kmeans_init: Annotated[bool, Advice("unused codes", "start from the data (--bottleneck.kmeans_init)", not_)] = True
    """Start the codebook from k-means over the latents of the first training batch."""
    kmeans_iterations: Count = 10
    """Iterations of k-means (`kmeans_init`)."""
    revive_below: Annotated[
        NonNegativeFloat, Advice("unused codes", "move unused codes earlier (--bottleneck.revive_below above {})")
    ] = 0.05
    """A code with a running count below this many uses per step is moved to a vector of the batch, drawn in proportion
    to its squared distance from its nearest codebook vector (as in k-means++); 0: never."""

    @property
    def starts_from_batch(self) -> bool:
        """True if the codebook starts from k-means over the first batch."""
        return self.kmeans_init


class Codebook(nn.Module):
    """V codebook vectors (V, d) and the running statistics that they learn from."""

    counts: Tensor
    """(V,) N above: running mean of each code's uses per step."""
    sums: Tensor
    """(V, d) m above (`update: ema` only)."""
    steps: Tensor
    """() int64, the steps that were learned from."""

    def __init__(self, config: CodebookConfig, dim: int, cosine: bool = False, processes: int = 1) -> None:
        """cosine: codebook vectors lie on the unit sphere. processes: number of processes that train it together."""
        super().__init__()
        self._config, self._cosine, self._group = config, cosine, ProcessGroup(processes)
        weight = torch.randn(config.codebook_size, dim) * dim**-0.5
        weight = F.normalize(weight, dim=-1) if cosine else weight
        self.register_buffer("counts", torch.ones(config.codebook_size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if config.update == "ema":
            self.register_buffer("weight", weight)
            self.register_buffer("sums", weight.clone())
        else:
            self.weight = nn.Parameter(weight)
        # Vectors (n, d) and codes (n,) of this step. Not buffers: DistributedDataParallel copies rank 0's buffers to
        # the other processes.
        self._remembered: list[tuple[Tensor, Tensor]] = []

    @property
    def vectors(self) -> Tensor:
        """Codebook vectors (V, d) float32 as they are searched and decoded; with a gradient if `update: gradient`."""
        if self._cosine and self._config.update == "gradient":
            return F.normalize(self.weight, dim=-1)  # with `update: ema` they are stored normalised
        return self.weight

    def quantize(self, vectors: Tensor, temperature: float = 0.0, dot_product: bool = False) -> tuple[Tensor, Tensor]:
        """Return the nearest codebook vectors (N, d) of vectors (N, d) float32, and their codes (N,) int64.

        temperature, dot_product: as for `find_nearest`.
        """
        codebook = self.vectors  # (V, d)
        codes = find_nearest(vectors.detach(), codebook.detach(), temperature, dot_product)
        return F.embedding(codes, codebook), codes

    def remember(self, vectors: Tensor, codes: Tensor) -> None:
        """Keep vectors (N, d) and their codes (N,) for `finish_step`. Does nothing in eval mode."""
        if self.training:
            self._remembered.append((vectors.detach(), codes))

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        """Start from k-means over vectors (N, d), this process's share of the first batch. Only with `kmeans_init`."""
        if not self._config.kmeans_init:
            return
        vectors = self._group.gather(vectors)
        size = self._config.codebook_size
        some = draw_indices(torch.ones(len(vectors)), KMEANS_VECTORS * size, derive_seed(0, "k-means vectors"))
        means, codes = self._kmeans(vectors[some.sort().values.to(vectors.device)])  # (V, d), (n,)
        self.weight.copy_(self._group.copy_from_main(means))
        # Counts as after one step from empty running means, so that the next step weighs as much as this one. With full
        # counts, the codes would stay for a hundred steps where an untrained encoder had its latents.
        share = len(some) / len(vectors)
        uses = count_codes(codes, size) / share * (1.0 - self._config.decay)
        self.counts.copy_(self._group.copy_from_main(uses))
        if self._config.update == "ema":
            self.sums.copy_(means * self.counts[:, None])

    @torch.no_grad()
    def finish_step(self) -> None:
        """Learn from the remembered vectors, and forget them."""
        if not self._remembered:
            return
        vectors, codes = (torch.cat(parts) for parts in zip(*self._remembered, strict=True))  # (N, d), (N,)
        self._remembered = []
        self.steps += 1
        uses = self._group.sum(count_codes(codes, len(self.counts)).float())  # (V,) n above
        self.counts.lerp_(uses, 1.0 - self._config.decay)
        if self._config.update == "ema":
            sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)  # (V, d)
            self.sums.lerp_(self._group.sum(sums), 1.0 - self._config.decay)
            self._set_to_means()
        if self._config.revive_below > 0:
            self._revive(vectors, codes)

    def drop_step(self) -> None:
        """Forget the remembered vectors."""
        self._remembered = []

    def _set_to_means(self) -> None:
        """Set the codebook vectors to e = m / N."""
        total = self.counts.sum()
        # Smoothed only for this division: stored, the smoothing would raise the counts of unused codes in every step.
        smoothed = (self.counts + EPSILON) / (total + len(self.counts) * EPSILON) * total
        torch.div(self.sums, smoothed[:, None], out=self.weight)
        if self._cosine:
            self.weight.copy_(F.normalize(self.weight, dim=-1))

    def _revive(self, vectors: Tensor, codes: Tensor) -> None:
        """Move codes that are hardly used to vectors that are far from their nearest codebook vector."""
        unused = (self.counts < self._config.revive_below).nonzero()[:, 0]
        if not len(unused):
            return
        distances = (vectors - F.embedding(codes, self.vectors.detach())).square().sum(dim=1)  # (N,)
        chosen = self._group.draw_vectors(vectors, distances, len(unused), derive_seed(0, "revive", int(self.steps)))
        unused = unused[: len(chosen)]
        # The statistics restart too: with the old ones, the next step would move the codes back.
        self.weight.detach()[unused] = chosen
        self.counts[unused] = self._config.revive_below
        if self._config.update == "ema":
            self.sums[unused] = chosen * self._config.revive_below

    def _kmeans(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Run Lloyd's algorithm on vectors (N, d): means (V, d) and the code of each vector's mean (N,).

        The first means are drawn in rounds, each in proportion to the squared distance from the means so far, as in
        k-means|| (Bahmani et al., "Scalable K-Means++", 2012). Plain k-means++ would take one round per code.
        """
        size = self._config.codebook_size
        means = vectors[draw_indices(torch.ones(len(vectors), device=vectors.device), 1, derive_seed(0, "k-means"))]
        for number in range(1, KMEANS_ROUNDS + 1):
            missing = 1 + (size - 1) * number // KMEANS_ROUNDS - len(means)
            distances = (vectors - F.embedding(find_nearest(vectors, means), means)).square().sum(dim=1)
            means = torch.cat([means, vectors[draw_indices(distances, missing, derive_seed(0, "k-means", number))]])
        # With fewer different vectors than codes, the other codes start at random near the first one, to be revived.
        missing = size - len(means)
        scale = vectors.std() if len(vectors) > 1 else vectors.new_ones(())
        means = torch.cat([means, means[:1] + scale * self.weight.detach()[:missing]])  # (V, d)
        for _ in range(self._config.kmeans_iterations):
            codes = find_nearest(vectors, means)
            uses = count_codes(codes, size)[:, None]
            sums = torch.zeros_like(means).index_add_(0, codes, vectors)
            means = torch.where(uses > 0, sums / uses.clamp_min(1), means)
            if self._cosine:
                means = F.normalize(means, dim=-1)
        return means, find_nearest(vectors, means)


def count_codes(codes: Tensor, size: int) -> Tensor:
    """Count each code among codes (N,): (V,) int64. Unlike torch.bincount, it does not make the CPU wait for a GPU."""
    return codes.new_zeros(size).scatter_add_(0, codes, torch.ones_like(codes))
