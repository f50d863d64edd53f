"""SimVQ: the codebook is a learned linear map of frozen random vectors, so that all codes move together and none dies.

Zhu et al., "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer" (2024):

    codes = C W   with C (V, d) frozen and W (d, d) learned
    loss  = |sg[z] - e|^2  (codebook, learns W)  +  beta * |z - sg[e]|^2  (commitment)

vector_quantize_pytorch has a SimVQ, which the tests compare with. It is one buffer and one linear layer, and its lookup
holds a matrix of all vectors by all codes; ours does not (nearest.py).
"""

from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.nearest import nearest
from stage1_tokenizer.bottlenecks.space import CodeSpace, grid_of
from stage1_tokenizer.bottlenecks.straight import rotate, straight_through
from stage1_tokenizer.bottlenecks.vq import vq_loss
from stage1_tokenizer.config.base import Channels, Codes, Config


class SimVqConfig(Config):
    """Vector quantizer whose codebook is a learned linear map of frozen random vectors; a large one stays in use."""

    kind: Literal["simvq"] = "simvq"
    codebook_size: Codes = 1024
    """V, the number of codes."""
    code_dim: Channels | None = None
    """Dimension of the code vectors; null: that of the latent."""
    beta: NonNegativeFloat = 0.25
    """Weight of the commitment term, which pulls the encoder to the codes; it does not touch the codebook term."""
    rotation: bool = False
    """Turn the gradient as the code is turned against the latent (the rotation trick), instead of straight-through."""


class SimVq(Bottleneck):
    """z (B, D, h, w) -> Bottlenecked with codes (B, h, w, 1)."""

    depth = 1
    frozen: Tensor

    def __init__(self, config: SimVqConfig, latent_channels: int) -> None:
        super().__init__()
        code_dim = config.code_dim or latent_channels
        self.config = config
        self.codebook_size = config.codebook_size
        self.space = CodeSpace(latent_channels, code_dim)
        # A persistent buffer: it is random, so a checkpoint without it could not be read.
        self.register_buffer("frozen", torch.randn(config.codebook_size, code_dim) * code_dim**-0.5)
        self.transform = nn.Linear(code_dim, code_dim, bias=False)

    @property
    def codebook(self) -> Tensor:
        """(V, code_dim) float32, with the gradient to the linear map."""
        with torch.autocast(self.frozen.device.type, enabled=False):
            return self.transform(self.frozen)

    def forward(self, z: Tensor) -> Bottlenecked:
        vectors = self.space.into(z)  # (N, code_dim), N = B * h * w
        # float32 with autocast off on every device: in bf16 the distances of near codes are equal.
        with torch.autocast(z.device.type, enabled=False):
            codebook = self.codebook  # (V, code_dim)
            ids = nearest(vectors.detach(), codebook.detach())  # (N,)
            chosen = codebook[ids]  # (N, code_dim)
            loss, commitment = vq_loss(vectors, chosen, self.config.beta, by_gradient=True)
            through = (rotate if self.config.rotation else straight_through)(vectors, chosen.detach())
            stats = {"commitment": commitment, "latent_norm": vectors.detach().norm(dim=-1).mean()}
        grid = grid_of(z)
        return Bottlenecked(self.space.back(through, grid), ids.view(*grid, 1), loss, stats)

    def vectors(self, codes: Tensor) -> Tensor:
        """codes (B, h, w, 1) -> z_q (B, D, h, w)."""
        return self.space.back(self.codebook[codes.flatten()], codes.shape[:3])

    def codebooks(self) -> list[Tensor]:
        return [self.codebook.detach()]
