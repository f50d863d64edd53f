"""A GPT (decoder-only transformer) over the positions of a latent grid.

The design is that of nanoGPT and LlamaGen: pre-norm blocks of causal attention and a feed-forward network (Radford et
al., "Language Models are Unsupervised Multitask Learners", 2019), with RMSNorm, SwiGLU and rotary positions along two
axes (Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", 2024). With the options
`positions: rotary`, `qk_norm: false`, `norm_eps: 1e-5`, `rotary_base: 10000`, `start_rotation: zero` and
`feed_forward_bias: false` it is exactly LlamaGen's (`llamagen.py`). The class is a start vector in front of the
sequence; each position of the grid is one element of the sequence:

    input      start  x_0  x_1 ... x_{h*w-2}      (B, h*w, width)
    context    of 0   1    2   ... h*w-1          (B, h*w, width)

Each input has two kinds of position information. A learned vector per row and one per column name the position that the
*output* belongs to. The rotation of queries and keys encodes the position of the *input*, so that attention depends on
distances in rows and columns. The start vector counts as the position left of the first one, if `start_rotation` does
not say otherwise.
"""

from typing import Literal, Self

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stage1_tokenizer.config.value_types import Channels, Count
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.base import BasePriorConfig, Grid, LabelEmbedding, Prior
from stage2_prior.fast_linear import Precision
from stage2_prior.gpt.dropout import Dropout
from stage2_prior.gpt.generation import PreparedGpt
from stage2_prior.gpt.layer import build_layer


class GptConfig(BasePriorConfig):
    """Decoder-only transformer with RMSNorm, SwiGLU, two-axis positions and normalised queries and keys."""

    kind: Literal["gpt"] = "gpt"
    layers: Count = 4
    """Transformer layers. More layers model the codes better and take more time and memory."""
    width: Channels = 128
    """Channels of embeddings and contexts. Must be a multiple of 4 times heads."""
    heads: Channels = 4
    """Attention heads per layer; each has width / heads channels (64 is common)."""
    feed_forward: Channels | None = None
    """Inner width of the feed-forward network; null: 4 times the width."""
    positions: Literal["rotary", "learned", "both"] = "both"
    """Position information: rotation of queries and keys, a learned vector per row and column, or both."""
    rotary_base: float = Field(100.0, gt=1.0)
    """Base of the rotation frequencies. 100 suits the short axes of grids; text models and LlamaGen use 10,000. No
    effect with positions learned."""
    start_rotation: Literal["left", "zero"] = "left"
    """Rotation of the start vector. left: that of a position left of the first one; zero: its queries and keys are
    multiplied by 0, as in LlamaGen, so that its attention logit is 0 at all positions. No effect with positions
    learned."""
    qk_norm: bool = True
    """Normalise queries and keys, each with a learned scale per channel. It keeps attention logits small in long
    trainings; LlamaGen does without."""
    norm_eps: float = Field(0.0, ge=0.0, le=1.0)
    """Number that every RMSNorm adds to the mean square; LlamaGen has 1e-5. 0: none."""
    feed_forward_bias: bool = True
    """Give the products of the feed-forward network a bias vector; LlamaGen has none."""
    checkpoint: bool = False
    """Compute each layer again in the backward pass instead of keeping its activations. A step takes a third longer and
    needs far less memory; turn it on when memory runs out."""

    @model_validator(mode="after")
    def _check(self) -> "GptConfig":
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width ({self.width}) must be a multiple of 4 times heads ({self.heads}): each head rotates pairs of "
                "channels along two axes"
            )
        return self

    copies_weights = True
    replays = True
    generates_by_row = False

    @property
    def computes_layers_twice(self) -> bool:
        """True if `checkpoint` is on."""
        return self.checkpoint

    def cached_numbers(self, grid: Grid) -> int:
        """Return how many numbers the keys and values of one image have."""
        return 2 * self.layers * grid[0] * grid[1] * self.width

    def smallest(self) -> Self:
        """Return a copy of this config with two layers of width 16."""
        return self.model_copy(update={"layers": 2, "width": 16, "heads": 2, "feed_forward": None})


