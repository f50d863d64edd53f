"""Grouped residual vector quantization: the channels are split into groups, each with residual codebooks of its own.

Yang et al., "HiFi-Codec: Group-residual Vector Quantization for High Fidelity Audio Codec" (2023). The groups are
quantized independently, so K = depth * groups codes describe a position, and each search is in fewer dimensions.
"""

from typing import Literal, Self, cast

from pydantic import Field, model_validator
from torch import nn

from stage1_tokenizer.bottlenecks.rvq import LARGEST_DEPTH, BaseResidualQuantizer, ResidualCodebooks, ResidualConfig
from stage1_tokenizer.engine.errors import ConfigError


class GroupedRvqConfig(ResidualConfig):
    """Residual vector quantizer over groups of channels: `depth` x `groups` codes per position."""

    kind: Literal["grouped_rvq"] = "grouped_rvq"
    depth: int = Field(2, ge=1, le=LARGEST_DEPTH)
    """Codes per position and group, coarse to fine."""
    groups: int = Field(2, ge=2, le=LARGEST_DEPTH)
    """Number of groups of channels; it must divide the dimension of the codebook vectors."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.code_dim is not None and self.code_dim % self.groups:
            raise ValueError(f"code_dim {self.code_dim} cannot be split into {self.groups} equal groups")
        return self


class GroupedResidualQuantizer(BaseResidualQuantizer):
    """A residual quantizer with several groups of channels."""

    def __init__(self, config: GroupedRvqConfig, latent_channels: int, processes: int = 1) -> None:
        super().__init__(latent_channels, config.code_dim, config.codebook_size, config.depth * config.groups)
        if self.space.dim % config.groups:
            raise ConfigError(
                f"bottleneck.groups {config.groups} does not divide the latent's {self.space.dim} channels; "
                "change it, network.latent_channels or bottleneck.code_dim"
            )
        self.groups = nn.ModuleList(
            ResidualCodebooks(config, self.space.dim // config.groups, processes) for _ in range(config.groups)
        )

    def group_codebooks(self) -> list[ResidualCodebooks]:
        """Return the codebooks of each group."""
        return [cast("ResidualCodebooks", group) for group in self.groups]
