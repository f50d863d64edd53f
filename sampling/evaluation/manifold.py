"""Which pictures lie within the other set, one by one: what precision, recall, density and coverage are means of.

torch-fidelity gives the means of two of them only; an interval by resampling needs the single pictures.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stage1_tokenizer.seeds import derive_seed

CHUNK = 1000
"""Rows of a matrix of distances at a time: 80 MB beside 10,000 others, in float64."""


@dataclass(frozen=True)
class Manifold:
    """Of n samples and m reference pictures. A ball reaches from a picture to the k-th nearest of its own set."""

    precision: Tensor
    """(n,) bool: the sample lies in a reference ball."""
    recall: Tensor
    """(m,) bool: the reference picture lies in a sample's ball."""
    density: Tensor
    """(n,) float64: the number of reference balls that the sample lies in, over k."""
    coverage: Tensor
    """(m,) bool: the reference picture's ball holds a sample."""


def manifold(
    samples: Tensor,
    reference: Tensor,
    k: int = 3,
    k_density: int = 5,
    at_most: int = 10_000,
    seed: int = 0,
) -> Manifold:
    """All four, from features (N, D) and (M, D), of each `at_most`, in float64.

    The means of `precision` and `recall` (balls of k) are what `precision_recall` says, those of `density` and
    `coverage` (balls of k_density) what `density_coverage` says.

    Raises:
        ValueError: a set has no more than k pictures.
    """
    samples, reference = (subset(features, at_most, seed).double() for features in (samples, reference))
    density, coverage = density_coverage_of(samples, reference, k_density)
    return Manifold(within(samples, reference, k), within(reference, samples, k), density, coverage)


def within(points: Tensor, others: Tensor, k: int) -> Tensor:
    """(n, D), (m, D) -> (n,) bool: which points lie in a ball of the others (Kynkaanniemi et al. 2019, equation 1)."""
    radii = radii_of(others, k)
    return torch.cat([(torch.cdist(part, others) <= radii).any(dim=1) for part in torch.split(points, CHUNK)])


def density_coverage_of(samples: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(n, D), (m, D) float64 -> density (n,) float64, coverage (m,) bool (Naeem et al. 2020, equations 5 and 6)."""
    radii = radii_of(reference, k)
    density, coverage = [], torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for part in torch.split(samples, CHUNK):
        inside = torch.cdist(part, reference) <= radii
        density.append(inside.sum(dim=1).double() / k)
        coverage |= inside.any(dim=0)
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
