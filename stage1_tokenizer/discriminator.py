"""The discriminator (PatchGAN): a small convolutional network that tells images from reconstructions, patch by patch.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (2017), sections 3.2.2 and 6.1.2.
"""

from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stage1_tokenizer.config.base import Config, config_from_json
from stage1_tokenizer.config.value_types import Channels
from stage1_tokenizer.engine.checkpoint import load_strict, read_header, read_weights, write_weights
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.initial_weights import check_initial
from stage1_tokenizer.networks.group_norm import build_norm

DISCRIMINATOR_FILE = "discriminator.safetensors"
"""File beside the tokenizer, from which a later training goes on with the same discriminator."""
LARGEST_DEPTH = 16
"""Largest number of strided layers; a header may come from anybody, and 16 need images of 196,608 pixels a side."""


class DiscriminatorConfig(Config):
    """Size and normalisation of the discriminator."""

    channels: Channels = 64
    """Width of the first layer; the width doubles with each layer, up to eight times this width."""
    layers: int = Field(3, ge=1, le=LARGEST_DEPTH)
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
        self.config = config
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


def save_discriminator(folder: Path, discriminator: PatchDiscriminator, step: int) -> None:
    """Write the weights after `step` optimizer steps of the tokenizer, beside the tokenizer in a run's folder."""
    header = {"config": discriminator.config.model_dump_json(), "step": str(step)}
    write_weights(folder / DISCRIMINATOR_FILE, discriminator, "discriminator", header)


def read_discriminator_config(folder: Path) -> DiscriminatorConfig | None:
    """Read the config of the discriminator in a run's folder; None: there is none. Raises BadFileError."""
    file = folder / DISCRIMINATOR_FILE
    if not file.is_file():
        return None
    return config_from_json(DiscriminatorConfig, read_header(file, "discriminator").get("config"), str(file))


def check_discriminator(folder: Path, config: DiscriminatorConfig, image_channels: int) -> None:
    """Check that a discriminator of this config can start from the one in a run's folder, if there is one.

    Raises:
        ConfigError: it has another architecture; lists the tensors that differ.
        BadFileError: the file is damaged.
    """
    file = folder / DISCRIMINATOR_FILE
    if not file.is_file():
        return
    with torch.device("meta"):
        planned = PatchDiscriminator(config, image_channels)
    check_initial(
        planned,
        read_weights(file, "discriminator")[0],
        file,
        "Leave out the options adversarial.discriminator, which then are those of the file. To start with a new "
        "discriminator, give --init_from a copy of the tokenizer's file in another folder",
    )


def start_discriminator(discriminator: PatchDiscriminator | None, folder: Path) -> str:
    """Start a discriminator from the one in a run's folder, if there is one; return a line that says so.

    Raises:
        BadFileError: the file is damaged, or does not fit.
    """
    file = folder / DISCRIMINATOR_FILE
    if discriminator is None:
        return "no discriminator (adversarial.weight 0)"
    if not file.is_file():
        return f"note: there is no {file}, so the discriminator starts from random weights"
    load_strict(discriminator, read_weights(file, "discriminator")[0], str(file))
    return f"the discriminator starts from {file}"
