"""LPIPS: distance between two images in the features of a trained network, weighted to agree with people's judgement.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018). The linear heads ship
with the `lpips` package; the backbone is torchvision's download, or a local safetensors file. The package's modules
compute the features; the distance between them is taken here, in half the passes over memory.
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

SMALLEST = {"vgg": 16, "alex": 31}
DOWNLOADED = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
"""torchvision's names of its files, in each of which stands how the file's SHA-256 begins."""
CHOICES = (
    "give a local safetensors file of torchvision's convolutions as perceptual.weights, leave that null to have them "
    "downloaded, or set perceptual.weight 0"
)
EPSILON = 1e-10
"""Added to the length of a feature vector, as the package does."""


class PerceptualConfig(Config):
    """LPIPS as a term of the loss."""

    weight: NonNegativeFloat = 0.0
    """Weight in the loss; 0: LPIPS is neither loaded nor computed."""
    net: Literal["vgg", "alex"] = "vgg"
    """The backbone: VGG-16, as in the VQGAN paper, or AlexNet, which is several times faster."""
    weights: str | None = None
    """The backbone's convolutions as a safetensors file with torchvision's keys (`features.0.weight`, ...), in any
    floating-point format; null: torchvision downloads them."""


class Perceptual(nn.Module):
    """Frozen LPIPS. Holds no state of the run: it is in no checkpoint and in no optimizer."""

    def __init__(self, config: PerceptualConfig, image_size: tuple[int, int]) -> None:
        """Raises ConfigError or BadFileError: images too small, or weights that are missing or do not fit."""
        super().__init__()
        if min(image_size) < SMALLEST[config.net]:
            raise ConfigError(
                f"perceptual.net {config.net} needs images of at least {SMALLEST[config.net]} pixels a side, "
                f"data.image_size is {image_size[0]}x{image_size[1]}; set perceptual.weight 0 or take larger images"
            )
        given = None if config.weights is None else read_backbone(config.weights)
        with warnings.catch_warnings():  # lpips 0.1.4 calls torchvision in a way that is deprecated there
            warnings.filterwarnings("ignore", message="The parameter 'pretrained'|Arguments other than a weight enum")
            if given is None:
                check_download(DOWNLOADED[config.net])
            try:
                self.lpips = lpips.LPIPS(net=config.net, pnet_rand=given is not None, verbose=False)
            # A RuntimeError is torch's, of a download whose hash is not the one that its name promises.
            except (OSError, RuntimeError, HTTPException) as error:
                raise ConfigError(
                    f"the weights of perceptual.net {config.net} cannot be downloaded ({error}); {CHOICES}"
                ) from None
        if given is not None:
            self._load_backbone(given, f"perceptual.weights {config.weights}")
        self.lpips.to(memory_format=torch.channels_last)  # on two cores 15 % faster
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever its parent does: LPIPS has dropout."""
        return super().train(False)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """x, x_hat (B, C, H, W) in [-1, 1], one channel or three -> mean distance (), differentiable in x_hat alone.

        Under autocast the features are computed in its precision, the distance between them in float32.
        """
        if x.shape[1] == 1:
            x, x_hat = x.expand(-1, 3, -1, -1), x_hat.expand(-1, 3, -1, -1)
        with torch.no_grad():
            real = [features / _length(features) for features in self._features(x)]
        heads = [head.model[-1].weight for head in self.lpips.lins]  # (1, c, 1, 1) each, not negative
        layers = zip(self._features(x_hat), real, heads, strict=True)
        return torch.stack([_Distance.apply(*layer) for layer in layers]).sum()

    def _features(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) -> five feature maps (B, c, h, w) in float32."""
        return [features.float() for features in self.lpips.net(self.lpips.scaling_layer(x))]

    def _load_backbone(self, given: Mapping[str, Tensor], source: str) -> None:
        """Raises BadFileError, which names the source, unless all weights are there, of their shapes, and finite."""
        # lpips groups torchvision's `features` into slices, with their numbers: slice2.5.weight is features.5.weight.
        backbone: dict[str, Tensor] = self.lpips.net.state_dict()
        wanted = {name: "features." + name.split(".", 1)[1] for name in backbone}
        for name, key in wanted.items():
            if key not in given or given[key].shape != backbone[name].shape or not given[key].is_floating_point():
                raise BadFileError(f"{source}: is not {type(self.lpips.net).__name__}: no fitting {key}")
        try:
            weights = {name: given[key].to(torch.float32) for name, key in wanted.items()}
        except RuntimeError as error:  # safetensors knows formats of four bits, from which torch does not convert
            raise BadFileError(f"{source}: holds numbers of a format that cannot be read ({error})") from None
        for name, tensor in weights.items():
            if not tensor.isfinite().all():
                raise BadFileError(f"{source}: {wanted[name]} holds numbers that are not finite")
        self.lpips.net.load_state_dict(weights, strict=True)


def check_download(name: str) -> None:
    """Check the file of this name that torchvision has downloaded before, if there is one.

    torchvision checks what it downloads, but unpickles what is there already without a look, and a pickle runs code.

    Raises:
        BadFileError: its SHA-256 is not the one that its name promises.
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
    """The convolutions, `features...`, of the file given as perceptual.weights.

    Raises:
        ConfigError: there is no such file.
        BadFileError: it is damaged, or not safetensors.
    """
    key = "perceptual.weights"
    return read_tensors(require_file(Path(given), key, CHOICES), key, "features.")[0]


class _Distance(torch.autograd.Function):
    """Features of x_hat (B, c, h, w), unit-length ones of x, head w (1, c, 1, 1) -> mean of the weighted squares ().

    With u = f / |f| and d = u - u_x this is the mean over B, h, w of sum_c w d^2 (equation 1), whose gradient at f is
    (g - u sum_c(g u)) / |f| for g = 2 w d / (B h w). Autograd would keep and read twice as many tensors of this size.
    Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, real: Tensor, head: Tensor) -> Tensor:
        length = _length(features)
        unit = features / length
        apart = unit - real
        ctx.save_for_backward(unit, length, apart, head)
        return (apart.square().mean(dim=(0, 2, 3)) * head.flatten()).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        unit, length, apart, head = ctx.saved_tensors
        positions = length.numel()  # B h w
        g = apart * (head * (2.0 / positions * gradients[0]))
        along = (g * unit).sum(dim=1, keepdim=True)
        return g.addcmul_(unit, along, value=-1.0).div_(length), None, None


def _length(features: Tensor) -> Tensor:
    """(B, c, h, w) -> Euclidean length at each position (B, 1, h, w), a little more than 0."""
    return torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON
