"""The network of the VQGAN paper: residual blocks, self-attention at chosen levels, half the resolution per level.

Esser, Rombach and Ommer, "Taming Transformers for High-Resolution Image Synthesis" (2021), appendix, table 7.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BeforeValidator, Field, NonNegativeInt, model_validator
from torch import Tensor, nn

from stage1_tokenizer.config.value_types import Blocks, Channels, Count
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.networks.base import BaseNetworkConfig, Decoder
from stage1_tokenizer.networks.group_norm import build_norm, count_groups


class VqganNetworkConfig(BaseNetworkConfig):
    """ResNet encoder and decoder with GroupNorm, SiLU and attention at chosen levels."""

    kind: Literal["vqgan"] = "vqgan"
    channels: Channels = 32
    """Width of the first level; level i has a width of channels * multipliers[i]."""
    multipliers: tuple[Channels, ...] = Field((1, 2, 4), min_length=1, max_length=16)
    """Width of each level as a multiple of `channels`. The resolution halves between levels: factor 2 ** (len - 1)."""
    blocks: Blocks = 1
    """Residual blocks per level of the encoder; the decoder has one more."""
    attention: tuple[NonNegativeInt, ...] = Field((), max_length=16)
    """Levels (0 is the full resolution) with self-attention after each residual block."""
    middle_attention: bool = True
    """Self-attention between the two residual blocks at the latent resolution."""
    latent_channels: Channels = 64
    """D, the channels of the latent that the bottleneck receives."""
    moments: bool = False
    """The encoder returns 2 D channels, mean and log variance of the latent, instead of D. Only with bottleneck kl, as
    in latent diffusion."""
    downsample: Annotated[Literal[3, 4], BeforeValidator(lambda given: {"3": 3, "4": 4}.get(str(given), given))] = 4
    """Side of the kernels that halve the resolution. 4: one pixel of padding on all sides. 3: one row below and one
    column on the right, as in taming-transformers, LlamaGen and diffusers, whose weights fit then."""
    norm_groups: Count = 32
    """Groups of channels in each norm; a norm whose width they do not divide has the next smaller number that does.
    Choose it so that a group has several channels: a norm of single channels removes the contrast of the image."""
    dropout: float = Field(0.0, ge=0.0, le=1.0)
    """Probability of dropout inside the residual blocks, in 0..1."""

    @model_validator(mode="after")
    def _check(self) -> "VqganNetworkConfig":
        for level in self.attention:
            if level >= len(self.multipliers):
                raise ValueError(
                    f"attention names level {level}, but there are only levels 0..{len(self.multipliers) - 1}"
                )
        return self

    @property
    def factor(self) -> int:
        """Image size divided by latent size."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the full resolution down."""
        return [self.channels * multiplier for multiplier in self.multipliers]

    def check(self, image_size: tuple[int, int]) -> None:
        """Raise ConfigError if a group of a norm has a single value: minus its mean, this value would always be 0."""
        width, factor = self.widths[-1], self.factor
        if image_size == (factor, factor) and count_groups(width, self.norm_groups) == width:
            raise ConfigError(
                f"network.channels {self.channels}: the latent grid of {factor}x{factor} images is 1x1, and its norms "
                f"have one of the {width} channels in each group, so that all images would look alike to the decoder; "
                f"give --data.image_size {2 * factor}, or network.channels that make more than {self.norm_groups} at "
                "the last level"
            )

    @property
    def encoded_channels(self) -> int | None:
        """Channels of the encoder's output if they are not those of the latent; None: they are."""
        return 2 * self.latent_channels if self.moments else None


# Without gradients, `silu` and `add` write into a tensor that nothing else needs. New memory costs more than the
# arithmetic: on a CPU, the first access to a large tensor's pages takes three times as long as the operation itself.


def silu(x: Tensor) -> Tensor:
    """Apply SiLU to x of any shape; in place if gradients are off."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def add(x: Tensor, y: Tensor) -> Tensor:
    """Add x and y; in place in y if gradients are off."""
    return x + y if torch.is_grad_enabled() else y.add_(x)


class Silu(nn.Module):
    """`silu` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape."""
        return silu(x)


class ResidualBlock(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, h, w): norm, SiLU and convolution, twice, plus a shortcut."""

    def __init__(self, c_in: int, c_out: int, config: VqganNetworkConfig) -> None:
        super().__init__()
        self.norm1 = build_norm(c_in, config.norm_groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = build_norm(c_out, config.norm_groups)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, c_in, h, w) -> (B, c_out, h, w)."""
        y = self.conv1(silu(self.norm1(x)))  # (B, c_out, h, w)
        y = self.conv2(self.dropout(silu(self.norm2(y))))
        return add(self.shortcut(x), y)


class AttentionBlock(nn.Module):
    """(B, c, h, w) -> (B, c, h, w): single-head self-attention over all positions, plus the input."""

    def __init__(self, channels: int, norm_groups: int = 32) -> None:
        super().__init__()
        self.norm = build_norm(channels, norm_groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, c, h, w) -> (B, c, h, w)."""
        h = x.shape[2]
        q, k, v = rearrange(self.qkv(self.norm(x)), "B (three c) h w -> three B 1 (h w) c", three=3)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h*w, c)
        return add(x, self.out(rearrange(y, "B 1 (h w) c -> B c h w", h=h)))


