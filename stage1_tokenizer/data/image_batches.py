"""A data set's split as batches of uint8 pictures: resized, cropped, flipped, and cached in memory where it fits.

ImageSet[i]   (h', w', C) uint8 of any size, label    what each kind of data set provides
resize        the short side covers the image size    antialiased; done once where the pictures are cached
crop, flip    (H, W, C)                               functions of (seed, epoch, index)
batch         (B, C, H, W) uint8, labels (B,) int64   normalised to [-1, 1] on the device, by `normalise`
"""

import sys
from collections.abc import Mapping
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import NonNegativeInt, model_validator
from torch import Tensor

from stage1_tokenizer.config.base import Config
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.config.value_types import Side, Size
from stage1_tokenizer.data.bad_files import BadFiles, BadImageError, BadPart
from stage1_tokenizer.data.resident import Resident, roomy
from stage1_tokenizer.engine.console import show_progress
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.seeds import draw_uniforms
from stage1_tokenizer.engine.system import map_in_threads, memory_per_process

ImageArray = NDArray[np.uint8]
Split = Literal["train", "validation"]

LONGEST = 16
"""Of a picture that is longer than this many times its width, only the middle is used: scaled up whole to cover the
image size, a line of pixels would fill any memory."""


SPLITS: tuple[Split, Split] = ("train", "validation")


class ImageSet(Protocol):
    """One split of a data set, before any processing."""

    classes: tuple[str, ...]
    """Names of the classes in the order of their labels; empty where there are none."""

    @property
    def identity(self) -> str:
        """What the config does not say of the content: changes when images are added, removed or replaced."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[ImageArray, int]:
        """The picture, (h', w', C) uint8, and its label; the label is 0 where there are no classes.

        Raises:
            BadImageError: it cannot be read.
        """
        ...


class DataSplit(ImageSet, Protocol):
    """One split of a kind of data set, which says what was found."""

    origin: str
    """Where the images are from: the end of the line."""

    @property
    def class_sizes(self) -> Mapping[str, int | None]:
        """Number of images of each class; None: unknown."""
        return dict.fromkeys(self.classes)


class SizedConfig(Config):
    """The base of the configs of all data sets."""

    @property
    def is_drawn(self) -> bool:
        """True if the images are computed: no folder holds them, so none can be named in its place."""
        return "root" not in type(self).model_fields

    image_size: Size = (32, 32)
    """Height and width in pixels: `64`, or `64,96`. Both must be divisible by the tokenizer's factor."""
    flip: Annotated[bool, Mark.VIEW] = False
    """Mirror a training picture left to right with probability 1/2."""
    cache: Annotated[Literal["auto", "memory", "none"], Mark.FREE] = "auto"
    """Keep the decoded uint8 pictures in memory. `auto` does so where those of both splits, in all processes of this
    machine, take less than a quarter of the memory of the machine or its container. Where they also have one size and
    take less than an eighth of the GPU's, training keeps them there and makes its batches there."""
    workers: Annotated[NonNegativeInt, Mark.FREE] = 0
    """Processes that prepare batches beside the training; of use where the pictures are not cached. Pictures that are
    kept on a GPU need none."""

    resize_to: Side | None = None
    """Scale a picture's short side to this many pixels before cropping. By default it just covers the image size."""
    random_crop: Annotated[bool, Mark.VIEW] = False
    """Crop a training picture at a random place instead of the centre."""

    @property
    def tolerated(self) -> float:
        """Share of the pictures, 0..1, that may be unreadable. Drawn and published ones never are."""
        return 0.0

    @model_validator(mode="after")
    def _check(self) -> "SizedConfig":
        if min(self.image_size) < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
        if self.resize_to is not None and self.resize_to < max(self.image_size):
            raise ValueError(f"resize_to ({self.resize_to}) must be at least the image size {self.image_size}")
        return self


class Processed:
    """An ImageSet whose pictures are resized, each when it is asked for. For one that cannot be read, the next one that
    can stands in, with its own label; after the last comes the first."""

    def __init__(self, images: ImageSet, config: SizedConfig, bad: BadPart) -> None:
        self._images, self._config, self._bad = images, config, bad

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[ImageArray, int]:
        """Raises BadFileError where too many cannot be read."""
        n = len(self._images)
        for place in range(index, index + n):
            if place % n in self._bad:
                continue
            try:
                picture, label = self._images[place % n]
            except BadImageError as error:
                self._bad.add(place % n, error)
            else:
                return resize(picture, self._config.image_size, self._config.resize_to), label
        raise self._bad.files.verdict()


