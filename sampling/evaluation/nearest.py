"""Memorisation: the training pictures that a sample is nearest to, and how many samples are nearer than by chance.

What is near depends on the data, so it is measured on it: held-out pictures were not memorised, and however near they
lie to the training pictures, so may a sample. Of samples from the same distribution, a known share is nearer still than
the nearest per cent of these; more than that is memorisation (the test of Meehan et al., "A Non-Parametric Test to
Detect Data-Copying in Generative Models", 2020, with a threshold for each single sample).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sampling.evaluation.extractors.base import Extractor

CHUNK = 2**23
"""Numbers of samples' pixels in float64 at a time: 64 MB."""


@dataclass(frozen=True)
class Neighbours:
    """Of each of n pictures the k nearest training pictures, nearest first."""

    indices: Tensor
    """(n, k) int64."""
    distances: Tensor
    """(n, k) float64."""


@dataclass(frozen=True)
class Nearest:
    """The same search twice."""

    pixels: Neighbours
    """By the root of the mean squared difference of pixels, on the scale 0..255; 0 for an exact copy."""
    features: Neighbours
    """By 1 - cosine of the extractor's features: 0 for the same direction, 1 for orthogonal ones."""


@dataclass(frozen=True)
class Memorised:
    """Which samples lie nearer to a training picture than held-out ones do."""

    counted: Tensor
    """(n,) bool."""
    threshold: float
    """A sample whose nearest training picture is nearer than this is counted."""
    expected: float
    """The share that would be counted were the samples drawn from the data's distribution anew."""

    @property
    def count(self) -> int:
        return int(self.counted.sum())


def nearest(
    samples: Tensor,
    training: Iterable[tuple[Tensor, Tensor]],
    extractor: Extractor,
    k: int = 3,
    training_features: Tensor | None = None,
    mirrored: bool = False,
) -> Nearest:
    """samples (n, C, H, W) uint8; training: batches of pictures (B, C, H, W) uint8 and their indices (B,), one by one.

    training_features: (M, D), row i that of the training picture of index i, where they are known already.
    mirrored: each training picture counts as its mirror image too, as it does where training flips; for pixels only,
    since features hardly see it.

    Raises:
        ValueError: training pictures of another shape, or fewer than k of them.
    """
    device = next(extractor.parameters()).device
    samples = samples.to(device)
    features = F.normalize(torch.cat([extractor(part).features for part in torch.split(samples, 64)]).double(), dim=1)
    by_pixels, by_features = _Best(len(samples), k, device), _Best(len(samples), k, device)
    for pictures, indices in training:
        if pictures.shape[1:] != samples.shape[1:]:
            raise ValueError(f"training pictures are {tuple(pictures.shape[1:])}, samples {tuple(samples.shape[1:])}")
        x, places = pictures.to(device), indices.to(device)
        apart = _pixel_distances(samples, x)
        if mirrored:
            apart = torch.minimum(apart, _pixel_distances(samples, x.flip(3)))
        by_pixels.add(apart, places)
        found = extractor(x).features if training_features is None else training_features[indices.cpu()].to(device)
        cosines = features @ F.normalize(found.double(), dim=1).T
        by_features.add((1.0 - cosines).clamp_min(0.0), places)
    return Nearest(by_pixels.neighbours(), by_features.neighbours())


def memorised(samples: Neighbours, held_out: Neighbours, share: float = 0.01) -> Memorised:
    """Count samples that are nearer to their nearest training picture than all but a share of the held-out pictures.

    With m held-out pictures the threshold is the j-th smallest of their distances, j = share * (m + 1) rounded down
    but at least 1: a picture of the same distribution is nearer with a probability of j / (m + 1), which is `expected`.
    Both must have been compared with the same training pictures, of which no held-out picture is one.
    """
    distances = held_out.distances[:, 0].sort().values
    j = max(1, int(share * (len(distances) + 1)))
    threshold = float(distances[j - 1])
    mine = samples.distances[:, 0]
    # An exact copy counts, also where held-out pictures that are in the training set too make the threshold 0.
    return Memorised((mine < threshold) | (mine == 0), threshold, j / (len(distances) + 1))


class _Best:
    """The k smallest distances so far."""

    def __init__(self, n: int, k: int, device: torch.device) -> None:
        self._k = k
        self._distances = torch.full((n, k), torch.inf, dtype=torch.float64, device=device)
        self._indices = torch.full((n, k), -1, dtype=torch.int64, device=device)

    def add(self, distances: Tensor, indices: Tensor) -> None:
        """(n, B), (B,). Of equal distances the one that was there first stays."""
        together = torch.cat([self._distances, distances], dim=1)
        order = together.sort(dim=1, stable=True).indices[:, : self._k]
        self._distances = together.gather(1, order)
        self._indices = torch.cat([self._indices, indices.expand(len(distances), -1)], dim=1).gather(1, order)

    def neighbours(self) -> Neighbours:
        if (self._indices < 0).any():
            raise ValueError(f"there are fewer than {self._k} training pictures to be near to")
        return Neighbours(self._indices.cpu(), self._distances.cpu())


def _pixel_distances(samples: Tensor, pictures: Tensor) -> Tensor:
    """(n, C, H, W), (B, C, H, W), uint8 both -> (n, B) float64.

    As |x|^2 + |y|^2 - 2 x.y in float64, where these whole numbers are exact.
    """
    y = pictures.flatten(1).double()
    rows = max(1, CHUNK // y.shape[1])
    squares = []
    for part in torch.split(samples, rows):
        x = part.flatten(1).double()
        squares.append(x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1) - 2.0 * (x @ y.T))
    return (torch.cat(squares) / y.shape[1]).sqrt()
