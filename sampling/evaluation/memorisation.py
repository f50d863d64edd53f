"""Memorisation: the training images nearest to each sample, and the share of samples that lie nearer than expected.

samples      -> nearest training image, in pixels and in features
validation   -> the same, for images that the prior cannot have memorised

The distance that counts as near is measured on the data: the nearest one per cent of the held-out images sets a
threshold. If samples have the distribution of the data, about one per cent of them lies below it; a larger share means
memorisation (the test of Meehan et al., "A Non-Parametric Test to Detect Data-Copying in Generative Models", 2020, with
a threshold for each single sample).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from sampling.evaluation.extractors.base import Extractor
from sampling.evaluation.features import Evaluator
from sampling.evaluation.intervals import Interval, share_interval
from sampling.evaluation.results import Metric
from sampling.evaluation.sources import ImageSource, random_indices
from sampling.saved_images import arrange_rows
from stage1_tokenizer.data.order import rank_range as share_of
from stage1_tokenizer.engine.console import show_progress

SHARE = 0.01
"""Share of the held-out images that lie below the threshold."""
NEIGHBOURS = 3
"""Training images that are searched for and shown for a sample."""
SHOWN = 8
"""Samples in each half of the image of nearest neighbours."""
BATCH = 256
CHUNK = 2**23
"""Pixel values of samples that are in float64 at once: 64 MB."""


class Neighbours(NamedTuple):
    """The k nearest training images of each of n images, nearest first."""

    indices: Tensor
    """(n, k) int64."""
    distances: Tensor
    """(n, k) float64."""

    def merge(self, distances: Tensor, indices: Tensor, k: int) -> "Neighbours":
        """Return the k nearest of these and B others: distances (n, B), indices (B,). These win a tie."""
        distances = torch.cat([self.distances, distances], dim=1)
        indices = torch.cat([self.indices, indices.expand(len(distances), -1)], dim=1)
        order = distances.sort(dim=1, stable=True).indices[:, :k]
        return Neighbours(indices.gather(1, order), distances.gather(1, order))

    def part(self, start: int, stop: int | None) -> "Neighbours":
        """Return the neighbours of images start to stop - 1 (None: to the last), on the CPU."""
        return Neighbours(self.indices[start:stop].cpu(), self.distances[start:stop].cpu())


class Nearest(NamedTuple):
    """Nearest training images by two distances."""

    pixels: Neighbours
    """Distance: root of the mean squared difference of pixels, on the scale 0..255; 0 for an exact copy."""
    features: Neighbours
    """Distance: 1 - cosine of the extractor's features; 0 for the same direction, 1 for orthogonal features."""


class Memorised(NamedTuple):
    """Samples that lie nearer to a training image than held-out images do."""

    is_memorised: Tensor
    """(n,) bool."""
    threshold: float
    """A sample counts if the distance to its nearest training image is below this, or 0."""
    expected: float
    """Share that is expected to count if the samples have the data's distribution."""

    @property
    def number(self) -> int:
        """Number of samples that count."""
        return int(self.is_memorised.sum())


def find_nearest_training(
    samples: Tensor,
    training: Iterable[tuple[Tensor, Tensor]],
    extractor: Extractor,
    k: int = NEIGHBOURS,
    training_features: Tensor | None = None,
    mirrored: bool = False,
) -> Nearest:
    """Find the k nearest training images of samples (n, C, H, W) uint8.

    training: batches of images (B, C, H, W) uint8 and their indices (B,).
    training_features: (M, D), row i for the training image with index i; None: computed here.
    mirrored: in pixels, compare with each training image's mirror image too, for trainings that flip images. (Features
        hardly change in a mirror image.)

    Raises:
        ValueError: the training images have another shape, or there are fewer than k.
    """
    device = next(extractor.parameters()).device
    samples = samples.to(device)
    features = F.normalize(torch.cat([extractor(part).features for part in torch.split(samples, 64)]).double(), dim=1)
    nobody = Neighbours(
        torch.empty(len(samples), 0, dtype=torch.int64, device=device),
        torch.empty(len(samples), 0, dtype=torch.float64, device=device),
    )
    by_pixels = by_features = nobody
    for images, indices in training:
        if images.shape[1:] != samples.shape[1:]:
            raise ValueError(f"training images are {tuple(images.shape[1:])}, samples {tuple(samples.shape[1:])}")
        x, places = images.to(device), indices.to(device)
        distances = _pixel_distances(samples, x)
        if mirrored:
            distances = torch.minimum(distances, _pixel_distances(samples, x.flip(3)))
        by_pixels = by_pixels.merge(distances, places, k)
        known = extractor(x).features if training_features is None else training_features[indices.cpu()].to(device)
        cosines = features @ F.normalize(known.double(), dim=1).T
        by_features = by_features.merge((1.0 - cosines).clamp_min(0.0), places, k)
    if by_pixels.indices.shape[1] < k:
        raise ValueError(f"there are fewer than {k} training images")
    return Nearest(by_pixels.part(0, None), by_features.part(0, None))