FOLD_FROM = 512
"""Smallest number of positions B * h * w at which `Upsample` folds its kernel; with fewer, folding does not pay."""


class Upsample(nn.Module):
    """(B, c, h, w) -> (B, c, 2h, 2w): nearest neighbour, then a 3x3 convolution, which avoids a checkerboard pattern.

    On a CPU both are computed as one transposed convolution of 4x4 and stride 2. Several of the nine pixels under the
    3x3 kernel are copies of one pixel, so their weights can be added up first (`fold_kernel`). This needs four products
    per new pixel instead of nine, and no larger tensor in between. It is more than twice as fast, forward and backward,
    and equal up to rounding. On other devices it was not measured.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, c, h, w) -> (B, c, 2h, 2w)."""
        is_exporting = torch.compiler.is_exporting()  # a branch on the number of positions would be fixed in the export
        if not is_exporting and x.device.type == "cpu" and x.shape[0] * x.shape[2] * x.shape[3] >= FOLD_FROM:
            return F.conv_transpose2d(x, fold_kernel(self.conv.weight), self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def fold_kernel(weight: Tensor) -> Tensor:
    """Turn a 3x3 kernel (c_out, c_in, 3, 3) after nearest-neighbour upsampling into the 4x4 kernel (c_in, c_out, 4, 4)
    of an equal transposed convolution of stride 2: the sums over all 2x2 windows that overlap the kernel."""
    sums = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)  # (c_out, c_in, 4, 4)
    return sums.flip(2, 3).transpose(0, 1)


class CornerDownsample(nn.Conv2d):
    """(B, c, h, w) -> (B, c, h // 2, w // 2): a 3x3 convolution after one row of zeros below, one column on the right.

    The 4x4 convolution of stride 2 and padding 1 whose first row and column are 0 is equal.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, c, h, w) -> (B, c, h // 2, w // 2)."""
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def build_downsample(channels: int, config: VqganNetworkConfig) -> nn.Conv2d:
    """Build the convolution of stride 2 between two levels."""
    return CornerDownsample(channels) if config.downsample == 3 else nn.Conv2d(channels, channels, 4, 2, padding=1)


def _build_middle(channels: int, config: VqganNetworkConfig) -> list[nn.Module]:
    attention = [AttentionBlock(channels, config.norm_groups)] if config.middle_attention else []
    block = (channels, channels, config)
    return [ResidualBlock(*block), *attention, ResidualBlock(*block)]


class VqganEncoder(nn.Sequential):
    """x (B, C, H, W) in [-1, 1] -> z (B, D, H / factor, W / factor), or 2 D channels with `moments`."""

    def __init__(self, image_channels: int, config: VqganNetworkConfig) -> None:
        widths = config.widths
        layers: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 3, padding=1)]
        width = widths[0]
        for level, level_width in enumerate(widths):
            if level > 0:
                layers.append(build_downsample(width, config))
            for _ in range(config.blocks):
                layers.append(ResidualBlock(width, level_width, config))
                width = level_width
                if level in config.attention:
                    layers.append(AttentionBlock(width, config.norm_groups))
        layers += _build_middle(width, config)
        encoded = config.encoded_channels or config.latent_channels
        layers += [build_norm(width, config.norm_groups), Silu(), nn.Conv2d(width, encoded, 3, padding=1)]
        super().__init__(*layers)


class VqganDecoder(Decoder):
    """z_q (B, D, h, w) -> x_hat (B, C, h * factor, w * factor)."""

    def __init__(self, image_channels: int, config: VqganNetworkConfig) -> None:
        widths = config.widths
        width = widths[-1]
        layers: list[nn.Module] = [
            nn.Conv2d(config.latent_channels, width, 3, padding=1),
            *_build_middle(width, config),
        ]
        for level in reversed(range(len(widths))):
            for _ in range(config.blocks + 1):
                layers.append(ResidualBlock(width, widths[level], config))
                width = widths[level]
                if level in config.attention:
                    layers.append(AttentionBlock(width, config.norm_groups))
            if level > 0:
                layers.append(Upsample(width))
        layers += [build_norm(width, config.norm_groups), Silu(), nn.Conv2d(width, image_channels, 3, padding=1)]
        super().__init__(*layers)
