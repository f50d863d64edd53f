"""The data sets: one config class per kind, one union, one build. To add a kind: a file, a member, a case."""

from typing import Annotated, assert_never

from pydantic import Field

from stage1_tokenizer.data.folder import FolderConfig, FolderImages
from stage1_tokenizer.data.pictures import ImageSet, Pictures, Split
from stage1_tokenizer.data.shapes import Shapes, ShapesConfig
from stage1_tokenizer.data.torchvision_sets import (
    READERS,
    Cifar10Config,
    FashionMnistConfig,
    MnistConfig,
    TorchvisionImages,
)

DataConfig = Annotated[
    ShapesConfig | Cifar10Config | MnistConfig | FashionMnistConfig | FolderConfig, Field(discriminator="kind")
]


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


def build_pictures(config: DataConfig, split: Split, seed: int) -> Pictures:
    """One split of a data set, ready for batches; `seed` selects the augmentations."""
    return Pictures(build_images(config, split), config, seed)
