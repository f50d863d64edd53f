"""Grouped residual vector quantization: the channels are split into groups, each with residual codebooks of its own.

Yang et al., "HiFi-Codec: Group-residual Vector Quantization" (2023). The groups are quantized independently of each
other, so K = depth * groups codes describe a position, and each search is in a space of fewer dimensions.
"""

from typing import Literal, Self, cast

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.rvq import MOST_CODES, ResidualCodebooks, ResidualConfig
from stage1_tokenizer.bottlenecks.space import CodeSpace, grid_of
from stage1_tokenizer.engine.errors import ConfigError


class GroupedRvqConfig(ResidualConfig):
    """Residual vector quantizer over groups of channels: `depth` x `groups` codes per position."""

    kind: Literal["grouped_rvq"] = "grouped_rvq"
    depth: int = Field(2, ge=1, le=MOST_CODES)
    """Codes per position and group, coarse to fine."""
    groups: int = Field(2, ge=2, le=MOST_CODES)
    """Groups into which the channels of the code vectors are split."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.code_dim is not None and self.code_dim % self.groups:
            raise ValueError(f"code_dim {self.code_dim} cannot be split into {self.groups} equal groups")
        return self


class GroupedResidualQuantizer(Bottleneck):
    """z (B, D, h, w) -> Bottlenecked with codes (B, h, w, depth * groups), the coarse codes of all groups first."""

    def __init__(self, config: GroupedRvqConfig, latent_channels: int, processes: int = 1) -> None:
        super().__init__()
        self.space = CodeSpace(latent_channels, config.code_dim)
        if self.space.dim % config.groups:
            raise ConfigError(
                f"bottleneck.groups {config.groups} does not divide the latent's {self.space.dim} channels; "
                "change it, network.latent_channels or bottleneck.code_dim"
            )
        self.depth, self.codebook_size = config.depth * config.groups, config.codebook_size
        self.groups = nn.ModuleList(
            ResidualCodebooks(config, self.space.dim // config.groups, processes) for _ in range(config.groups)
        )

    def forward(self, z: Tensor) -> Bottlenecked:
        vectors = self.space.into(z)  # (N, d), N = B * h * w
        with torch.autocast(z.device.type, enabled=False):  # distances in float32
            quantized = [group(part) for group, part in zip(self.groups, self._split(vectors), strict=True)]
            through, ids, losses, commitments = (list(part) for part in zip(*quantized, strict=True))
            commitment = torch.stack(commitments).mean()  # the mean over groups is the mean over all channels
            loss = torch.stack(losses).mean()
            stats = {"commitment": commitment, "latent_norm": vectors.detach().norm(dim=-1).mean()}
        grid = grid_of(z)
        codes = torch.stack(ids, dim=2).view(*grid, self.depth)  # (N, depth, G) -> (B, h, w, depth * G)
        return Bottlenecked(self.space.back(torch.cat(through, dim=1), grid), codes, loss, stats)

    def vectors(self, codes: Tensor) -> Tensor:
        ids = rearrange(codes, "B h w (depth G) -> G (B h w) depth", G=len(self.groups))
        parts = [group.vectors(part) for group, part in zip(self._groups(), ids, strict=True)]
        return self.space.back(torch.cat(parts, dim=1), codes.shape[:3])

    def codebooks(self) -> list[Tensor]:
        by_group = [[codebook.vectors.detach() for codebook in group.levels()] for group in self._groups()]
        return [codebook for level in zip(*by_group, strict=True) for codebook in level]

    def start(self, z: Tensor) -> None:
        for group, part in zip(self._groups(), self._split(self.space.into(z)), strict=True):
            group.start(part)

    def finish_step(self) -> None:
        for group in self._groups():
            group.finish_step()

    def drop_step(self) -> None:
        for group in self._groups():
            group.drop_step()

    def _groups(self) -> list[ResidualCodebooks]:
        return [cast("ResidualCodebooks", group) for group in self.groups]

    def _split(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """(N, d) -> for each group (N, d / G)."""
        return vectors.chunk(len(self.groups), dim=1)
