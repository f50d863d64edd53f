"""Fully connected encoder and decoder: every number of the latent depends on every pixel.

Hinton and Salakhutdinov, "Reducing the Dimensionality of Data with Neural Networks" (2006), without the pretraining.
"""

from itertools import pairwise
from typing import Literal

from einops.layers.torch import Rearrange
from pydantic import Field
from torch import nn

from stage1_tokenizer.config.value_types import Channels, Side
from stage1_tokenizer.networks.base import BaseNetworkConfig, Decoder


class MlpNetworkConfig(BaseNetworkConfig):
    """A multilayer perceptron, for small images: its weights fit one image size, and their number grows with it."""

    name_of_one_size = "multilayer perceptron"
    mixes_positions = True
    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Channels, ...] = Field((300, 300), max_length=64)
    """Widths of the encoder's hidden layers; the decoder has the same ones in reverse order."""
    factor: Side = 7
    """Image size divided by latent size: 7 gives a latent grid of 4x4 for MNIST's 28x28 pixels."""
    latent_channels: Channels = 64
    """D, the channels of the latent that the bottleneck receives."""


def _build_layers(widths: list[int]) -> list[nn.Module]:
    """Build linear layers between these widths, with a ReLU after each but the last.

    The weights start as He et al., "Delving Deep into Rectifiers" (2015), section 2.2. With PyTorch's default, signals
    shrink in each layer, until all images have almost the same latents and a codebook cannot tell them apart.
    """
    layers: list[nn.Module] = []
    for width, next_width in pairwise(widths):
        linear = nn.Linear(width, next_width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return layers[:-1]


class MlpEncoder(nn.Sequential):
    """x (B, C, H, W) in [-1, 1], only of the size that it was built for -> z (B, D, H / factor, W / factor)."""

    def __init__(self, image_channels: int, image_size: tuple[int, int], config: MlpNetworkConfig) -> None:
        (H, W), C, D = image_size, image_channels, config.latent_channels
        h, w = H // config.factor, W // config.factor
        super().__init__(
            # With all sizes stated, an image of another size is an error. Without, it could fit in a wrong order.
            Rearrange("B C H W -> B (C H W)", C=C, H=H, W=W),
            *_build_layers([C * H * W, *config.hidden, D * h * w]),
            Rearrange("B (D h w) -> B D h w", D=D, h=h, w=w),
        )


class MlpDecoder(Decoder):
    """z_q (B, D, h, w), only of the size that it was built for -> x_hat (B, C, H, W)."""

    def __init__(self, image_channels: int, image_size: tuple[int, int], config: MlpNetworkConfig) -> None:
        (H, W), C, D = image_size, image_channels, config.latent_channels
        h, w = H // config.factor, W // config.factor
        super().__init__(
            Rearrange("B D h w -> B (D h w)", D=D, h=h, w=w),
            *_build_layers([D * h * w, *reversed(config.hidden), C * H * W]),
            Rearrange("B (C H W) -> B C H W", C=C, H=H, W=W),
        )
