"""SimVQ: the codebook is a learned linear map of frozen random vectors, so that all codes move together and none dies.

Zhu et al., "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer" (2024):

    codes = C W   with C (V, d) frozen and W (d, d) learned
    loss  = |sg[z] - e|^2  (codebook, learns W)  +  beta * |z - sg[e]|^2  (commitment)

vector_quantize_pytorch has a SimVQ, which the tests compare with. It is one buffer and one linear layer, and its lookup
holds a matrix of all vectors by all codes; ours does not (nearest.py).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import BaseBottleneckConfig, Beta, CodeDim
from stage1_tokenizer.bottlenecks.nearest import nearest
from stage1_tokenizer.bottlenecks.space import Quantized, Quantizer
from stage1_tokenizer.bottlenecks.straight import rotate, straight_through
from stage1_tokenizer.bottlenecks.vq import stats_of, vq_loss
from stage1_tokenizer.config.value_types import CodebookSize


class SimVqConfig(BaseBottleneckConfig):
    """Vector quantizer whose codebook is a learned linear map of frozen random vectors; a large one stays in use."""

    kind: Literal["simvq"] = "simvq"
    codebook_size: CodebookSize = 1024
    """V, the number of codes."""
    code_dim: CodeDim = None
    """Dimension of the code vectors; null: that of the latent."""
    beta: Beta = 0.25
    """Weight of the commitment term, which pulls the encoder to the codes; it does not touch the codebook term."""
    rotation: bool = False
    """Turn the gradient as the code is turned against the latent (the rotation trick), instead of straight-through."""


class SimVq(Quantizer):
    """One codebook, one code per position."""

    frozen: Tensor

    def __init__(self, config: SimVqConfig, latent_channels: int) -> None:
        super().__init__(latent_channels, config.code_dim, config.codebook_size)
        self.config = config
        d = self.space.dim
        # A persistent buffer: it is random, so a checkpoint without it could not be read.
        self.register_buffer("frozen", torch.randn(config.codebook_size, d) * d**-0.5)
        self.transform = nn.Linear(d, d, bias=False)

    @property
    def codebook(self) -> Tensor:
        """(V, d) float32, with the gradient to the linear map."""
        with torch.autocast(self.frozen.device.type, enabled=False):
            return self.transform(self.frozen)

    def quantize(self, vectors: Tensor) -> Quantized:
        codebook = self.codebook  # (V, d)
        ids = nearest(vectors.detach(), codebook.detach())  # (N,)
        chosen = codebook[ids]  # (N, d)
        loss, commitment = vq_loss(vectors, chosen, self.config.beta, by_gradient=True)
        through = (rotate if self.config.rotation else straight_through)(vectors, chosen.detach())
        return Quantized(through, ids, loss, stats_of(vectors, commitment))

    def values(self, codes: Tensor) -> Tensor:
        return self.codebook[codes[:, 0]]

    def codebooks(self) -> list[Tensor]:
        return [self.codebook.detach()]
