"""Pictures straight from a tokenizer whose bottleneck has a prior of its own: noise from N(0, I), then the decoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampling.saved_images import Shape, to_images
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.seeds import draw_uniforms
from stage1_tokenizer.tokenizer import LoadedTokenizer, Tokenizer


@dataclass(frozen=True)
class NoiseSource:
    """A tokenizer that can be sampled from, and how."""

    loaded: LoadedTokenizer
    device: torch.device
    seed: int
    temperature: float
    """Standard deviation of the noise."""

    doing, unit = "sampling", "picture"
    units_per_image = 1

    @classmethod
    def load(cls, path: str, device: torch.device, seed: int, temperature: float) -> Self:
        """Raises ConfigError where the tokenizer's latent has no distribution to draw from, and says what would do."""
        loaded = LoadedTokenizer.load(path, device)
        bottleneck, kind = loaded.tokenizer.bottleneck, loaded.tokenizer.config.bottleneck.kind
        if bottleneck.depth:
            raise ConfigError(
                f"--tokenizer {path}: a tokenizer with bottleneck.kind {kind!r} has codes, and only a prior knows "
                f"which of them go together; train one with `python stage2_prior/train.py --tokenizer {path}` and "
                "name it with --prior"
            )
        if not bottleneck.noise_channels:
            raise ConfigError(
                f"--tokenizer {path}: a tokenizer with bottleneck.kind {kind!r} is an autoencoder whose latent has no "
                "distribution to draw from; train one with --bottleneck.kind kl, or with codes and a prior over them"
            )
        return cls(loaded, device, seed, temperature)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    @property
    def image_shape(self) -> Shape:
        """Of each picture."""
        config = self.tokenizer.config
        return (*config.image_size, config.image_channels)

    def labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """0 for each picture, as for every data set without classes."""
        return np.zeros_like(indices)

    def sample(self, indices: NDArray[np.int64], progress: Callable[[int], object]) -> NDArray[np.uint8]:
        """The pictures of these numbers: (n, H, W, C) uint8.

        Raises:
            BadFileError: the tokenizer gives images that are not finite.
        """
        model = self.tokenizer
        (height, width), factor = model.config.image_size, model.config.network.factor
        size = (model.bottleneck.noise_channels, height // factor, width // factor)
        noise = self.temperature * normals(self.seed, indices, size)  # (n, c, h, w)

        def decode(noise: Tensor) -> Tensor:
            images = model.decode(model.bottleneck.sample(noise))  # (n, C, H, W)
            if not torch.isfinite(images).all():
                raise BadFileError(f"{self.loaded.path}: gives numbers that are not finite: its weights are damaged")
            return images

        pictures = to_images(decode, noise.to(self.device))
        progress(len(indices))
        return pictures

    def settings(self) -> dict[str, object]:
        """What settings.json adds to the configuration."""
        loaded = self.loaded
        found = {"step": loaded.step, "classes": (), "weights": loaded.fingerprint}
        return {"tokenizer": str(loaded.path), **found}


def normals(seed: int, indices: NDArray[np.int64], size: tuple[int, int, int]) -> Tensor:
    """Standard normal noise (n, c, h, w) float32, picture by picture a function of (seed, index) alone."""
    uniform = draw_uniforms(seed, "noise", np.zeros_like(indices), indices, int(np.prod(size)))  # (n, c*h*w) in [0, 1)
    # By inverting the distribution function, in float64. At exactly 0 that is -inf, so half a step of the generator
    # above it; the largest number, 1 - 2^-53, is just as far into the other tail.
    return torch.special.ndtri(torch.from_numpy(uniform).clamp_min(2.0**-54)).float().reshape(-1, *size)
