"""LPIPS: the distance between two images in the features of a trained network, weighted to match human judgement.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), equation 1. The linear
heads are part of the `lpips` package. The backbone (VGG-16 or AlexNet) is downloaded by torchvision, or read from a
safetensors file. The package's modules compute the features. The distance between them is computed here, with half the
passes over memory.
"""

import warnings
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, Self

import lpips
import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from stage1_tokenizer.config.base import Config
from stage1_tokenizer.engine.checkpoint import read_tensors
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.files import file_sha256, require_file

SMALLEST_SIDE = {"vgg": 16, "alex": 31}
"""Smallest side of an image, in pixels."""
DOWNLOADED = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
"""Names of torchvision's files. The last part of a name is the beginning of the file's SHA-256."""
CHOICES = (
    "give a local safetensors file of torchvision's convolutions as perceptual.weights, leave that null to have them "
    "downloaded, or set perceptual.weight 0"
)
EPSILON = 1e-10
"""Small number that is added to the length of a feature vector, as in the package."""


class PerceptualConfig(Config):
    """LPIPS as a term of the generator's loss."""

    weight: NonNegativeFloat = 0.0
    """Weight of LPIPS in the loss; 0: LPIPS is neither loaded nor computed."""
    net: Literal["vgg", "alex"] = "vgg"
    """The backbone: VGG-16, as in the VQGAN paper, or AlexNet, which is several times faster."""
    weights: str | None = None
    """Path of the backbone's convolutions: a safetensors file with torchvision's keys (`features.0.weight`, ...), any
    floating-point format; null: torchvision downloads them."""


class Perceptual(nn.Module):
    """LPIPS with frozen weights. It has no state: no checkpoint and no optimizer contains it."""

    def __init__(self, config: PerceptualConfig, image_size: tuple[int, int]) -> None:
        """Load the backbone.

        Raises:
            ConfigError: images of this (H, W) are too small, or the weights are missing.
            BadFileError: the weights are damaged or do not fit.
        """
        super().__init__()
        if min(image_size) < SMALLEST_SIDE[config.net]:
            raise ConfigError(
                f"perceptual.net {config.net} needs images of at least {SMALLEST_SIDE[config.net]} pixels a side, "
                f"data.image_size is {image_size[0]}x{image_size[1]}; set perceptual.weight 0 or take larger images"
            )
        given = None if config.weights is None else read_backbone(config.weights)
        with warnings.catch_warnings():  # lpips 0.1.4 uses deprecated arguments of torchvision
            warnings.filterwarnings("ignore", message="The parameter 'pretrained'|Arguments other than a weight enum")
            if given is None:
                check_download(DOWNLOADED[config.net])
            try:
                self.lpips = lpips.LPIPS(net=config.net, pnet_rand=given is not None, verbose=False)
            # torch raises a RuntimeError if the hash of a download is not the one in its name.
            except (OSError, RuntimeError, HTTPException) as error:
                raise ConfigError(
                    f"the weights of perceptual.net {config.net} cannot be downloaded ({error}); {CHOICES}"
                ) from None
        if given is not None:
            self._load_backbone(given, f"perceptual.weights {config.weights}")
        self.lpips.to(memory_format=torch.channels_last)  # 15 % faster on two cores
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, also if the parent module is set to train mode: LPIPS has dropout."""
        return super().train(False)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Return the mean distance () of x, x_hat (B, C, H, W) in [-1, 1], C = 1 or 3; only x_hat gets a gradient.

        Under autocast the features are computed in its precision, and the distance between them in float32.
        """
        if x.shape[1] == 1:
            x, x_hat = x.expand(-1, 3, -1, -1), x_hat.expand(-1, 3, -1, -1)
        with torch.no_grad():
            real = [features / _length(features) for features in self._features(x)]  # (B, c, h, w) of unit length
        heads = [head.model[-1].weight for head in self.lpips.lins]  # (1, c, 1, 1) each, >= 0
        layers = zip(self._features(x_hat), real, heads, strict=True)
        return torch.stack([_Distance.apply(*layer) for layer in layers]).sum()

    def _features(self, x: Tensor) -> list[Tensor]:
        """Return five feature maps (B, c, h, w) float32 of x (B, 3, H, W)."""
        return [features.float() for features in self.lpips.net(self.lpips.scaling_layer(x))]

    def _load_backbone(self, given: Mapping[str, Tensor], source: str) -> None:
        """Load the backbone's weights. Raise BadFileError if one is missing, has another shape, or is not finite."""
        # lpips splits torchvision's `features` into slices and keeps the numbers: slice2.5.weight is features.5.weight.
        backbone: dict[str, Tensor] = self.lpips.net.state_dict()
        wanted = {name: "features." + name.split(".", 1)[1] for name in backbone}
        for name, key in wanted.items():
            if key not in given or given[key].shape != backbone[name].shape or not given[key].is_floating_point():
                raise BadFileError(f"{source}: is not {type(self.lpips.net).__name__}: no fitting {key}")
        try:
            weights = {name: given[key].to(torch.float32) for name, key in wanted.items()}
        except RuntimeError as error:  # safetensors has 4-bit formats that torch cannot convert
            raise BadFileError(f"{source}: holds numbers of a format that cannot be read ({error})") from None
        for name, tensor in weights.items():
            if not tensor.isfinite().all():
                raise BadFileError(f"{source}: {wanted[name]} holds numbers that are not finite")
        self.lpips.net.load_state_dict(weights, strict=True)


