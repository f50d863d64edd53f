"""No bottleneck but the latent's size: a plain autoencoder."""

from typing import Literal

from torch import Tensor

from stage1_tokenizer.bottlenecks.base import BaseBottleneckConfig, Bottleneck, Bottlenecked


class NoBottleneckConfig(BaseBottleneckConfig):
    """A plain autoencoder; its latent is continuous, so there are no codes and no prior over them."""

    kind: Literal["none"] = "none"


class NoBottleneck(Bottleneck):
    """z (B, D, h, w) as it is."""

    def forward(self, z: Tensor) -> Bottlenecked:
        return Bottlenecked(z_q=z, codes=None, loss=z.new_zeros(()))
