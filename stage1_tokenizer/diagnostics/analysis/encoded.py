"""What all pictures are made of: images, their latents and codes, and their reconstructions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stage1_tokenizer.data.pictures import Pictures, normalise
from stage1_tokenizer.metrics import CodeUse, psnr
from stage1_tokenizer.tokenizer import Tokenizer

BATCH = 64


@dataclass(frozen=True)
class Encoded:
    """Images and what a tokenizer made of them; all on the CPU."""

    x: Tensor
    """(N, C, H, W) in [-1, 1]."""
    labels: Tensor
    """(N,) int64."""
    z: Tensor
    """(N, D, h, w), as the bottleneck receives it."""
    z_q: Tensor
    """(N, D, h, w), as the decoder receives it."""
    codes: Tensor | None
    """(N, h, w, K) int64, or None where the bottleneck is continuous."""
    x_hat: Tensor
    """(N, C, H, W), clamped to [-1, 1]."""

    @property
    def psnr(self) -> Tensor:
        """(N,) in dB."""
        return psnr(self.x, self.x_hat)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.x.shape[2], self.x.shape[3]

    def spread(self, n: int) -> list[int]:
        """Up to n different places 0..N-1, evenly spaced."""
        return sorted(set(np.linspace(0, len(self.x) - 1, min(n, len(self.x)), dtype=np.int64).tolist()))


@torch.inference_mode()
def encode(tokenizer: Tokenizer, pictures: Pictures, at_most: int, device: torch.device) -> Encoded:
    """Up to `at_most` images, evenly spaced over a split."""
    chosen = np.linspace(0, len(pictures) - 1, min(at_most, len(pictures)), dtype=np.int64)
    parts: list[tuple[Tensor, ...]] = []
    for indices in np.array_split(chosen, -(-len(chosen) // BATCH)):
        batch, labels = pictures.batch(indices)
        x = normalise(batch.to(device))
        z = tokenizer.encoder(x)  # (B, D, h, w)
        bottlenecked = tokenizer.bottleneck(z)
        codes = torch.zeros(len(x)) if bottlenecked.codes is None else bottlenecked.codes  # (B, h, w, K)
        x_hat = tokenizer.decode(bottlenecked.z_q).float().clamp(-1, 1)
        parts.append(tuple(part.cpu() for part in (x, labels, z.float(), bottlenecked.z_q.float(), codes, x_hat)))
    x, labels, z, z_q, codes, x_hat = (torch.cat(part) for part in zip(*parts, strict=True))
    return Encoded(x, labels, z, z_q, codes if tokenizer.bottleneck.depth else None, x_hat)


@torch.inference_mode()
def decode(tokenizer: Tokenizer, z_q: Tensor) -> Tensor:
    """(N, D, h, w) -> images (N, C, H, W), clamped to [-1, 1], on the CPU."""
    device = next(tokenizer.parameters()).device
    return torch.cat(
        [tokenizer.decode(part.to(device)).float().clamp(-1, 1).cpu() for part in z_q.chunk(-(-len(z_q) // BATCH))]
    )


@torch.inference_mode()
def vectors(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """codes (N, h, w, K) -> z_q (N, D, h, w) on the CPU."""
    device = next(tokenizer.parameters()).device
    return torch.cat(
        [tokenizer.bottleneck.vectors(part.to(device)).float().cpu() for part in codes.chunk(-(-len(codes) // BATCH))]
    )


def code_use(codes: Tensor, codebook_size: int) -> CodeUse:
    """How the codes (N, h, w, K) use their codebooks."""
    use = CodeUse(codes.shape[-1], codebook_size, codes.device)
    use.add(codes)
    return use
