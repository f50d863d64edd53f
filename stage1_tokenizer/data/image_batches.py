"""One split of a data set as batches of uint8 images: resized, cropped, flipped, and cached in memory if they fit.

DataSplit[i]  (h', w', C) uint8 of any size, label    from each kind of data set
resize        the short side covers the image size    antialiased; once per image if the images are cached
crop, flip    (H, W, C)                               functions of (seed, epoch, index)
batch         (B, C, H, W) uint8, labels (B,) int64   `normalise` maps them to [-1, 1] on the device
"""

import sys
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stage1_tokenizer.data.bad_files import BadFiles, BadImageError
from stage1_tokenizer.data.base import BaseDataConfig, DataSplit, ImageArray
from stage1_tokenizer.data.image_tensor import ImageTensor, device_with_room
from stage1_tokenizer.engine.console import show_progress
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.seeds import draw_uniforms
from stage1_tokenizer.engine.system import map_in_threads, memory_per_process

MAX_ASPECT = 16
"""Only the middle of an image is used if its long side is more than this many times its short side: an image one pixel
wide, scaled as a whole to cover the image size, would fill any memory."""

LabelledImage = tuple[ImageArray, int]


class ResizedImages:
    """The images of a split, each read and resized on access. The next readable image, with its own label, replaces one
    that cannot be read; the first image follows the last."""

    def __init__(self, images: DataSplit, config: BaseDataConfig, bad: BadFiles) -> None:
        self._images, self._config, self._bad = images, config, bad

    def __getitem__(self, index: int) -> LabelledImage:
        """Return a resized image (h', w', C) uint8 and its label.

        Raises:
            BadFileError: too many images cannot be read.
        """
        n = len(self._images)
        for candidate in chain(range(index, n), range(index)):
            key = self._images, candidate
            if key in self._bad:
                continue
            try:
                image, label = self._images[candidate]
            except BadImageError as error:
                self._bad.add(key, error)
            else:
                return resize(image, self._config.image_size, self._config.resize_to), label
        raise self._bad.build_error()


