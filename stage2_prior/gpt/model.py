"""A GPT over the positions of a latent grid, on x-transformers' layers.

The sequence of an image is its positions in row-major order, preceded by a start vector that says the class (or that
there is none). Its outputs are contexts, each knowing what came before:

    input      start  x_0  x_1 ... x_{h*w-2}      (B, h*w, width)
    context    of 0   1    2   ... h*w-1          (B, h*w, width)

An image has two axes, and the model is told places on both. A learned vector for its row and one for its column say
which place an output is *for*; a rotation of queries and keys says where the input *is*, so that attention sees
distances in rows and columns. The start stands left of the first position.
"""

from typing import Literal, Self

import torch
from einops import rearrange
from pydantic import model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stage1_tokenizer.config.value_types import Channels, Count
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.base import BasePriorConfig, Grid, Prior
from stage2_prior.gpt.generation import PreparedGpt
from stage2_prior.gpt.layer import layer
from stage2_prior.products import Precision

ROTARY_BASE = 100.0
"""Slowest rotation, in positions: grids are short (Heo et al., "Rotary Position Embedding for Vision Transformer",
2024, section 3.2)."""


class GptConfig(BasePriorConfig):
    """Decoder-only transformer with RMSNorm, SwiGLU, two-axis positions and normalised queries and keys."""

    kind: Literal["gpt"] = "gpt"
    layers: Count = 4
    width: Channels = 128
    """Must be a multiple of heads."""
    heads: Channels = 4
    feed_forward: Channels | None = None
    """Inner width of the feed-forward network; null: 4 times the width."""
    positions: Literal["rotary", "learned", "both"] = "both"
    """How a place is told: by rotating queries and keys, by a learned vector for each row and column, or both."""
    checkpoint: bool = False
    """Compute each layer again in the backward pass instead of keeping its activations: a third slower, and far less
    memory."""

    @model_validator(mode="after")
    def _check(self) -> "GptConfig":
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width ({self.width}) must be a multiple of 4 times heads ({self.heads}): each head turns pairs of "
                "channels along two axes"
            )
        return self

    copies_weights = True
    replays = True
    generates_by_row = False

    @property
    def computes_layers_twice(self) -> bool:
        return self.checkpoint

    def cached_numbers(self, grid: Grid) -> int:
        """Return the count of keys and values."""
        return 2 * self.layers * grid[0] * grid[1] * self.width

    def smallest(self) -> Self:
        return self.model_copy(update={"layers": 2, "width": 16, "heads": 2, "feed_forward": None})


class Gpt(Prior):
    """Prior over codes of one TokenShape, for images of `classes` classes (0: unconditional)."""

    config: GptConfig

    def __init__(self, config: GptConfig, shape: TokenShape, classes: int) -> None:
        super().__init__(config, shape, classes)
        width = config.width
        self.start = nn.Embedding(classes + 1, width)
        learned = config.positions != "rotary"
        self.rows = nn.Embedding(shape.h, width) if learned else None
        self.columns = nn.Embedding(shape.w, width) if learned else None
        for embedding in (self.start, self.rows, self.columns):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=width**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        inner = config.feed_forward or 4 * width
        self.layers = nn.ModuleList(
            layer(width, config.heads, width // config.heads, inner, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(width)

    def contexts(self, embedded: Tensor, labels: Tensor, grid: Grid) -> Tensor:
        """Embedded positions (B, h*w, width), labels (B,) -> contexts (B, h*w, width)."""
        x = torch.cat([self.start(labels)[:, None], embedded[:, :-1]], dim=1)  # (B, h*w, width)
        places, turns = self.places(grid, x.device)
        if places is not None:
            x = x + places
        x = self.dropout(x)
        for each in self.layers:
            if self.config.checkpoint and self.training:
                x = checkpoint(each, x, turns, use_reentrant=False)
            else:
                x = each(x, turns)
        return self.norm(x)

    def prepare(self, precision: Precision = "float32") -> PreparedGpt:
        """Arrange the weights for generation with a cache of keys and values."""
        return PreparedGpt(self, precision, self.layers, self.start, self.norm, self.places)

    def places(self, grid: Grid, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Compute what tells places: learned vectors (h*w, width) of the places that outputs are for, and cosine and
        sine (h*w, head width / 2, 2) of the angles by which the inputs are turned. None for what is not used."""
        learned = None
        if self.rows is not None and self.columns is not None:
            rows, columns = self.rows.weight[: grid[0]], self.columns.weight[: grid[1]]
            learned = rearrange(rows[:, None] + columns[None, :], "h w D -> (h w) D")
        if self.config.positions == "learned":
            return learned, None
        angles = self.angles(grid, device)
        return learned, torch.stack([angles.cos(), angles.sin()], dim=-1)

    def angles(self, grid: Grid, device: torch.device) -> Tensor:
        """The angles (h*w, head width / 2) by which pairs of channels are turned: the first half of the pairs by the
        row of the input, the others by its column."""
        quarter = self.config.width // self.config.heads // 4
        frequencies = ROTARY_BASE ** -(torch.arange(quarter, device=device) / quarter)
        index = torch.arange(-1, grid[0] * grid[1] - 1, device=device)  # input t is position t - 1
        # The start stands left of the first position, so its row is 0 where -1 // w would be -1.
        row, column = (index // grid[1]).clamp_min(0), torch.where(index < 0, index, index % grid[1])
        return torch.cat([row[:, None] * frequencies, column[:, None] * frequencies], dim=-1)
