"""The data sets: one config class per kind, one union, one build. To add a kind: a file, a member, a case."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, assert_never

import torch
from pydantic import Field

from stage1_tokenizer.config.base import Config, Tree
from stage1_tokenizer.data.bad_files import BadFiles, BadImageError, BadPart, errors_of
from stage1_tokenizer.data.folder import FolderConfig, FolderImages
from stage1_tokenizer.data.folder.index import FolderIndex
from stage1_tokenizer.data.folder.scan import check_is_no_data
from stage1_tokenizer.data.image_batches import SPLITS, DataSplit, ImageBatches, Split
from stage1_tokenizer.data.record import DataRecord, Found, announce
from stage1_tokenizer.data.shapes import Shapes, ShapesConfig
from stage1_tokenizer.data.torchvision_sets import (
    READERS,
    Cifar10Config,
    DownloadedConfig,
    FashionMnistConfig,
    MnistConfig,
    TorchvisionImages,
)
from stage1_tokenizer.engine.errors import BadFileError, ConfigError

DataConfig = Annotated[
    ShapesConfig  # one on each line
    | Cifar10Config
    | MnistConfig
    | FashionMnistConfig
    | FolderConfig,
    Field(discriminator="kind"),
]


class SavedData(Config):
    """A data config under the key that it has in a run's config, for its errors to name."""

    data: DataConfig


def data_config(tree: Tree, source: str) -> DataConfig:
    """The data config that a checkpoint's header carries. It downloads nothing: a header that comes from anybody would
    choose the folder to download into.

    Raises:
        BadFileError: this version has no such data set, or knows other keys of it.
    """
    try:
        data = SavedData.from_tree({"data": tree}, "header").data
    except ConfigError as error:
        raise BadFileError(f"{source}: its header names data that this version cannot read, {error}") from None
    return data.model_copy(update={"download": False}) if isinstance(data, DownloadedConfig) else data


class OpenData:
    """A data set whose files were listed once: both of its splits, and what was found."""

    def __init__(self, config: DataConfig) -> None:
        """Errors are those of the data set's own class."""
        self.config = config
        self._index = FolderIndex(config) if isinstance(config, FolderConfig) else None
        self._splits: dict[Split, DataSplit] = {}
        self._bad: BadFiles | None = None

    def images(self, split: Split) -> DataSplit:
        """One split, unprocessed."""
        if split not in self._splits:
            self._splits[split] = build_images(self.config, split, self._index)
        return self._splits[split]

    @property
    def found(self) -> Found:
        """Number of images of each split and class, and what lies beside them."""
        if self._index:
            return self._index.found
        train, validation = self.images("train"), self.images("validation")
        sizes, more = train.class_sizes, validation.class_sizes
        classes = {name: None if number is None else number + (more[name] or 0) for name, number in sizes.items()}
        return Found(train.origin, len(train), len(validation), classes=classes)

    @property
    def identity(self) -> dict[str, str]:
        """What the config does not say of the content of each split, and the classes; the same wherever it lies."""
        return {split: self.images(split).identity for split in SPLITS}

    @property
    def record(self) -> DataRecord:
        """Record of these data, by which a resumed run compares them."""
        return DataRecord(self.found.lines(), self.identity, list(self.images("train").classes))

    def check_run_folder(self, folder: Path) -> None:
        """Raise ConfigError if a folder has images in it and no run; the engine calls it before it writes a run."""
        check_is_no_data(folder)

    def find_changes(self, folder: Path) -> list[str] | None:
        """Return lines that describe how these data differ from the record in a run's folder; None: no record."""
        saved = DataRecord.saved_in(folder)
        return None if saved is None else saved.differences(self.record)

    def write_record(self, folder: Path) -> None:
        """Write the record of these data into a run's folder. Raises StorageError."""
        self.record.write(folder)

    def image_batches(
        self,
        split: Split,
        seed: int,
        device: torch.device | str = "cpu",
        bad_list: Path | None = None,
        only: range | None = None,
    ) -> ImageBatches:
        """One split, ready for batches. Bad files are counted over both splits; see `ImageBatches` for the rest."""
        found = self.found
        if self._bad is None:
            self._bad = BadFiles(bad_list, self.config.tolerated, found.images, self._find_bad)
        first = 0 if split == "train" or found.shared else found.train
        return ImageBatches(self.images(split), self.config, seed, device, BadPart(self._bad, first), only)

    def _find_bad(self) -> Iterator[tuple[int, BadImageError]]:
        """Read all files, those of both splits; the bad ones by their place in the data set."""
        first = 0
        for split in SPLITS[:1] if self.found.shared else SPLITS:
            images = self.images(split)
            errors = errors_of(images.__getitem__, range(len(images)))
            yield from ((first + place, error) for place, error in enumerate(errors) if error)
            first += len(images)


def open_data(config: DataConfig) -> OpenData:
    """List a data set once, and say what was found."""
    opened = OpenData(config)
    announce(opened.found)
    return opened


def build_images(config: DataConfig, split: Split, index: FolderIndex | None = None) -> DataSplit:
    """One split of a data set, unprocessed. index: a folder that was listed already."""
    match config:
        case ShapesConfig():
            return Shapes(config, split)
        case Cifar10Config() | MnistConfig() | FashionMnistConfig():
            return TorchvisionImages(READERS[config.kind], config, split)
        case FolderConfig():
            return FolderImages(config, split, index)
        case _:
            assert_never(config)


def build_image_batches(
    config: DataConfig, split: Split, seed: int, device: torch.device | str = "cpu", bad_list: Path | None = None
) -> ImageBatches:
    """One split of a data set, ready for batches, after saying what was found; `seed` selects the augmentations, and on
    `device` the batches are made where the whole split finds room there. Files that cannot be read are listed in
    `bad_list`, if it is given. Who needs both splits opens the data once, with `open_data`."""
    return open_data(config).image_batches(split, seed, device, bad_list)
