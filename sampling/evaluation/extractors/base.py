"""The base of the feature extractors: uint8 images of any size -> features.

The resize changes a Fréchet distance as much as the network does (Parmar, Zhang and Zhu, "On Aliased Resizing and
Surprising Subtleties in GAN Evaluation", 2022). Therefore all kinds share one resize, and each image is resized once.
"""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from stage1_tokenizer.engine.errors import BadFileError, shorten


class Extracted(NamedTuple):
    """Features and logits of a batch."""

    features: Tensor
    """(B, D) float32: input of the classification layer, pooled over positions."""
    logits: Tensor | None
    """(B, classes) float32; None if the network has no classes."""


class Extractor(nn.Module):
    """A frozen network in float32. Subclasses implement `_extract`, which gets the resized images."""

    def __init__(self, name: str, dimension: int, size: tuple[int, int], sha256: str, is_inception: bool) -> None:
        super().__init__()
        self.name = name
        self.dimension = dimension
        """Number of features D."""
        self.size = size
        """Height and width of the network's input."""
        self.sha256 = sha256
        """SHA-256 of the weights file."""
        self.is_inception = is_inception
        """True for the weights of all published FIDs. Only then are metrics called FID, KID and inception score."""
        # Kept references are found again by this text, so it must not change.
        self.resize = (
            f"once, from the picture's own size to {size[0]}x{size[1]}, antialiased bicubic on eight bits, without a "
            "crop; a picture of that size is left as it is"
        )

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, also when a parent module is put into train mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Extracted:
        """Extract features: images (B, C, H, W) uint8 on any device, C 1 or 3.

        The features of an image do not depend on the other images of its batch.

        Raises:
            ValueError: the images have another type or shape.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; they must be uint8 (B, 1 or 3, H, W)")
        device = next(self.parameters()).device
        # By default, torch's convolutions on a GPU round to the ten bits of TF32.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.no_grad(), torch.autocast(device.type, enabled=False), exact:
            x = self._resized(images.to(device).expand(-1, 3, -1, -1))
            features, logits = self._extract(x)
        return Extracted(features.float(), None if logits is None else logits.float())

    def _resized(self, images: Tensor) -> Tensor:
        """Resize uint8 images (B, 3, H, W) to (B, 3, *size); images of that size stay unchanged."""
        resized: Tensor = resize(images, list(self.size), InterpolationMode.BICUBIC, antialias=True)
        return resized

    def _extract(self, images: Tensor) -> Extracted:
        """Compute features and logits from resized images (B, 3, *size) uint8."""
        raise NotImplementedError


def load_weights(network: nn.Module, given: Mapping[str, Tensor], source: str) -> None:
    """Load weights of any floating-point format into the network as float32, and freeze it in eval mode.

    All keys must match, except BatchNorm's counts of batches, which are not used. Integer tensors are tables that the
    network computes itself; they must be equal. A network without such tables may be on the meta device.

    Raises:
        BadFileError: a key is missing or unexpected, or has a wrong shape, type or value. The error names `source` and
            the key.
    """
    own = network.state_dict()  # includes the version numbers of the layers
    expected = {name: tensor for name, tensor in own.items() if not _counts_batches(name)}
    given = {name: tensor for name, tensor in given.items() if not _counts_batches(name)}
    kind = type(network).__name__
    for name in (*expected, *given):
        if name not in given:
            raise BadFileError(f"{source}: these are not weights of {kind}: no {name}")
        if name not in expected:
            raise BadFileError(f"{source}: these are not weights of {kind}: it has no {shorten(name)}")
        fits = given[name].shape == expected[name].shape
        if not fits or given[name].is_floating_point() != expected[name].is_floating_point():
            raise BadFileError(
                f"{source}: these are not weights of {kind}: {name} is {given[name].dtype} {tuple(given[name].shape)}, "
                f"should be {tuple(expected[name].shape)}"
            )
    try:
        weights = {
            name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for name, tensor in given.items()
        }
    except RuntimeError as error:  # for example 4-bit formats, which safetensors can store
        raise BadFileError(f"{source}: has a number format that torch cannot convert ({error})") from None
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise BadFileError(f"{source}: {name} has numbers that are not finite")
        if not tensor.is_floating_point() and not torch.equal(tensor, expected[name]):
            raise BadFileError(f"{source}: these are not weights of {kind}: {name} has other values")
    own.update(weights)
    own.update({name: torch.zeros((), dtype=torch.int64) for name in own if _counts_batches(name)})
    network.load_state_dict(own, strict=True, assign=True)
    network.requires_grad_(False).eval()


def _counts_batches(name: str) -> bool:
    """Return True for the key of BatchNorm's count of batches."""
    return name.rsplit(".", 1)[-1] == "num_batches_tracked"
