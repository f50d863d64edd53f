"""Distances between two sets of pictures, in features: torch-fidelity's, with the sizes and seeds spelled out, and
the pictures that lie within the other set, one by one, for intervals by resampling need them.

They are the FID, KID and inception score of the papers where the features are Inception's
(`Extractor.is_inception`); of other features they have other values and must be called otherwise.
"""

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
"""Rows of a matrix of distances at a time: 80 MB beside 10,000 others, in float64."""


class KernelDistance(NamedTuple):
    """Mean and deviation of the squared MMD over random subsets."""

    mean: float
    std: float
    subset_size: int
    """What was asked for, or the smaller set's size where that is less."""


class Score(NamedTuple):
    """Mean and deviation over splits."""

    mean: float
    std: float


def frechet_distance(a: Moments, b: Moments) -> float:
    """Frechet distance between two Gaussians of these moments (Heusel et al. 2017, equation 6): 0 of equal ones.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), on the scale of the squared features. It falls with the
    number of pictures, so only distances of equal counts can be compared. Singular covariances (N <= D) are fine.
    Rounding may leave a little less than 0 (-0.0008 where the squared features are 400), which is given as 0.
    """
    statistics = [{"mu": moments.mean, "sigma": moments.covariance} for moments in (a, b)]
    return max(0.0, float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]))


def kernel_distance(
    f1: Tensor, f2: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018): f1 (N, D), f2 (M, D).

    Unbiased, so it is about 0, and may be below, for two sets of one distribution; its value does not depend on N.
    In float64: the kernel's sums cancel.
    """
    size = min(subset_size, len(f1), len(f2))
    found = kid_features_to_metric(
        f1.double(), f2.double(), kid_subsets=subsets, kid_subset_size=size, rng_seed=_numpy_seed(seed), verbose=False
    )
    return KernelDistance(found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD], size)


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> Score:
    """exp of the mean KL from a picture's classes to all pictures' (Salimans et al. 2016): logits (N, classes).

    From 1 to the number of classes. The pictures are shuffled, then split; each split has its own score.

    Raises:
        ValueError: fewer pictures than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} pictures cannot be split in {splits}")
    found = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=_numpy_seed(seed))
    return Score(found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD])


def _numpy_seed(seed: int) -> int:
    """numpy's old generator, which torch-fidelity uses, takes 32 bits."""
    return seed % 2**32


@dataclass(frozen=True)
class Manifold:
    """Two sets of pictures, n samples and m references, compared by balls: a picture's ball reaches to the k-th nearest
    of its own set."""

    precision: Tensor
    """(n,) bool: the sample lies in a reference ball."""
    recall_by_group: Tensor
    """(m, groups) bool: the reference picture lies in the ball of a sample of this group."""
    density: Tensor
    """(n,) float64: the number of reference balls that the sample lies in, over k."""
    coverage_by_group: Tensor
    """(m, groups) bool: the reference picture's ball holds a sample of this group."""

    @property
    def recall(self) -> Tensor:
        """(m,) bool: the reference picture lies in a sample's ball."""
        return self.recall_by_group.any(dim=1)

    @property
    def coverage(self) -> Tensor:
        """(m,) bool: the reference picture's ball holds a sample."""
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
    """All four, from features (N, D) and (M, D), of each `at_most`; the samples in so many random groups.

    The means of `precision` and `recall` (balls of k) are those of Kynkaanniemi et al. 2019, as torch-fidelity computes
    them, those of `density` and `coverage` (balls of k_density) those of Naeem et al. 2020: expected for two sets of
    one distribution are density 1 and coverage 1 - 2^-k where n = m is large (their section 3.3). In float64, since
    torch.cdist takes |x|^2 + |y|^2 - 2 x.y: in float32 the distance of near duplicates is noise.

    Raises:
        ValueError: a set has no more than k pictures.
    """
    samples, reference = (subset(features, at_most, seed).double() for features in (samples, reference))
    members = np.random.default_rng(derive_seed(seed, "groups", len(samples))).integers(0, groups, len(samples))
    group_of, one = torch.from_numpy(members), torch.zeros(len(reference), dtype=torch.int64)
    density, coverage = density_coverage_of(samples, reference, k_density, group_of)
    precision = within(samples, reference, k, one)[:, 0]
    return Manifold(precision, within(reference, samples, k, group_of), density, coverage)


def within(points: Tensor, others: Tensor, k: int, group_of: Tensor) -> Tensor:
    """(n, D), (m, D), groups of the others (m,) -> (n, groups) bool: which points lie in a ball of one of that group
    (Kynkaanniemi et al. 2019, equation 1). A ball reaches to the k-th nearest of all the others."""
    radii = radii_of(others, k)
    groups = [group_of == number for number in range(int(group_of.max()) + 1)]
    found = []
    for part in torch.split(points, CHUNK):
        inside = torch.cdist(part, others) <= radii
        found.append(torch.stack([inside[:, group].any(dim=1) for group in groups], dim=1))
    return torch.cat(found)


def density_coverage_of(samples: Tensor, reference: Tensor, k: int, group_of: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D), (m, D) float64, groups of the samples (n,) -> density (n,) float64, coverage (m, groups) bool
    (Naeem et al. 2020, equations 5 and 6)."""
    radii = radii_of(reference, k)
    density, coverage = [], torch.zeros(len(reference), int(group_of.max()) + 1, dtype=torch.bool)
    for part, numbers in zip(torch.split(samples, CHUNK), torch.split(group_of, CHUNK), strict=True):
        inside = torch.cdist(part, reference) <= radii
        density.append(inside.sum(dim=1).double() / k)
        for number in torch.unique(numbers).tolist():
            coverage[:, number] |= inside[numbers == number].any(dim=0)
    return torch.cat(density), coverage


def radii_of(points: Tensor, k: int) -> Tensor:
    """(n, D) -> (n,): how far the k-th nearest other point is away. Raises ValueError: there are no k others."""
    check_neighbours(points, k)
    return torch.cat([torch.cdist(part, points).kthvalue(k + 1).values for part in torch.split(points, CHUNK)])


def check_neighbours(points: Tensor, k: int) -> None:
    """Raises ValueError: (n, D) with n not above k."""
    if len(points) <= k:
        raise ValueError(f"{len(points)} pictures have no {k} neighbours each; give at least {k + 1}")


def subset(features: Tensor, at_most: int, seed: int) -> Tensor:
    """Rows chosen at random, in their order: (N, D) -> (min(N, at_most), D)."""
    if len(features) <= at_most:
        return features
    generator = np.random.default_rng(derive_seed(seed, "subset", len(features)))
    chosen = np.sort(generator.choice(len(features), at_most, replace=False))
    return features[torch.from_numpy(chosen).to(features.device)]
