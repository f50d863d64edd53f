"""95 % confidence intervals by resampling, over the pictures that were drawn; the reference is taken as it is.

A mean over pictures is bootstrapped. A Frechet distance cannot be: a bootstrap sample holds some pictures several
times, so it has fewer different ones, and the distance falls so slowly with their number that this dominates. Of 500
standard normal vectors of 256 dimensions to 500 others it is 66.5, of 10 bootstrap samples 94.8 on average; of 2000 to
2000, 16.6 and 24.7: every percentile interval would miss the value it is for. So it, KID and the inception score get a
delete-one-group jackknife, which repeats nothing.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import binomtest
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from sampling.evaluation.moments import Array, Moments, RunningMoments
from stage1_tokenizer.engine.seeds import derive_seed

LEVEL = 0.95
DRAWS = 1_000_000
"""Of a bootstrap, at a time."""
Indices = NDArray[np.int64]


class Interval(NamedTuple):
    """The ends of a 95 % confidence interval."""

    low: float
    high: float


def bootstrap_mean(values: Tensor | NDArray[np.generic], seed: int, resamples: int = 1000) -> Interval:
    """Percentile bootstrap of the mean of values (N,) over pictures (Efron 1979). Truths count as 0 and 1."""
    x = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(derive_seed(seed, "bootstrap", len(x)))
    parts = np.array_split(np.arange(resamples), -(-resamples * len(x) // DRAWS))
    means = np.concatenate([x[generator.integers(0, len(x), (len(part), len(x)))].mean(axis=1) for part in parts])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def jackknife(n: int, statistic: Callable[[Indices], float], seed: int, groups: int = 20) -> Interval:
    """Delete-one-group jackknife (Shao and Tu, "The Jackknife and Bootstrap", 1995, section 2.3) over n pictures.

    statistic(indices) is what pictures of these indices (rising) have. With t_i where the i-th of g random groups is
    left out, the standard error is sqrt((g - 1) / g sum (t_i - mean t)^2), and the interval the value of all pictures
    +- that times Student's t of g - 1 degrees of freedom.
    """
    everything = np.arange(n, dtype=np.int64)
    left_out = [statistic(np.setdiff1d(everything, group)) for group in grouped(n, groups, seed)]
    return _student(statistic(everything), left_out)


def frechet_interval(features: Tensor, reference: Moments, seed: int, groups: int = 20) -> Interval:
    """The jackknife of `frechet_distance` between the moments of features (N, D), all of them, and the reference.

    One symmetric eigendecomposition a group: tr (C R)^(1/2) = tr (R^(1/2) C R^(1/2))^(1/2), with R's root taken once.
    """
    whole, rests = _without_groups(features, seed, groups)
    root = _root(reference.covariance)
    left_out = [_distance(rest, reference, root) for rest in rests]
    return _student(_distance(whole, reference, root), left_out)


def paired_frechet_interval(features: Tensor, originals: Tensor, seed: int, groups: int = 20) -> Interval:
    """The jackknife of `frechet_distance` between (N, D) and (N, D), where row i of both is of the same picture, so
    that it is left out of both: of reconstructions and their originals."""
    (made, rests), (original, rests_of_originals) = (
        _without_groups(side, seed, groups) for side in (features, originals)
    )
    pairs = zip(rests, rests_of_originals, strict=True)
    left_out = [_distance(one, other, _root(other.covariance)) for one, other in pairs]
    return _student(_distance(made, original, _root(original.covariance)), left_out)


def kernel_interval(f1: Tensor, f2: Tensor, value: float, seed: int, groups: int = 20) -> Interval:
    """The jackknife over f1 (N, D) of the squared MMD to f2 (M, D), about `value`, the mean over subsets that
    `kernel_distance` gives; the error is that of the estimate from all pairs (Gretton et al. 2012, equation 3), whose
    part of f2 alone is the same for all groups and left out."""
    x, y = (f.double().cpu().numpy() for f in (f1, f2))
    parts = grouped(len(x), groups, seed)
    xx = np.array([[_kernel_sum(x[i], x[j], i is j) for j in parts] for i in parts])
    xy = np.array([_kernel_sum(x[i], y) for i in parts])

    def distance(kept: NDArray[np.bool_]) -> float:
        n = sum(len(part) for part, keep in zip(parts, kept, strict=True) if keep)
        return float(xx[np.ix_(kept, kept)].sum() / (n * (n - 1)) - 2 * xy[kept].sum() / (n * len(y)))

    return _student(value, [distance(np.arange(groups) != i) for i in range(groups)])


def any_interval(by_group: Tensor) -> Interval:
    """The jackknife over groups of samples of a share of the reference pictures, as recall and coverage are: by_group
    (m, groups) bool says which groups put a picture in. The radii stay those of all samples."""
    count = by_group.sum(dim=1, keepdim=True)
    rest = (count - by_group.long() > 0).double().mean(dim=0)  # (groups,): the share with one group left out
    low, high = _student(float((count > 0).double().mean()), rest.tolist())
    return Interval(max(low, 0.0), min(high, 1.0))


def share_interval(counted: int, of: int) -> Interval:
    """Of a share, after Wilson (1927), which is right for rare things too: of 0 of n it is not 0 to 0."""
    found = binomtest(counted, of).proportion_ci(LEVEL, method="wilson")
    return Interval(float(found.low), float(found.high))


def score_interval(logits: Tensor, seed: int, splits: int = 10, groups: int = 20) -> Interval:
    """The jackknife of `inception_score`'s mean over splits: logits (N, classes).

    The pictures are shuffled once, for what a shuffle changes is no matter of the pictures.
    """
    shuffled = logits[np.random.default_rng(derive_seed(seed, "score", len(logits))).permutation(len(logits))]
    return jackknife(
        len(logits),
        lambda kept: isc_features_to_metric(shuffled[kept], splits, shuffle=False)[KEY_METRIC_ISC_MEAN],
        seed,
        groups,
    )


def grouped(n: int, groups: int, seed: int) -> list[Indices]:
    """Random groups of 0..n-1, of sizes that differ by at most 1. Raises ValueError: less than two for each."""
    if n < 2 * groups:
        raise ValueError(f"{n} pictures are too few for a jackknife of {groups} groups; it needs {2 * groups}")
    order = np.random.default_rng(derive_seed(seed, "groups", n)).permutation(n)
    return [np.sort(group) for group in np.array_split(order, groups)]


def _without_groups(features: Tensor, seed: int, groups: int) -> tuple[Moments, Iterator[Moments]]:
    """The moments of features (N, D), and those with each random group left out, one at a time."""
    x = features.double().cpu().numpy()
    whole = RunningMoments(x.shape[1])
    whole.add(x)

    def rests() -> Iterator[Moments]:
        for group in grouped(len(x), groups, seed):
            part = RunningMoments(x.shape[1])
            part.add(x[group])
            yield whole.without(part.count, part.mean, part.scatter)

    return whole.moments(), rests()


def _student(value: float, left_out: list[float]) -> Interval:
    g = len(left_out)
    error = float(np.sqrt((g - 1) * np.var(left_out)))  # the variance divides by g
    reach = float(stdtrit(g - 1, (1 + LEVEL) / 2)) * error
    return Interval(value - reach, value + reach)


def _distance(a: Moments, b: Moments, root: Array) -> float:
    """`frechet_distance`, given the root of b's covariance."""
    apart = a.mean - b.mean
    values = np.linalg.eigvalsh(root @ a.covariance @ root)
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(apart @ apart + traces - 2 * np.sqrt(values.clip(min=0)).sum())


def _root(covariance: Array) -> Array:
    """Symmetric (D, D) without negative eigenvalues -> its root."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)


def _kernel_sum(x: Array, y: Array, same: bool = False) -> float:
    """Sum over pairs of (x.y / D + 1)^3; where both are the same pictures, of different ones."""
    kernel = (x @ y.T / x.shape[1] + 1) ** 3
    return float(kernel.sum() - np.trace(kernel) * same)
