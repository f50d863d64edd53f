"""A codebook: V vectors of dimension d that follow the vectors assigned to them.

    start(vectors)        before the first step: k-means over the first batch
    look_up(vectors)      the nearest codes
    note(vectors, ids)    in train mode: what the codebook is to learn from
    finish_step()         after each optimizer step: running means (EMA), then dead codes are moved

van den Oord et al. 2017, appendix A.1, for a code with n vectors x assigned to it in a step:

    N <- decay N + (1 - decay) n        m <- decay m + (1 - decay) sum x        e = m / N

Everything is computed from the batches of all processes together, and equally in all of them: counts and sums are
all-reduced, and what is drawn is drawn from the whole batch by numbers that follow from the step. So two processes of B
have the codebook of one process of 2B, and two micro-batches that of one batch.
"""

from operator import not_
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Advice, BaseBottleneckConfig, Beta
from stage1_tokenizer.bottlenecks.group import Group, draw
from stage1_tokenizer.bottlenecks.nearest import nearest
from stage1_tokenizer.config.value_types import CodebookSize, Count
from stage1_tokenizer.engine.seeds import derive_seed

EPSILON = 1e-5
"""Laplace smoothing of the counts, so that a code without vectors does not divide by zero."""
KMEANS_VECTORS = 64
"""k-means looks at no more than this many vectors per code."""
KMEANS_ROUNDS = 16


class CodebookConfig(BaseBottleneckConfig):
    """How a codebook starts, learns, and keeps its codes in use."""

    codebook_size: CodebookSize = 256
    """V, the number of codes."""
    update: Literal["ema", "gradient"] = "ema"
    """How the codebook learns: running means of the vectors assigned to each code, or the codebook loss."""
    beta: Beta = 0.25
    """Weight of the commitment term, which pulls the encoder to the codes; it does not touch the codebook term."""
    decay: float = Field(0.99, gt=0.0, lt=1.0)
    """Decay of the running means and of the count of a code's uses."""
    kmeans_init: Annotated[bool, Advice("unused codes", "start from the data (--bottleneck.kmeans_init)", not_)] = True
    """Start the codebook from k-means over the first training batch."""
    kmeans_iterations: Count = 10
    revive_below: Annotated[
        NonNegativeFloat, Advice("unused codes", "move unused codes earlier (--bottleneck.revive_below above {})")
    ] = 0.05
    """A code whose running count of uses per step falls below this is moved to a badly served vector of the batch, one
    drawn in proportion to its squared distance from its code (as in k-means++); 0: never."""

    @property
    def starts_from_batch(self) -> bool:
        return self.kmeans_init


