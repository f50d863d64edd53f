"""Memorisation: the training pictures that a sample is nearest to, and how many samples are nearer than by chance.

samples      -> nearest training image, in pixels and in features
validation   -> the same: how near pictures lie that cannot have been learned by heart

What is near depends on the data, so it is measured on it: held-out pictures were not memorised, and however near they
lie to the training pictures, so may a sample. Of samples from the same distribution, a known share is nearer still than
the nearest per cent of these; more than that is memorisation (the test of Meehan et al., "A Non-Parametric Test to
Detect Data-Copying in Generative Models", 2020, with a threshold for each single sample).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from sampling.evaluation.extractors.base import Extractor
from sampling.evaluation.features import Measuring
from sampling.evaluation.intervals import Interval, share_interval
from sampling.evaluation.results import Figure
from sampling.evaluation.sources import Source, some
from sampling.saved_images import rows_of
from stage1_tokenizer.data.order import rank_range as share_of
from stage1_tokenizer.engine.console import show_progress

SHARE = 0.01
"""Of held-out pictures, the nearest one per cent sets what is near."""
NEIGHBOURS_SHOWN = 3
"""Training images that are shown beside a sample."""
SHOWN = 8
"""Samples in each half of the picture."""
BATCH = 256
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


class Copies(NamedTuple):
    """What was found of n samples."""

    figures: list[Figure]
    picture: NDArray[np.uint8]
    """(H, W, C): the samples nearest to training images, by pixels and then by features, each with its neighbours."""
    says: str


def is_grey(samples: Source) -> bool:
    """Whether the first pictures' channels are equal."""
    pictures = samples.read(np.arange(min(len(samples), SHOWN)))
    return bool((pictures == pictures[:, :1]).all())


def look_for_copies(
    measuring: Measuring,
    samples: Source,
    training: Source,
    training_features: Tensor,
    held_out: Source,
    n: int,
    *,
    mirrored: bool,
    trained_on: int,
) -> Copies:
    """Compare n samples, and as many held-out pictures, with training images, whose features are (M, D).

    trained_on: how many training images there are, of which these may be a random part.
    """
    accelerator = measuring.accelerator
    looked_at = samples.read(some(n, len(samples), measuring.seed))
    known = held_out.read(some(n, len(held_out), measuring.seed))
    looked_at = looked_at[:, : known.shape[1]]  # an .npz file has three equal channels of grey pictures
    together, split = torch.cat([looked_at, known]), len(looked_at)
    mine = share_of(len(together), accelerator.process_index, accelerator.num_processes)
    found = nearest(
        together[mine.start : mine.stop],
        _batches(training),
        measuring.extractor,
        NEIGHBOURS_SHOWN,
        training_features,
        mirrored,
    )
    found = _joined(gather_object([found]))
    rows, figures = [], []
    for name, unit, neighbours in (("pixels", "of 255", found.pixels), ("features", "1 - cosine", found.features)):
        ours = Neighbours(neighbours.indices[:split], neighbours.distances[:split])
        theirs = Neighbours(neighbours.indices[split:], neighbours.distances[split:])
        counted = memorised(ours, theirs, SHARE)
        figures.append(_figure(name, unit, ours.distances[:, 0], theirs.distances[:, 0], counted))
        for index in ours.distances[:, 0].argsort()[:SHOWN].tolist():
            row = [looked_at[index], *training.read(ours.indices[index].numpy())]
            rows.append([picture.permute(1, 2, 0).numpy() for picture in row])
    says = (
        f"{split:,} samples and {len(known):,} held-out pictures, drawn at random, each beside {len(training):,} of "
        f"{trained_on:,} training images; a sample counts where it is nearer to one than all but "
        f"{counted.expected:.1%} of the held-out pictures are, or is the same"
    )
    says += "; training mirrors images, so mirrored ones are compared in pixels too" if mirrored else ""
    return Copies(figures, rows_of(_halves(rows)), says)


def _figure(name: str, unit: str, ours: Tensor, theirs: Tensor, counted: Memorised) -> Figure:
    """distances to the nearest training image: of samples (n,), of held-out pictures (m,)."""
    share = counted.counted.double()
    low, high = share_interval(counted.count, len(share))
    note = (
        f"{counted.count:,} of {len(share):,}, {counted.expected:.1%} expected of new pictures; median distance "
        f"{float(ours.median()):.3g} ({unit}), of held-out ones {float(theirs.median()):.3g}"
    )
    if name == "pixels":
        note += f"; exact copies: {int((ours == 0).sum()):,}"
    label = f"nearer to training than held-out, {name}"
    interval = Interval(100 * low, 100 * high)
    return Figure(f"memorised_{name}", label, 100 * float(share.mean()), interval, "%", "lower", note)


def _batches(source: Source) -> Iterator[tuple[Tensor, Tensor]]:
    starts = range(0, len(source), BATCH)
    for start in show_progress(starts, len(starts), "batch", "training images"):
        indices = np.arange(start, min(start + BATCH, len(source)), dtype=np.int64)
        yield source.read(indices), torch.from_numpy(indices)


def _joined(parts: list[Nearest]) -> Nearest:
    """What the processes found, one after another."""

    def joined(each: list[Neighbours]) -> Neighbours:
        return Neighbours(torch.cat([it.indices for it in each]), torch.cat([it.distances for it in each]))

    return Nearest(joined([part.pixels for part in parts]), joined([part.features for part in parts]))


def _halves(rows: list[list[NDArray[np.uint8]]]) -> list[list[NDArray[np.uint8]]]:
    """By pixels on the left, by features on the right, with a gap."""
    half = len(rows) // 2
    gap = np.full_like(rows[0][0], 128)
    return [[*left, gap, *right] for left, right in zip(rows[:half], rows[half:], strict=True)]
