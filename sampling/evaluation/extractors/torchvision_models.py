"""Any classifier of torchvision as an extractor, by its name there: what its last layer is given are the features."""

import difflib
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from sampling.evaluation.extractors.base import Extracted, Extractor, fit
from stage1_tokenizer.config.base import Config
from stage1_tokenizer.config.error_messages import quote_value
from stage1_tokenizer.engine.checkpoint import read_tensors
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.files import file_sha256, require_file
from stage1_tokenizer.perceptual import check_download


class TorchvisionConfig(Config):
    """A classifier of torchvision, the features before its last layer; never called FID, inception_v3 neither, for its
    weights are others."""

    kind: Literal["torchvision"] = "torchvision"
    model: str
    """Its name there: resnet50, vgg16, convnext_tiny, vit_b_16, ..."""
    weights: str | None = None
    """Its state dict as a safetensors file; null: torchvision's default weights, downloaded once, and the hash is
    checked."""


class TorchvisionExtractor(Extractor):
    """Features: what the last linear layer is given. Logits: what it returns."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: TorchvisionConfig, key: str) -> None:
        """Raises ConfigError or BadFileError: no such model, or weights that are missing or do not fit."""
        # The last layer of a SqueezeNet is a convolution.
        known = [name for name in list_models(torchvision.models) if not name.startswith("squeezenet")]
        if config.model not in known:
            nearest = difflib.get_close_matches(config.model, known, 3, 0.0)
            raise ConfigError(
                f"{key}.model {quote_value(config.model)}: is no classifier of torchvision's with a linear last layer; "
                f"the nearest names are {', '.join(nearest)}"
            )
        # The input's size and scale, and for a ViT the number of its positions, stand beside the published weights.
        published: Any = get_model_weights(config.model).DEFAULT
        wanted = published.transforms()
        size = wanted.crop_size[0]
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
        fit(network, weights, f"{key}.weights {path}")
        self.network = network
        self.register_buffer("mean", torch.tensor(wanted.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(wanted.std).view(3, 1, 1), persistent=False)

    def _extract(self, pictures: Tensor) -> Extracted:
        given: list[Tensor] = []
        hook = _last_linear(self.network).register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
        try:
            logits = self.network((pictures.float() / 255.0 - self.mean) / self.deviation)
        finally:
            hook.remove()
        return Extracted(given[0], logits)


def _last_linear(network: nn.Module) -> nn.Linear:
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]


def _options(name: str, size: int) -> dict[str, Any]:
    """What torchvision itself sets where a model is built for its published weights."""
    if name.startswith("vit_"):
        return {"image_size": size}
    if name in ("googlenet", "inception_v3"):  # drawing their initial values takes a minute
        return {"transform_input": True, "init_weights": False}
    return {}


def _download(published: Any, choices: str) -> tuple[Path, dict[str, Tensor]]:
    """torchvision's file, downloaded unless it was before, and what is in it.

    Raises:
        ConfigError: it cannot be downloaded.
        BadFileError: a former download is damaged.
    """
    name = published.url.rsplit("/", 1)[1]
    check_download(name)
    try:
        weights = dict(published.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu"))
    # A RuntimeError is torch's, of a download whose hash is not the one that its name promises.
    except (OSError, RuntimeError, HTTPException) as error:
        raise ConfigError(f"the weights {name} cannot be downloaded ({error}); {choices}") from None
    return Path(torch.hub.get_dir()) / "checkpoints" / name, weights
