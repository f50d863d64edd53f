"""No extractor: reconstructions are compared image by image alone, and no weights are needed."""

from typing import Literal

from stage1_tokenizer.config.base import Config


class NoExtractorConfig(Config):
    """No features: PSNR, SSIM and NMSE of reconstructions, and how the codes are used, without any weights."""

    kind: Literal["none"] = "none"
