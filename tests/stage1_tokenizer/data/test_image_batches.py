"""Batches of a data set's images: size, crop, flip, cache, and the conversion to [-1, 1] and back."""

import random
import tracemalloc
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stage1_tokenizer.data.base import BaseDataConfig, DataSplit, ImageArray
from stage1_tokenizer.data.image_batches import ImageBatches, normalise, resize, to_uint8
from stage1_tokenizer.data.order import BatchOrder, training_batches
from stage1_tokenizer.engine.errors import ConfigError

# Python 3.12 warns of any fork in a process with threads, and torch has some.
may_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Fixed(DataSplit):
    """Given images, labelled by their index."""

    identity = ""

    def __init__(self, *images: ImageArray) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[ImageArray, int]:
        return self._images[index], index


def coordinates(height: int, width: int) -> ImageArray:
    """An image whose every pixel says where it is: (row, column, 7)."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


def noise(n: int, height: int = 12, width: int = 9, channels: int = 3) -> Fixed:
    drawn = np.random.default_rng(0).integers(0, 256, (n, height, width, channels), dtype=np.uint8)
    return Fixed(*drawn)


def batches_of(images: Fixed, seed: int = 0, **options: Any) -> ImageBatches:
    return ImageBatches(images, BaseDataConfig(**{"image_size": (8, 6), "cache": "none", **options}), seed)


def global_generators() -> tuple[object, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def every(n: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.arange(n), np.full(n, epoch)


@pytest.mark.parametrize("cache", ["none", "memory", "auto"])
def test_a_batch_is_a_function_of_seed_epoch_and_index(cache: str) -> None:
    """No global generator is read or moved, nor does the batch or the cache matter: so a resume is exact."""
    options = {"flip": True, "random_crop": True}
    expected = batches_of(noise(40), **options).batch(*every(40, 2))[0]
    mine = batches_of(noise(40), cache=cache, **options)
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = global_generators()
        order = np.random.default_rng(seed).permutation(40)
        batch, labels = mine.batch(order, np.full(40, 2))
        assert torch.equal(batch, expected[order])
        assert labels.tolist() == order.tolist()
        assert global_generators() == before
    assert not torch.equal(mine.batch(*every(40, 3))[0], expected)
    assert not torch.equal(batches_of(noise(40), seed=1, **options).batch(*every(40, 2))[0], expected)


@may_fork
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
def test_workers_change_nothing() -> None:
    """Images are prepared in other processes for speed alone; a hidden generator in a worker would show here."""
    made = batches_of(noise(20), flip=True, random_crop=True)
    before = torch.get_rng_state()
    batches = [list(training_batches(made, BatchOrder(20, 8, seed=3), 1, 7, workers)) for workers in (0, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert [len(stream) for stream in batches] == [6, 6]
    for (alone, labels), (helped, same) in zip(*batches, strict=True):
        assert torch.equal(alone, helped)
        assert torch.equal(labels, same)


def test_a_batch_without_epochs_is_the_middle() -> None:
    """Validation and extraction see the centre, not mirrored, whatever the training options are."""
    for height, width in [(8, 6), (9, 6), (14, 6), (8, 9), (8, 16)]:  # each covers 8 x 6 as it is
        crop = batches_of(Fixed(coordinates(height, width)), flip=True, random_crop=True).batch(np.array([0]))[0][0]
        top, left = int(crop[0, 0, 0]), int(crop[1, 0, 0])
        assert np.array_equal(crop.permute(1, 2, 0), coordinates(height, width)[top : top + 8, left : left + 6])
        assert max(abs(top - (height - 8) / 2), abs(left - (width - 6) / 2)) <= 0.5
    once, _ = batches_of(noise(5, 31, 17)).batch(np.arange(5))
    twice, _ = batches_of(Fixed(*once.permute(0, 2, 3, 1).numpy())).batch(np.arange(5))
    assert torch.equal(once, twice)


def test_a_random_crop_takes_every_place() -> None:
    """Each offset is as likely as another, mirrored or not, the last ones too; a crop is a piece of the image."""
    full = coordinates(12, 10)
    made = batches_of(Fixed(*[full] * 400), random_crop=True, flip=True, resize_to=10)
    counts = np.zeros((5, 5, 2))
    for epoch in range(10):
        for crop in made.batch(*every(400, epoch))[0].permute(0, 2, 3, 1).numpy():
            mirrored = int(crop[0, 0, 1] > crop[0, 1, 1])
            top, left = crop[0, -mirrored, :2]
            assert np.array_equal(crop[:, ::-1] if mirrored else crop, full[top : top + 8, left : left + 6])
            counts[top, left, mirrored] += 1
    assert ((counts - 80) ** 2 / 80).sum() < 85.4  # chi-square, 49 degrees of freedom, p = 0.001


def test_half_of_the_images_are_mirrored() -> None:
    """Exactly left to right, in half of the epochs of each image; an image is never mirrored where flip is off."""
    images = noise(400, 8, 6)
    plain, _ = batches_of(images, flip=True).batch(np.arange(400))
    epochs = [batches_of(images, flip=True).batch(*every(400, epoch))[0] for epoch in range(10)]
    mirrored = np.stack([(batch != plain).any(dim=(1, 2, 3)).numpy() for batch in epochs])
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / 4000**0.5
    assert abs(mirrored.mean(axis=1) - 0.5).max() < 4 * 0.5 / 400**0.5
    assert len(np.unique(mirrored, axis=1).T) > 300
    assert torch.equal(epochs[0][mirrored[0]], plain[mirrored[0]].flip(-1))
    assert torch.equal(batches_of(images).batch(*every(400, 0))[0], plain)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("source", [(1, 1), (5, 40), (40, 5), (16, 12), (9, 7), (100, 150)])
@pytest.mark.parametrize("size", [(8, 6), (6, 8), (16, 16)])
def test_every_size_becomes_the_image_size(channels: int, source: tuple[int, int], size: tuple[int, int]) -> None:
    """Scaled to cover the frame, one side exactly and with the aspect kept: nothing is padded and little is cut."""
    grey = np.random.default_rng(0).integers(0, 256, (*source, 1), dtype=np.uint8)
    scaled = resize(np.repeat(grey, channels, axis=2), size)
    assert scaled.shape[2] == channels
    assert np.array_equal(scaled, np.repeat(scaled[..., :1], channels, axis=2))
    ratios = [scaled.shape[side] / size[side] for side in (0, 1)]
    assert min(ratios) == 1.0
    factors = [scaled.shape[side] / source[side] for side in (0, 1)]
    assert abs(factors[0] - factors[1]) * min(source) <= 0.5 + 1e-9
    made = batches_of(Fixed(np.repeat(grey, channels, axis=2)), image_size=size)
    assert made.batch(np.array([0, 0]))[0].shape == (2, channels, *size)
    assert made.channels == channels


def test_resize_to_sets_the_short_side() -> None:
    """And leaves room for crops; it cannot be smaller than what is cut from it."""
    for height, width in [(30, 50), (50, 30), (7, 9)]:
        assert min(resize(coordinates(height, width), (8, 6), 20).shape[:2]) == 20
    with pytest.raises(ConfigError, match="resize_to"):
        BaseDataConfig.from_tree({"image_size": [8, 30], "resize_to": 20})
    with pytest.raises(ConfigError, match="image_size"):
        BaseDataConfig.from_tree({"image_size": [8, 0]})
    with pytest.raises(ConfigError, match="no images"):
        batches_of(Fixed())


def test_a_resized_image_is_the_same_image() -> None:
    """Each pixel of the new one lies where it lay in the old, in both directions of an oblong image."""
    scaled = resize(coordinates(40, 60), (20, 20)).astype(float)
    assert scaled.shape == (20, 30, 3)
    middle = scaled[1:-1, 1:-1]
    assert abs(middle[..., 0] - (np.arange(20) * 2 + 0.5)[1:-1, None]).max() <= 1.0
    assert abs(middle[..., 1] - (np.arange(30) * 2 + 0.5)[None, 1:-1]).max() <= 1.0
    assert (scaled[..., 2] == 7).all()


def test_shrinking_is_antialiased() -> None:
    """Trap 39: a checkerboard finer than the new pixels becomes grey; picking pixels would leave it black or white."""
    board = (np.indices((128, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None]
    for size in [(32, 32), (31, 37), (50, 50)]:
        small = resize(board, size).astype(float)
        assert abs(small - 127.5).max() < 20


def test_each_level_survives_the_way_to_the_network_and_back() -> None:
    """Trap 38: 0..255 -> [-1, 1] -> 0..255 is exact, values between are rounded, and those beyond are clamped."""
    levels = torch.arange(256, dtype=torch.uint8)
    x = normalise(levels)
    assert (x.dtype, x.min().item(), x.max().item()) == (torch.float32, -1.0, 1.0)
    assert torch.allclose(x, levels.double().div(127.5).sub(1.0).float(), atol=1e-7)
    assert torch.equal(to_uint8(x), levels)
    step = 1 / 127.5
    for shift in (-0.45, 0.45):
        assert torch.equal(to_uint8(x + shift * step), levels)
    assert torch.equal(to_uint8(x.double()), levels)
    assert to_uint8(torch.tensor([-1.01, -9.0, 1.01, 9.0, float("inf"), -float("inf")])).tolist() == [
        0,
        0,
        255,
        255,
        255,
        0,
    ]
    evenly = torch.linspace(-1.0, 1.0, 100_001)
    assert abs(to_uint8(evenly).double().mean().item() - 127.5) < 0.01
    assert torch.equal(levels, torch.arange(256, dtype=torch.uint8)), "the images themselves are left as they are"


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_only_the_images_asked_for_are_read(cache: Literal["memory", "none"]) -> None:
    """Of several processes each decodes its own share, and gets what it would get of all."""

    class Counted(Fixed):
        read: ClassVar[set[int]] = set()

        def __getitem__(self, index: int) -> tuple[ImageArray, int]:
            self.read.add(index)
            return super().__getitem__(index)

    images = Counted(*(np.full((9 + i % 2 * 4, 8, 3), i, dtype=np.uint8) for i in range(12)))
    config = BaseDataConfig(image_size=(8, 8), cache=cache, flip=True, random_crop=True)
    part, whole = ImageBatches(images, config, 0, only=range(5, 9)), ImageBatches(Fixed(*images._images), config, 0)
    indices, epochs = np.arange(5, 9), np.full(4, 3)
    for mine, all_ in zip(part.batch(indices, epochs), whole.batch(indices, epochs), strict=True):
        assert torch.equal(mine, all_)
    assert Counted.read == {0, 5, 6, 7, 8}  # the first tells how many channels there are


def test_a_narrow_image_takes_little_memory() -> None:
    """A file of a few kB may hold 1 x 60,000,000 pixels, and scaled to cover 64 x 64 these fill any memory."""
    made = batches_of(Fixed(np.zeros((4000, 1, 3), dtype=np.uint8)), image_size=(64, 64))
    tracemalloc.start()
    made.batch(np.array([0]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