class Gpt(Prior):
    """A prior over the codes of one TokenShape, for images of `classes` classes (0: unconditional)."""

    config: GptConfig

    def __init__(self, config: GptConfig, shape: TokenShape, classes: int) -> None:
        super().__init__(config, shape, classes)
        width = config.width
        self.start = LabelEmbedding(classes, width)
        is_learned = config.positions != "rotary"
        self.rows = nn.Embedding(shape.h, width) if is_learned else None
        self.columns = nn.Embedding(shape.w, width) if is_learned else None
        for embedding in (self.start, self.rows, self.columns):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=width**-0.5)
        self.dropout = Dropout(config.dropout)
        inner = config.feed_forward or 4 * width
        self.layers = nn.ModuleList(
            build_layer(
                width,
                config.heads,
                width // config.heads,
                inner,
                config.dropout,
                length=shape.h * shape.w,
                qk_norm=config.qk_norm,
                norm_eps=config.norm_eps,
                feed_forward_bias=config.feed_forward_bias,
                start_rotation="left" if config.positions == "learned" else config.start_rotation,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(width, eps=config.norm_eps or None)

    def contexts(self, embedded: Tensor, labels: Tensor, grid: Grid) -> Tensor:
        """Compute the contexts of all positions: embedded positions (B, h*w, width), labels (B,) -> (B, h*w, width)."""
        x = torch.cat([self.start(labels)[:, None], embedded[:, :-1]], dim=1)  # (B, h*w, width)
        learned = self.learned_positions(grid)
        if learned is not None:
            x = x + learned
        x = self.dropout(x)
        angles = None if self.config.positions == "learned" else self.rotary_angles(grid, x.device)
        for layer in self.layers:
            if self.config.checkpoint and self.training:
                x = checkpoint(layer, x, angles, use_reentrant=False)
            else:
                x = layer(x, angles)  # (B, h*w, width)
        return self.norm(x)

    def prepare(self, precision: Precision = "float32") -> PreparedGpt:
        """Arrange the weights for generation with a cache of keys and values."""
        return PreparedGpt(self, precision, self.layers, self.start, self.norm, self.position_tables)

    def position_tables(self, grid: Grid, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return the position information of all inputs; None for a kind that `config.positions` leaves out.

        Returns:
            learned: (h*w, width), the sum of the row's and the column's vector of the position of each output.
            rotation: (h*w, head width / 2, 2), cosine and sine of the angles of each input; 0 and 0 for the start
                vector if `config.start_rotation` is zero.
        """
        learned = self.learned_positions(grid)
        if self.config.positions == "learned":
            return learned, None
        angles = self.rotary_angles(grid, device)
        rotation = torch.stack([angles.cos(), angles.sin()], dim=-1)
        if self.config.start_rotation == "zero":
            rotation[0] = 0.0
        return learned, rotation

    def learned_positions(self, grid: Grid) -> Tensor | None:
        """Return the sum of the row's and the column's vector of each output (h*w, width); None if there are none."""
        if self.rows is None or self.columns is None:
            return None
        rows, columns = self.rows.weight[: grid[0]], self.columns.weight[: grid[1]]
        return rearrange(rows[:, None] + columns[None, :], "h w D -> (h w) D")

    def rotary_angles(self, grid: Grid, device: torch.device) -> Tensor:
        """Return the rotation angles (h*w, head width / 2) in radians, one per pair of channels (RoPE, equation 15).

        The first half of the pairs rotates by the row of the input, the second half by its column. Pair i of a half of
        n pairs has the frequency rotary_base ** (-i / n), theta in RoPE (Su et al., "RoFormer", 2021, section 3.2.2;
        its value for grids: Heo et al., "Rotary Position Embedding for Vision Transformer", 2024, section 3.2).
        """
        pairs = self.config.width // self.config.heads // 4  # per axis
        frequencies = self.config.rotary_base ** -(torch.arange(pairs, device=device) / pairs)
        index = torch.arange(-1, grid[0] * grid[1] - 1, device=device)  # input t is position t - 1
        # The start vector (index -1) stands at row 0, column -1; -1 // w would give row -1.
        row, column = (index // grid[1]).clamp_min(0), torch.where(index < 0, index, index % grid[1])
        return torch.cat([row[:, None] * frequencies, column[:, None] * frequencies], dim=-1)