def check_download(name: str) -> None:
    """Check the SHA-256 of the file of this name in torchvision's download folder, if there is one.

    torchvision checks a new download, but it unpickles an existing file unchecked, and unpickling can run any code.

    Raises:
        BadFileError: the file's SHA-256 does not begin as its name says.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        return
    promised = path.stem.rpartition("-")[2]
    found = file_sha256(path)
    if not found.startswith(promised):
        raise BadFileError(
            f"{path}: is damaged or was replaced: its SHA-256 begins with {found[: len(promised)]}, not with "
            f"{promised} as its name says; delete it, and it will be downloaded again"
        )


def read_backbone(given: str) -> dict[str, Tensor]:
    """Read the convolutions, `features...`, from the file given as perceptual.weights.

    Raises:
        ConfigError: there is no such file.
        BadFileError: it is damaged, or not safetensors.
    """
    key = "perceptual.weights"
    return read_tensors(require_file(Path(given), key, CHOICES), key, "features.")[0]


class _Distance(torch.autograd.Function):
    """Weighted squared distance () between features f of x_hat (B, c, h, w) and unit-length features u_x of x.

    With u = f / |f|, d = u - u_x and head w (1, c, 1, 1), it is the mean over B, h, w of sum_c w d^2 (equation 1). Its
    gradient with respect to f is (g - u sum_c(g u)) / |f| with g = 2 w d / (B h w). Autograd would keep and read twice
    as many tensors of this size. Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, real: Tensor, head: Tensor) -> Tensor:
        """Compute the distance ()."""
        length = _length(features)
        unit = features / length
        difference = unit - real
        ctx.save_for_backward(unit, length, difference, head)
        return (difference.square().mean(dim=(0, 2, 3)) * head.flatten()).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Compute the gradient (B, c, h, w) with respect to the features of x_hat."""
        unit, length, difference, head = ctx.saved_tensors
        positions = length.numel()  # B h w
        g = difference * (head * (2.0 / positions * gradients[0]))
        along = (g * unit).sum(dim=1, keepdim=True)
        return g.addcmul_(unit, along, value=-1.0).div_(length), None, None


def _length(features: Tensor) -> Tensor:
    """Compute the Euclidean length at each position, plus EPSILON: (B, c, h, w) -> (B, 1, h, w)."""
    return torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON
