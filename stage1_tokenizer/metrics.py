"""Metrics of reconstructions (PSNR, SSIM, the variance for NMSE), and of codes (usage, entropy, perplexity)."""

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from stage1_tokenizer.data.image_batches import ImageBatches, normalise
from stage1_tokenizer.engine.precision import to_float64

VARIANCE_IMAGES = 2000
WINDOW = 11
"""Side of SSIM's Gaussian window, in pixels."""
SIGMA = 1.5
"""Standard deviation of SSIM's Gaussian window, in pixels."""


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each image in dB: x, x_hat (B, C, H, W) in [-1, 1] -> (B,).

    x_hat is clamped to [-1, 1], as in an image file. The data range is 2, so a mean squared error m gives
    10 log10(4 / m). Equal images get 100 dB instead of infinity.
    """
    error = (x_hat.float().clamp(-1, 1) - x.float()).square().flatten(1).mean(dim=1)  # (B,)
    return 10.0 * torch.log10(4.0 / error.clamp_min(4e-10))


def ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """Compute the structural similarity of each image: x, x_hat (B, C, H, W) in [-1, 1] -> (B,), 1 for equal images.

    x_hat is clamped to [-1, 1]. Equation 13 of Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From
    Error Visibility to Structural Similarity" (2004), with K1 = 0.01, K2 = 0.03 and a Gaussian window of 11x11 pixels
    (smaller for smaller images), averaged over all positions at which the window fits, and over the channels.
    """
    x, x_hat = x.float(), x_hat.float().clamp(-1, 1)
    width = min(WINDOW, *((side - 1) // 2 * 2 + 1 for side in x.shape[2:]))
    taps = torch.exp(-((torch.arange(width, device=x.device) - width // 2) ** 2) / (2 * SIGMA**2))
    taps = taps / taps.sum()  # (width,)

    def mean(image: Tensor) -> Tensor:
        """Average with the window at each position at which it fits: (B, C, H, W) -> (B * C, 1, H - 10, W - 10)."""
        rows = F.conv2d(image.flatten(0, 1)[:, None], taps.view(1, 1, -1, 1))
        return F.conv2d(rows, taps.view(1, 1, 1, -1))

    mu, mu_hat = mean(x), mean(x_hat)
    variances = mean(x * x) + mean(x_hat * x_hat) - mu * mu - mu_hat * mu_hat
    covariance = mean(x * x_hat) - mu * mu_hat
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the data range is 2
    similar = (2 * mu * mu_hat + c1) * (2 * covariance + c2) / ((mu * mu + mu_hat * mu_hat + c1) * (variances + c2))
    return similar.reshape(len(x), -1).mean(dim=1)


def pixel_variance(images: ImageBatches, at_most: int = VARIANCE_IMAGES) -> float:
    """Compute the variance of all pixels and channels of a split, on the scale of [-1, 1].

    It looks at up to `at_most` images, evenly spaced over the split. NMSE is the mean squared error divided by this
    variance: an image that is the data's mean grey everywhere has an NMSE of 1.
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, min(at_most, len(images)), dtype=np.int64))
    count, total, squares = 0, 0.0, 0.0
    for part in np.array_split(chosen, -(-len(chosen) // 256)):
        x = normalise(images.batch(part)[0]).double()
        count, total, squares = count + x.numel(), total + float(x.sum()), squares + float(x.square().sum())
    return max(squares / count - (total / count) ** 2, 1e-12)


class CodeUse(nn.Module):
    """Use of the codebook: a histogram for each of the K codes of a position. A module, so that a state can hold it.

    Each process counts its own codes: call `gather` before reading metrics. With K > 1, metrics are means over the K
    histograms.
    """

    counts: Tensor
    """(K, V) int64."""

    def __init__(self, depth: int, codebook_size: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(depth, codebook_size, dtype=torch.int64, device=device))

    def gather(self, accelerator: Accelerator) -> None:
        """Move the counts of all processes to the main process; the others restart at 0."""
        self.counts = accelerator.reduce(self.counts, "sum")
        self.keep_on_main(accelerator)

    def keep_on_main(self, accelerator: Accelerator) -> None:
        """Set the counts to 0 in all processes but the main one. Call it after a resume: all load the same counts."""
        if not accelerator.is_main_process:
            self.counts.zero_()

    def add(self, codes: Tensor) -> None:
        """Count codes (..., K) in 0..V-1."""
        depth, size = self.counts.shape
        # scatter_add instead of bincount, which makes the CPU wait for a GPU. The k-th histogram begins at k * V.
        places = (codes.reshape(-1, depth) + torch.arange(depth, device=codes.device) * size).flatten()
        self.counts.view(-1).scatter_add_(0, places, torch.ones_like(places))

    @property
    def usage(self) -> float:
        """Share of the codebook that was used at least once, in 0..1."""
        return float((self.counts > 0).float().mean())

    @property
    def entropy_bits(self) -> float:
        """Entropy of the code frequencies (unigram entropy), in bits per token."""
        counts = to_float64(self.counts)
        share = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)  # (K, V)
        return float(-(share * share.clamp_min(1e-300).log2()).sum(dim=1).mean()) + 0.0  # + 0.0 makes -0.0 a 0.0

    @property
    def perplexity(self) -> float:
        """2 ** entropy: the number of equally frequent codes with this entropy, in 1..V."""
        return float(2.0**self.entropy_bits)

    def metrics(self) -> dict[str, float]:
        """Return usage, perplexity and entropy under their names in the log."""
        return {
            "code_usage": self.usage,
            "code_perplexity": self.perplexity,
            "code_entropy_bits": self.entropy_bits,
        }

    def take_metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics over all processes, and restart counting; no metrics if the bottleneck is continuous."""
        if not len(self.counts):
            return {}
        self.counts = accelerator.reduce(self.counts, "sum")
        metrics = self.metrics()
        self.counts.zero_()
        return metrics
