"""Lookup-free quantization: each coordinate of a short latent vector becomes its sign, one bit of the code.

Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation" (MAGVIT-v2, 2023), equations 3-5,
with z a latent vector, c its codebook vector, H the entropy and sg the stop-gradient:

    loss = weight * (E[H(q(c|z))] - gamma * H(E[q(c|z)]))  +  beta * |z - sg[c]|^2
    q(c|z) = softmax over the 2^d codebook vectors c of -inverse_temperature * |z - c|^2

With `spherical`: Zhao, Xiong and Krähenbühl, "Image and Video Tokenization with Binary Spherical Quantization" (BSQ,
2024): vectors and codebook vectors are first scaled to length one, so that the quantization error is bounded.

Both entropies are exact, without a matrix of N vectors by V codes. The bits of a code are independent given z: q(c|z)
is the product over bits of sigmoid(+-4 s t z_i), for codebook vectors of coordinates +-s and inverse temperature t.

- The entropy of q(c|z) is the sum of the entropies of its bits.
- The mean of q over the vectors does not factorise. But q(c|z) is the product of two probabilities, that of the first
  half of the bits and that of the second. So all V means are one product of two matrices (N, sqrt(V)). (BSQ uses the
  product of the mean probabilities of the bits instead. That is an upper bound of the entropy, and it is also reached
  by bits that always agree.)

vector_quantize_pytorch has an LFQ too, with which the tests compare this one. It is not used for three reasons. It
builds the (N, V) matrix. It clamps probabilities at 1e-5 before the logarithm, but for V above 1e5 even the uniform
distribution is below that. With several processes it discards their sum but still divides by their number (or does
neither, if its first call was before they joined).
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
from stage1_tokenizer.bottlenecks.quantizer import Quantized, Quantizer
from stage1_tokenizer.bottlenecks.straight_through import straight_through
from stage1_tokenizer.config.value_types import CodebookSize


class LfqConfig(BaseBottleneckConfig):
    """Lookup-free quantizer: one bit per coordinate, and entropy terms that spread the codes."""

    kind: Literal["lfq"] = "lfq"
    codebook_size: CodebookSize = 1024
    """V, a power of two; the codebook vectors have log2 V coordinates. The entropy terms need memory for
    2 N sqrt(V) + V numbers, with N vectors in a batch of one process: about 20 MiB for V = 2^18 and N = 4096."""
    spherical: Annotated[
        bool,
        Advice("commitment", "keep latents and codes at length one with --bottleneck.spherical", not_),
    ] = False
    """Scale vectors and codebook vectors to length one (binary spherical quantization)."""
    entropy_weight: Annotated[
        NonNegativeFloat, Advice("unused codes", "a larger --bottleneck.entropy_weight than {}")
    ] = 0.1
    """Weight of both entropy terms; a larger one keeps more codes in use."""
    diversity_gamma: NonNegativeFloat = 1.0
    """Weight, within the entropy terms, of the entropy of the mean, which spreads codes over the codebook. The mean is
    over one batch of all processes; with gradient accumulation, over one micro-batch."""
    beta: Beta = 0.25
    """Weight of the commitment term, which pulls the encoder to the codebook vectors."""
    inverse_temperature: PositiveFloat = 100.0
    """Inverse temperature of the soft assignment in the entropy terms. Only coordinates near zero get a gradient from
    them: at 100, those within about 0.03 (spherical: 0.03 sqrt(log2 V)); a lower value reaches more."""

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
    """One code per position; its bits are the signs of the coordinates of its vector."""

    powers: Tensor
    """(d,) int64: 2^(d-1), ..., 2, 1; the first coordinate is the highest bit."""

    def __init__(self, config: LfqConfig, latent_channels: int, processes: int = 1) -> None:
        bits = config.codebook_size.bit_length() - 1
        super().__init__(latent_channels, bits, config.codebook_size)
        self.config = config
        self.scale = bits**-0.5 if config.spherical else 1.0
        self.register_buffer("powers", 2 ** torch.arange(bits - 1, -1, -1), persistent=False)
        self._several_processes = processes > 1

    def quantize(self, vectors: Tensor) -> Quantized:
        """Quantize vectors (N, d) float32 to codes (N, 1)."""
        if self.config.spherical:
            vectors = F.normalize(vectors, dim=-1)
        codes = ((vectors > 0) * self.powers).sum(-1, keepdim=True)  # (N, 1)
        nearest = self.codes_to_vectors(codes)  # (N, d)
        commitment = F.mse_loss(vectors, nearest)
        # |z - c|^2 is -2 z c plus a constant. For the two values +-s of a coordinate of c, this differs by 4 s z.
        logits = 4 * self.scale * self.config.inverse_temperature * vectors  # (N, d)
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
        """Return the one codebook (V, d), all combinations of signs."""
        return [self.codes_to_vectors(torch.arange(self.codebook_size, device=self.powers.device)[:, None])]

    def codes_to_vectors(self, codes: Tensor) -> Tensor:
        """Return the codebook vectors (..., d) of codes (..., 1), with coordinates +-scale."""
        return torch.where((codes & self.powers) != 0, self.scale, -self.scale)

    def _codebook_entropy(self, logits: Tensor) -> Tensor:
        """Compute the entropy () in nats of the mean distribution over codes, from the logits (N, d) of its bits."""
        d = logits.shape[1]
        first, second = _joint(logits[:, : d // 2]), _joint(logits[:, d // 2 :])  # (N, 2^(d/2)) each
        mean = einsum(first, second, "N a, N b -> a b") / logits.shape[0]  # (2^(d/2), 2^(d/2)) = all V
        # Only in training, when every process calls this with equally many vectors. The value is that of the whole
        # batch. The gradient is this process's part: DDP averages these parts to the gradient of the whole batch.
        if self._several_processes and self.training:
            total = mean.detach().clone()
            torch.distributed.all_reduce(total)
            mean = straight_through(mean, total / torch.distributed.get_world_size())
        return -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()


def _bit_entropies(logits: Tensor) -> Tensor:
    """Compute the entropies in nats of bits with these logits, any shape; stable for logits of any size."""
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def _joint(logits: Tensor) -> Tensor:
    """Compute probabilities (N, 2^m) of all values of m independent bits with logits (N, m), highest bit first."""
    joint = logits.new_ones(logits.shape[0], 1)
    for bit in logits.unbind(1):
        values = torch.stack([torch.sigmoid(-bit), torch.sigmoid(bit)], dim=1)  # (N, 2)
        joint = rearrange(einsum(joint, values, "N a, N b -> N a b"), "N a b -> N (a b)")
    return joint
