"""The feature extractors: one config class per kind, one union, one build. To add a kind: a file, a member, a case."""

from typing import Annotated, Literal, assert_never

import torch
from pydantic import Field

from sampling.evaluation.extractors.base import Extractor
from sampling.evaluation.extractors.efficientnet_lite0 import EfficientNetLite0Config, EfficientNetLite0Extractor
from sampling.evaluation.extractors.inception import InceptionConfig, InceptionExtractor
from sampling.evaluation.extractors.torchvision_models import TorchvisionConfig, TorchvisionExtractor
from stage1_tokenizer.config.base import Config


class NoExtractorConfig(Config):
    """No features: PSNR, SSIM and NMSE of reconstructions, and how the codes are used, without any weights."""

    kind: Literal["none"] = "none"


ExtractorConfig = Annotated[InceptionConfig | EfficientNetLite0Config | TorchvisionConfig, Field(discriminator="kind")]
ExtractorOrNoneConfig = Annotated[
    InceptionConfig | EfficientNetLite0Config | TorchvisionConfig | NoExtractorConfig, Field(discriminator="kind")
]
"""Where an evaluation has figures without features too."""


def build_extractor(config: ExtractorConfig, device: torch.device | str, key: str = "extractor") -> Extractor:
    """`key` is the config's dotted key, for errors to name.

    Raises:
        ConfigError: weights that do not exist or cannot be downloaded, or a model of no known name.
        BadFileError: weights that are damaged or do not fit.
    """
    return _build(config, key).to(device)


def _build(config: ExtractorConfig, key: str) -> Extractor:
    match config:
        case InceptionConfig():
            return InceptionExtractor(config, key)
        case EfficientNetLite0Config():
            return EfficientNetLite0Extractor(config, key)
        case TorchvisionConfig():
            return TorchvisionExtractor(config, key)
        case _:
            assert_never(config)
