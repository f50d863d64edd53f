"""The bottlenecks: one config class per kind, one union, one build. To add a kind: a file, a member, a case."""

from typing import Annotated, assert_never

from pydantic import Field

from stage1_tokenizer.bottlenecks.base import Bottleneck
from stage1_tokenizer.bottlenecks.none import NoBottleneck, NoBottleneckConfig
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer, VqConfig

BottleneckConfig = Annotated[VqConfig | NoBottleneckConfig, Field(discriminator="kind")]


def build_bottleneck(config: BottleneckConfig, latent_channels: int, processes: int = 1) -> Bottleneck:
    """`processes` says whether statistics of the codebook must be summed over several of them."""
    match config:
        case VqConfig():
            return VectorQuantizer(config, latent_channels, processes)
        case NoBottleneckConfig():
            return NoBottleneck()
        case _:
            assert_never(config)
