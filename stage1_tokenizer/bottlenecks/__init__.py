"""The bottlenecks between encoder and decoder, and `build_bottleneck`, which builds one from its config.

    vq, vq_library     vector quantization            fsq, lfq      quantization without a learned codebook
    rvq, grouped_rvq   residual quantization          kl            the normal latent of a VAE
    simvq              a codebook that moves whole    none          a plain autoencoder
    dictionary         sparse combinations of atoms

To add a kind: write one file, add one member to `BottleneckConfig` and one `case` to `build_bottleneck`.
"""

from typing import Annotated, assert_never

from pydantic import Field

from stage1_tokenizer.bottlenecks.base import Bottleneck
from stage1_tokenizer.bottlenecks.dictionary import Dictionary, DictionaryConfig
from stage1_tokenizer.bottlenecks.fsq import FiniteScalarQuantizer, FsqConfig
from stage1_tokenizer.bottlenecks.grouped_rvq import GroupedResidualQuantizer, GroupedRvqConfig
from stage1_tokenizer.bottlenecks.kl import KlBottleneck, KlConfig
from stage1_tokenizer.bottlenecks.lfq import LfqConfig, LookupFreeQuantizer
from stage1_tokenizer.bottlenecks.none import NoBottleneck, NoBottleneckConfig
from stage1_tokenizer.bottlenecks.rvq import ResidualQuantizer, RvqConfig
from stage1_tokenizer.bottlenecks.simvq import SimVq, SimVqConfig
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer, VqConfig
from stage1_tokenizer.bottlenecks.vq_library import LibraryVectorQuantizer, VqLibraryConfig
from stage1_tokenizer.engine.errors import ConfigError

BottleneckConfig = Annotated[
    VqConfig
    | VqLibraryConfig
    | RvqConfig
    | GroupedRvqConfig
    | FsqConfig
    | LfqConfig
    | SimVqConfig
    | NoBottleneckConfig
    | KlConfig
    | DictionaryConfig,
    Field(discriminator="kind"),
]


def build_bottleneck(
    config: BottleneckConfig, latent_channels: int, processes: int = 1, encoded_channels: int | None = None
) -> Bottleneck:
    """Build a bottleneck for latents of D channels.

    processes: number of processes that train it together. encoded_channels: channels of the encoder's output, if they
        are not those of the latent.

    Raises:
        ConfigError: this kind of bottleneck receives latents only.
    """
    if encoded_channels is not None and not isinstance(config, KlConfig):
        raise ConfigError(f"network.moments is for bottleneck.kind kl, not for {config.kind}; leave it out")
    match config:
        case VqConfig():
            return VectorQuantizer(config, latent_channels, processes)
        case VqLibraryConfig():
            return LibraryVectorQuantizer(config, latent_channels, processes)
        case FsqConfig():
            return FiniteScalarQuantizer(config, latent_channels)
        case LfqConfig():
            return LookupFreeQuantizer(config, latent_channels, processes)
        case SimVqConfig():
            return SimVq(config, latent_channels, processes)
        case RvqConfig():
            return ResidualQuantizer(config, latent_channels, processes)
        case GroupedRvqConfig():
            return GroupedResidualQuantizer(config, latent_channels, processes)
        case NoBottleneckConfig():
            return NoBottleneck()
        case KlConfig():
            return KlBottleneck(config, latent_channels, encoded_channels)
        case DictionaryConfig():
            return Dictionary(config, latent_channels)
        case _:
            assert_never(config)