class Codebook(nn.Module):
    """V code vectors (V, d) and what they have learned from."""

    counts: Tensor
    sums: Tensor
    steps: Tensor

    def __init__(self, config: CodebookConfig, dim: int, cosine: bool = False, processes: int = 1) -> None:
        """`cosine`: codes lie on the unit sphere. `processes`: how many train it together."""
        super().__init__()
        self._config, self._cosine, self._group = config, cosine, Group(processes)
        weight = torch.randn(config.codebook_size, dim) * dim**-0.5
        weight = F.normalize(weight, dim=-1) if cosine else weight
        self.register_buffer("counts", torch.ones(config.codebook_size))  # N above, uses per step
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if config.update == "ema":
            self.register_buffer("weight", weight)
            self.register_buffer("sums", weight.clone())  # m above
        else:
            self.weight = nn.Parameter(weight)
        # Of the step so far. Not buffers: DistributedDataParallel would write rank 0's over those of the others.
        self._seen: list[tuple[Tensor, Tensor]] = []

    @property
    def vectors(self) -> Tensor:
        """The codes as they are looked up and decoded: (V, d) float32, with the gradient of a gradient codebook."""
        if self._cosine and self._config.update == "gradient":
            return F.normalize(self.weight, dim=-1)  # the running means of the other kind are stored normalised
        return self.weight

    def look_up(self, vectors: Tensor, temperature: float = 0.0) -> tuple[Tensor, Tensor]:
        """vectors (N, d) float32 -> their codes (N, d), with the gradient of a gradient codebook, and ids (N,)."""
        codes = self.vectors
        ids = nearest(vectors.detach(), codes.detach(), temperature)
        return F.embedding(ids, codes), ids

    def note(self, vectors: Tensor, ids: Tensor) -> None:
        """Keep vectors (N, d) and their ids (N,) for `finish_step`; in eval mode nothing."""
        if self.training:
            self._seen.append((vectors.detach(), ids))

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        """k-means over vectors (N, d), this process's share of the first batch; without `kmeans_init` nothing."""
        if not self._config.kmeans_init:
            return
        vectors = self._group.gather(vectors)
        size = self._config.codebook_size
        some = draw(torch.ones(len(vectors)), KMEANS_VECTORS * size, derive_seed(0, "k-means vectors"))
        means, ids = self._kmeans(vectors[some.sort().values.to(vectors.device)])
        self.weight.copy_(self._group.agree(means))
        # As if empty running means had seen one step, so that the next ones count as much as this one. Counted in full,
        # the codes would stay for a hundred steps where an encoder without any training had its latents.
        share = len(some) / len(vectors)
        uses = uses_of(ids, size) / share * (1.0 - self._config.decay)
        self.counts.copy_(self._group.agree(uses))
        if self._config.update == "ema":
            self.sums.copy_(means * self.counts[:, None])

    @torch.no_grad()
    def finish_step(self) -> None:
        """Learn from what was noted since the last step, and forget it."""
        if not self._seen:
            return
        vectors, ids = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen = []
        self.steps += 1
        uses = self._group.sum(uses_of(ids, len(self.counts)).float())
        self.counts.lerp_(uses, 1.0 - self._config.decay)
        if self._config.update == "ema":
            sums = torch.zeros_like(self.sums).index_add_(0, ids, vectors)
            self.sums.lerp_(self._group.sum(sums), 1.0 - self._config.decay)
            self._set_to_means()
        if self._config.revive_below > 0:
            self._revive(vectors, ids)

    def drop_step(self) -> None:
        """Forget what was noted since the last step."""
        self._seen = []

    def _set_to_means(self) -> None:
        total = self.counts.sum()
        # Smoothed for this division alone: written back, it would raise the counts of unused codes in every step.
        smoothed = (self.counts + EPSILON) / (total + len(self.counts) * EPSILON) * total
        torch.div(self.sums, smoothed[:, None], out=self.weight)
        if self._cosine:
            self.weight.copy_(F.normalize(self.weight, dim=-1))

    def _revive(self, vectors: Tensor, ids: Tensor) -> None:
        """Move codes that are hardly used to vectors which their codes serve badly."""
        dead = (self.counts < self._config.revive_below).nonzero()[:, 0]
        if not len(dead):
            return
        distances = (vectors - F.embedding(ids, self.vectors.detach())).square().sum(dim=1)  # (N,)
        chosen = self._group.draw(vectors, distances, len(dead), derive_seed(0, "revive", int(self.steps)))
        dead = dead[: len(chosen)]
        # All that the code has learned is forgotten with it, or the next step would take it back.
        self.weight.detach()[dead] = chosen
        self.counts[dead] = self._config.revive_below
        if self._config.update == "ema":
            self.sums[dead] = chosen * self._config.revive_below

    def _kmeans(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Lloyd's algorithm on vectors (N, d): means (V, d) and the id of each vector's mean (N,).

        The first means are drawn as in k-means|| (Bahmani et al. 2012): in rounds, each in proportion to the squared
        distance from the means so far. Plain k-means++ would take a round per code.
        """
        size = self._config.codebook_size
        means = vectors[draw(torch.ones(len(vectors), device=vectors.device), 1, derive_seed(0, "k-means"))]
        for number in range(1, KMEANS_ROUNDS + 1):
            wanted = 1 + (size - 1) * number // KMEANS_ROUNDS - len(means)
            apart = (vectors - F.embedding(nearest(vectors, means), means)).square().sum(dim=1)
            means = torch.cat([means, vectors[draw(apart, wanted, derive_seed(0, "k-means", number))]])
        # Where there are fewer different vectors than codes, the rest start at random among them, to be revived later.
        missing = size - len(means)
        scale = vectors.std() if len(vectors) > 1 else vectors.new_ones(())
        means = torch.cat([means, means[:1] + scale * self.weight.detach()[:missing]])
        for _ in range(self._config.kmeans_iterations):
            ids = nearest(vectors, means)
            uses = uses_of(ids, size)[:, None]
            sums = torch.zeros_like(means).index_add_(0, ids, vectors)
            means = torch.where(uses > 0, sums / uses.clamp_min(1), means)
            if self._cosine:
                means = F.normalize(means, dim=-1)
        return means, nearest(vectors, means)


def uses_of(ids: Tensor, size: int) -> Tensor:
    """Count of each code among ids (N,): (V,) int64. (torch.bincount would make the processor wait for a GPU.)"""
    return ids.new_zeros(size).scatter_add_(0, ids, torch.ones_like(ids))
