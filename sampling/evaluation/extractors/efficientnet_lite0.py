"""EfficientNet-Lite0: a small ImageNet classifier, for Fréchet distances on machines without Inception's weights.

Tan and Le, "EfficientNet" (2019), in its variant for mobile processors (2020): no squeeze-and-excitation, ReLU6, stem
and head of fixed width. TensorFlow trained it, so padding is TensorFlow's "SAME", which is asymmetric at stride 2.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sampling.evaluation.extractors.base import Extracted, Extractor, load_weights
from stage1_tokenizer.config.base import Config
from stage1_tokenizer.engine.checkpoint import read_tensors
from stage1_tokenizer.engine.files import file_sha256, require_file

BLOCKS = (
    # kernel, stride, expansion, channels in, channels out, repeats
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)
HEAD = 1280
"""Number of features."""
CLASSES = 1000
SIZE = 224
AT_ONCE = 8
"""Images that go through the network together on a CPU, so that a layer fits into its cache."""
FOLDED = {
    "_conv_stem": "_bn0",
    "_conv_head": "_bn1",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
}
"""Convolutions and the BatchNorm that follows each, in the network and in its blocks."""
CHOICES = "give EfficientNet-Lite0's weights as a safetensors file with the keys of EfficientNet-PyTorch"


class EfficientNetLite0Config(Config):
    """EfficientNet-Lite0's 1280 pooled features. Distances in them are not an FID."""

    kind: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    weights: str
    """Path of a safetensors file with the key names of EfficientNet-PyTorch (`_conv_stem.weight`, ...), in any
    floating-point format."""


class EfficientNetLite0Extractor(Extractor):
    """EfficientNet-Lite0 as an extractor.

    Features: the last convolution's output, averaged over positions. Logits: ImageNet's 1000 classes.
    """

    def __init__(self, config: EfficientNetLite0Config, key: str) -> None:
        """Load the weights. Raises ConfigError or BadFileError: they are missing or do not fit."""
        path = require_file(Path(config.weights), f"{key}.weights", CHOICES)
        super().__init__("EfficientNet-Lite0", HEAD, (SIZE, SIZE), file_sha256(path), is_inception=False)
        with torch.device("meta"):
            self.network = EfficientNetLite0()
        load_weights(self.network, read_tensors(path, f"{key}.weights")[0], f"{key}.weights {path}")
        self.network.fold()
        self.network.to(memory_format=torch.channels_last)

    def _extract(self, images: Tensor) -> Extracted:
        x = (images.float() - 127.0) / 128.0  # as in its training
        x = x.contiguous(memory_format=torch.channels_last)
        at_once = AT_ONCE if x.device.type == "cpu" else len(x)
        parts = [self.network(part) for part in torch.split(x, at_once)]
        return Extracted(*(torch.cat(part) for part in zip(*parts, strict=True)))


class EfficientNetLite0(nn.Module):
    """The network, with the parameter names of EfficientNet-PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2)
        self._bn0 = _norm(32)
        blocks: list[nn.Module] = []
        for kernel, stride, expansion, into, out, repeats in BLOCKS:
            blocks.append(_Block(kernel, stride, expansion, into, out))
            blocks += [_Block(kernel, 1, expansion, out, out) for _ in range(repeats - 1)]
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(BLOCKS[-1][4], HEAD, 1, 1)
        self._bn1 = _norm(HEAD)
        self._fc = nn.Linear(HEAD, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 224, 224) in [-1, 1] -> features (B, 1280), logits (B, 1000)."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))  # (B, 1280, 7, 7)
        features = x.mean(dim=(2, 3))
        return features, self._fc(features)

    def fold(self) -> None:
        """Fold each frozen BatchNorm into the convolution before it: on one core 28 ms per image instead of 47."""
        for module in (self, *self._blocks):
            for convolution, norm in FOLDED.items():
                if hasattr(module, convolution):
                    fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                    setattr(module, convolution, fused)
                    setattr(module, norm, nn.Identity())


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME".

    n positions become ceil(n / stride). Half of the padding comes before the input and half after; an odd row or column
    comes after.
    """

    def __init__(self, into: int, out: int, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__(into, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve (B, C, H, W)."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
        if height % 2 or width % 2:
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
            height = width = 0
        return F.conv2d(x, self.weight, self.bias, stride, (height // 2, width // 2), 1, self.groups)


class _Block(nn.Module):
    """An inverted residual: expand, depthwise convolution, project (Sandler et al., MobileNetV2, 2018)."""

    def __init__(self, kernel: int, stride: int, expansion: int, into: int, out: int) -> None:
        super().__init__()
        wide = into * expansion
        if expansion > 1:
            self._expand_conv = SameConv(into, wide, 1, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = SameConv(wide, out, 1, 1)
        self._bn2 = _norm(out)
        self._expands, self._adds = expansion > 1, stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to (B, C, H, W)."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self._expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self._adds else y


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
