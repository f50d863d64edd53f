"""Mean and covariance of features in float64, combined from parts without loss of digits."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of `count` feature vectors; count is None if a file does not give it."""

    count: int | None
    mean: Array
    """(D,)"""
    covariance: Array
    """(D, D), unbiased: the scatter divided by count - 1."""


class RunningMoments:
    """Moments of all vectors added so far.

    Two parts are combined from their means and their sums of squares around these means (Chan, Golub and LeVeque,
    "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, equation 2.1). The simpler
    E[x^2] - E[x]^2 loses digits when the mean is much larger than the deviation.
    """

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean: Array = np.zeros(dimension)
        self.scatter: Array = np.zeros((dimension, dimension))
        """Sum of (x - mean)(x - mean)^T."""

    def add(self, features: NDArray[np.floating]) -> None:
        """Add the vectors features (B, D)."""
        if len(features):
            x = features.astype(np.float64)
            mean = x.mean(axis=0)
            x -= mean
            self.combine(len(x), mean, x.T @ x)

    def combine(self, count: int, mean: Array, scatter: Array) -> None:
        """Add a part, given its count, mean (D,) and scatter (D, D)."""
        if count == 0:
            return
        total = self.count + count
        difference = mean - self.mean
        self.scatter = self.scatter + scatter
        self.scatter += np.outer(difference, difference * (self.count * count / total))
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def without(self, part: "RunningMoments") -> Moments:
        """Return the moments that remain when a part is removed: `combine` backwards."""
        left = self.count - part.count
        mean_left = self.mean + (self.mean - part.mean) * (part.count / left)
        difference = part.mean - mean_left
        scatter_left = self.scatter - part.scatter
        scatter_left -= np.outer(difference, difference * (left * part.count / self.count))
        return Moments(left, mean_left, scatter_left / (left - 1))

    def moments(self) -> Moments:
        """Return the moments. Raises ValueError: fewer than two vectors have no covariance."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, but there are {self.count}")
        return Moments(self.count, self.mean, self.scatter / (self.count - 1))


def running_moments(features: NDArray[np.floating]) -> RunningMoments:
    """Return the running moments of features (N, D)."""
    running = RunningMoments(features.shape[1])
    running.add(features)
    return running


def moments_of(features: NDArray[np.floating]) -> Moments:
    """Return the moments of features (N, D). Raises ValueError: N is less than 2."""
    return running_moments(features).moments()
