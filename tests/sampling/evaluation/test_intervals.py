"""Intervals: they cover the true value as often as they should, and equal those of slow formulas."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sampling.evaluation.distances import frechet_distance, inception_score, kernel_distance, manifold
from sampling.evaluation.intervals import (
    Interval,
    any_interval,
    bootstrap_mean,
    frechet_interval,
    jackknife,
    kernel_interval,
    random_groups,
    score_interval,
    share_interval,
)
from sampling.evaluation.moments import moments_of


def drawn(n: int, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def covered(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


def middle(interval: Interval) -> float:
    return (interval.low + interval.high) / 2


def test_bootstrap_covers_a_mean() -> None:
    """95 % of 200 intervals, within three standard errors; of skewed values, and of shares."""
    rng = np.random.default_rng(0)
    exponential = [bootstrap_mean(rng.exponential(size=80), seed=i, resamples=300) for i in range(200)]
    assert covered(exponential, 1.0) == pytest.approx(0.94, abs=0.045)
    shares = [bootstrap_mean(torch.from_numpy(rng.random(100) < 0.3), seed=i, resamples=300) for i in range(200)]
    assert covered(shares, 0.3) == pytest.approx(0.94, abs=0.045)


def test_bootstrap_of_many_is_the_normal_one() -> None:
    x = drawn(2000, 1)[:, 0]
    found = bootstrap_mean(x, seed=0)
    reach = 1.96 * float(x.std()) / 2000**0.5
    assert found.low == pytest.approx(float(x.mean()) - reach, abs=0.1 * reach)
    assert found.high == pytest.approx(float(x.mean()) + reach, abs=0.1 * reach)
    assert found == bootstrap_mean(x, seed=0) != bootstrap_mean(x, seed=1)


def test_jackknife_of_a_mean_is_students() -> None:
    """The jackknife of a mean is the standard error of the group means, with Student's t."""
    x = drawn(40, 1)[:, 0].double().numpy()
    found = jackknife(40, lambda kept: float(x[kept].mean()), seed=0, groups=20)
    sizes = [len(group) for group in random_groups(40, 20, seed=0)]
    assert sizes == [2] * 20
    means = np.array([x[group].mean() for group in random_groups(40, 20, seed=0)])
    reach = 2.093024 * means.std(ddof=1) / 20**0.5  # Student's t of 19 degrees of freedom
    assert found.low == pytest.approx(x.mean() - reach, rel=1e-6)
    assert found.high == pytest.approx(x.mean() + reach, rel=1e-6)


def test_groups_have_each_image_once() -> None:
    groups = random_groups(103, 20, seed=1)
    assert np.array_equal(np.sort(np.concatenate(groups)), np.arange(103))
    assert {len(group) for group in groups} == {5, 6}
    with pytest.raises(ValueError, match="too few"):
        random_groups(39, 20, seed=0)


@pytest.mark.parametrize(("n", "d"), [(100, 5), (60, 90)])
def test_the_fast_frechet_jackknife_is_the_slow_one(n: int, d: int) -> None:
    """It equals the jackknife of `frechet_distance`; also with fewer images than dimensions."""
    x, reference = drawn(n, d) * 1.2, moments_of(drawn(200, d, 1).numpy())
    slow = jackknife(n, lambda kept: frechet_distance(moments_of(x.numpy()[kept]), reference), seed=3)
    fast = frechet_interval(x, reference, seed=3)
    np.testing.assert_allclose(fast, slow, rtol=1e-6)
    assert fast.low < frechet_distance(moments_of(x.numpy()), reference) < fast.high


def test_the_fast_kernel_jackknife_is_the_slow_one() -> None:
    x, y = drawn(90) * 1.3, drawn(80, seed=1)

    def mmd(kept: np.ndarray) -> float:
        a, b, n, m = x[kept].double().numpy(), y.double().numpy(), len(kept), 80
        k = {name: (p @ q.T / 4 + 1) ** 3 for name, (p, q) in {"aa": (a, a), "bb": (b, b), "ab": (a, b)}.items()}
        within = [(k[name].sum() - np.trace(k[name])) / (s * (s - 1)) for name, s in (("aa", n), ("bb", m))]
        return float(sum(within) - 2 * k["ab"].mean())

    np.testing.assert_allclose(kernel_interval(x, y, mmd(np.arange(90)), seed=2), jackknife(90, mmd, seed=2), rtol=1e-9)
    assert middle(kernel_interval(x, y, 0.5, seed=0)) == pytest.approx(0.5)


def test_the_score_lies_in_its_interval() -> None:
    logits = drawn(400, 10) * 3
    interval = score_interval(logits, seed=0)
    assert interval.low < inception_score(logits, seed=0).mean < interval.high
    assert interval.high - interval.low < 1


def test_jackknives_cover_what_a_set_of_this_size_has_on_average() -> None:
    """Intervals of the Fréchet distance and KID cover 95 % of 120 draws, within about three standard errors."""
    reference = drawn(150, 4, seed=10_000)
    moments = moments_of(reference.numpy())
    draws = [drawn(150, 4, seed=i) * 1.3 + 0.3 for i in range(120)]
    frechet = [frechet_interval(x, moments, seed=i) for i, x in enumerate(draws)]
    assert covered(frechet, float(np.mean([middle(one) for one in frechet]))) == pytest.approx(0.95, abs=0.065)
    values = [kernel_distance(x, reference, subsets=1).mean for x in draws]
    pairs = enumerate(zip(draws, values, strict=True))
    kernel = [kernel_interval(x, reference, value, seed=i, groups=10) for i, (x, value) in pairs]
    assert covered(kernel, float(np.mean([middle(one) for one in kernel]))) == pytest.approx(0.95, abs=0.065)


def test_a_bootstrap_of_the_frechet_distance_would_miss_it() -> None:
    """A bootstrap sample repeats images, so it has less spread and a larger distance than the set."""
    x, reference = drawn(200, 64), moments_of(drawn(200, 64, seed=1).numpy())
    value = frechet_distance(moments_of(x.numpy()), reference)
    rng = np.random.default_rng(0)
    again = [frechet_distance(moments_of(x.numpy()[rng.integers(0, 200, 200)]), reference) for _ in range(20)]
    assert min(again) > 1.15 * value
    interval = frechet_interval(x, reference, seed=0)
    assert interval.high - interval.low < 0.5 * value


def test_recall_and_coverage_vary_with_the_samples_and_their_intervals_cover_it() -> None:
    """The interval is about other samples; the reference images stay the same."""
    reference = drawn(400, 2, seed=10_000)
    found = [manifold(drawn(60, 2, seed=i), reference, seed=i, groups=20) for i in range(60)]
    for shares in ([each.recall_by_group for each in found], [each.coverage_by_group for each in found]):
        mean = float(np.mean([share.any(dim=1).double().mean() for share in shares]))
        assert covered([any_interval(share) for share in shares], mean) == pytest.approx(0.95, abs=0.12)


def test_a_share_of_0_has_an_interval() -> None:
    """Wilson's interval (1927, by hand) has a width above 0 for shares of 0 and 1 too."""
    assert share_interval(0, 100) == pytest.approx((0.0, 0.0370), abs=1e-4)
    assert share_interval(100, 100) == pytest.approx((0.9630, 1.0), abs=1e-4)
    low, high = share_interval(30, 100)
    z, p, n = 1.959964, 0.3, 100
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (low, high) == pytest.approx((middle - reach, middle + reach), abs=1e-6)
