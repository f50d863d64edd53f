"""The Inception-v3 of all published FIDs: TensorFlow's network of 2015, which differs from torchvision's.

The architecture and the weights ("inception-v3-compat") are torch-fidelity's, whose results agree with TensorFlow's.
"""

from http.client import HTTPException
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    BasicConv2d,
    FeatureExtractorInceptionV3,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE_1,
    InceptionE_2,
)

from sampling.evaluation.extractors.base import Extracted, Extractor, load_weights
from stage1_tokenizer.config.base import Config
from stage1_tokenizer.engine.checkpoint import read_tensors
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.files import file_sha256, require_file
from stage1_tokenizer.perceptual import check_download

DIMENSION = 2048
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the file that torch-fidelity and pytorch-fid download under different names."""
DOWNLOADED = URL_INCEPTION_V3.rsplit("/", 1)[1]


class InceptionConfig(Config):
    """Inception-v3's 2048 pooled features, for FID and KID, and its logits, for the inception score."""

    kind: Literal["inception"] = "inception"
    weights: str | None = None
    """Path of the weights: the file that torch-fidelity or pytorch-fid download (`...-2015-12-05-6726825d.pth`), or the
    same weights as a safetensors file; null: download it once and check its hash."""


class InceptionExtractor(Extractor):
    """Inception-v3 as an extractor.

    Features: pool3 (2048). Logits: without the bias, as in the published inception score ("logits_unbiased").
    """

    def __init__(self, config: InceptionConfig, key: str) -> None:
        """Load the weights.

        Raises:
            ConfigError: the weights are missing or cannot be downloaded.
            BadFileError: the file is another one, or does not fit.
        """
        choices = (
            f"give {DOWNLOADED}, pt_inception-2015-12-05-6726825d.pth or the same weights as a safetensors file as "
            f"{key}.weights, leave that null to have them downloaded, or take {key}.kind efficientnet_lite0"
        )
        path = require_file(Path(config.weights), f"{key}.weights", choices) if config.weights else _download(choices)
        super().__init__("Inception-v3 (TensorFlow 2015)", DIMENSION, (299, 299), file_sha256(path), is_inception=True)
        source = f"{key}.weights {path}"
        if path.suffix == ".safetensors":
            weights = read_tensors(path, f"{key}.weights")[0]
        elif self.sha256 == SHA256:
            # The hash is known, and even so only tensors are unpickled (weights_only).
            weights = torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, str(path.parent), "cpu", progress=False, file_name=path.name, weights_only=True
            )
        else:
            raise BadFileError(
                f"{source}: this is not the file of Inception's weights: its SHA-256 is {self.sha256}, not {SHA256}; "
                "give other weights as a safetensors file"
            )
        with torch.device("meta"):
            self.network = InceptionV3()
        load_weights(self.network, weights, source)

    def _extract(self, images: Tensor) -> Extracted:
        # The network resizes to 299 pixels too, which changes nothing in images of that size.
        return Extracted(*self.network(images))


class InceptionV3(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """torch-fidelity's network, but its constructor does not read weights (torch-fidelity unpickles them there)."""

    def __init__(self) -> None:
        FeatureExtractorBase.__init__(self, "inception-v3-compat", ["2048", "logits_unbiased"])
        self.feature_extractor_internal_dtype = torch.float32
        layers: dict[str, nn.Module] = {
            "Conv2d_1a_3x3": BasicConv2d(3, 32, kernel_size=3, stride=2),
            "Conv2d_2a_3x3": BasicConv2d(32, 32, kernel_size=3),
            "Conv2d_2b_3x3": BasicConv2d(32, 64, kernel_size=3, padding=1),
            "MaxPool_1": nn.MaxPool2d(kernel_size=3, stride=2),
            "Conv2d_3b_1x1": BasicConv2d(64, 80, kernel_size=1),
            "Conv2d_4a_3x3": BasicConv2d(80, 192, kernel_size=3),
            "MaxPool_2": nn.MaxPool2d(kernel_size=3, stride=2),
            "Mixed_5b": InceptionA(192, pool_features=32),
            "Mixed_5c": InceptionA(256, pool_features=64),
            "Mixed_5d": InceptionA(288, pool_features=64),
            "Mixed_6a": InceptionB(288),
            "Mixed_6b": InceptionC(768, channels_7x7=128),
            "Mixed_6c": InceptionC(768, channels_7x7=160),
            "Mixed_6d": InceptionC(768, channels_7x7=160),
            "Mixed_6e": InceptionC(768, channels_7x7=192),
            "Mixed_7a": InceptionD(768),
            "Mixed_7b": InceptionE_1(1280),
            "Mixed_7c": InceptionE_2(2048),
            "AvgPool": nn.AdaptiveAvgPool2d(output_size=(1, 1)),
            "fc": nn.Linear(DIMENSION, 1008),
        }
        for name, layer in layers.items():
            self.add_module(name, layer)


def _download(choices: str) -> Path:
    """Return the path of the downloaded weights; download them if they are missing.

    Raises:
        ConfigError: the download failed.
        BadFileError: an earlier download is damaged.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / DOWNLOADED
    check_download(DOWNLOADED)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), SHA256, progress=False)
        # torch raises a RuntimeError if the hash of the download is wrong.
        except (OSError, RuntimeError, HTTPException) as error:
            raise ConfigError(f"Inception's weights cannot be downloaded ({error}); {choices}") from None
    return path
