"""Figures of reconstructions and codes: PSNR, SSIM, NMSE, and how the codebook is used."""

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from stage1_tokenizer.data.image_batches import ImageBatches, normalise
from stage1_tokenizer.engine.precision import float64

VARIANCE_IMAGES = 2000
WINDOW = 11
"""Pixels of SSIM's Gaussian window along a side."""
SIGMA = 1.5
"""Pixels of its standard deviation."""


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB: (B, C, H, W) in [-1, 1] twice -> (B,).

    x_hat is clamped to [-1, 1], as it is when it becomes a picture; the data range is 2, so a mean squared error of
    m on this scale gives 10 log10(4 / m). Equal images are given 100 dB instead of infinity.
    """
    error = (x_hat.float().clamp(-1, 1) - x.float()).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(4.0 / error.clamp_min(4e-10))


def ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """Structural similarity: (B, C, H, W) in [-1, 1] twice -> (B,) in [-1, 1], 1 for equal images. x_hat is clamped.

    Equation 13 of Wang, Bovik, Sheikh and Simoncelli (2004) with K1 0.01, K2 0.03 and a Gaussian window of 11x11
    (smaller where the image is), averaged over all places where the window fits, and over the channels, each taken by
    itself.
    """
    x, x_hat = x.float(), x_hat.float().clamp(-1, 1)
    width = min(WINDOW, *((side - 1) // 2 * 2 + 1 for side in x.shape[2:]))
    taps = torch.exp(-((torch.arange(width, device=x.device) - width // 2) ** 2) / (2 * SIGMA**2))
    taps = taps / taps.sum()

    def mean(image: Tensor) -> Tensor:
        """The Gaussian mean around each place where the window fits: (B, C, H, W) -> (B * C, 1, H - 10, W - 10)."""
        rows = F.conv2d(image.flatten(0, 1)[:, None], taps.view(1, 1, -1, 1))
        return F.conv2d(rows, taps.view(1, 1, 1, -1))

    mu, mu_hat = mean(x), mean(x_hat)
    variances = mean(x * x) + mean(x_hat * x_hat) - mu * mu - mu_hat * mu_hat
    covariance = mean(x * x_hat) - mu * mu_hat
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the data range is 2
    similar = (2 * mu * mu_hat + c1) * (2 * covariance + c2) / ((mu * mu + mu_hat * mu_hat + c1) * (variances + c2))
    return similar.reshape(len(x), -1).mean(dim=1)


def pixel_variance(pictures: ImageBatches, at_most: int = VARIANCE_IMAGES) -> float:
    """Variance of all pixels and channels of a split on the scale of [-1, 1], from up to `at_most` of its images,
    evenly spaced. Mean squared error over it is the NMSE: 1 is what a picture in the data's mean grey would have."""
    chosen = np.unique(np.linspace(0, len(pictures) - 1, min(at_most, len(pictures)), dtype=np.int64))
    count, total, squares = 0, 0.0, 0.0
    for part in np.array_split(chosen, -(-len(chosen) // 256)):
        x = normalise(pictures.batch(part)[0]).double()
        count, total, squares = count + x.numel(), total + float(x.sum()), squares + float(x.square().sum())
    return max(squares / count - (total / count) ** 2, 1e-12)


class CodeUse(nn.Module):
    """Histogram of the codes, one for each of the K codes of a position. A module, so that a saved state can hold it.

    `gather` it before reading the figures; with K codebooks they are means over these.
    """

    counts: Tensor

    def __init__(self, depth: int, codebook_size: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(depth, codebook_size, dtype=torch.int64, device=device))

    def gather(self, accelerator: Accelerator) -> None:
        """Add up over processes. The main process has the sum afterwards, the others begin anew."""
        self.counts = accelerator.reduce(self.counts, "sum")
        self.keep_on_main(accelerator)

    def keep_on_main(self, accelerator: Accelerator) -> None:
        """In the other processes begin anew."""
        if not accelerator.is_main_process:
            self.counts.zero_()

    def add(self, codes: Tensor) -> None:
        """codes (..., K), ids in 0..V-1."""
        depth, size = self.counts.shape
        # scatter_add and not bincount, which would wait for a GPU. The k-th histogram begins at k * V.
        places = (codes.reshape(-1, depth) + torch.arange(depth, device=codes.device) * size).flatten()
        self.counts.view(-1).scatter_add_(0, places, torch.ones_like(places))

    @property
    def usage(self) -> float:
        """Share of the codebook that was used at least once."""
        return float((self.counts > 0).float().mean())

    @property
    def entropy_bits(self) -> float:
        """Entropy of the codes' frequencies (the unigram entropy), in bits per token."""
        counts = float64(self.counts)
        share = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
        return float(-(share * share.clamp_min(1e-300).log2()).sum(dim=1).mean()) + 0.0  # and not -0.0

    @property
    def perplexity(self) -> float:
        """2 ** entropy: the number of equally frequent codes that would have this entropy."""
        return float(2.0**self.entropy_bits)

    def taken(self, accelerator: Accelerator) -> dict[str, float]:
        """The figures of all processes together, after which counting begins anew; none where there are no codes."""
        if not len(self.counts):
            return {}
        self.counts = accelerator.reduce(self.counts, "sum")
        figures = self.figures()
        self.counts.zero_()
        return figures

    def figures(self) -> dict[str, float]:
        """All three under the names that they have in the log."""
        return {
            "code_usage": self.usage,
            "code_perplexity": self.perplexity,
            "code_entropy_bits": self.entropy_bits,
        }
