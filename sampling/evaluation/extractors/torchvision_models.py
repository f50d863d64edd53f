"""Any torchvision classifier as an extractor: the features are the input of its last linear layer."""

import difflib
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from sampling.evaluation.extractors.base import Extracted, Extractor, load_weights
from stage1_tokenizer.config.base import Config
from stage1_tokenizer.config.error_messages import quote_value
from stage1_tokenizer.engine.checkpoint import read_tensors
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.files import file_sha256, require_file
from stage1_tokenizer.perceptual import check_download


class TorchvisionConfig(Config):
    """A torchvision classifier. Distances in its features are not an FID, not even with inception_v3, whose weights
    differ from FID's."""

    kind: Literal["torchvision"] = "torchvision"
    model: str
    """Name of the classifier in torchvision: resnet50, vgg16, convnext_tiny, vit_b_16, ..."""
    weights: str | None = None
    """Path of its state dict as a safetensors file; null: download torchvision's default weights once and check their
    hash."""


class TorchvisionExtractor(Extractor):
    """A torchvision classifier as an extractor. Features: input of the last linear layer. Logits: its output."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: TorchvisionConfig, key: str) -> None:
        """Load the weights.

        Raises:
            ConfigError: there is no such model, or the weights are missing or cannot be downloaded.
            BadFileError: the weights are damaged or do not fit.
        """
        # A SqueezeNet ends in a convolution.
        known = [name for name in list_models(torchvision.models) if not name.startswith("squeezenet")]
        if config.model not in known:
            nearest = difflib.get_close_matches(config.model, known, 3, 0.0)
            raise ConfigError(
                f"{key}.model {quote_value(config.model)}: this is not a torchvision classifier with a linear last "
                f"layer; the nearest names are {', '.join(nearest)}"
            )
        # The published weights state the input's size and scale, and a ViT's number of positions.
        published: Any = get_model_weights(config.model).DEFAULT
        transforms = published.transforms()
        size = transforms.crop_size[0]
        choices = (
            f"give the state dict of torchvision's {config.model} as a safetensors file as {key}.weights, or leave "
            "that null to have it downloaded"
        )
        if config.weights is None:
            path, weights = _download(published, choices)
        else:
            path = require_file(Path(config.weights), f"{key}.weights", choices)
            weights = read_tensors(path, f"{key}.weights")[0]
        network = get_model(config.model, weights=None, **_options(config.model, size))
        dimension = _last_linear(network).in_features
        super().__init__(f"torchvision {config.model}", dimension, (size, size), file_sha256(path), is_inception=False)
        load_weights(network, weights, f"{key}.weights {path}")
        self.network = network
        self.register_buffer("mean", torch.tensor(transforms.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(transforms.std).view(3, 1, 1), persistent=False)

    def _extract(self, images: Tensor) -> Extracted:
        inputs: list[Tensor] = []
        hook = _last_linear(self.network).register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        try:
            logits = self.network((images.float() / 255.0 - self.mean) / self.deviation)
        finally:
            hook.remove()
        return Extracted(inputs[0], logits)


def _last_linear(network: nn.Module) -> nn.Linear:
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]


def _options(name: str, size: int) -> dict[str, Any]:
    """Return the options that torchvision sets when it builds a model for its published weights."""
    if name.startswith("vit_"):
        return {"image_size": size}
    if name in ("googlenet", "inception_v3"):  # drawing initial values takes a minute
        return {"transform_input": True, "init_weights": False}
    return {}


def _download(published: Any, choices: str) -> tuple[Path, dict[str, Tensor]]:
    """Return the path and the content of torchvision's weights file; download it if it is missing.

    Raises:
        ConfigError: the download failed.
        BadFileError: an earlier download is damaged.
    """
    name = published.url.rsplit("/", 1)[1]
    check_download(name)
    try:
        weights = dict(published.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu"))
    # torch raises a RuntimeError if the hash of the download differs from that in its name.
    except (OSError, RuntimeError, HTTPException) as error:
        raise ConfigError(f"the weights {name} cannot be downloaded ({error}); {choices}") from None
    return Path(torch.hub.get_dir()) / "checkpoints" / name, weights
