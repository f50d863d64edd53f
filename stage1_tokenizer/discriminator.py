"""The discriminator (PatchGAN): a small convolutional network that tells images from reconstructions, patch by patch.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (2017), sections 3.2.2 and 6.1.2.
"""

from functools import partial
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from stage1_tokenizer.config.base import Config
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.networks.vqgan import build_norm


class DiscriminatorConfig(Config):
    """Size and normalisation of the discriminator."""

    channels: PositiveInt = 64
    """Width of the first layer; the width doubles with each layer, up to eight times this width."""
    layers: PositiveInt = 3
    """Number of strided layers; the receptive field of a logit is a patch of 70x70 pixels for 3, of 34x34 for 2."""
    norm: Literal["batch", "group"] = "group"
    """`batch`: batch norm as in the paper, always with the statistics of the present batch; `group`: group norm, which
    also works for small batches and does not depend on the number of processes."""


def check_depth(config: DiscriminatorConfig, image_size: tuple[int, int]) -> None:
    """Raise ConfigError if images of this (H, W) are too small for the number of layers.

    Call it before a training: the discriminator may first be used after thousands of steps.
    """
    # Each strided layer halves the side, rounded down. The two other layers remove one pixel each, and one must remain.
    least = 3 * 2**config.layers
    if min(image_size) >= least:
        return
    most = max(0, (min(image_size) // 3).bit_length() - 1)
    way_out = f"give --adversarial.discriminator.layers {most}" if most else "no discriminator fits"
    raise ConfigError(
        f"adversarial.discriminator.layers {config.layers}: needs images of at least {least}x{least} pixels, and these "
        f"are {image_size[0]}x{image_size[1]} (height, width); {way_out}, or larger images"
    )


class PatchDiscriminator(nn.Module):
    """The discriminator: a grid of logits per image, positive where a patch looks like an image of the data."""

    def __init__(self, config: DiscriminatorConfig, image_channels: int) -> None:
        super().__init__()
        widths = [config.channels * min(2**layer, 8) for layer in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, config.layers + 1):
            norm = partial(nn.BatchNorm2d, track_running_stats=False) if config.norm == "batch" else build_norm
            layers += [
                nn.Conv2d(
                    widths[layer - 1], widths[layer], 4, stride=2 if layer < config.layers else 1, padding=1, bias=False
                ),
                norm(widths[layer]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.layers:  # the paper's initialisation
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
        self.to(memory_format=torch.channels_last)  # as the tokenizer, whose reconstructions it gets

    def forward(self, *batches: Tensor) -> tuple[Tensor, ...]:
        """Return the logits (B, 1, h', w') of each batch (B, C, H, W) in [-1, 1]; no norm mixes two batches."""
        return tuple(self.layers(images) for images in batches)
