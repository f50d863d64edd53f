"""PatchGAN: a small convolutional classifier that judges overlapping patches as real or reconstructed.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (2017), section 3.2.
"""

from functools import partial
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from stage1_tokenizer.config.base import Config
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.networks.vqgan import normalisation


class DiscriminatorConfig(Config):
    """The PatchGAN's size."""

    channels: PositiveInt = 64
    """Width of the first layer; it doubles with each layer, up to eightfold."""
    layers: PositiveInt = 3
    """Strided layers: 3 judges patches of 70x70 pixels, 2 of 34x34."""
    norm: Literal["batch", "group"] = "group"
    """`batch` is the paper's (with the batch's own statistics, always); `group` also works on small batches, and the
    same on one process as on many."""


def check_depth(config: DiscriminatorConfig, image_size: tuple[int, int]) -> None:
    """Raises ConfigError where the images end before the layers do.

    To be called before the training: the discriminator may start after thousands of steps.
    """
    # Each strided layer halves the side, rounded down; the two others take a pixel each, and one must be left.
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
    """Images in [-1, 1] -> a grid of logits each, positive for real."""

    def __init__(self, config: DiscriminatorConfig, image_channels: int) -> None:
        super().__init__()
        widths = [config.channels * min(2**layer, 8) for layer in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, config.layers + 1):
            norm = partial(nn.BatchNorm2d, track_running_stats=False) if config.norm == "batch" else normalisation
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
        self.to(memory_format=torch.channels_last)  # like the tokenizer, whose reconstructions it judges

    def forward(self, *batches: Tensor) -> tuple[Tensor, ...]:
        """Each (B, C, H, W) -> logits (B, 1, h', w'). One by one, so that no norm mixes real and fake."""
        return tuple(self.layers(images) for images in batches)
