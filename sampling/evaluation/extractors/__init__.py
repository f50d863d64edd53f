"""The feature extractors: a config class per kind, their union, and `build_extractor`.

To add a kind: a file, a member of the unions, a case.
"""

from typing import Annotated, Literal, assert_never

import torch
from pydantic import Field

from sampling.evaluation.extractors.base import Extractor
from sampling.evaluation.extractors.efficientnet_lite0 import EfficientNetLite0Config, EfficientNetLite0Extractor
from sampling.evaluation.extractors.inception import InceptionConfig, InceptionExtractor
from sampling.evaluation.extractors.torchvision_models import TorchvisionConfig, TorchvisionExtractor
from stage1_tokenizer.config.base import Config


class NoExtractorConfig(Config):
    """No extractor: reconstructions get PSNR, SSIM, NMSE and code usage, which need no weights."""

    kind: Literal["none"] = "none"


ExtractorConfig = Annotated[InceptionConfig | EfficientNetLite0Config | TorchvisionConfig, Field(discriminator="kind")]
ExtractorOrNoneConfig = Annotated[
    InceptionConfig | EfficientNetLite0Config | TorchvisionConfig | NoExtractorConfig, Field(discriminator="kind")
]
"""The kinds for an evaluation that also has metrics without features."""


def build_extractor(config: ExtractorConfig, device: torch.device | str, key: str = "extractor") -> Extractor:
    """Build an extractor and load its weights. `key` is the config's dotted key, for error messages.

    Raises:
        ConfigError: the weights do not exist or cannot be downloaded, or the model's name is unknown.
        BadFileError: the weights are damaged or do not fit the network.
    """
    match config:
        case InceptionConfig():
            return InceptionExtractor(config, key).to(device)
        case EfficientNetLite0Config():
            return EfficientNetLite0Extractor(config, key).to(device)
        case TorchvisionConfig():
            return TorchvisionExtractor(config, key).to(device)
        case _:
            assert_never(config)
