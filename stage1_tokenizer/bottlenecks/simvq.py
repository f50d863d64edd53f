"""SimVQ: the codebook is a learned linear map of frozen random vectors, so all codes move together and none dies.

Zhu et al., "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer" (2024), with z a
latent vector, e its codebook vector and sg the stop-gradient:

    codebook = C W   with C (V, d) frozen and W (d, d) learned
    loss     = |sg[z] - e|^2  (codebook, learns W)  +  beta * |z - sg[e]|^2  (commitment)

vector_quantize_pytorch has a SimVQ too, with which the tests compare this one. It is not used, because its search holds
a matrix of all vectors by all codes, and nearest.py does not.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import BaseBottleneckConfig, Beta, CodeDim
from stage1_tokenizer.bottlenecks.nearest import FAST_PATHS, find_nearest
from stage1_tokenizer.bottlenecks.quantizer import Quantized, Quantizer
from stage1_tokenizer.bottlenecks.straight_through import rotation_trick, straight_through
from stage1_tokenizer.bottlenecks.vq import quantizer_stats, vq_loss
from stage1_tokenizer.config.value_types import CodebookSize
from stage1_tokenizer.engine.processor import FastPath


class SimVqConfig(BaseBottleneckConfig):
    """Vector quantizer whose codebook is a learned linear map of frozen random vectors; a large one stays in use."""

    fast_paths: ClassVar[tuple[FastPath, ...]] = FAST_PATHS
    kind: Literal["simvq"] = "simvq"
    codebook_size: CodebookSize = 1024
    """V, the number of codes."""
    code_dim: CodeDim = None
    """Dimension of the codebook vectors; null: that of the latent."""
    beta: Beta = 0.25
    """Weight of the commitment term, which pulls the encoder to the codebook vectors; it does not move the codebook."""
    rotation: bool = False
    """Rotate and scale the decoder's gradient by the rotation from the latent vector to its codebook vector (Fifty et
    al. 2024), instead of passing it straight through."""


class SimVq(Quantizer):
    """One codebook, one code per position."""

    frozen: Tensor
    """(V, d) C above."""

    def __init__(self, config: SimVqConfig, latent_channels: int) -> None:
        super().__init__(latent_channels, config.code_dim, config.codebook_size)
        self.config = config
        d = self.space.dim
        # A persistent buffer: it is random, so without it a weights file could not be decoded.
        self.register_buffer("frozen", torch.randn(config.codebook_size, d) * d**-0.5)
        self.transform = nn.Linear(d, d, bias=False)

    @property
    def codebook(self) -> Tensor:
        """Codebook vectors (V, d) float32, with a gradient to the linear map."""
        with torch.autocast(self.frozen.device.type, enabled=False):
            return self.transform(self.frozen)

    def quantize(self, vectors: Tensor) -> Quantized:
        """Quantize vectors (N, d) float32 to codes (N,)."""
        codebook = self.codebook  # (V, d)
        codes = find_nearest(vectors.detach(), codebook.detach())  # (N,)
        nearest = codebook[codes]  # (N, d)
        loss, commitment = vq_loss(vectors, nearest, self.config.beta, by_gradient=True)
        quantized = rotation_trick(vectors, nearest) if self.config.rotation else straight_through(vectors, nearest)
        return Quantized(quantized, codes, loss, quantizer_stats(vectors, commitment))

    def codes_to_vectors(self, codes: Tensor) -> Tensor:
        """Return the codebook vectors (N, d) of codes (N, 1)."""
        return self.codebook[codes[:, 0]]

    def codebooks(self) -> list[Tensor]:
        """Return the one codebook (V, d)."""
        return [self.codebook.detach()]
