"""The data sets: one config class per kind, one union, one build. To add a kind: a file, a member, a case."""

from pathlib import Path
from typing import Annotated, assert_never

import torch
from pydantic import Field

from stage1_tokenizer.config import Config, Tree
from stage1_tokenizer.data.folder import FolderConfig, FolderImages
from stage1_tokenizer.data.pictures import ImageSet, Pictures, Split
from stage1_tokenizer.data.shapes import Shapes, ShapesConfig
from stage1_tokenizer.data.torchvision_sets import (
    READERS,
    Cifar10Config,
    DownloadedConfig,
    FashionMnistConfig,
    MnistConfig,
    TorchvisionImages,
)
from stage1_tokenizer.errors import BadFileError, ConfigError

DataConfig = Annotated[
    ShapesConfig | Cifar10Config | MnistConfig | FashionMnistConfig | FolderConfig, Field(discriminator="kind")
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


def build_images(config: DataConfig, split: Split) -> ImageSet:
    """One split of a data set, unprocessed."""
    match config:
        case ShapesConfig():
            return Shapes(config, split)
        case Cifar10Config() | MnistConfig() | FashionMnistConfig():
            return TorchvisionImages(READERS[config.kind], config, split)
        case FolderConfig():
            return FolderImages(config, split)
        case _:
            assert_never(config)


def build_pictures(
    config: DataConfig,
    split: Split,
    seed: int,
    device: torch.device | str = "cpu",
    bad_list: Path | None = None,
) -> Pictures:
    """One split of a data set, ready for batches; `seed` selects the augmentations, and on `device` the batches are
    made where the whole split finds room there. Files that cannot be read are listed in `bad_list`, if it is given."""
    return Pictures(build_images(config, split), config, seed, device, bad_list)
