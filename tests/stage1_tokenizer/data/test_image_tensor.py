"""Images that are kept as one tensor: the batches are those of a loop over the images, bit for bit."""

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from stage1_tokenizer.data.base import BaseDataConfig
from stage1_tokenizer.data.image_batches import ImageBatches
from stage1_tokenizer.data.image_tensor import ImageTensor, device_with_room
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.order import BatchOrder, training_batches
from stage1_tokenizer.data.shapes import ShapesConfig
from tests.stage1_tokenizer.data.test_image_batches import Fixed, noise

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"flip": True},
    {"random_crop": True, "resize_to": 13},
    {"random_crop": True, "resize_to": 13, "flip": True},
]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 6), (12, 9), (1, 1), (5, 9)])
def test_a_batch_is_that_of_a_loop(size: tuple[int, int], channels: int, options: dict[str, Any], device: str) -> None:
    """Uncached images go through the loop. Crops at every edge, epochs mixed within a batch, images repeated."""
    images = noise(30, channels=channels)
    slow = ImageBatches(images, BaseDataConfig(image_size=size, cache="none", **options), seed=3)
    fast = ImageBatches(images, BaseDataConfig(image_size=size, cache="memory", **options), seed=3, device=device)
    assert fast.device.type == device
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 30, 200)
    for epochs in (None, rng.integers(0, 50, 200)):
        expected, names = slow.batch(indices, epochs)
        batch, labels = fast.batch(indices, epochs)
        assert batch.device.type == labels.device.type == device
        assert torch.equal(batch.cpu(), expected)
        assert torch.equal(labels.cpu(), names)
        assert (batch.dtype, labels.dtype, batch.stride()) == (expected.dtype, names.dtype, expected.stride())


def test_the_edges_can_be_reached() -> None:
    """The first and the last place of a crop, up to draws just below one."""
    images = np.arange(2 * 5 * 4, dtype=np.uint8).reshape(2, 5, 4, 1)
    tensor = ImageTensor(images, np.array([7, 8]), (3, 2), torch.device("cpu"))
    last = 1.0 - 2.0**-53
    draws = np.array([[0.0, 0.0, 0.5], [last, last, last], [last, 0.0, 0.0]])
    batch, labels = tensor.batch(np.array([0, 1, 1]), draws)
    assert labels.tolist() == [7, 8, 8]
    expected = [images[0, :3, :2], images[1, 2:, 2:], images[1, 2:, 1::-1]]
    assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), np.stack(expected))
    assert tensor.batch(np.array([], dtype=np.int64), np.empty((0, 3)))[0].shape == (0, 1, 3, 2)


@pytest.mark.parametrize("different", [0, 1, 4])
def test_images_of_several_sizes_are_cached_one_by_one(different: int) -> None:
    """A folder's images only cover the image size, each by its own shape; wherever the first other one comes."""
    rng = np.random.default_rng(0)
    sizes = [(12, 9) if index == different else (12, 6) for index in range(5)]
    images = Fixed(*(rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes))
    config = {"image_size": (12, 6), "flip": True, "random_crop": True}
    slow, fast = (ImageBatches(images, BaseDataConfig(cache=cache, **config), seed=0) for cache in ("none", "memory"))
    where = np.arange(40) % 5, np.arange(40)
    for one, other in zip(slow.batch(*where), fast.batch(*where), strict=True):
        assert torch.equal(one, other)


def test_a_gpu_keeps_only_what_leaves_it_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of its memory; a device of another kind, whose memory is not known, keeps nothing."""
    monkeypatch.setattr("torch.cuda.get_device_properties", Mock(return_value=Mock(total_memory=8000)))
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert device_with_room(cuda, 999) == cuda
    assert device_with_room(cuda, 1000) == cpu
    assert device_with_room(cpu, 10**12) == cpu
    assert device_with_room(torch.device("mps"), 1) == cpu


def test_images_on_a_gpu_are_not_sent_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked process cannot use the parent's GPU, so the batches are made in this one, whatever `workers` says."""
    made = open_data(ShapesConfig(train_images=8, image_size=(8, 8))).image_batches("train", seed=0)
    monkeypatch.setattr(ImageBatches, "device", torch.device("cuda"))
    monkeypatch.setattr("stage1_tokenizer.data.order.DataLoader", Mock(side_effect=AssertionError))
    assert len(list(training_batches(made, BatchOrder(8, 4, seed=0), 0, 3, workers=2))) == 3