class ImageBatches:
    """One split, ready for batches. Random access: the same (epoch, index) gives the same pixels in every process."""

    def __init__(
        self,
        images: ImageSet,
        config: SizedConfig,
        seed: int,
        device: torch.device | str = "cpu",
        bad: BadPart | None = None,
        only: range | None = None,
    ) -> None:
        """`device`: where batches are to be made, if the pictures are cached, have one size and leave it enough room;
        otherwise they are made on the CPU. The same batches either way. `bad`: what counts and lists the pictures that
        cannot be read, over both splits; None: they are only printed. `only`: the pictures that will be asked for, of
        which alone are cached; None: all.

        Raises:
            BadFileError: too many pictures cannot be read; where they are not cached, so does `batch` later.
        """
        if len(images) == 0:
            raise ConfigError(f"the data set ({config!r}) has no images in this split")
        self.classes = images.classes
        self._config, self._seed, self._length = config, seed, len(images)
        bad = bad or BadPart(BadFiles(None, config.tolerated, len(images)), 0)
        processed = Processed(images, config, bad)
        first = processed[0][0]
        self.channels: int = first.shape[2]
        self._processed = processed
        self._items: Processed | list[tuple[ImageArray, int]] | Resident = processed
        self._cached = range(len(images)) if only is None else only
        number = bad.files.n if only is None else len(only)
        fits = config.cache == "auto" and first.nbytes * number < memory_per_process() // 4
        if len(self._cached) and (config.cache == "memory" or fits):
            self._items = _read_all(processed, self._cached, config.image_size, torch.device(device))
            if bad.files.summary():
                print(bad.files.summary(), file=sys.stderr)

    def __len__(self) -> int:
        return self._length

    @property
    def device(self) -> torch.device:
        """Where `batch` makes its tensors."""
        return self._items.device if isinstance(self._items, Resident) else torch.device("cpu")

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64] | None = None) -> tuple[Tensor, Tensor]:
        """Pictures (B, C, H, W) uint8 and labels (B,) int64.

        `epochs` (B,) selects each picture's augmentation; without it the view is plain: centre crop, no flip.
        """
        draws = np.full((len(indices), 3), 0.5)  # the centre, not flipped
        if epochs is not None and (self._config.random_crop or self._config.flip):
            drawn = draw_uniforms(self._seed, "augment", epochs, indices, 3)
            if self._config.random_crop:
                draws[:, :2] = drawn[:, :2]
            if self._config.flip:
                draws[:, 2] = drawn[:, 2]
        indices = indices if self._items is self._processed else indices - self._cached.start
        if isinstance(self._items, Resident):
            return self._items.batch(indices, draws)
        height, width = self._config.image_size
        pictures = np.empty((len(indices), height, width, self.channels), dtype=np.uint8)
        labels = np.empty(len(indices), dtype=np.int64)
        for row, (index, (down, right, mirror)) in enumerate(zip(indices, draws, strict=True)):
            picture, labels[row] = self._items[int(index)]
            top = int(down * (picture.shape[0] - height + 1))
            left = int(right * (picture.shape[1] - width + 1))
            view = picture[top : top + height, left : left + width]
            pictures[row] = view[:, ::-1] if mirror < 0.5 else view
        return torch.from_numpy(pictures).permute(0, 3, 1, 2), torch.from_numpy(labels)


def _read_all(
    images: Processed, which: range, image_size: tuple[int, int], device: torch.device
) -> Resident | list[tuple[ImageArray, int]]:
    """Pictures in memory: as one tensor if they have one size, which is on the device if there is room for it."""
    labels = np.empty(len(which), dtype=np.int64)
    together = np.empty((len(which), *images[0][0].shape), dtype=np.uint8)  # (N, H', W', C)
    read = show_progress(map_in_threads(images.__getitem__, which), len(which), "image", "reading", nested=True)
    for index, (picture, label) in enumerate(read):
        if picture.shape != together.shape[1:]:
            return [*zip(together[:index].copy(), labels[:index].tolist(), strict=True), (picture, label), *read]
        together[index], labels[index] = picture, label
    return Resident(together, labels, image_size, roomy(device, together.nbytes))


def resize(picture: ImageArray, image_size: tuple[int, int], short_side: int | None = None) -> ImageArray:
    """Scale (h', w', C), antialiased, so that it covers `image_size`, and to a short side of `short_side` if given."""
    longest = LONGEST * min(picture.shape[:2])
    top, left = (max(0, side - longest) // 2 for side in picture.shape[:2])
    picture = picture[top : top + longest, left : left + longest]
    height, width = picture.shape[:2]
    target = target_size(height, width, image_size, short_side)
    assert target is not None  # it is not too long any more
    if target == (height, width):
        return picture
    image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    scaled = np.asarray(image.resize((target[1], target[0]), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(scaled.reshape(*target, picture.shape[2]))


def target_size(height: int, width: int, image_size: tuple[int, int], short_side: int | None) -> tuple[int, int] | None:
    """Height and width that a picture is scaled to; None where only its middle is used, for it is too long."""
    if max(height, width) > LONGEST * min(height, width):
        return None
    scale = max(image_size[0] / height, image_size[1] / width)
    if short_side is not None:
        scale = max(scale, short_side / min(height, width))
    return max(image_size[0], round(height * scale)), max(image_size[1], round(width * scale))


def normalise(pictures: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], on whatever device the pictures are."""
    return pictures.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8 0..255, clamped and rounded (truncating would darken by half a level)."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
