"""Images from a tokenizer alone: standard normal noise is decoded. Only for a latent with a known distribution (kl).

noise (n, c, h, w) ~ N(0, temperature^2), a function of (seed, i) -> bottleneck.sample -> z_q -> decoder -> images
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampling.sampler import Progress
from sampling.saved_images import ImageShape, decode_in_chunks
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.seeds import draw_uniforms
from stage1_tokenizer.tokenizer import LoadedTokenizer


@dataclass(frozen=True)
class NoiseSource:
    """A tokenizer whose noise is decoded to images, with the seed and the spread of the noise."""

    loaded: LoadedTokenizer
    device: torch.device
    seed: int
    temperature: float
    """Standard deviation of the noise."""

    task, unit = "sampling", "image"
    units_per_image = 1

    @classmethod
    def load(cls, path: str, device: torch.device, seed: int, temperature: float) -> Self:
        """Load a tokenizer that can be sampled from.

        Raises:
            ConfigError: the tokenizer has codes (it needs a prior), or a latent without a known distribution.
        """
        loaded = LoadedTokenizer.load(path, device)
        bottleneck, kind = loaded.tokenizer.bottleneck, loaded.tokenizer.config.bottleneck.kind
        if bottleneck.depth:
            raise ConfigError(
                f"--tokenizer {path}: a tokenizer with bottleneck.kind {kind!r} has codes, and sampling them needs a "
                f"prior; train one with `python stage2_prior/train.py --tokenizer {path}` and name it with --prior"
            )
        if not bottleneck.noise_channels:
            raise ConfigError(
                f"--tokenizer {path}: a tokenizer with bottleneck.kind {kind!r} is an autoencoder whose latent has no "
                "distribution to draw from; train one with --bottleneck.kind kl, or with codes and a prior over them"
            )
        return cls(loaded, device, seed, temperature)

    @property
    def image_shape(self) -> ImageShape:
        """Height, width and channels of one image."""
        config = self.loaded.tokenizer.config
        return (*config.image_size, config.image_channels)

    def labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return label 0 (n,) for each image, as for a data set without classes."""
        return np.zeros_like(indices)

    def sample(self, indices: NDArray[np.int64], progress: Progress) -> NDArray[np.uint8]:
        """Sample the images with these numbers (n,): (n, H, W, C) uint8.

        Raises:
            BadFileError: the tokenizer's images are not finite.
        """
        model = self.loaded.tokenizer
        (height, width), factor = model.config.image_size, model.config.network.factor
        size = (model.bottleneck.noise_channels, height // factor, width // factor)
        noise = self.temperature * draw_normals(self.seed, indices, size)  # (n, c, h, w)

        def decode(noise: Tensor) -> Tensor:
            images = model.decode(model.bottleneck.sample(noise))  # (n, C, H, W)
            if not torch.isfinite(images).all():
                raise BadFileError(f"{self.loaded.path}: gives numbers that are not finite: its weights are damaged")
            return images

        images = decode_in_chunks(decode, noise.to(self.device))
        progress(len(indices))
        return images

    def settings(self) -> dict[str, object]:
        """Return what the images depend on beside the config, for settings.json: step, classes, weights."""
        facts = {"step": self.loaded.step, "classes": (), "weights": self.loaded.fingerprint}
        return {"tokenizer": self.loaded.source, **facts}


def draw_normals(seed: int, indices: NDArray[np.int64], size: tuple[int, int, int]) -> Tensor:
    """Return standard normal noise (n, c, h, w) float32; that of each image is a function of (seed, index) alone."""
    uniform = draw_uniforms(seed, "noise", np.zeros_like(indices), indices, int(np.prod(size)))  # (n, c*h*w) in [0, 1)
    # Inverse of the normal distribution function, in float64. It is -inf at exactly 0, so 0 becomes half a step of the
    # generator; the largest number, 1 - 2^-53, is just as far in the other tail.
    return torch.special.ndtri(torch.from_numpy(uniform).clamp_min(2.0**-54)).float().reshape(-1, *size)
