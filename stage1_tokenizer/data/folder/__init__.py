"""A data set of image files in a folder. docs/data.md has the rules by which they become classes and splits."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.data.bad_files import BadImageError
from stage1_tokenizer.data.base import BaseDataConfig, DataSplit, ImageArray, Split
from stage1_tokenizer.data.colour import MAX_PIXELS, Background, ReadingOptions
from stage1_tokenizer.data.folder.index import FolderIndex, Item
from stage1_tokenizer.data.folder.layout import Layout
from stage1_tokenizer.data.folder.scan import Links
from stage1_tokenizer.data.image_batches import target_size
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.engine.file_names import describe_path, normalise_name

COLOURS: dict[str, Background] = {"white": (255, 255, 255), "black": (0, 0, 0), "checker": "checker"}
HASHED_FILES = 256
"""Number of files whose content is hashed too: names and sizes stay the same if uncompressed files are replaced."""
HASHED_BYTES = 4096
"""Number of bytes that are hashed at the beginning and at the end of such a file."""


def _parse_background(given: Any) -> Any:
    """Return a colour as its name, or as "R,G,B"."""
    text = ",".join(map(str, given)) if isinstance(given, (list, tuple)) else str(given).replace(" ", "").lower()
    levels = text.split(",")
    if text in COLOURS or (
        len(levels) == 3 and all(re.fullmatch(r"\d{1,3}", x, re.A) and int(x) < 256 for x in levels)
    ):
        return text
    raise ValueError(f"is one of {', '.join(COLOURS)}, or R,G,B of 0..255 such as 128,128,128")


class FolderConfig(BaseDataConfig):
    """Any tree of images. Sub-folders are the classes, or the splits with the classes in them; docs/data.md."""

    kind: Literal["folder"] = "folder"
    root: Annotated[str, Mark.PATH]
    """The folder with the images."""
    layout: Layout = "auto"
    """Meaning of the sub-folders. `classes`: the first level are the classes. `flat`: there are no classes. `splits`:
    train and val (or valid, validation, test), with the classes in them. `auto` decides by a rule (docs/data.md), and
    prints the decision."""
    classes: Annotated[str | None, Mark.PATH] = None
    """A file with the names of the classes, one per line, in the order of their labels. Other images are left out."""
    labels: Annotated[str | None, Mark.PATH] = None
    """A table with the class of each image, CSV or JSON lines. Images without a row are left out."""
    label_column: str | None = None
    """The column of the classes in the table, if it has no usual name such as `label` or `class`."""
    files: Annotated[str | None, Mark.PATH] = None
    """A list of the images to use, one path per line. Other images are left out."""
    validation_files: Annotated[str | None, Mark.PATH] = None
    """A list of the images to validate on, one path per line. All other images are trained on."""
    validation_root: Annotated[str | None, Mark.PATH] = None
    """Another folder, whose images are all validated on. All images of `root` are trained on then."""
    channels: Annotated[Literal[1, 3], BeforeValidator(lambda given: {"1": 1, "3": 3}.get(str(given), given))] = 3
    """Number of channels: 3 for colour, or 1 to convert the images to grey."""
    validation_share: float = Field(0.1, ge=0.0, le=1.0)
    """Share of the images in the validation split, if neither folders nor lists name it. A hash of an image's path
    decides, so adding images moves none. 0 or 1: train on all images, and validate on all."""
    bad_share: Annotated[float, Mark.FREE] = Field(0.01, ge=0.0, le=1.0)
    """Share of the files that may be unreadable: damaged, too large, links to nowhere. Each is listed, and the next
    image replaces it. Above this share the run stops, because something is wrong with the data set."""
    truncated: Literal["skip", "fill"] = "skip"
    """Treatment of a JPEG file that ends early. `skip`: it counts as unreadable. `fill`: its missing part is grey."""
    largest_pixels: int = Field(MAX_PIXELS, ge=1, le=2**31)
    """Greatest number of pixels of a file. Each pixel takes up to 8 bytes of memory while the file is read, in each
    thread: 64 million pixels take 0.5 GB, a thousand million 8 GB."""
    background: Annotated[str, BeforeValidator(_parse_background)] = "white"
    """Background under transparent pixels: `white`, `black`, `checker` (grey squares), or R,G,B of 0..255."""
    bits: int = Field(16, ge=9, le=16)
    """Bits that grey pixels of 16 bits use. Many cameras and microscopes use 12; with 16 their images are nearly
    black."""
    links: Annotated[Links, Mark.NOT_EVALUATED] = "inside"
    """Treatment of symbolic links. `inside`: a link out of the folder counts as unreadable, because a folder from an
    untrusted source could otherwise put any file of this machine into a run, and into all that the run publishes.
    `anywhere`: such links are followed, each linked folder once."""

    @property
    def tolerated_bad_share(self) -> float:
        """Share of the images, 0..1, that may be unreadable."""
        return self.bad_share

    @property
    def reading_options(self) -> ReadingOptions:
        """Choices in how a file becomes pixels. A new object for each call, because it remembers which warnings were
        printed."""
        red, green, blue = [*map(int, self.background.split(","))] if "," in self.background else (0, 0, 0)
        background = COLOURS.get(self.background, (red, green, blue))
        return ReadingOptions(background, self.truncated, self.bits, self.largest_pixels)


def read_folder(config: FolderConfig) -> dict[Split, DataSplit]:
    """List a folder, and return its splits; one object for both if they are the same images.

    Raises:
        ConfigError, BadFileError: as `FolderIndex`.
    """
    index, options = FolderIndex(config), config.reading_options
    train = FolderImages(config, index, index.splits["train"], options)
    if index.splits["validation"] is index.splits["train"]:
        return {"train": train, "validation": train}
    return {"train": train, "validation": FolderImages(config, index, index.splits["validation"], options)}


class FolderImages(DataSplit):
    """One split of a folder, in the order of the relative paths."""

    def __init__(
        self, config: FolderConfig, index: FolderIndex, items: Sequence[Item], options: ReadingOptions
    ) -> None:
        self.classes, self.origin = index.classes, f"under {describe_path(config.root)}"
        self.ignored, self.notes = index.ignored, index.notes
        self._config, self._items, self._options = config, items, options
        self._labels = {name: label for label, name in enumerate(index.classes)}

    @cached_property
    def identity(self) -> str:
        """Hash of the names, classes and sizes of the files, and of the content of some."""
        return hash_of_files(self._items)

    @property
    def names(self) -> list[str]:
        """Path of each image below the folder, with forward slashes."""
        return [item.name for item in self._items]

    @property
    def class_sizes(self) -> dict[str, int | None]:
        """Number of images of each class."""
        numbers = Counter(item.class_ for item in self._items)
        return {name: numbers[name] for name in self.classes}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[ImageArray, int]:
        item = self._items[index]
        if item.refusal:
            raise BadImageError(item.path, item.refusal)
        label = self._labels[item.class_] if item.class_ is not None else 0
        return read_image(item.path, self._config.channels, self._options, self._target_size), label

    def _target_size(self, height: int, width: int) -> tuple[int, int] | None:
        return target_size(height, width, self._config.image_size, self._config.resize_to)


def hash_of_files(items: Sequence[Item]) -> str:
    """Hash the names, classes and sizes of files in their order, and the content of some."""
    digest = hashlib.blake2b(digest_size=16)
    stride = max(1, len(items) // HASHED_FILES)
    for index, item in enumerate(items):
        line = f"{normalise_name(item.name)}\t{item.class_}\t{_file_size(item)}\n"
        digest.update(line.encode(errors="surrogateescape"))
        if index % stride == 0 and not item.refusal:
            digest.update(_read_ends(item))
    return digest.hexdigest()


def _file_size(item: Item) -> int | str:
    if item.refusal:
        return "refused"
    try:
        return item.path.stat().st_size
    except OSError:  # a link to nowhere
        return "unreadable"


def _read_ends(item: Item) -> bytes:
    try:
        file = os.open(item.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            size = os.fstat(file).st_size
            first = os.read(file, HASHED_BYTES)
            os.lseek(file, max(HASHED_BYTES, size - HASHED_BYTES), os.SEEK_SET)
            return first + os.read(file, HASHED_BYTES)
        finally:
            os.close(file)
    except OSError:
        return b""
