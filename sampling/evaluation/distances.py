"""Metrics of sets of features.

torch-fidelity computes the Fréchet distance, the kernel distance and the inception score, with sizes and seeds given
explicitly. Precision, recall, density and coverage are computed here image by image, because confidence intervals by
resampling need the value of each image.

Only with Inception's features (`Extractor.is_inception`) are the values those that papers call FID, KID and inception
score. With other features the values differ, and so must the names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from sampling.evaluation.moments import Moments
from stage1_tokenizer.engine.seeds import derive_seed

CHUNK = 1000
"""Rows of a distance matrix that are computed at once: 80 MB for 10,000 columns in float64."""


class KernelDistance(NamedTuple):
    """Mean and standard deviation of the squared MMD over random subsets."""

    mean: float
    std: float
    subset_size: int
    """Images in a subset: the size asked for, or that of the smaller set if it has fewer images."""


class Score(NamedTuple):
    """Mean and standard deviation of the inception score over splits."""

    mean: float
    std: float


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the Fréchet distance between two Gaussians with these moments (Heusel et al. 2017, equation 6).

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in units of squared features; 0 for equal moments. It falls
    with the number of images, so compare distances of equal counts only. Singular covariances (N <= D) are allowed.
    Rounding can give slightly less than 0 (-0.0008 for squared features of 400); the function then returns 0.
    """
    statistics = [{"mu": moments.mean, "sigma": moments.covariance} for moments in (a, b)]
    return max(0.0, float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]))


def kernel_distance(
    f1: Tensor, f2: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Return the squared MMD of f1 (N, D) and f2 (M, D) with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    Unbiased: the expected value for two sets from one distribution is 0 whatever N is, and values below 0 occur.
    Computed in float64, because the kernel's sums cancel.
    """
    size = min(subset_size, len(f1), len(f2))
    values = kid_features_to_metric(
        f1.double(), f2.double(), kid_subsets=subsets, kid_subset_size=size, rng_seed=_numpy_seed(seed), verbose=False
    )
    return KernelDistance(values[KEY_METRIC_KID_MEAN], values[KEY_METRIC_KID_STD], size)


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> Score:
    """Return exp of the mean KL divergence from an image's classes to those of all images (Salimans et al. 2016).

    logits: (N, classes). The score lies between 1 and the number of classes. The images are shuffled, then split; each
    split has its own score.

    Raises:
        ValueError: there are fewer images than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images cannot be divided into {splits} splits")
    values = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=_numpy_seed(seed))
    return Score(values[KEY_METRIC_ISC_MEAN], values[KEY_METRIC_ISC_STD])


def _numpy_seed(seed: int) -> int:
    """Return the seed in 32 bits, for numpy's old generator, which torch-fidelity uses."""
    return seed % 2**32


@dataclass(frozen=True)
class Manifold:
    """Comparison of n samples with m reference images by balls.

    The ball of an image is centred at its features; its radius is the distance to the k-th nearest image of its own
    set.
    """

    precision: Tensor
    """(n,) bool: the sample lies in the ball of a reference image."""
    recall_by_group: Tensor
    """(m, groups) bool: the reference image lies in the ball of a sample of this group."""
    density: Tensor
    """(n,) float64: number of reference balls that contain the sample, divided by k."""
    coverage_by_group: Tensor
    """(m, groups) bool: the reference image's ball contains a sample of this group."""

    @property
    def recall(self) -> Tensor:
        """(m,) bool: the reference image lies in the ball of a sample."""
        return self.recall_by_group.any(dim=1)

    @property
    def coverage(self) -> Tensor:
        """(m,) bool: the reference image's ball contains a sample."""
        return self.coverage_by_group.any(dim=1)


def manifold(
    samples: Tensor,
    reference: Tensor,
    k: int = 3,
    k_density: int = 5,
    at_most: int = 10_000,
    seed: int = 0,
    groups: int = 1,
) -> Manifold:
    """Compare samples (N, D) with a reference (M, D): precision, recall, density and coverage.

    at_most: size of each set; from a larger one a random subset is taken.
    groups: number of random groups that the samples are divided into, for a jackknife.

    The means of `precision` and `recall` (balls of k) are those of Kynkäänniemi et al. 2019 (equations 1 and 2); the
    means of `density` and `coverage` (balls of k_density) are those of Naeem et al. 2020 (equations 5 and 6). Expected
    for two large equal-sized sets from one distribution: density 1, coverage 1 - 2^-k (Naeem et al., section 3.3).
    Computed in float64: torch.cdist takes |x|^2 + |y|^2 - 2 x.y, which in float32 is noise for near duplicates.

    Raises:
        ValueError: a set has no more than k images.
    """
    samples, reference = (subset(features, at_most, seed).double() for features in (samples, reference))
    generator = np.random.default_rng(derive_seed(seed, "groups", len(samples)))
    group_of = torch.from_numpy(generator.integers(0, groups, len(samples)))
    in_group = [group_of == group for group in range(int(group_of.max()) + 1)]

    precision = [inside.any(dim=1) for inside in _in_balls(samples, reference, k)]
    recall = [
        torch.stack([inside[:, members].any(dim=1) for members in in_group], dim=1)
        for inside in _in_balls(reference, samples, k)
    ]
    density, coverage = [], torch.zeros(len(reference), len(in_group), dtype=torch.bool)
    for inside, groups_here in zip(_in_balls(samples, reference, k_density), torch.split(group_of, CHUNK), strict=True):
        density.append(inside.sum(dim=1).double() / k_density)
        for group in torch.unique(groups_here).tolist():
            coverage[:, group] |= inside[groups_here == group].any(dim=0)
    return Manifold(torch.cat(precision), torch.cat(recall), torch.cat(density), coverage)


def _in_balls(points: Tensor, centres: Tensor, k: int) -> Iterator[Tensor]:
    """Yield, for CHUNK rows of points (n, D) at a time, which centres' (m, D) balls contain them: (rows, m) bool."""
    radii = _radii(centres, k)
    for part in torch.split(points, CHUNK):
        yield torch.cdist(part, centres) <= radii


def _radii(points: Tensor, k: int) -> Tensor:
    """Return the distance of each point (n, D) to its k-th nearest other point: (n,)."""
    if len(points) <= k:
        raise ValueError(f"an image needs {k} neighbours, so {k + 1} images or more; here are {len(points)}")
    return torch.cat([torch.cdist(part, points).kthvalue(k + 1).values for part in torch.split(points, CHUNK)])


def subset(features: Tensor, at_most: int, seed: int) -> Tensor:
    """Return a random subset of the rows, in their order: (N, D) -> (min(N, at_most), D)."""
    if len(features) <= at_most:
        return features
    generator = np.random.default_rng(derive_seed(seed, "subset", len(features)))
    chosen = np.sort(generator.choice(len(features), at_most, replace=False))
    return features[torch.from_numpy(chosen).to(features.device)]
