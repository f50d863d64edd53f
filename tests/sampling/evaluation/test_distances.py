"""Metrics of sets of features, compared with slow formulas and with torch-fidelity, and their properties."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from sampling.evaluation.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold,
    subset,
)
from sampling.evaluation.moments import Moments, moments_of


class DensityCoverage(NamedTuple):
    density: float
    coverage: float


def density_coverage(samples: Tensor, reference: Tensor, k: int = 5) -> DensityCoverage:
    """Return the means of both."""
    each = manifold(samples, reference, 1, k)
    return DensityCoverage(float(each.density.mean()), float(each.coverage.double().mean()))


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3, at_most: int = 10_000) -> PrecisionRecall:
    """Return the means of both."""
    each = manifold(samples, reference, k, 1, at_most)
    return PrecisionRecall(float(each.precision.float().mean()), float(each.recall.float().mean()))


def drawn(n: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def moments(x: Tensor) -> Moments:
    return moments_of(x.numpy())


def root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def slow_frechet(a: Tensor, b: Tensor) -> float:
    """Compute the distance by tr (C_a C_b)^(1/2) = tr (R C_b R)^(1/2) with R = C_a^(1/2), which is symmetric."""
    x, y = a.double().numpy(), b.double().numpy()
    C_a, C_b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    R = root(C_a)
    apart = x.mean(axis=0) - y.mean(axis=0)
    return float(apart @ apart + np.trace(C_a) + np.trace(C_b) - 2 * np.trace(root(R @ C_b @ R)))


def test_frechet_is_the_slow_one_and_torch_fidelitys() -> None:
    """Also with fewer images than dimensions, whose covariances are singular."""
    for n, d in ((200, 6), (40, 64)):
        a, b = drawn(n, d), drawn(n, d, 1) * 1.5 + 0.3
        ours = frechet_distance(moments(a), moments(b))
        statistics = [fid_features_to_statistics(x.double()) for x in (a, b)]
        theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert ours == pytest.approx(slow_frechet(a, b), rel=1e-5)


def test_frechet_of_a_set_and_itself_is_zero() -> None:
    for n in (300, 10):
        x = drawn(n, 20)
        assert abs(frechet_distance(moments(x), moments(x))) < 1e-4


def test_frechet_of_known_gaussians() -> None:
    """Diagonal covariances: |m_a - m_b|^2 + sum (s_a - s_b)^2. A translation adds its length squared."""
    deviations_a, deviations_b = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 0.0])
    shift = np.array([1.0, -2.0, 0.5])
    a = Moments(100, np.zeros(3), np.diag(deviations_a**2))
    b = Moments(100, shift, np.diag(deviations_b**2))
    assert frechet_distance(a, b) == pytest.approx(shift @ shift + ((deviations_a - deviations_b) ** 2).sum())
    x, y = drawn(50), drawn(50, seed=1)
    moved = frechet_distance(moments(x), moments(y + 2.0 + x.mean(dim=0) - y.mean(dim=0)))
    level = frechet_distance(moments(x), moments(y + x.mean(dim=0) - y.mean(dim=0)))
    assert moved - level == pytest.approx(6 * 4.0, rel=1e-4)


def slow_mmd(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    def k(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_is_the_slow_one_and_torch_fidelitys() -> None:
    """A subset of the set's size is the set, so nothing is random."""
    x, y = drawn(30), drawn(30, seed=1) + 0.2
    ours = kernel_distance(x, y, subsets=2)
    assert ours.subset_size == 30
    assert ours.mean == pytest.approx(slow_mmd(x.double().numpy(), y.double().numpy()), rel=1e-9)
    assert ours.std == pytest.approx(0, abs=1e-12)
    x, y = drawn(200), drawn(300, seed=1)
    theirs = kid_features_to_metric(x, y, kid_subsets=20, kid_subset_size=50, rng_seed=5, verbose=False)
    some = kernel_distance(x, y, subsets=20, subset_size=50, seed=5)
    assert some.mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert some.std == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-6)


def test_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    """Unbiased: over 60 pairs of sets the mean is 0 within four standard errors, and some are negative."""
    found = np.array(
        [kernel_distance(drawn(40, seed=2 * i), drawn(40, seed=2 * i + 1), subsets=1).mean for i in range(60)]
    )
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(60)
    assert found.min() < 0
    assert kernel_distance(drawn(200), drawn(200, seed=1) + 1, subsets=5).mean > 10 * found.std()