class ImageBatches:
    """One split, ready for batches. Random access: the same (epoch, index) gives the same pixels in every process."""

    def __init__(
        self,
        images: DataSplit,
        config: BaseDataConfig,
        seed: int,
        device: torch.device | str = "cpu",
        bad: BadFiles | None = None,
        only: range | None = None,
    ) -> None:
        """Read the images that are to be cached.

        seed: selects the crops and flips.
        device: place for the images and their batches, if the images are cached, have one size and leave the device
            enough room. Otherwise the CPU; the batches are the same.
        bad: the images of both splits that cannot be read; None: only those of this split count.
        only: indices that will be asked for, so that only these images are cached; None: all.

        Raises:
            ConfigError: the split is empty.
            BadFileError: too many images cannot be read. If they are not cached, `batch` raises this later.
        """
        if len(images) == 0:
            raise ConfigError(f"the data set ({config!r}) has no images in this split")
        self.classes = images.classes
        self._config, self._seed, self._length = config, seed, len(images)
        bad = bad or BadFiles(None, config.tolerated_bad_share, len(images))
        resized = ResizedImages(images, config, bad)
        first_image, _ = resized[0]
        self.channels: int = first_image.shape[2]
        self._items: ResizedImages | list[LabelledImage] | ImageTensor = resized
        self._first = 0  # index of the first item
        indices = range(len(images)) if only is None else only
        number = bad.n if only is None else len(only)
        fits = config.cache == "auto" and first_image.nbytes * number < memory_per_process() // 4
        if indices and (config.cache == "memory" or fits):
            self._items = _read_images(resized, indices, config.image_size, torch.device(device))
            self._first = indices.start
            if summary := bad.summary():
                print(summary, file=sys.stderr)

    def __len__(self) -> int:
        return self._length

    @property
    def device(self) -> torch.device:
        """The device on which `batch` makes its tensors."""
        return self._items.device if isinstance(self._items, ImageTensor) else torch.device("cpu")

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64] | None = None) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W) uint8 and labels (B,) int64.

        epochs (B,): selects the crop and flip of each image; None: centre crop without a flip.
        """
        draws = np.full((len(indices), 3), 0.5)  # the centre, not flipped
        if epochs is not None and (self._config.random_crop or self._config.flip):
            drawn = draw_uniforms(self._seed, "augment", epochs, indices, 3)
            if self._config.random_crop:
                draws[:, :2] = drawn[:, :2]
            if self._config.flip:
                draws[:, 2] = drawn[:, 2]
        indices = indices - self._first
        if isinstance(self._items, ImageTensor):
            return self._items.batch(indices, draws)
        height, width = self._config.image_size
        images = np.empty((len(indices), height, width, self.channels), dtype=np.uint8)
        labels = np.empty(len(indices), dtype=np.int64)
        for row, (index, (down, right, mirror)) in enumerate(zip(indices, draws, strict=True)):
            image, labels[row] = self._items[int(index)]
            cropped = crop(image, (height, width), down, right)
            images[row] = cropped[:, ::-1] if mirror < 0.5 else cropped
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)


def _read_images(
    images: ResizedImages, indices: range, image_size: tuple[int, int], device: torch.device
) -> ImageTensor | list[LabelledImage]:
    """Read images into memory: into one tensor if they have one size (on the device if there is room), else a list."""
    labels = np.empty(len(indices), dtype=np.int64)
    stacked = np.empty((len(indices), *images[0][0].shape), dtype=np.uint8)  # (N, H', W', C)
    stream = show_progress(map_in_threads(images.__getitem__, indices), len(indices), "image", "reading", nested=True)
    for row, (image, label) in enumerate(stream):
        if image.shape != stacked.shape[1:]:
            return [*zip(stacked[:row].copy(), labels[:row].tolist(), strict=True), (image, label), *stream]
        stacked[row], labels[row] = image, label
    return ImageTensor(stacked, labels, image_size, device_with_room(device, stacked.nbytes))


def resize(image: ImageArray, image_size: tuple[int, int], short_side: int | None = None) -> ImageArray:
    """Scale an image (h', w', C), antialiased, so that it covers `image_size` and its short side is at least
    `short_side` pixels."""
    longest = MAX_ASPECT * min(image.shape[:2])
    top, left = (max(0, side - longest) // 2 for side in image.shape[:2])
    image = image[top : top + longest, left : left + longest]
    height, width = image.shape[:2]
    target = target_size(height, width, image_size, short_side)
    assert target is not None  # the crop above keeps the aspect below MAX_ASPECT
    if target == (height, width):
        return image
    pil_image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    scaled = np.asarray(pil_image.resize((target[1], target[0]), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(scaled.reshape(*target, image.shape[2]))


def target_size(height: int, width: int, image_size: tuple[int, int], short_side: int | None) -> tuple[int, int] | None:
    """Return the height and width that `resize` scales an image to; None if it uses only the middle of the image."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        return None
    scale = max(image_size[0] / height, image_size[1] / width)
    if short_side is not None:
        scale = max(scale, short_side / min(height, width))
    return max(image_size[0], round(height * scale)), max(image_size[1], round(width * scale))


def crop(image: ImageArray, size: tuple[int, int], down: float = 0.5, right: float = 0.5) -> ImageArray:
    """Return a part (H, W, C) of an image (h', w', C); down and right in [0, 1) place it, and 0.5 is the centre."""
    top = int(down * (image.shape[0] - size[0] + 1))
    left = int(right * (image.shape[1] - size[1] + 1))
    return image[top : top + size[0], left : left + size[1]]


def normalise(images: Tensor) -> Tensor:
    """Map uint8 images from 0..255 to float32 in [-1, 1], on their device."""
    return images.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Map images from float in [-1, 1] to uint8 0..255, clamped and rounded (truncating would darken by half a
    level)."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
