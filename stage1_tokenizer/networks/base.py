"""The network's contract: what every network config states about its kind, and the base class of decoders."""

from typing import ClassVar

from torch import Tensor, nn

from stage1_tokenizer.config.base import Config


class BaseNetworkConfig(Config):
    """Base of the config classes of all networks.

    A kind adds `factor`, the image size divided by the latent size, and `latent_channels`, D.
    """

    name_of_one_size: ClassVar[str | None] = None
    """Name of the kind, for messages, if its weights fit only images of the training size; None: they fit any size."""
    mixes_positions: ClassVar[bool] = False
    """True if a code can describe any part of the image; False: mainly the patch at its position."""

    @property
    def reach(self) -> int:
        """Largest distance, in latents, at which a pixel influences a code, or a code a pixel; 0: unlimited, as with
        normalisation or attention."""
        return 0

    @property
    def encoded_channels(self) -> int | None:
        """Channels of the encoder's output if they are not those of the latent; None: they are."""
        return None

    def check(self, image_size: tuple[int, int]) -> None:
        """Raise ConfigError if the network cannot learn from images of this (H, W)."""


class Decoder(nn.Sequential):
    """z_q (B, D, h, w) -> image (B, C, h * factor, w * factor), meant to lie in [-1, 1] but not clamped to it."""

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last layer, at which `objective.adaptive_weight` compares gradients (VQGAN, equation 7)."""
        weights = [layer.weight for layer in self if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
        return weights[-1]
