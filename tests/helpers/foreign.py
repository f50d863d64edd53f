"""Foreign tokenizers for tests: the import command, random checkpoints in the layout of a project, a slow reference.

The reference computes with the weights under the names of the project, in float64, one function per layer, written from
the papers and the facts in tests/fixtures/foreign/README.md. It shares no code with the packages.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.commands import ROOT, Ended, names_of, run

FOREIGN = ROOT / "tests" / "fixtures" / "foreign"
COMMAND = "stage1_tokenizer/import_weights/__main__.py"
State = dict[str, Tensor]


def import_weights(*arguments: object) -> Ended:
    """Run the import command."""
    return run(names_of(COMMAND)["main"], *arguments)


class Layout(NamedTuple):
    """Sizes of a random checkpoint, and the names of its project."""

    llamagen: bool = False
    widths: tuple[int, ...] = (32, 64)
    blocks: int = 1
    attention: tuple[int, ...] = (1,)
    latent: int = 6
    dim: int = 6
    size: int = 40

    def level(self, side: str, level: int) -> str:
        """Return the name of a level."""
        if self.llamagen:
            return f"{side}.conv_blocks.{level if side == 'encoder' else len(self.widths) - 1 - level}"
        return f"{side}.{'down' if side == 'encoder' else 'up'}.{level}"

    @property
    def block(self) -> str:
        """Name of the residual blocks of a level."""
        return "res" if self.llamagen else "block"

    def middle(self, side: str) -> tuple[str, str, str]:
        """Return the names of the middle blocks."""
        names = ("0", "1", "2") if self.llamagen else ("block_1", "attn_1", "block_2")
        return tuple(f"{side}.mid.{name}" for name in names)  # type: ignore[return-value]


def random_state(layout: Layout, seed: int = 0) -> State:
    """Draw the weights of a checkpoint; norms and biases are away from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def convolution(name: str, c_in: int, c_out: int, kernel: int) -> None:
        scale = 1 / math.sqrt(c_in * kernel**2)
        state[f"{name}.weight"] = torch.randn(c_out, c_in, kernel, kernel, generator=generator) * scale
        state[f"{name}.bias"] = torch.randn(c_out, generator=generator) * 0.2

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(channels, generator=generator)
        state[f"{name}.bias"] = 0.3 * torch.randn(channels, generator=generator)

    def block(name: str, c_in: int, c_out: int) -> None:
        norm(f"{name}.norm1", c_in)
        convolution(f"{name}.conv1", c_in, c_out, 3)
        norm(f"{name}.norm2", c_out)
        convolution(f"{name}.conv2", c_out, c_out, 3)
        if c_in != c_out:
            convolution(f"{name}.nin_shortcut", c_in, c_out, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{name}.{part}", channels, channels, 1)

    def middle(side: str, channels: int) -> None:
        first, between, second = layout.middle(side)
        block(first, channels, channels)
        attention(between, channels)
        block(second, channels, channels)

    widths, last = layout.widths, len(layout.widths) - 1
    convolution("encoder.conv_in", 3, widths[0], 3)
    for level, width in enumerate(widths):
        for index in range(layout.blocks):
            before = widths[max(level - 1, 0)] if index == 0 else width
            block(f"{layout.level('encoder', level)}.{layout.block}.{index}", before, width)
            if level in layout.attention:
                attention(f"{layout.level('encoder', level)}.attn.{index}", width)
        if level < last:
            convolution(f"{layout.level('encoder', level)}.downsample.conv", width, width, 3)
    middle("encoder", widths[-1])
    norm("encoder.norm_out", widths[-1])
    convolution("encoder.conv_out", widths[-1], layout.latent, 3)
    convolution("decoder.conv_in", layout.latent, widths[-1], 3)
    middle("decoder", widths[-1])
    for level in reversed(range(len(widths))):
        for index in range(layout.blocks + 1):
            before = widths[min(level + 1, last)] if index == 0 else widths[level]
            block(f"{layout.level('decoder', level)}.{layout.block}.{index}", before, widths[level])
            if level in layout.attention:
                attention(f"{layout.level('decoder', level)}.attn.{index}", widths[level])
        if level > 0:
            convolution(f"{layout.level('decoder', level)}.upsample.conv", widths[level], widths[level], 3)
    norm("decoder.norm_out", widths[0])
    convolution("decoder.conv_out", widths[0], 3, 3)
    convolution("quant_conv", layout.latent, layout.dim, 1)
    convolution("post_quant_conv", layout.dim, layout.latent, 1)
    state["quantize.embedding.weight"] = torch.randn(layout.size, layout.dim, generator=generator)
    return state


class Reference:
    """A slow VQGAN that computes in float64 from the weights of a checkpoint."""

    def __init__(self, state: State, layout: Layout) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.layout = layout

    def convolution(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """Apply a convolution; one of stride 2 pads one row below and one column on the right."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        if stride == 2:
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Normalise groups of channels: 32 of them, eps 1e-6."""
        B, c, h, w = x.shape
        groups = x.reshape(B, 32, -1)
        mean, variance = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, unbiased=False)
        y = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(B, c, h, w)
        return y * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    def swish(self, x: Tensor) -> Tensor:
        """Return x times its sigmoid."""
        return x / (1 + (-x).exp())

    def block(self, name: str, x: Tensor) -> Tensor:
        """Apply a residual block."""
        y = self.convolution(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", x)))
        y = self.convolution(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", y)))
        short = f"{name}.nin_shortcut"
        return y + (self.convolution(short, x) if f"{short}.weight" in self.state else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        """Apply single-head attention over all positions."""
        B, c, h, w = x.shape
        y = self.norm(f"{name}.norm", x)
        q, k, v = (self.convolution(f"{name}.{part}", y).reshape(B, c, h * w) for part in "qkv")
        weights = torch.einsum("bci,bcj->bij", q, k).div(c**0.5).softmax(2)
        y = torch.einsum("bij,bcj->bci", weights, v).reshape(B, c, h, w)
        return x + self.convolution(f"{name}.proj_out", y)

    def middle(self, side: str, x: Tensor) -> Tensor:
        """Apply the middle blocks."""
        first, between, second = self.layout.middle(side)
        return self.block(second, self.attention(between, self.block(first, x)))

    def level(self, side: str, level: int, x: Tensor) -> Tensor:
        """Apply the residual blocks and attentions of a level."""
        name = self.layout.level(side, level)
        for index in range(self.layout.blocks + (side == "decoder")):
            x = self.block(f"{name}.{self.layout.block}.{index}", x)
            if level in self.layout.attention:
                x = self.attention(f"{name}.attn.{index}", x)
        return x

    def vectors(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) to the vectors before quantization (B, d, h, w)."""
        x = self.convolution("encoder.conv_in", images.double())
        for level in range(len(self.layout.widths)):
            x = self.level("encoder", level, x)
            if level < len(self.layout.widths) - 1:
                x = self.convolution(f"{self.layout.level('encoder', level)}.downsample.conv", x, stride=2)
        x = self.swish(self.norm("encoder.norm_out", self.middle("encoder", x)))
        return self.convolution("quant_conv", self.convolution("encoder.conv_out", x))

    def codes(self, vectors: Tensor, kind: str) -> Tensor:
        """Return the codes (B, h, w) of vectors; kind: nearest, sphere or product."""
        z, e = vectors.permute(0, 2, 3, 1)[..., None, :], self.codebook(kind)
        if kind == "product":
            return (z * e).sum(-1).argmax(-1)
        z = z / z.norm(dim=-1, keepdim=True) if kind == "sphere" else z
        return (z - e).square().sum(-1).argmin(-1)

    def codebook(self, kind: str) -> Tensor:
        """Return the codebook (V, d) as it is used."""
        e = self.state["quantize.embedding.weight"]
        return e / e.norm(dim=-1, keepdim=True) if kind == "sphere" else e

    def images(self, codes: Tensor, kind: str) -> Tensor:
        """Decode codes (B, h, w) to images (B, 3, H, W)."""
        x = self.convolution("post_quant_conv", self.codebook(kind)[codes].permute(0, 3, 1, 2))
        x = self.middle("decoder", self.convolution("decoder.conv_in", x))
        for level in reversed(range(len(self.layout.widths))):
            x = self.level("decoder", level, x)
            if level > 0:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.convolution(f"{self.layout.level('decoder', level)}.upsample.conv", x)
        return self.convolution("decoder.conv_out", self.swish(self.norm("decoder.norm_out", x)))


def write_checkpoint(path: Path, state: State, key: str = "state_dict") -> Path:
    """Write a checkpoint of torch with the weights under a key."""
    torch.save({key: state, "global_step": 3}, path)
    return path


def relative_error(given: Tensor, expected: Tensor) -> float:
    """Return the greatest difference, in units of the greatest expected value."""
    return float((given - expected).abs().max() / expected.abs().max())
