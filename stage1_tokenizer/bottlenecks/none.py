"""No bottleneck: the latent passes unchanged, as in a plain autoencoder, so only its size limits the information."""

from typing import Literal

from torch import Tensor

from stage1_tokenizer.bottlenecks.base import BaseBottleneckConfig, Bottleneck, Bottlenecked


class NoBottleneckConfig(BaseBottleneckConfig):
    """A plain autoencoder; its latent is continuous, so there are no codes and no prior over them."""

    kind: Literal["none"] = "none"


class NoBottleneck(Bottleneck):
    """The identity on z (B, D, h, w), with no codes and a loss of 0."""

    def forward(self, z: Tensor) -> Bottlenecked:
        """Return z (B, D, h, w) as z_q."""
        return Bottlenecked(z_q=z, codes=None, loss=z.new_zeros(()))
