"""Structural similarity of two images, after Wang, Bovik, Sheikh and Simoncelli (2004)."""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11
SIGMA = 1.5


def ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] twice -> (B,) in [-1, 1], 1 for equal images. x_hat is clamped, as in a picture.

    Their equation 13 with K1 0.01, K2 0.03 and a Gaussian window of 11x11 (smaller where the image is), averaged over
    all places where the window fits, and over the channels, each taken by itself.
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
