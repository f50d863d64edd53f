"""Inception-v3 as all published FIDs have it: the network of 2015, ported from TensorFlow, and not torchvision's.

The architecture and the weights ("inception-v3-compat") are torch-fidelity's, whose figures agree with TensorFlow's.
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

from sampling.evaluation.extractors.base import Extracted, Extractor, fit
from stage1_tokenizer.config.base import Config
from stage1_tokenizer.engine.checkpoint import read_tensors
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.files import file_sha256, require_file
from stage1_tokenizer.perceptual import check_download

DIMENSION = 2048
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the one file that torch-fidelity and pytorch-fid download, under two names."""
DOWNLOADED = URL_INCEPTION_V3.rsplit("/", 1)[1]


class InceptionConfig(Config):
    """Inception-v3's pool features (2048): those of FID, KID, and with its logits of the inception score."""

    kind: Literal["inception"] = "inception"
    weights: str | None = None
    """The weights as torch-fidelity or pytorch-fid download them (`...-2015-12-05-6726825d.pth`), or the same as a
    safetensors file; null: downloaded once, and the hash is checked."""


class InceptionExtractor(Extractor):
    """Features: pool3 (2048). Logits: without the bias, as the inception score has them ("logits_unbiased")."""

    def __init__(self, config: InceptionConfig, key: str) -> None:
        """Raises ConfigError or BadFileError: weights that are missing, cannot be downloaded, or do not fit."""
        choices = (
            f"give {DOWNLOADED}, pt_inception-2015-12-05-6726825d.pth or the same weights as a safetensors file as "
            f"{key}.weights, leave that null to have them downloaded, or take {key}.kind efficientnet_lite0"
        )
        given = None if config.weights is None else require_file(Path(config.weights), f"{key}.weights", choices)
        path = _downloaded(choices) if given is None else given
        super().__init__("Inception-v3 (TensorFlow 2015)", DIMENSION, (299, 299), file_sha256(path), is_inception=True)
        source = f"{key}.weights {path}"
        if path.suffix == ".safetensors":
            weights = read_tensors(path, f"{key}.weights")[0]
        elif self.sha256 == SHA256:
            weights = _unpickled(path)
        else:
            raise BadFileError(
                f"{source}: is not the file of Inception's weights: its SHA-256 is {self.sha256}, not {SHA256}; "
                "other weights are read from safetensors only"
            )
        with torch.device("meta"):
            self.network = InceptionV3()
        fit(self.network, weights, source)

    def _extract(self, pictures: Tensor) -> Extracted:
        # The network's own resize takes 299 pixels to 299 pixels: each has the weight 1 on itself, so nothing changes.
        return Extracted(*self.network(pictures))


class InceptionV3(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """torch-fidelity's network without the reading of weights, which unpickles, in its constructor."""

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


def _downloaded(choices: str) -> Path:
    """Where the download lies, after it was made if need be.

    Raises:
        ConfigError: it cannot be made.
        BadFileError: what lies there is not it.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / DOWNLOADED
    check_download(DOWNLOADED)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), SHA256, progress=False)
        # A RuntimeError is torch's, of a download that has another hash.
        except (OSError, RuntimeError, HTTPException) as error:
            raise ConfigError(f"Inception's weights cannot be downloaded ({error}); {choices}") from None
    return path


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The weights in a file whose hash was looked at; and even so nothing but tensors is unpickled."""
    weights: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
        URL_INCEPTION_V3, str(path.parent), "cpu", progress=False, file_name=path.name, weights_only=True
    )
    return weights
