"""Which pictures lie within the other set, one by one: what precision, recall, density and coverage are means of.

torch-fidelity gives the means of two of them only; an interval by resampling needs the single pictures.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stage1_tokenizer.engine.seeds import derive_seed

CHUNK = 1000
"""Rows of a matrix of distances at a time: 80 MB beside 10,000 others, in float64."""


@dataclass(frozen=True)
class Manifold:
    """Of n samples and m reference pictures. A ball reaches from a picture to the k-th nearest of its own set."""

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
    """All four, from features (N, D) and (M, D), of each `at_most`, in float64; the samples in so many random groups.

    The means of `precision` and `recall` (balls of k) are what `precision_recall` says, those of `density` and
    `coverage` (balls of k_density) those of Naeem et al.: expected for two sets of one distribution are density 1 and
    coverage 1 - 2^-k where n = m is large (their section 3.3).

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
