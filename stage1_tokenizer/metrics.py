"""Figures over a whole split: PSNR, and how the codebook is used."""

import torch
from torch import Tensor


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB: (B, C, H, W) in [-1, 1] twice -> (B,).

    x_hat is clamped to [-1, 1], as it is when it becomes a picture; the data range is 2, so a mean squared error of
    m on this scale gives 10 log10(4 / m). Equal images are given 100 dB instead of infinity.
    """
    error = (x_hat.float().clamp(-1, 1) - x.float()).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(4.0 / error.clamp_min(4e-10))


class CodeUse:
    """Histogram of the codes over a split; add up `counts` over processes before reading the figures."""

    def __init__(self, codebook_size: int, device: torch.device) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def add(self, codes: Tensor) -> None:
        """Any shape, ids in 0..V-1."""
        self.counts += torch.bincount(codes.flatten(), minlength=len(self.counts))

    @property
    def usage(self) -> float:
        """Share of the codebook that was used at least once."""
        return float((self.counts > 0).float().mean())

    @property
    def entropy_bits(self) -> float:
        """Entropy of the codes' frequencies (the unigram entropy), in bits per token."""
        share = self.counts.double() / self.counts.sum().clamp_min(1)
        return float(-(share * share.clamp_min(1e-300).log2()).sum())

    @property
    def perplexity(self) -> float:
        """2 ** entropy: the number of equally frequent codes that would have this entropy."""
        return float(2.0**self.entropy_bits)
