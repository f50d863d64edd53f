"""The facts that every kind of network states about itself, and the base of the decoders."""

from typing import ClassVar

from torch import Tensor, nn

from stage1_tokenizer.config.base import Config


class BaseNetworkConfig(Config):
    """Base of the config classes. A kind adds `factor`, image size over latent size, and `latent_channels`, D."""

    name_of_one_size: ClassVar[str | None] = None
    """Name of a kind whose weights fit images of the training size alone, for messages; None: they fit any size."""
    mixes_positions: ClassVar[bool] = False
    """True if a code may describe any part of the image, and not mainly the patch under it."""

    @property
    def reach(self) -> int:
        """Number of latents away at which a code sees pixels, or a pixel codes, at most; 0: it sees all of its input,
        as with normalisation or attention."""
        return 0

    def check(self, image_size: tuple[int, int]) -> None:
        """Raise ConfigError where the network cannot learn from images of this size."""


class Decoder(nn.Sequential):
    """z_q (B, D, h, w) -> image (B, C, h * factor, w * factor), meant to lie in [-1, 1] but not clamped to it."""

    @property
    def last_weight(self) -> Tensor:
        """The last layer's weight, at which the adaptive weight compares gradients."""
        weights = [layer.weight for layer in self if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
        return weights[-1]
