"""No bottleneck: the latent passes unchanged, as in a plain autoencoder, so only its size limits the information."""

from typing import Literal

from torch import Tensor

from stage1_tokenizer.bottlenecks.base import BaseBottleneckConfig, Bottleneck, Bottlenecked


class NoBottleneckConfig(BaseBottleneckConfig):
    """A plain autoencoder; its latent is continuous, so there are no codes and no prior over them."""

    kind: Literal["none"] = "none"


class NoBottleneck(Bottleneck):
    """The identity: z (B, D, h, w) -> z, no codes, a loss of 0."""

    def forward(self, z: Tensor) -> Bottlenecked:
        """z (B, D, h, w) -> Bottlenecked with z_q = z."""
        return Bottlenecked(z_q=z, codes=None, loss=z.new_zeros(()))
