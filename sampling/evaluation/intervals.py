"""95 % confidence intervals by resampling the images that were drawn; the reference is taken as fixed.

The mean of a value per image gets a bootstrap interval. The Fréchet distance must not: a bootstrap sample repeats
images, so it has fewer different ones, and the distance rises as their number falls. Example: 500 standard normal
vectors of 256 dimensions have a distance of 66.5 to 500 others, but 10 bootstrap samples of them 94.8 on average (2000
vectors: 16.6 and 24.7), so a percentile interval would miss the value. Therefore the Fréchet distance, KID, the
inception score, recall and coverage get a delete-one-group jackknife, which repeats no image.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import binomtest
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from sampling.evaluation.moments import Array, Moments, running_moments
from stage1_tokenizer.engine.seeds import derive_seed

LEVEL = 0.95
DRAWS = 1_000_000
"""Random indices of a bootstrap that are in memory at once."""


class Interval(NamedTuple):
    """Lower and upper end of a 95 % confidence interval."""

    low: float
    high: float


def bootstrap_mean(values: Tensor | NDArray[np.generic], seed: int, resamples: int = 1000) -> Interval:
    """Return the percentile bootstrap interval of the mean of values (N,) (Efron 1979). True counts as 1."""
    x = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(derive_seed(seed, "bootstrap", len(x)))
    parts = np.array_split(np.arange(resamples), -(-resamples * len(x) // DRAWS))
    means = np.concatenate([x[generator.integers(0, len(x), (len(part), len(x)))].mean(axis=1) for part in parts])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def jackknife(n: int, statistic: Callable[[NDArray[np.int64]], float], seed: int, groups: int = 20) -> Interval:
    """Return the delete-one-group jackknife interval of a statistic of n images.

    statistic(indices) is the value for the images with these indices (rising). With t_i the value without the i-th of g
    random groups, the standard error is sqrt((g - 1) / g sum (t_i - mean t)^2) (Shao and Tu, "The Jackknife and
    Bootstrap", 1995, section 2.3). The interval is the value for all images +- the error times Student's t of g - 1
    degrees of freedom.
    """
    everything = np.arange(n, dtype=np.int64)
    left_out = [statistic(np.setdiff1d(everything, group)) for group in random_groups(n, groups, seed)]
    return _student(statistic(everything), left_out)


def frechet_interval(features: Tensor, reference: Moments, seed: int, groups: int = 20) -> Interval:
    """Return the jackknife interval of `frechet_distance` between all features (N, D) and the reference.

    One symmetric eigendecomposition per group: tr (C R)^(1/2) = tr (R^(1/2) C R^(1/2))^(1/2), and R's root is computed
    once.
    """
    whole, rests = _without_groups(features, seed, groups)
    root = _root(reference.covariance)
    left_out = [_distance(rest, reference, root) for rest in rests]
    return _student(_distance(whole, reference, root), left_out)


def paired_frechet_interval(features: Tensor, originals: Tensor, seed: int, groups: int = 20) -> Interval:
    """Return the jackknife interval of `frechet_distance` between reconstructions (N, D) and their originals (N, D).

    Row i of both belongs to one image, so a group of images is left out of both sides.
    """
    whole, rests = _without_groups(features, seed, groups)
    whole_original, original_rests = _without_groups(originals, seed, groups)
    pairs = zip(rests, original_rests, strict=True)
    left_out = [_distance(rest, original, _root(original.covariance)) for rest, original in pairs]
    return _student(_distance(whole, whole_original, _root(whole_original.covariance)), left_out)


def kernel_interval(f1: Tensor, f2: Tensor, value: float, seed: int, groups: int = 20) -> Interval:
    """Return the jackknife interval over f1 (N, D) of the squared MMD to f2 (M, D), around `value`.

    value: the mean over subsets that `kernel_distance` gives. The error is that of the estimate from all pairs (Gretton
    et al. 2012, equation 3). Its term for f2 alone is the same for all groups and omitted.
    """
    x, y = (f.double().cpu().numpy() for f in (f1, f2))
    parts = random_groups(len(x), groups, seed)
    xx = np.array([[_kernel_sum(x[i], x[j], i is j) for j in parts] for i in parts])
    xy = np.array([_kernel_sum(x[i], y) for i in parts])

    def distance(kept: NDArray[np.bool_]) -> float:
        n = sum(len(part) for part, keep in zip(parts, kept, strict=True) if keep)
        return float(xx[np.ix_(kept, kept)].sum() / (n * (n - 1)) - 2 * xy[kept].sum() / (n * len(y)))

    return _student(value, [distance(np.arange(groups) != i) for i in range(groups)])


def any_interval(by_group: Tensor) -> Interval:
    """Return the jackknife interval of recall or coverage: the share of reference images with a hit in any group.

    by_group: (m, groups) bool, true if a sample of this group hits the reference image. The radii are always those of
    all samples.
    """
    count = by_group.sum(dim=1, keepdim=True)
    rest = (count - by_group.long() > 0).double().mean(dim=0)  # (groups,): the share without one group
    low, high = _student(float((count > 0).double().mean()), rest.tolist())
    return Interval(max(low, 0.0), min(high, 1.0))


def share_interval(count: int, total: int) -> Interval:
    """Return Wilson's interval (1927) of the share count / total. It has a width above 0 even for a share of 0 or 1."""
    interval = binomtest(count, total).proportion_ci(LEVEL, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def score_interval(logits: Tensor, seed: int, splits: int = 10, groups: int = 20) -> Interval:
    """Return the jackknife interval of the mean of `inception_score` over splits: logits (N, classes).

    The images are shuffled once for all groups, because the variation of a shuffle says nothing about the images.
    """
    shuffled = logits[np.random.default_rng(derive_seed(seed, "score", len(logits))).permutation(len(logits))]
    return jackknife(
        len(logits),
        lambda kept: isc_features_to_metric(shuffled[kept], splits, shuffle=False)[KEY_METRIC_ISC_MEAN],
        seed,
        groups,
    )


def random_groups(n: int, groups: int, seed: int) -> list[NDArray[np.int64]]:
    """Divide 0..n-1 into random groups; sizes differ by at most 1. Raises ValueError: fewer than two per group."""
    if n < 2 * groups:
        raise ValueError(f"{n} images are too few for a jackknife of {groups} groups, which needs {2 * groups}")
    order = np.random.default_rng(derive_seed(seed, "groups", n)).permutation(n)
    return [np.sort(group) for group in np.array_split(order, groups)]


def _without_groups(features: Tensor, seed: int, groups: int) -> tuple[Moments, Iterator[Moments]]:
    """Return the moments of features (N, D), and one after another the moments without each random group."""
    x = features.double().cpu().numpy()
    whole = running_moments(x)
    rests = (whole.without(running_moments(x[group])) for group in random_groups(len(x), groups, seed))
    return whole.moments(), rests


def _student(value: float, left_out: list[float]) -> Interval:
    """Return the jackknife interval around a value, given the values without each group."""
    g = len(left_out)
    error = float(np.sqrt((g - 1) * np.var(left_out)))  # np.var divides by g
    reach = float(stdtrit(g - 1, (1 + LEVEL) / 2)) * error
    return Interval(value - reach, value + reach)


def _distance(a: Moments, b: Moments, root: Array) -> float:
    """Return `frechet_distance`, given the root of b's covariance."""
    difference = a.mean - b.mean
    values = np.linalg.eigvalsh(root @ a.covariance @ root)
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(difference @ difference + traces - 2 * np.sqrt(values.clip(min=0)).sum())


def _root(covariance: Array) -> Array:
    """Return the root of a symmetric matrix (D, D) without negative eigenvalues."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)


def _kernel_sum(x: Array, y: Array, same: bool = False) -> float:
    """Return the sum of (x.y / D + 1)^3 over all pairs. same: x and y are one set; leave out pairs of equal index."""
    kernel = (x @ y.T / x.shape[1] + 1) ** 3
    return float(kernel.sum() - np.trace(kernel) * same)
