"""Lookup-free quantization: each coordinate of a short latent vector becomes its sign, one bit of the code.

Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation" (MAGVIT-v2, 2023), equations 3-5:

    loss = weight * (E[H(q(c|z))] - gamma * H(E[q(c|z)]))  +  beta * |z - sg[c]|^2
    q(c|z) = softmax over the 2^d codes c of -inverse_temperature * |z - c|^2

With `spherical`, Zhao, Xiong and Krähenbühl, "Image and Video Tokenization with Binary Spherical Quantization" (2024):
latents and codes are scaled to length one first, so that the quantization error is bounded.

The code's coordinates are independent given z: q(c|z) is the product over bits of sigmoid(+-4 s t z_i), for codes of
coordinates +-s and inverse temperature t. Both entropies are therefore exact without a matrix of N vectors by V codes:

- The entropy of q(c|z) is the sum of its bits' entropies.
- The mean of q over the vectors does not factorise. But q(c|z) is the product of two numbers, the probability of the
  code's first half of bits and that of its second: so all V means are one product of two (N, sqrt(V)) matrices. (BSQ
  takes the product of the bits' means instead, an upper bound which bits that always agree reach as well.)

vector_quantize_pytorch has an LFQ, which the tests compare with, but which will not do: it builds the (N, V) matrix; it
takes no logarithm below 1e-5, where at V above 1e5 even the uniform distribution lies; and with several processes it
drops their sum, and divides by their number all the same (or does neither, if its first call came before they joined).
"""

import math
from operator import not_
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from pydantic import NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from stage1_tokenizer.bottlenecks.base import Advice, BaseBottleneckConfig, Beta
from stage1_tokenizer.bottlenecks.space import Quantized, Quantizer
from stage1_tokenizer.bottlenecks.straight import straight_through
from stage1_tokenizer.config.value_types import CodebookSize


class LfqConfig(BaseBottleneckConfig):
    """Lookup-free quantizer: one bit per coordinate, and entropy terms that spread the codes."""

    kind: Literal["lfq"] = "lfq"
    codebook_size: CodebookSize = 1024
    """V, a power of two; the code vectors have log2 V coordinates. The entropy terms take memory for 2 N sqrt(V) + V
    numbers, with N the vectors of a batch in one process: some 20 MiB at V = 2^18 and N = 4096."""
    spherical: Annotated[
        bool,
        Advice("commitment", "keep latents and codes at length one with --bottleneck.spherical", not_),
    ] = False
    """Scale latents and codes to length one (binary spherical quantization)."""
    entropy_weight: Annotated[
        NonNegativeFloat, Advice("unused codes", "a larger --bottleneck.entropy_weight than {}")
    ] = 0.1
    """Weight of both entropy terms."""
    diversity_gamma: NonNegativeFloat = 1.0
    """Weight, within the entropy terms, of that which spreads the codes over the codebook. It is of one batch over all
    processes; with gradient accumulation, of one micro-batch."""
    beta: Beta = 0.25
    """Weight of the commitment term, which pulls the encoder to the codes."""
    inverse_temperature: PositiveFloat = 100.0
    """How hard the codes are that the entropies see. The higher, the nearer to zero are the coordinates which they can
    move: at 100, within about 0.03 (spherical: 0.03 sqrt(log2 V))."""

    @model_validator(mode="after")
    def _check(self) -> "LfqConfig":
        below = 2 ** (self.codebook_size.bit_length() - 1)
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size must be a power of two from 2 on, got {self.codebook_size}")
        if self.codebook_size != below:
            raise ValueError(
                f"codebook_size must be a power of two, got {self.codebook_size}; "
                f"the nearest are {below} and {2 * below}"
            )
        return self


class LookupFreeQuantizer(Quantizer):
    """One code per position, whose bits are the signs of its vector."""

    powers: Tensor

    def __init__(self, config: LfqConfig, latent_channels: int, processes: int = 1) -> None:
        bits = config.codebook_size.bit_length() - 1
        super().__init__(latent_channels, bits, config.codebook_size)
        self.config = config
        self.scale = bits**-0.5 if config.spherical else 1.0
        self.register_buffer("powers", 2 ** torch.arange(bits - 1, -1, -1), persistent=False)  # (d,), highest first
        self._several_processes = processes > 1

    def quantize(self, vectors: Tensor) -> Quantized:
        if self.config.spherical:
            vectors = F.normalize(vectors, dim=-1)
        codes = ((vectors > 0) * self.powers).sum(-1, keepdim=True)  # (N, 1)
        nearest = self.values(codes)  # (N, d)
        commitment = F.mse_loss(vectors, nearest)
        # |z - c|^2 is -2 z c and a constant, and z c at the bit's two values +-s z: a difference of 4 s z.
        logits = 4 * self.scale * self.config.inverse_temperature * vectors
        sample_entropy, codebook_entropy = _bit_entropies(logits).sum(-1).mean(), self._codebook_entropy(logits)
        entropy_loss = sample_entropy - self.config.diversity_gamma * codebook_entropy
        loss = self.config.entropy_weight * entropy_loss + self.config.beta * commitment
        stats = {
            "commitment": commitment.detach(),
            "sample_entropy_bits": sample_entropy.detach() / math.log(2),
            "codebook_entropy_bits": codebook_entropy.detach() / math.log(2),
        }
        return Quantized(straight_through(vectors, nearest), codes, loss, stats)

    def codebooks(self) -> list[Tensor]:
        return [self.values(torch.arange(self.codebook_size, device=self.powers.device)[:, None])]

    def values(self, codes: Tensor) -> Tensor:
        """codes (..., 1) -> (..., d), coordinates +-scale."""
        return torch.where((codes & self.powers) != 0, self.scale, -self.scale)

    def _codebook_entropy(self, logits: Tensor) -> Tensor:
        """Entropy in nats of the mean distribution over codes, given the logits (N, d) of its independent bits."""
        d = logits.shape[1]
        first, second = _joint(logits[:, : d // 2]), _joint(logits[:, d // 2 :])  # (N, 2^(d/2)) each
        mean = einsum(first, second, "N a, N b -> a b") / len(logits)
        # Only while training, when every process is here with equally many vectors. The value is the whole batch's; the
        # gradient is this process's part, for DDP takes the mean of those, which is the gradient of the whole batch.
        if self._several_processes and self.training:
            total = mean.detach().clone()
            torch.distributed.all_reduce(total)
            mean = straight_through(mean, total / torch.distributed.get_world_size())
        return -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()


def _bit_entropies(logits: Tensor) -> Tensor:
    """Entropies in nats of bits with these logits, in a form that neither overflows nor cancels."""
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def _joint(logits: Tensor) -> Tensor:
    """Logits (N, m) of independent bits -> probabilities (N, 2^m) of their joint values, highest bit first."""
    joint = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(1):
        values = torch.stack([torch.sigmoid(-bit), torch.sigmoid(bit)], dim=1)  # (N, 2)
        joint = rearrange(einsum(joint, values, "N a, N b -> N a b"), "N a b -> N (a b)")
    return joint