def test_inception_score() -> None:
    """The score equals torch-fidelity's; it is 1 for equal images, and at most the number of classes."""
    logits = drawn(200, 10) * 2
    theirs = isc_features_to_metric(logits, 5, True, 3)
    assert inception_score(logits, 5, seed=3).mean == theirs["inception_score_mean"]
    p = torch.softmax(logits.double(), dim=1)
    whole = float((p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp())
    assert inception_score(logits, 1).mean == pytest.approx(whole, rel=1e-9)
    assert inception_score(torch.zeros(50, 10)).mean == pytest.approx(1)
    certain = torch.nn.functional.one_hot(torch.arange(40) % 4).float() * 50
    assert inception_score(certain, splits=1).mean == pytest.approx(4)
    with pytest.raises(ValueError, match="split"):
        inception_score(logits[:3])


def slow_inside(points: NDArray[np.float64], others: NDArray[np.float64], k: int) -> NDArray[np.bool_]:
    """Return (n, m): true if a point is in another's ball, by a loop over pairs."""
    radius = [sorted(float(np.linalg.norm(a - b)) for b in others)[k] for a in others]  # the nearest is itself
    return np.array([[np.linalg.norm(p - o) <= r for o, r in zip(others, radius, strict=True)] for p in points])


def test_precision_recall_density_coverage_are_the_slow_ones() -> None:
    samples, reference = drawn(40, 3) * 0.7 + 0.5, drawn(50, 3, seed=1)
    s, r = samples.double().numpy(), reference.double().numpy()
    found = precision_recall(samples, reference, k=3)
    assert found.precision == pytest.approx(slow_inside(s, r, 3).any(axis=1).mean(), abs=1e-6)
    assert found.recall == pytest.approx(slow_inside(r, s, 3).any(axis=1).mean(), abs=1e-6)
    inside = slow_inside(s, r, 5)
    dense = density_coverage(samples, reference, k=5)
    assert dense.density == pytest.approx(inside.sum() / (5 * 40))
    assert dense.coverage == pytest.approx(inside.any(axis=0).mean())
    assert 0.2 < found.recall < found.precision <= 1, "else there is nothing to compare"


def test_single_images_have_the_librarys_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The means are exactly torch-fidelity's, for any chunk size."""
    samples, reference = drawn(130, 4) * 0.8, drawn(150, 4, seed=1)
    theirs = prc_features_to_metric(samples.double(), reference.double(), prc_neighborhood=3, verbose=False)
    for chunk in (1000, 37):
        monkeypatch.setattr("sampling.evaluation.distances.CHUNK", chunk)
        single = manifold(samples, reference)
        assert single.precision.float().mean().item() == theirs["precision"]
        assert single.recall.float().mean().item() == theirs["recall"]
        dense = density_coverage(samples, reference)
        assert float(single.density.mean()) == dense.density
        assert float(single.coverage.double().mean()) == dense.coverage
    assert precision_recall(samples, reference) == (theirs["precision"], theirs["recall"])


def test_identical_and_disjoint_sets() -> None:
    x = drawn(60)
    assert precision_recall(x, x) == (1, 1)
    assert density_coverage(x, x).coverage == 1
    assert precision_recall(x, x + 100) == (0, 0)
    assert density_coverage(x, x + 100) == (0, 0)


def test_copies_lie_at_no_distance() -> None:
    """In float32, torch.cdist has noise of 1e-3 of |x| between copies far from 0. The balls of doubled images have a
    radius of 0, and contain only equal points."""
    doubled = torch.cat([drawn(30), drawn(30)]) + 1000
    assert precision_recall(doubled[:30], doubled, k=1).precision == 1
    assert precision_recall(doubled[:30] + 0.01, doubled, k=1).precision == 0


def test_dropped_modes_cost_coverage_and_recall_and_not_precision() -> None:
    modes = torch.arange(4).repeat_interleave(50)[:, None] * 50.0
    reference, samples = drawn(200) + modes, (drawn(200, seed=1) + modes)[:100]
    whole, dropped = density_coverage(drawn(200, seed=1) + modes, reference), density_coverage(samples, reference)
    assert whole.coverage > 0.9
    assert dropped.coverage == pytest.approx(0.5, abs=0.06)
    found = precision_recall(samples, reference)
    assert found.recall <= 0.5
    assert found.precision > 0.7


def test_density_of_one_distribution_is_one() -> None:
    """Naeem et al., section 3.3: density 1, and coverage 1 - (N - 1) ... (N - k) / ((2N - 1) ... (2N - k))."""
    found = [density_coverage(drawn(300, 3, seed=2 * i), drawn(300, 3, seed=2 * i + 1)) for i in range(5)]
    missed = np.prod([(300 - i) / (600 - i) for i in range(1, 6)])
    assert np.mean([one.density for one in found]) == pytest.approx(1, abs=0.05)
    assert np.mean([one.coverage for one in found]) == pytest.approx(1 - missed, abs=0.02)


def test_the_seed_chooses_among_too_many() -> None:
    x = drawn(100)
    some = subset(x, 30, seed=1)
    assert len({tuple(row) for row in some.tolist()}) == 30
    assert torch.equal(some, subset(x, 30, seed=1))
    assert not torch.equal(some, subset(x, 30, seed=2))
    assert torch.equal(subset(x, 100, seed=1), x)
    assert precision_recall(x, drawn(100, seed=1), at_most=40) == precision_recall(
        subset(x, 40, 0), subset(drawn(100, seed=1), 40, 0)
    )


def test_too_few_images_say_so() -> None:
    with pytest.raises(ValueError, match="needs 5 neighbours"):
        density_coverage(drawn(9), drawn(5))
    with pytest.raises(ValueError, match="needs 3 neighbours"):
        precision_recall(drawn(3), drawn(9))