def count_memorised(samples: Neighbours, held_out: Neighbours, share: float = SHARE) -> Memorised:
    """Count the samples that are nearer to a training image than all but a share of the held-out images are.

    With m held-out images, the threshold is the j-th smallest of their distances, j = share * (m + 1) rounded down but
    at least 1. An image of the same distribution is nearer with a probability of j / (m + 1), which is `expected`. Both
    sets must have been compared with the same training images, and none of these may be a held-out image.
    """
    distances = held_out.distances[:, 0].sort().values
    j = max(1, int(share * (len(distances) + 1)))
    threshold = float(distances[j - 1])
    nearest = samples.distances[:, 0]
    # An exact copy counts even if the threshold is 0, because held-out images are in the training set too.
    return Memorised((nearest < threshold) | (nearest == 0), threshold, j / (len(distances) + 1))


def _pixel_distances(samples: Tensor, images: Tensor) -> Tensor:
    """Return the distances of uint8 images (n, C, H, W) and (B, C, H, W): (n, B) float64.

    Computed as |x|^2 + |y|^2 - 2 x.y in float64, in which these integers are exact.
    """
    y = images.flatten(1).double()
    rows = max(1, CHUNK // y.shape[1])
    squares = []
    for part in torch.split(samples, rows):
        x = part.flatten(1).double()
        squares.append(x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1) - 2.0 * (x @ y.T))
    return (torch.cat(squares) / y.shape[1]).sqrt()


class Memorisation(NamedTuple):
    """Result of the search for memorised training images."""

    metrics: list[Metric]
    image: NDArray[np.uint8]
    """(H, W, C): the samples nearest to training images, by pixels and by features, each with its neighbours."""
    description: str
    """Description of the search, for the protocol."""


def is_grey(samples: ImageSource) -> bool:
    """Return True if all channels are equal in the first images."""
    images = samples.read(np.arange(min(len(samples), SHOWN)))
    return bool((images == images[:, :1]).all())


def measure_memorisation(
    evaluator: Evaluator,
    samples: ImageSource,
    training: ImageSource,
    training_features: Tensor,
    held_out: ImageSource,
    n: int,
    *,
    mirrored: bool,
    training_total: int,
) -> Memorisation:
    """Compare n random samples, and as many held-out images, with training images, whose features are (M, D).

    training_total: number of training images; `training` may be a random part of them.
    """
    accelerator = evaluator.accelerator
    chosen = samples.read(random_indices(n, len(samples), evaluator.seed))
    known = held_out.read(random_indices(n, len(held_out), evaluator.seed))
    chosen = chosen[:, : known.shape[1]]  # an .npz file has three equal channels for grey images
    together, split = torch.cat([chosen, known]), len(chosen)
    own = share_of(len(together), accelerator.process_index, accelerator.num_processes)
    found = find_nearest_training(
        together[own.start : own.stop],
        _training_batches(training),
        evaluator.extractor,
        NEIGHBOURS,
        training_features,
        mirrored,
    )
    parts: list[Nearest] = gather_object([found])
    rows, metrics = [], []
    for name, unit in (("pixels", "of 255"), ("features", "1 - cosine")):
        neighbours = Neighbours(*map(torch.cat, zip(*(getattr(part, name) for part in parts), strict=True)))
        nearest, nearest_held_out = neighbours.part(0, split), neighbours.part(split, None)
        memorised = count_memorised(nearest, nearest_held_out)
        metrics.append(_metric(name, unit, nearest.distances[:, 0], nearest_held_out.distances[:, 0], memorised))
        for index in nearest.distances[:, 0].argsort()[:SHOWN].tolist():
            row = [chosen[index], *training.read(nearest.indices[index].numpy())]
            rows.append([image.permute(1, 2, 0).numpy() for image in row])
    description = (
        f"{split:,} samples and {len(known):,} held-out images, drawn at random, each compared with "
        f"{len(training):,} of {training_total:,} training images; a sample counts if it is nearer to one than all but "
        f"{memorised.expected:.1%} of the held-out images are, or equal to one"
    )
    description += "; training mirrors images, so in pixels mirrored ones are compared too" if mirrored else ""
    half = len(rows) // 2
    gap = np.full_like(rows[0][0], 128)
    halves = [[*left, gap, *right] for left, right in zip(rows[:half], rows[half:], strict=True)]
    return Memorisation(metrics, arrange_rows(halves), description)


def _metric(name: str, unit: str, nearest: Tensor, nearest_held_out: Tensor, memorised: Memorised) -> Metric:
    """Return the metric of one distance, given the distances of samples (n,) and held-out images (m,)."""
    number, total = memorised.number, len(nearest)
    low, high = share_interval(number, total)
    note = (
        f"{number:,} of {total:,}, {memorised.expected:.1%} expected of new images; median distance "
        f"{float(nearest.median()):.3g} ({unit}), of held-out images {float(nearest_held_out.median()):.3g}"
    )
    if name == "pixels":
        note += f"; exact copies: {int((nearest == 0).sum()):,}"
    label = f"nearer to training than held-out, {name}"
    value = 100 * float(memorised.is_memorised.double().mean())
    return Metric(f"memorised_{name}", label, value, Interval(100 * low, 100 * high), "%", "lower", note)


def _training_batches(source: ImageSource) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images of a source in batches, with their indices, and count them on a progress bar."""
    starts = range(0, len(source), BATCH)
    for start in show_progress(starts, len(starts), "batch", "training images"):
        indices = np.arange(start, min(start + BATCH, len(source)), dtype=np.int64)
        yield source.read(indices), torch.from_numpy(indices)
