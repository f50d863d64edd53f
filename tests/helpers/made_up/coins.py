"""Bottleneck `coins`: two coordinates are rounded to -1 or 1, so there are four codes."""

from typing import Annotated, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from stage1_tokenizer.bottlenecks.base import Advice, BaseBottleneckConfig
from stage1_tokenizer.bottlenecks.quantizer import Quantized, Quantizer
from stage1_tokenizer.bottlenecks.straight_through import straight_through


class CoinsConfig(BaseBottleneckConfig):
    """Two coins per position."""

    kind: Literal["coins"] = "coins"
    pull: Annotated[PositiveFloat, Advice("unused codes", "a fairer --bottleneck.pull than {}")] = 0.5
    """Weight of the commitment term."""


class Coins(Quantizer):
    """A quantizer with four codes."""

    def __init__(self, config: CoinsConfig, latent_channels: int) -> None:
        super().__init__(latent_channels, 2, codebook_size=4)
        self.config = config

    def quantize(self, vectors: Tensor) -> Quantized:
        """Round vectors (n, 2) to -1 or 1 per coordinate."""
        codes = (vectors > 0).long() @ torch.tensor([2, 1], device=vectors.device)
        nearest = self.codes_to_vectors(codes[:, None])
        loss = self.config.pull * (vectors - nearest).square().mean()
        return Quantized(straight_through(vectors, nearest), codes, loss, {})

    def codes_to_vectors(self, codes: Tensor) -> Tensor:
        """Return the vectors (n, 2) of codes (n, 1)."""
        return torch.cat([codes // 2, codes % 2], dim=1).float() * 2 - 1

    def codebooks(self) -> list[Tensor]:
        """Return the four vectors, (4, 2)."""
        return [self.codes_to_vectors(torch.arange(4)[:, None])]
