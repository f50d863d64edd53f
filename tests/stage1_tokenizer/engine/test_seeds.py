"""Random numbers as functions of names and numbers."""

import itertools

import numpy as np
from numpy.typing import NDArray

from stage1_tokenizer.engine.seeds import derive_seed, draw_uniforms

Indices = NDArray[np.int64]


def grid(epochs: int, indices: int) -> tuple[Indices, Indices]:
    """Return all pairs (epoch, index), flat."""
    epoch, index = np.meshgrid(np.arange(epochs), np.arange(indices), indexing="ij")
    return epoch.ravel(), index.ravel()


def chi_square(values: NDArray[np.float64], bins: int) -> float:
    """Return the chi-square statistic of `values` against the uniform law, in standard deviations."""
    counts, _ = np.histogram(values, bins=bins, range=(0.0, 1.0))
    expected = values.size / bins
    statistic = float(np.square(counts - expected).sum() / expected)
    return (statistic - (bins - 1)) / (2.0 * (bins - 1)) ** 0.5


def test_a_seed_never_changes() -> None:
    """Published runs and cached tokens can be repeated only if the same names always give the same number."""
    assert derive_seed(0) == 4246866556266386882
    assert derive_seed(0, "model", 3, 1) == 5429091872433007020
    assert draw_uniforms(0, "augment", np.array([2]), np.array([5]), 2).tolist() == [
        [0.8248000182784023, 0.3427049140251076]
    ]


def test_a_seed_depends_on_every_part() -> None:
    """Two purposes, steps or ranks with the same seed would draw the same noise."""
    names: list[str | int] = ["model", "mode", 1, 12, 2]
    purposes = [purpose for n in range(4) for purpose in itertools.product(names, repeat=n)]
    seeds = [derive_seed(seed, *purpose) for seed in (0, 1, 12, 2**40) for purpose in purposes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a", "b") != derive_seed(0, "b", "a") != derive_seed(0, "ab")


def test_a_number_does_not_depend_on_its_batch() -> None:
    """The augmentation of an image is the same in any batch, in any order, for any number of other draws."""
    epochs, indices = grid(3, 40)
    whole = draw_uniforms(7, "augment", epochs, indices, 3)
    order = np.random.default_rng(0).permutation(len(epochs))
    assert np.array_equal(draw_uniforms(7, "augment", epochs[order], indices[order], 3), whole[order])
    alone = [draw_uniforms(7, "augment", epochs[i : i + 1], indices[i : i + 1], 3) for i in range(len(epochs))]
    assert np.array_equal(np.concatenate(alone), whole)
    assert np.array_equal(draw_uniforms(7, "augment", epochs, indices, 8)[:, :3], whole)
    assert draw_uniforms(7, "augment", epochs[:0], indices[:0], 3).shape == (0, 3)


def test_numbers_differ_by_seed_purpose_epoch_index_and_draw() -> None:
    """A generator that adds or xors its coordinates would repeat numbers."""
    epochs, indices = grid(60, 60)
    keys = [(seed, purpose) for seed in (0, 1) for purpose in ("augment", "sample")]
    drawn = np.stack([draw_uniforms(seed, purpose, epochs, indices, 4) for seed, purpose in keys])
    assert np.unique(drawn).size == drawn.size


def test_numbers_are_uniform() -> None:
    """Over all numbers and along each coordinate: numbers that are uniform over all images may be constant for one."""
    epochs, indices = grid(50, 2000)
    drawn = draw_uniforms(1, "augment", epochs, indices, 3).reshape(50, 2000, 3)
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    assert abs(chi_square(drawn, 1000)) < 4.0
    for axis, size in enumerate(drawn.shape):
        lines = [chi_square(drawn.take([i], axis=axis), 50) for i in range(min(size, 200))]
        assert np.max(np.abs(lines)) < 5.5
    one_picture = draw_uniforms(1, "augment", np.arange(20000), np.full(20000, 17), 1)
    many_draws = draw_uniforms(1, "augment", np.array([3]), np.array([17]), 20000)
    large = draw_uniforms(1, "augment", np.full(20000, 2**40), np.arange(20000) + 2**50, 1)
    assert max(abs(chi_square(x, 100)) for x in (one_picture, many_draws, large)) < 4.0


def test_neighbours_are_not_correlated() -> None:
    """Neighbouring images, the same image in the next epoch, and its crop and flip are independent."""
    epochs, indices = grid(100, 1000)
    drawn = draw_uniforms(2, "augment", epochs, indices, 3).reshape(100, 1000, 3)
    for axis in range(3):
        for lag in (1, 2):
            n = drawn.shape[axis]
            a = drawn.take(range(n - lag), axis=axis).ravel() - 0.5
            b = drawn.take(range(lag, n), axis=axis).ravel() - 0.5
            assert abs(float((a * b).mean()) * 12.0) < 4.0 * a.size**-0.5  # 1/12 is the variance of a and of b
            # And the pairs fill the square evenly, which lines of a lattice would not.
            pairs = np.floor(16 * (a + 0.5)) * 16 + np.floor(16 * (b + 0.5))
            assert abs(chi_square((pairs + 0.5) / 256, 256)) < 4.0


def test_each_bit_is_balanced_at_every_coordinate() -> None:
    """Flips compare one draw with 1/2, so its leading bits must be fair for each epoch and each index."""
    epochs, indices = grid(256, 256)
    bits = np.floor(draw_uniforms(3, "augment", epochs, indices, 1).reshape(256, 256, 1) * [2, 4, 8]) % 2
    for axis in (0, 1):
        assert np.abs(bits.mean(axis=axis) - 0.5).max() < 5.0 * 0.5 / 16
