"""Features collected in batches: moments of all, a fair choice of kept ones, equal on any number of processes."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from sampling.evaluation.extractors.base import Extracted
from sampling.evaluation.features import Features
from sampling.evaluation.moments import moments_of
from stage1_tokenizer.data.order import rank_range
from tests.helpers.processes import run_processes


def drawn(n: int, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) @ torch.randn(
        d, d, generator=torch.Generator().manual_seed(99)
    )


def test_moments_are_numpys_whatever_the_batches() -> None:
    x = drawn(101)
    for size in (1, 7, 64, 101):
        features = Features(5, keep=0)
        for part in torch.split(x, size):
            features.add(Extracted(part, None))
        assert features.count == 101
        np.testing.assert_allclose(features.moments.mean, x.double().mean(dim=0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(features.moments.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)
        assert features.features.shape == (0, 5)


def test_a_large_mean_costs_no_digits() -> None:
    """E[x^2] - E[x]^2 would lose all digits: the mean is 2^20 times the deviation, and its square 2^40 times."""
    x = (drawn(400) + 2.0**20).double()
    features = Features(5, keep=None)
    for part in torch.split(x.float(), 32):
        features.add(Extracted(part, None))
    np.testing.assert_allclose(features.moments.covariance, np.cov(x.float().double().numpy(), rowvar=False), rtol=1e-9)


def test_what_is_kept_depends_on_index_and_seed_alone() -> None:
    x, order = drawn(300), torch.randperm(300, generator=torch.Generator().manual_seed(1))
    one, other = Features(5, keep=40), Features(5, keep=40)
    one.add(Extracted(x, x[:, :2]))
    for part in torch.split(order, 9):
        other.add(Extracted(x[part], x[part, :2]), part)
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.features, other.features)
    assert torch.equal(one.features, x[one.indices])
    assert one.logits is not None
    assert torch.equal(one.logits, x[one.indices, :2])
    assert len({*one.indices.tolist()}) == 40
    another = Features(5, keep=40, seed=1)
    another.add(Extracted(x, None))
    assert another.logits is None
    assert not torch.equal(one.indices, another.indices)


def test_the_choice_is_fair_to_all_places() -> None:
    """In a data set sorted by class, each tenth keeps a tenth, within four standard deviations."""
    features = Features(1, keep=100)
    for part in torch.split(torch.arange(1000.0)[:, None], 50):
        features.add(Extracted(part, None))
    counts = torch.bincount(features.indices // 100, minlength=10)
    assert counts.sum() == 100
    assert (counts - 10).abs().max() <= 4 * 3


def test_all_are_kept_where_nothing_is_said() -> None:
    x = drawn(50)
    features = Features(5, keep=None)
    for part in torch.split(x, 8):
        features.add(Extracted(part, None))
    assert torch.equal(features.features, x)


def test_two_images_are_needed() -> None:
    features = Features(5, keep=None)
    features.add(Extracted(drawn(1), None))
    with pytest.raises(ValueError, match="at least 2"):
        _ = features.moments


def collected(accelerator: Accelerator, n: int, keep: int | None) -> tuple[int, Tensor, Tensor, Tensor, Tensor | None]:
    mine = torch.tensor(list(rank_range(n, accelerator.process_index, accelerator.num_processes)), dtype=torch.int64)
    features = Features(5, keep)
    for part in torch.split(mine, 4):
        features.add(Extracted(drawn(n)[part], drawn(n, 3)[part]), part)
    features.merge_over(accelerator)
    return (
        features.count,
        torch.from_numpy(features.moments.covariance),
        features.indices,
        features.features,
        features.logits,
    )


@pytest.mark.parametrize(("n", "keep"), [(31, 12), (31, None), (2, None)])
def test_any_number_of_processes_has_the_same(n: int, keep: int | None) -> None:
    """Processes have shares of different sizes; with three processes and two images, one has none."""
    alone = run_processes(1, collected, n, keep)[0]
    for found in run_processes(3 if n == 2 else 2, collected, n, keep):
        assert found[0] == alone[0] == n
        torch.testing.assert_close(found[1], alone[1], rtol=1e-12, atol=1e-14)
        for ours, wanted in zip(found[2:], alone[2:], strict=True):
            assert torch.equal(ours, wanted)


def test_moments_of_is_the_same_in_one_go() -> None:
    x = drawn(20).numpy()
    assert np.allclose(moments_of(x).covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12)
