"""Mean and covariance of features, in float64, combined from parts without losing digits."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Of `count` feature vectors; None where a file does not say of how many."""

    count: int | None
    mean: Array
    """(D,)"""
    covariance: Array
    """(D, D), unbiased: the sum over count - 1."""


class RunningMoments:
    """Moments of what was added so far.

    Parts are combined by their means and their sums of squares around these (Chan, Golub and LeVeque, "Updating
    Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, equation 2.1): E[x^2] - E[x]^2 would lose
    as many digits as the mean is larger than the deviation.
    """

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean: Array = np.zeros(dimension)
        self.scatter: Array = np.zeros((dimension, dimension))
        """Sum of (x - mean)(x - mean)^T."""

    def add(self, features: NDArray[np.floating]) -> None:
        """features (B, D)."""
        if len(features):
            x = features.astype(np.float64)
            mean = x.mean(axis=0)
            x -= mean
            self.combine(len(x), mean, x.T @ x)

    def combine(self, count: int, mean: Array, scatter: Array) -> None:
        """Add a part of which these are known."""
        if count == 0:
            return
        total = self.count + count
        apart = mean - self.mean
        self.scatter = self.scatter + scatter
        self.scatter += np.outer(apart, apart * (self.count * count / total))
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def without(self, count: int, mean: Array, scatter: Array) -> Moments:
        """Moments of what is left where a small part, of which these are known, is taken away: `combine` backwards."""
        left = self.count - count
        mean_left = self.mean + (self.mean - mean) * (count / left)
        apart = mean - mean_left
        scatter_left = self.scatter - scatter
        scatter_left -= np.outer(apart, apart * (left * count / self.count))
        return Moments(left, mean_left, scatter_left / (left - 1))

    def moments(self) -> Moments:
        """Raises ValueError: fewer than two vectors have no covariance."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, here are {self.count}")
        return Moments(self.count, self.mean, self.scatter / (self.count - 1))


def moments_of(features: NDArray[np.floating]) -> Moments:
    """Of features (N, D), N at least 2."""
    running = RunningMoments(features.shape[1])
    running.add(features)
    return running.moments()


def combined(parts: Iterable[RunningMoments], dimension: int) -> RunningMoments:
    """All parts together."""
    together = RunningMoments(dimension)
    for part in parts:
        together.combine(part.count, part.mean, part.scatter)
    return together
