"""The architecture of a VQGAN, read from the names and shapes of its weights."""

import math
from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any, NamedTuple

from torch import Tensor

from stage1_tokenizer.engine.errors import BadFileError, shorten
from stage1_tokenizer.import_weights.layer_names import LayerNames, Side

State = Mapping[str, Tensor]
MOST = 64
"""Levels, and blocks per level, that are looked for."""


class Architecture(NamedTuple):
    """Sizes and layers of a VQGAN."""

    image_channels: int
    widths: list[int]
    """Channels of each level, from the full resolution down."""
    blocks: int
    """Residual blocks per level of the encoder; the decoder has one more."""
    attention: list[int]
    """Levels with attention."""
    middle_attention: bool
    encoded_channels: int
    """Channels of the encoder's output."""
    latent_channels: int
    """Channels of the decoder's input."""

    def network_tree(self, norm_groups: int) -> dict[str, Any]:
        """Return the config of our network."""
        channels = self.widths[0]
        if any(width % channels for width in self.widths):
            channels = math.gcd(*self.widths)
        return {
            "kind": "vqgan",
            "channels": channels,
            "multipliers": [width // channels for width in self.widths],
            "blocks": self.blocks,
            "attention": self.attention,
            "middle_attention": self.middle_attention,
            "latent_channels": self.latent_channels,
            "moments": self.encoded_channels != self.latent_channels,
            "downsample": 3,
            "norm_groups": norm_groups,
        }


def read_architecture(state: State, names: LayerNames, source: str) -> Architecture:
    """Read the architecture from the weights of a VQGAN.

    Raises:
        BadFileError: a layer is missing that all VQGANs have, or encoder and decoder have not the same levels.
    """

    def size(name: str, axis: int = 0) -> int:
        tensor = state.get(name)
        if tensor is None or tensor.ndim != 4:
            found = (
                "is missing" if tensor is None else f"has the shape {tuple(tensor.shape)}, not that of a convolution"
            )
            raise BadFileError(f"{source}: {shorten(name)} {found}")
        return tensor.shape[axis]

    blocks_there = {name.rsplit(".", 2)[0] for name in state}  # "encoder.down.0.block.0" of its "conv1.weight"

    def number_of(name: Any) -> int:
        return len(list(takewhile(lambda i: i < MOST and name(i) in blocks_there, count())))

    def has_attention(name: str) -> bool:
        return any(f"{name}.{parts.norm}.weight" in state for parts in names.attention_parts)

    size("encoder.conv_in.weight")
    levels = number_of(lambda level: names.block("encoder", level, 0))
    names.levels = levels
    blocks = number_of(lambda index: names.block("encoder", 0, index))
    if not levels:
        raise BadFileError(f"{source}: {names.block('encoder', 0, 0)} is missing")
    architecture = Architecture(
        image_channels=size("encoder.conv_in.weight", 1),
        widths=[size(f"{names.block('encoder', level, 0)}.conv2.weight") for level in range(levels)],
        blocks=blocks,
        attention=[level for level in range(levels) if has_attention(names.attention("encoder", level, 0))],
        middle_attention=has_attention(names.middle("encoder")[1]),
        encoded_channels=size("encoder.conv_out.weight"),
        latent_channels=size("decoder.conv_in.weight", 1),
    )
    above = [level for level in range(levels) if has_attention(names.attention("decoder", level, 0))]
    if above != architecture.attention:
        level = min({*above} ^ {*architecture.attention})
        side: Side = "decoder" if level in above else "encoder"
        raise BadFileError(
            f"{source}: only the {side} has {names.attention(side, level, 0)}; in our network both have attention at "
            "the same levels"
        )
    return architecture
