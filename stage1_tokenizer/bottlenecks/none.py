"""No bottleneck but the latent's size: a plain autoencoder."""

from typing import Literal

from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottlenecked
from stage1_tokenizer.config import Config


class NoBottleneckConfig(Config):
    """A plain autoencoder; its latent is continuous, so there are no codes and no prior over them."""

    kind: Literal["none"] = "none"


class NoBottleneck(nn.Module):
    """z (B, D, h, w) as it is."""

    depth = 0
    codebook_size = 0

    def forward(self, z: Tensor) -> Bottlenecked:
        return Bottlenecked(z_q=z, codes=None, loss=z.new_zeros(()))

    def vectors(self, codes: Tensor) -> Tensor:
        raise AssertionError("a continuous bottleneck has no codes; Tokenizer.decode_codes refuses before this")
