"""The order of the data: the images of each batch."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.order import BatchOrder, rank_range, training_batches, validation_batches
from stage1_tokenizer.data.shapes import ShapesConfig
from stage1_tokenizer.engine.errors import ConfigError

# (images, batch size): epochs end between batches, within them, and several times in one.
CASES = [(20, 4), (21, 4), (17, 8), (3, 8), (1, 4)]


def stream(order: BatchOrder, first: int, last: int) -> NDArray[np.int64]:
    """(epoch, index) of each image of some steps, in order: (n, 2)."""
    places = [order.indices(step) for step in range(first, last)]
    return np.concatenate([np.stack([epochs, indices], axis=1) for indices, epochs in places])


@pytest.mark.parametrize(("n", "batch_size"), CASES)
def test_every_epoch_is_a_permutation(n: int, batch_size: int) -> None:
    """Each image comes once before any comes again, and no batch is short or dropped at an epoch's end."""
    epochs = 6
    steps = -(-n * epochs // batch_size)
    places = stream(BatchOrder(n, batch_size, seed=1), 0, steps)
    assert len(places) == steps * batch_size
    assert places[:, 0].tolist() == [position // n for position in range(len(places))]
    seen = places[: n * epochs, 1].reshape(epochs, n)
    assert np.array_equal(np.sort(seen, axis=1), np.tile(np.arange(n), (epochs, 1)))


def test_each_epoch_and_each_seed_has_its_own_order() -> None:
    """A fixed order would show the same batches over and over; and any place is equally likely for any image."""
    orders = [stream(BatchOrder(50, 50, seed), 0, 40)[:, 1].reshape(40, 50) for seed in range(20)]
    every = np.concatenate(orders)
    assert len(np.unique(every, axis=0)) == 800
    counts = np.stack([np.bincount(every[:, place], minlength=50) for place in range(50)])
    statistic = ((counts - 16) ** 2 / 16).sum()
    assert abs(statistic - 49 * 49) < 4 * (2 * 49 * 49) ** 0.5


@pytest.mark.parametrize(("n", "batch_size"), CASES)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_batch_is_the_same_on_any_number_of_processes(n: int, batch_size: int, processes: int) -> None:
    """Trap 41: the ranks' parts in the order of the ranks are the batch of one process, so a run can move."""
    one = BatchOrder(n, batch_size, seed=2)
    ranks = [BatchOrder(n, batch_size, 2, rank, processes) for rank in range(processes)]
    for step in (0, 1, 2, 11):
        parts = [order.indices(step) for order in ranks]
        assert [len(indices) for indices, _ in parts] == [batch_size // processes] * processes
        for whole, shares in zip(one.indices(step), zip(*parts, strict=True), strict=True):
            assert np.array_equal(np.concatenate(shares), whole)


@pytest.mark.parametrize(("n", "batch_size"), CASES)
def test_a_resumed_run_continues_with_the_next_batch(n: int, batch_size: int) -> None:
    """Trap 41: step k needs no step before it, in whatever order steps are asked for."""
    whole = stream(BatchOrder(n, batch_size, seed=3), 0, 40)
    for k in (1, 7, 29):
        assert np.array_equal(stream(BatchOrder(n, batch_size, seed=3), k, 40), whole[k * batch_size :])
    order = BatchOrder(n, batch_size, seed=3)
    for step in (39, 0, 20, 1, 39):
        assert np.array_equal(stream(order, step, step + 1), whole[step * batch_size : (step + 1) * batch_size])


def test_training_batches_are_those_of_the_order() -> None:
    """Resumed at step k, the images themselves are those of the uninterrupted run, augmentation included."""
    made = open_data(ShapesConfig(train_images=10, image_size=(16, 16), flip=True, random_crop=True)).image_batches(
        "train", seed=0
    )
    whole = list(training_batches(made, BatchOrder(10, 4, seed=0), 0, 8, workers=0))
    resumed = list(training_batches(made, BatchOrder(10, 4, seed=0), 5, 8, workers=0))
    for (pixels, labels), (same, too) in zip(whole[5:], resumed, strict=True):
        assert torch.equal(pixels, same)
        assert torch.equal(labels, too)
    for step, (pixels, labels) in enumerate(whole):
        expected, named = made.batch(*BatchOrder(10, 4, seed=0).indices(step))
        assert torch.equal(pixels, expected)
        assert torch.equal(labels, named)
    assert len({pixels.numpy().tobytes() for pixels, _ in whole}) == 8


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    """Ranks with batches of different sizes would weigh images differently, or wait for each other for ever."""
    with pytest.raises(ConfigError, match=r"batch_size 6 .* 4 processes"):
        BatchOrder(20, 6, 0, 0, 4)
    BatchOrder(20, 6, 0, 2, 3)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 10, 1000])
def test_the_ranges_of_all_ranks_are_a_partition(n: int) -> None:
    """Each index falls to exactly one process, in the order of the ranks, and shares differ by one at most."""
    for processes in (1, 2, 3, 4, 7):
        shares = [rank_range(n, rank, processes) for rank in range(processes)]
        assert [index for part in shares for index in part] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_validation_sees_each_image_once(processes: int) -> None:
    """Trap 26: samplers pad their last batch with images they have seen, which biases every figure."""
    config = ShapesConfig(validation_images=10, image_size=(16, 16), flip=True, random_crop=True)
    made = open_data(config).image_batches("validation", seed=0)
    plain = made.batch(np.arange(10))[0]
    assert len({image.numpy().tobytes() for image in plain}) == 10
    for batch_size in (1, 3, 10, 64):
        ranks = [list(validation_batches(made, batch_size, rank, processes)) for rank in range(processes)]
        sizes = [len(pixels) for batches in ranks for pixels, _ in batches]
        assert sum(sizes) == 10
        assert 0 < min(sizes) <= max(sizes) <= batch_size
        seen = torch.cat([pixels for batches in ranks for pixels, _ in batches])
        assert Counter(p.numpy().tobytes() for p in seen) == Counter(p.numpy().tobytes() for p in plain)


def test_an_order_can_be_sent_to_a_worker() -> None:
    """Where workers are not forked (macOS, Windows, Python 3.14 everywhere) the loader pickles what they work with."""
    order = BatchOrder(20, 4, seed=3, rank=1, processes=2)
    order.indices(3)
    copy: BatchOrder = pickle.loads(pickle.dumps(order))
    assert np.array_equal(stream(copy, 0, 9), stream(order, 0, 9))
