"""What a feature extractor is: uint8 pictures of any size -> features, the same for both sides of a comparison.

How pictures are resized decides a Frechet distance as much as the model does (Parmar, Zhang and Zhu, "On Aliased
Resizing and Surprising Subtleties in GAN Evaluation", 2022), so all kinds share one resize, and it happens once.
"""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from stage1_tokenizer.engine.errors import BadFileError, shorten


class Extracted(NamedTuple):
    """What an extractor says of a batch."""

    features: Tensor
    """(B, D) float32: the last layer before the classes, pooled over positions."""
    logits: Tensor | None
    """(B, classes) float32, or None where the network has no classes."""


class Extractor(nn.Module):
    """A frozen network in float32. Subclasses say in `_extract` what comes after the resize."""

    def __init__(self, name: str, dimension: int, size: tuple[int, int], sha256: str, is_inception: bool) -> None:
        super().__init__()
        self.name = name
        self.dimension = dimension
        """D."""
        self.size = size
        """(h, w) of the network's input."""
        self.sha256 = sha256
        """Of the file that the weights were read from."""
        self.is_inception = is_inception
        """Whether these are the weights of all published FIDs. Of no other features is anything called FID, KID or
        inception score."""
        self.resize = (
            f"once, from the picture's own size to {size[0]}x{size[1]}, antialiased bicubic on eight bits, without a "
            "crop; a picture of that size is left as it is"
        )

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever its parent does."""
        return super().train(False)

    def forward(self, pictures: Tensor) -> Extracted:
        """pictures (B, C, H, W) uint8 on any device, C 1 or 3. A picture's features do not depend on its batch.

        Raises:
            ValueError: pictures of another type or shape.
        """
        if pictures.dtype != torch.uint8 or pictures.dim() != 4 or pictures.shape[1] not in (1, 3):
            raise ValueError(f"pictures must be uint8 (B, 1 or 3, H, W), not {pictures.dtype} {tuple(pictures.shape)}")
        device = next(self.parameters()).device
        # A GPU's convolutions would round to the ten bits of TF32, as torch has it by default.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.no_grad(), torch.autocast(device.type, enabled=False), exact:
            x = self._resized(pictures.to(device).expand(-1, 3, -1, -1))
            features, logits = self._extract(x)
        return Extracted(features.float(), None if logits is None else logits.float())

    def _resized(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, *size), uint8 both; equal sizes are not touched."""
        resized: Tensor = resize(pictures, list(self.size), InterpolationMode.BICUBIC, antialias=True)
        return resized

    def _extract(self, pictures: Tensor) -> Extracted:
        """(B, 3, *size) uint8 -> features and logits."""
        raise NotImplementedError


def fit(network: nn.Module, given: Mapping[str, Tensor], source: str) -> None:
    """Load weights, in any floating-point format, into the network as float32, and freeze it in eval mode.

    BatchNorm's counts of batches are of no use here and may be missing; else each weight must have its place and each
    place its weight. Whole numbers are tables that the network has computed itself, and must be equal. The network may
    be one built on the meta device, if it has no such tables.

    Raises:
        BadFileError: names the source and the key that is missing, unexpected, misshapen, or holds what is not finite.
    """
    own = network.state_dict()  # with the versions of its layers
    places = {name: tensor for name, tensor in own.items() if not _counts_batches(name)}
    given = {name: tensor for name, tensor in given.items() if not _counts_batches(name)}
    kind = type(network).__name__
    for name in (*places, *given):
        if name not in given:
            raise BadFileError(f"{source}: is not of {kind}: no {name}")
        if name not in places:
            raise BadFileError(f"{source}: is not of {kind}: it has no {shorten(name)}")
        fits = given[name].shape == places[name].shape
        if not fits or given[name].is_floating_point() != places[name].is_floating_point():
            raise BadFileError(
                f"{source}: is not of {kind}: {name} is {given[name].dtype} {tuple(given[name].shape)}, "
                f"should be {tuple(places[name].shape)}"
            )
    try:
        weights = {
            name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for name, tensor in given.items()
        }
    except RuntimeError as error:  # safetensors knows formats of four bits, from which torch does not convert
        raise BadFileError(f"{source}: holds numbers of a format that cannot be read ({error})") from None
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise BadFileError(f"{source}: {name} holds numbers that are not finite")
        if not tensor.is_floating_point() and not torch.equal(tensor, places[name]):
            raise BadFileError(f"{source}: is not of {kind}: {name} has other values")
    own.update(weights)
    own.update({name: torch.zeros((), dtype=torch.int64) for name in own if _counts_batches(name)})
    network.load_state_dict(own, strict=True, assign=True)
    network.requires_grad_(False).eval()


def _counts_batches(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == "num_batches_tracked"
