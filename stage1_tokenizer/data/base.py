"""The base of every kind of data set: its config, and one split of its images before any processing."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt, model_validator

from stage1_tokenizer.config.base import Config
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.config.value_types import Side, Size

ImageArray = NDArray[np.uint8]
"""One image, (h', w', C) uint8."""
Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")


class BaseDataConfig(Config):
    """The keys that all kinds of data sets have."""

    @property
    def is_drawn(self) -> bool:
        """True if the images are computed: no folder holds them, so the user cannot name another folder."""
        return "root" not in type(self).model_fields

    image_size: Size = (32, 32)
    """Height and width in pixels: `64`, or `64,96`. Both must be divisible by the tokenizer's factor."""
    flip: Annotated[bool, Mark.NOT_EVALUATED] = False
    """Mirror a training image left to right with probability 1/2."""
    cache: Annotated[Literal["auto", "memory", "none"], Mark.FREE] = "auto"
    """Keep the images in memory as uint8. `auto` does so if the images of both splits, in all processes of this
    machine, take less than a quarter of the memory of the machine or its container. If they also have one size and take
    less than an eighth of the GPU's memory, training keeps them on the GPU and makes its batches there."""
    workers: Annotated[NonNegativeInt, Mark.FREE] = 0
    """Processes that prepare batches while the model trains. Useful if the images are not cached; images that are kept
    on a GPU need none."""

    resize_to: Side | None = None
    """Scale the short side of an image to this many pixels before cropping. The default just covers the image size."""
    random_crop: Annotated[bool, Mark.NOT_EVALUATED] = False
    """Crop a training image at a random place instead of the centre."""

    @property
    def tolerated_bad_share(self) -> float:
        """Share of the images, 0..1, that may be unreadable. Zero for drawn and published images."""
        return 0.0

    @model_validator(mode="after")
    def _check(self) -> "BaseDataConfig":
        if min(self.image_size) < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
        if self.resize_to is not None and self.resize_to < max(self.image_size):
            raise ValueError(f"resize_to ({self.resize_to}) must be at least the image size {self.image_size}")
        return self


class DataSplit(ABC):
    """One split of a data set: a sequence of (image, label) before any processing."""

    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their labels; empty for a data set without classes."""
    origin: str = ""
    """Source of the images, as the end of the line "1,234 images in 3 classes ..."."""
    ignored: Mapping[str, int] = MappingProxyType({})
    """Number of files that are no data, by their kind. Both splits report the same files."""
    notes: tuple[str, ...] = ()
    """Decisions and oddities that the user should know. Both splits report the same notes."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Text that changes when images are added, removed or replaced; empty if the config determines the images."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[ImageArray, int]:
        """Return an image, (h', w', C) uint8 of any size, and its label (0 for a data set without classes).

        Raises:
            BadImageError: the image cannot be read.
        """

    @property
    def class_sizes(self) -> Mapping[str, int | None]:
        """Number of images of each class; None: unknown."""
        return dict.fromkeys(self.classes)
