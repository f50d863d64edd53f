"""The small residual network of the VQ-VAE paper: strided convolutions and residual blocks, and the same in reverse.

van den Oord et al., "Neural Discrete Representation Learning" (2017), section 4.1. The name is that of the authors'
published example code (DeepMind Sonnet).

There is no normalisation and no attention, so a code depends only on the pixels within its receptive field. `local`
shrinks this field to little more than the code's own patch. Then equal patches have equal codes, wherever they are and
whatever is around them, which helps the prior. The decoder keeps its 3x3 kernels.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from stage1_tokenizer.config.value_types import Blocks, Channels, Side
from stage1_tokenizer.networks.base import BaseNetworkConfig, Decoder


class SonnetNetworkConfig(BaseNetworkConfig):
    """The VQ-VAE paper's network: fast, without normalisation or attention."""

    kind: Literal["sonnet"] = "sonnet"
    factor: Side = 4
    """Image size divided by latent size: a power of two, 2 or more."""
    channels: Channels = 128
    """Width at the latent resolution; the layers at higher resolutions have half of it."""
    residual_channels: Channels = 32
    """Width inside the residual blocks."""
    blocks: Blocks = 2
    """Residual blocks in the encoder, and the same number in the decoder."""
    latent_channels: Channels = 64
    """D, the channels of the latent that the bottleneck receives."""
    local: bool = False
    """Use 1x1 kernels in the encoder at the latent resolution: a code then depends on little beyond its own patch."""

    @model_validator(mode="after")
    def _check(self) -> "SonnetNetworkConfig":
        if self.factor < 2 or self.factor & (self.factor - 1):
            raise ValueError(f"factor must be a power of two, 2 or more, got {self.factor}")
        if self.factor > 2 and self.channels < 2:
            raise ValueError(f"channels must be 2 or more where factor is more than 2, got {self.channels}")
        return self

    @property
    def reach(self) -> int:
        """Distance in latents: 1 per 3x3 kernel at the latent resolution, and less than 2 for all strided kernels."""
        return self.blocks + 3


class SonnetBlock(nn.Module):
    """Residual block (B, c, h, w) -> (B, c, h, w): ReLU, k x k convolution, ReLU, 1x1 convolution, plus the input."""

    def __init__(self, channels: int, inner: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, c, h, w) -> (B, c, h, w)."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def _build_blocks(config: SonnetNetworkConfig, kernel: int) -> list[nn.Module]:
    return [
        *(SonnetBlock(config.channels, config.residual_channels, kernel) for _ in range(config.blocks)),
        nn.ReLU(),
    ]


class SonnetEncoder(nn.Sequential):
    """x (B, C, H, W) in [-1, 1] -> z (B, D, H / factor, W / factor)."""

    def __init__(self, image_channels: int, config: SonnetNetworkConfig) -> None:
        halvings = config.factor.bit_length() - 1
        kernel = 1 if config.local else 3
        layers: list[nn.Module] = []
        width = image_channels
        for halving in range(1, halvings + 1):
            wider = config.channels if halving == halvings else config.channels // 2
            layers += [nn.Conv2d(width, wider, 4, stride=2, padding=1), nn.ReLU()]
            width = wider
        layers += [nn.Conv2d(width, width, kernel, padding=kernel // 2), *_build_blocks(config, kernel)]
        layers.append(nn.Conv2d(width, config.latent_channels, 1))
        super().__init__(*layers)


class SonnetDecoder(Decoder):
    """z_q (B, D, h, w) -> x_hat (B, C, h * factor, w * factor)."""

    def __init__(self, image_channels: int, config: SonnetNetworkConfig) -> None:
        halvings = config.factor.bit_length() - 1
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, config.channels, 3, padding=1)]
        layers += _build_blocks(config, kernel=3)
        width = config.channels
        for _ in range(halvings - 1):
            layers += [nn.ConvTranspose2d(width, config.channels // 2, 4, stride=2, padding=1), nn.ReLU()]
            width = config.channels // 2
        layers.append(nn.ConvTranspose2d(width, image_channels, 4, stride=2, padding=1))
        super().__init__(*layers)
