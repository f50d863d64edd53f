"""Network `patches`: a linear map per patch, and one back."""

from typing import Literal

from torch import nn

from stage1_tokenizer.config.value_types import Side
from stage1_tokenizer.networks.base import BaseNetworkConfig, Decoder


class PatchesConfig(BaseNetworkConfig):
    """A linear map per patch."""

    kind: Literal["patches"] = "patches"
    factor: Side = 4
    """Image size divided by latent size."""
    latent_channels: Side = 6
    """Channels D of the latent."""

    @property
    def reach(self) -> int:
        """Latent positions around one that affect a patch, itself included."""
        return 1


class PatchesEncoder(nn.Sequential):
    """(B, C, H, W) -> (B, D, H / factor, W / factor)."""

    def __init__(self, image_channels: int, config: PatchesConfig) -> None:
        super().__init__(nn.Conv2d(image_channels, config.latent_channels, config.factor, stride=config.factor))


class PatchesDecoder(Decoder):
    """(B, D, h, w) -> (B, C, H, W)."""

    def __init__(self, image_channels: int, config: PatchesConfig) -> None:
        factor = config.factor
        super().__init__(nn.ConvTranspose2d(config.latent_channels, image_channels, factor, stride=factor), nn.Tanh())
