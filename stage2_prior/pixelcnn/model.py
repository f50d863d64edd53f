"""A gated PixelCNN over the positions of a latent grid (van den Oord et al., "Conditional Image Generation with
PixelCNN Decoders", 2016), here over embedded codes.

`layer.py` is one layer of its two stacks; `generation.py` computes the same one position at a time.
"""

from collections.abc import Iterable
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import field_validator
from torch import Tensor, nn

from stage1_tokenizer.config.value_types import Channels, Count, Side
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.base import BasePriorConfig, Grid, Prior
from stage2_prior.pixelcnn.generation import PreparedPixelCnn
from stage2_prior.pixelcnn.layer import GatedLayer
from stage2_prior.products import Precision


class PixelCnnConfig(BasePriorConfig):
    """Gated PixelCNN. To reach all of a grid of n rows and columns, first_kernel // 2 + (layers - 1) * (kernel // 2)
    must be at least n - 1."""

    kind: Literal["pixelcnn"] = "pixelcnn"
    layers: Count = 8
    width: Channels = 96
    """Channels of each stack."""
    first_kernel: Side = 7
    """Side of the first layer's kernel; odd, and at least 3, since the position itself is left out."""
    kernel: Side = 3
    """Side of the others' kernels; odd."""

    @field_validator("first_kernel", "kernel")
    @classmethod
    def _odd(cls, side: int) -> int:
        if side % 2 == 0:
            raise ValueError("must be odd, so that a kernel has a middle")
        return side

    @field_validator("first_kernel")
    @classmethod
    def _sees_something(cls, side: int) -> int:
        if side < 3:
            raise ValueError("must be at least 3: a kernel of 1 without its middle is nothing")
        return side

    generates_on_one_thread = True

    def cached_numbers(self, grid: Grid) -> int:
        """Return the count of the vertical stack's inputs, and of two rows of the horizontal one and its own."""
        return self.layers * (grid[0] + 3) * grid[1] * self.width

    def smallest(self) -> Self:
        return self.model_copy(update={"layers": 2, "width": 16})


class PixelCnn(Prior):
    """Prior over codes of one TokenShape, for images of `classes` classes (0: unconditional)."""

    config: PixelCnnConfig

    def __init__(self, config: PixelCnnConfig, shape: TokenShape, classes: int) -> None:
        super().__init__(config, shape, classes)
        self.layers = nn.ModuleList(
            GatedLayer(
                config.width,
                config.first_kernel if index == 0 else config.kernel,
                classes + 1,
                config.dropout,
                first=index == 0,
            )
            for index in range(config.layers)
        )
        self.output = nn.Conv2d(config.width, config.width, 1)

    def contexts(self, embedded: Tensor, labels: Tensor, grid: Grid) -> Tensor:
        """Embedded positions (B, h*w, width), labels (B,) -> contexts (B, h*w, width)."""
        above = left = rearrange(embedded, "B (h w) D -> B D h w", h=grid[0]).contiguous(
            memory_format=torch.channels_last
        )
        for layer in self.layers:
            above, left = layer(above, left, labels)
        context = F.relu(self.output(F.relu(left)))
        return rearrange(context, "B D h w -> B (h w) D")

    def prepare(self, precision: Precision = "float32") -> PreparedPixelCnn:
        """Arrange the weights for generation that computes only what a new position needs."""
        if precision != "float32":
            raise ConfigError(f"precision {precision}: a PixelCNN decodes in float32 alone; leave it out")
        return PreparedPixelCnn(self, cast("Iterable[GatedLayer]", self.layers), self.output)
