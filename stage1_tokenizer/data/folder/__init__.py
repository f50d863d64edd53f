"""A folder of images as a data set: which images, which classes, which splits. The rules are those of docs/data.md."""

import hashlib
import os
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.data.bad_files import BadImageError
from stage1_tokenizer.data.colour import LARGEST, Background, Decoding
from stage1_tokenizer.data.folder.index import FolderIndex, Item
from stage1_tokenizer.data.folder.layout import Layout
from stage1_tokenizer.data.folder.scan import Links
from stage1_tokenizer.data.image_batches import DataSplit, ImageArray, SizedConfig, Split, target_size
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.engine.file_names import normalise_name

COLOURS: dict[str, Background] = {"white": (255, 255, 255), "black": (0, 0, 0), "checker": "checker"}
SAMPLED = 256
"""Files of which the content is looked at too: all sizes stay the same when files without compression are replaced."""
ENDS = 4096
"""Bytes at the beginning and at the end of such a file."""


def _background(given: Any) -> Any:
    """A colour as its name, or as "R,G,B"."""
    text = ",".join(map(str, given)) if isinstance(given, (list, tuple)) else str(given).replace(" ", "").lower()
    levels = text.split(",")
    if text in COLOURS or (
        len(levels) == 3 and all(re.fullmatch(r"\d{1,3}", x, re.A) and int(x) < 256 for x in levels)
    ):
        return text
    raise ValueError(f"is one of {', '.join(COLOURS)}, or R,G,B of 0..255 such as 128,128,128")


class FolderConfig(SizedConfig):
    """Any tree of images. Sub-folders are the classes, or the splits with the classes in them; docs/data.md."""

    kind: Literal["folder"] = "folder"
    root: Annotated[str, Mark.PATH]
    """The folder."""
    layout: Layout = "auto"
    """What sub-folders are. `classes`: the first level are the classes. `flat`: nothing, there are no classes.
    `splits`: train and val (or valid, validation, test), with the classes in them. `auto` finds out and says it."""
    classes: Annotated[str | None, Mark.PATH] = None
    """A file with the names of the classes, one a line, in the order of their labels. Images of others are left out."""
    labels: Annotated[str | None, Mark.PATH] = None
    """A table of the class of each image, CSV or JSON lines; images without a row are left out."""
    label_column: str | None = None
    """The column of the classes in the table, where its name does not say it."""
    files: Annotated[str | None, Mark.PATH] = None
    """A list of the images to use, one path a line; others are left out."""
    validation_files: Annotated[str | None, Mark.PATH] = None
    """A list of the images to validate on, one path a line; all others are trained on."""
    validation_root: Annotated[str | None, Mark.PATH] = None
    """Another folder, all of which is validated on; all of `root` is trained on then."""
    channels: Annotated[Literal[1, 3], BeforeValidator(lambda given: {"1": 1, "3": 3}.get(str(given), given))] = 3
    """1 converts to grey."""
    validation_share: float = Field(0.1, ge=0.0, le=1.0)
    """Share of the images in the validation split, where no folder or list says which. A hash of an image's path
    decides, so adding images moves none. 0 or 1: train on all images, and validate on all."""
    bad_share: Annotated[float, Mark.FREE] = Field(0.01, ge=0.0, le=1.0)
    """Share of the files that may be unreadable: damaged, too large, links to nowhere. Each is listed, and the next
    picture stands in for it. Above this share the run stops, for then the data set is not what it seems."""
    truncated: Literal["skip", "fill"] = "skip"
    """A JPEG file that ends early counts as unreadable, or is read and its missing part is grey (`fill`)."""
    largest_pixels: int = Field(LARGEST, ge=1, le=2**31)
    """Greatest number of pixels of a file. Each takes up to 8 bytes of memory while the file is decoded, in each
    thread: 64 million pixels take 0.5 GB, a thousand million 8 GB."""
    background: Annotated[str, BeforeValidator(_background)] = "white"
    """What transparent pixels lie over: `white`, `black`, `checker` (grey squares), or R,G,B of 0..255."""
    bits: int = Field(16, ge=9, le=16)
    """Bits that grey pixels of 16 bits use; 12 for many cameras and microscopes, whose images are nearly black else."""
    links: Annotated[Links, Mark.VIEW] = "inside"
    """Where a file that is a symbolic link may lead. With `inside`, one that leads out of the folder counts as
    unreadable: a folder from elsewhere could otherwise show a run, and what it publishes, any file of this machine. So
    does a link to a folder that is not in this one; with `anywhere` it is followed, each folder once."""

    @property
    def tolerated(self) -> float:
        """As the base class has it."""
        return self.bad_share

    @property
    def decoding(self) -> Decoding:
        """Choices in reading a file as pixels. A new one each time, for it holds what was reported already."""
        red, green, blue = [*map(int, self.background.split(","))] if "," in self.background else (0, 0, 0)
        background = COLOURS.get(self.background, (red, green, blue))
        return Decoding(background, self.truncated, self.bits, self.largest_pixels)


class FolderImages(DataSplit):
    """One split of a folder, in the order of the relative paths. Reading a bad file raises BadImageError."""

    def __init__(self, config: FolderConfig, split: Split, index: FolderIndex | None = None) -> None:
        """index: what is there, where that is known. Errors are those of `FolderIndex`."""
        index = index or FolderIndex(config)
        self.classes, self.origin = index.classes, index.found.where
        self._config, self._items, self._how = config, index.splits[split], index.how
        self._labels = {name: label for label, name in enumerate(index.classes)}

    @cached_property
    def identity(self) -> str:
        """A hash of the names, classes and sizes of this split's files, and of the content of some."""
        return identity_of(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[ImageArray, int]:
        item = self._items[index]
        path = item.path
        if item.refusal:
            raise BadImageError(path, item.refusal)
        label = self._labels[item.class_] if item.class_ is not None else 0
        return read_image(path, self._config.channels, self._how, self._fit), label

    def _fit(self, height: int, width: int) -> tuple[int, int] | None:
        return target_size(height, width, self._config.image_size, self._config.resize_to)


def identity_of(items: Sequence[Item]) -> str:
    """A hash of the names, classes and sizes of files, in their order, and of the content of some."""
    digest = hashlib.blake2b(digest_size=16)
    every = max(1, len(items) // SAMPLED)
    for place, item in enumerate(items):
        line = f"{normalise_name(item.name)}\t{item.class_}\t{_size(item)}\n"
        digest.update(line.encode(errors="surrogateescape"))
        if place % every == 0 and not item.refusal:
            digest.update(_ends(item))
    return digest.hexdigest()


def _size(item: Item) -> int | str:
    if item.refusal:
        return "refused"
    try:
        return item.path.stat().st_size
    except OSError:  # a link to nowhere
        return "unreadable"


def _ends(item: Item) -> bytes:
    try:
        file = os.open(item.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            size = os.fstat(file).st_size
            first = os.read(file, ENDS)
            os.lseek(file, max(ENDS, size - ENDS), os.SEEK_SET)
            return first + os.read(file, ENDS)
        finally:
            os.close(file)
    except OSError:
        return b""
