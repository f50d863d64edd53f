"""SimVQ: the codebook is a learned linear map of frozen random vectors, so all codes move together and none dies.

Zhu et al., "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer" (2024), with z a
latent vector, e its codebook vector and sg the stop-gradient:

    codebook = C W + b   with C (V, d) frozen, W (d, d) and b (d,) learned
    loss     = |sg[z] - e|^2  (codebook, learns W and b)  +  beta * |z - sg[e]|^2  (commitment)

The codebook starts with the mean and the covariance of the first batch's latents (`batch_init`; ours). A linear map can
move and stretch a cloud of random vectors, but the vectors outside the latents' cloud are never the nearest, and one
that begins at the wrong scale loses most of its codes before the map has learned it.

vector_quantize_pytorch has a SimVQ too, with which the tests compare this one. It is not used, because its search holds
a matrix of all vectors by all codes, and nearest.py does not.
"""

from operator import not_
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Advice, BaseBottleneckConfig, Beta, CodeDim
from stage1_tokenizer.bottlenecks.nearest import FAST_PATHS, find_nearest
from stage1_tokenizer.bottlenecks.process_group import ProcessGroup
from stage1_tokenizer.bottlenecks.quantizer import Quantized, Quantizer
from stage1_tokenizer.bottlenecks.straight_through import rotation_trick, straight_through
from stage1_tokenizer.bottlenecks.vq import quantizer_stats, vq_loss
from stage1_tokenizer.config.value_types import CodebookSize
from stage1_tokenizer.engine.processor import FastPath

SMALLEST_VARIANCE = 1e-4
"""Smallest variance of the codebook in any direction at its start, as a share of the greatest."""


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
    batch_init: Annotated[bool, Advice("unused codes", "start from the data (--bottleneck.batch_init)", not_)] = True
    """Start the codebook with the mean and covariance of the latents of the first training batch."""


class SimVq(Quantizer):
    """One codebook, one code per position."""

    frozen: Tensor
    """(V, d) C above."""

    def __init__(self, config: SimVqConfig, latent_channels: int, processes: int = 1) -> None:
        super().__init__(latent_channels, config.code_dim, config.codebook_size)
        self.config, self._group = config, ProcessGroup(processes)
        d = self.space.dim
        # A persistent buffer: it is random, so without it a weights file could not be decoded.
        self.register_buffer("frozen", torch.randn(config.codebook_size, d) * d**-0.5)
        self.transform = nn.Linear(d, d)

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

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Give the codebook the mean and covariance of the latents z (B, D, h, w). Only with `batch_init`."""
        if not self.config.batch_init:
            return
        vectors = self._group.gather(self.space.to_vectors(z))  # (N, d)
        variances, axes = torch.linalg.eigh(vectors.T.cov(correction=0))  # (d,), (d, d)
        scales = variances.clamp_min(SMALLEST_VARIANCE * variances.amax()).sqrt()
        # C has covariance I / d, so C W has that of the latents for W = sqrt(d covariance), which is symmetric.
        root = (axes * scales) @ axes.T * self.space.dim**0.5
        self.transform.weight.copy_(self._group.copy_from_main(root))
        self.transform.bias.copy_(self._group.copy_from_main(vectors.mean(dim=0)))

    def codes_to_vectors(self, codes: Tensor) -> Tensor:
        """Return the codebook vectors (N, d) of codes (N, 1)."""
        return self.codebook[codes[:, 0]]

    def codebooks(self) -> list[Tensor]:
        """Return the one codebook (V, d)."""
        return [self.codebook.detach()]
