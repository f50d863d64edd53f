"""Fully connected encoder and decoder, as in the first autoencoders: every latent number sees every pixel."""

from itertools import pairwise
from typing import Literal

from einops.layers.torch import Rearrange
from pydantic import Field
from torch import nn

from stage1_tokenizer.config.value_types import Channels, Side
from stage1_tokenizer.networks.base import BaseNetworkConfig, Decoder


class MlpNetworkConfig(BaseNetworkConfig):
    """A multilayer perceptron, for small images: its weights fit one image size, and grow with the number of pixels."""

    name_of_one_size = "multilayer perceptron"
    mixes_positions = True
    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Channels, ...] = Field((300, 300), max_length=64)
    """Widths of the encoder's hidden layers; the decoder has them in reverse."""
    factor: Side = 7
    """Image size over latent size: 7 makes a grid of 4x4 of MNIST's 28x28."""
    latent_channels: Channels = 64
    """D, the channels of the latent that the bottleneck receives."""


def _layers(widths: list[int]) -> list[nn.Module]:
    """Linear layers between these widths, with a ReLU after each but the last."""
    layers: list[nn.Module] = []
    for width, next_width in pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    return layers[:-1]


class MlpEncoder(nn.Sequential):
    """(B, C, H, W) in [-1, 1], of the one size that it was built for -> (B, D, H / factor, W / factor)."""

    def __init__(self, image_channels: int, image_size: tuple[int, int], config: MlpNetworkConfig) -> None:
        (H, W), C, D = image_size, image_channels, config.latent_channels
        h, w = H // config.factor, W // config.factor
        super().__init__(
            # The sizes are stated, so that another image size is an error, and not another order of the same numbers.
            Rearrange("B C H W -> B (C H W)", C=C, H=H, W=W),
            *_layers([C * H * W, *config.hidden, D * h * w]),
            Rearrange("B (D h w) -> B D h w", D=D, h=h, w=w),
        )


class MlpDecoder(Decoder):
    def __init__(self, image_channels: int, image_size: tuple[int, int], config: MlpNetworkConfig) -> None:
        (H, W), C, D = image_size, image_channels, config.latent_channels
        h, w = H // config.factor, W // config.factor
        super().__init__(
            Rearrange("B D h w -> B (D h w)", D=D, h=h, w=w),
            *_layers([D * h * w, *reversed(config.hidden), C * H * W]),
            Rearrange("B (C H W) -> B C H W", C=C, H=H, W=W),
        )
