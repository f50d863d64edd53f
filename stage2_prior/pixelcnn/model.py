"""A gated PixelCNN over the positions of a latent grid.

The network of van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016, with embedded codes in
place of pixels, as in the prior of the VQ-VAE (van den Oord et al., "Neural Discrete Representation Learning", 2017):

    embedded codes (B, width, h, w) -> gated layers -> horizontal stack -> ReLU -> 1x1 convolution -> ReLU -> contexts

`layer.py` is one layer of the two stacks. `generation.py` computes the same network one position at a time.
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
from stage2_prior.fast_linear import Precision
from stage2_prior.pixelcnn.generation import PreparedPixelCnn
from stage2_prior.pixelcnn.layer import GatedLayer


class PixelCnnConfig(BasePriorConfig):
    """Gated PixelCNN. To see all earlier positions of a grid of n x n codes, first_kernel // 2 + (layers - 1) * (kernel
    // 2) must be at least n - 1."""

    kind: Literal["pixelcnn"] = "pixelcnn"
    layers: Count = 8
    """Gated layers. More layers see farther and take more time and memory."""
    width: Channels = 96
    """Channels of each stack."""
    first_kernel: Side = 7
    """Side of the first layer's kernel in positions; odd, at least 3."""
    kernel: Side = 3
    """Side of the kernels of all other layers in positions; odd."""

    @field_validator("first_kernel", "kernel")
    @classmethod
    def _odd(cls, side: int) -> int:
        if side % 2 == 0:
            raise ValueError("must be odd, so that the kernel has a middle")
        return side

    @field_validator("first_kernel")
    @classmethod
    def _sees_something(cls, side: int) -> int:
        if side < 3:
            raise ValueError(
                "must be at least 3: the first layer leaves out the middle of its kernel, which is all of a kernel of 1"
            )
        return side

    copies_weights = True
    generates_on_one_thread = True

    def cached_numbers(self, grid: Grid) -> int:
        """Return how many numbers the cached features of one image have: all rows of the vertical stack, one row of the
        horizontal stack, and one row of doubled width that passes from one to the other, in each layer."""
        return self.layers * (grid[0] + 3) * grid[1] * self.width

    def smallest(self) -> Self:
        """Return a copy of this config with two layers of width 16."""
        return self.model_copy(update={"layers": 2, "width": 16})


class PixelCnn(Prior):
    """A prior over the codes of one TokenShape, for images of `classes` classes (0: unconditional)."""

    config: PixelCnnConfig

    def __init__(self, config: PixelCnnConfig, shape: TokenShape, classes: int) -> None:
        super().__init__(config, shape, classes)
        self.layers = nn.ModuleList(
            GatedLayer(
                config.width,
                config.first_kernel if index == 0 else config.kernel,
                classes,
                config.dropout,
                first=index == 0,
            )
            for index in range(config.layers)
        )
        self.output = nn.Conv2d(config.width, config.width, 1)

    def contexts(self, embedded: Tensor, labels: Tensor, grid: Grid) -> Tensor:
        """Compute the contexts of all positions: embedded positions (B, h*w, width), labels (B,) -> (B, h*w, width)."""
        above = left = rearrange(embedded, "B (h w) D -> B D h w", h=grid[0]).contiguous(
            memory_format=torch.channels_last
        )
        for layer in self.layers:
            above, left = layer(above, left, labels)  # (B, width, h, w) each
        contexts = F.relu(self.output(F.relu(left)))
        return rearrange(contexts, "B D h w -> B (h w) D")

    def prepare(self, precision: Precision = "float32") -> PreparedPixelCnn:
        """Return this prior for generation that caches all features. Raise ConfigError if precision is not float32."""
        if precision != "float32":
            raise ConfigError(f"precision {precision}: a PixelCNN generates in float32 only; leave this option out")
        return PreparedPixelCnn(self, cast("Iterable[GatedLayer]", self.layers), self.output)
