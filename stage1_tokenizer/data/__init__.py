"""Data sets of images: one config class per kind. To add a kind: one file, one member of `DataConfig`, one `case`.

The route of a batch, and the module of each step:

    config  --open_data-->  OpenData                     open_data.py      both splits, listed once
            .splits[split]: DataSplit                    base.py           images of any size, as each kind reads them
            .image_batches(split): ImageBatches          image_batches.py  resized, cropped, flipped, cached
            --training_batches / validation_batches-->   order.py          (B, C, H, W) uint8 and labels (B,)
            --normalise-->                               image_batches.py  float32 in [-1, 1], on the device
"""

from typing import Annotated, assert_never

from pydantic import Field

from stage1_tokenizer.data.base import SPLITS, DataSplit, Split
from stage1_tokenizer.data.folder import FolderConfig, read_folder
from stage1_tokenizer.data.shapes import Shapes, ShapesConfig
from stage1_tokenizer.data.torchvision_sets import Cifar10Config, FashionMnistConfig, MnistConfig, TorchvisionImages

DataConfig = Annotated[
    ShapesConfig  # one on each line
    | Cifar10Config
    | MnistConfig
    | FashionMnistConfig
    | FolderConfig,
    Field(discriminator="kind"),
]


def build_splits(config: DataConfig) -> dict[Split, DataSplit]:
    """Build both splits of a data set."""
    match config:
        case ShapesConfig():
            return {split: Shapes(config, split) for split in SPLITS}
        case Cifar10Config() | MnistConfig() | FashionMnistConfig():
            return {split: TorchvisionImages(config, split) for split in SPLITS}
        case FolderConfig():
            return read_folder(config)
        case _:
            assert_never(config)
