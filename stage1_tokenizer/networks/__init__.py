"""The networks (encoder and decoder of a tokenizer), and `build_network`, which builds both from their config.

    sonnet   small residual network of the VQ-VAE paper      vqgan   ResNet with attention of the VQGAN paper
    mlp      fully connected layers, for small images        tiles   images of any size through a trained tokenizer

To add a kind: one file, one member of the union, one case.
"""

from typing import Annotated, assert_never

from pydantic import Field
from torch import nn

from stage1_tokenizer.networks.base import Decoder
from stage1_tokenizer.networks.mlp import MlpDecoder, MlpEncoder, MlpNetworkConfig
from stage1_tokenizer.networks.sonnet import SonnetDecoder, SonnetEncoder, SonnetNetworkConfig
from stage1_tokenizer.networks.vqgan import VqganDecoder, VqganEncoder, VqganNetworkConfig

NetworkConfig = Annotated[SonnetNetworkConfig | VqganNetworkConfig | MlpNetworkConfig, Field(discriminator="kind")]


def build_network(config: NetworkConfig, image_channels: int, image_size: tuple[int, int]) -> tuple[nn.Module, Decoder]:
    """Build the encoder, (B, C, H, W) -> z (B, D, h, w), and the decoder, z_q -> (B, C, H, W)."""
    match config:
        case SonnetNetworkConfig():
            return SonnetEncoder(image_channels, config), SonnetDecoder(image_channels, config)
        case VqganNetworkConfig():
            return VqganEncoder(image_channels, config), VqganDecoder(image_channels, config)
        case MlpNetworkConfig():
            return MlpEncoder(image_channels, image_size, config), MlpDecoder(image_channels, image_size, config)
        case _:
            assert_never(config)
