"""A split whose pictures have one size as one tensor, on the CPU or a GPU; a batch of it is cut there, without a loop.

The pixels of all pictures lie in one row, so that a line of a view (W pixels from some pixel on) is a window of that
row, and the lines of all views of a batch are one gather. Only indices and draws travel to a GPU, the pictures never.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHARE = 8
"""What is kept on a GPU takes less than this part of its memory (one eighth); the rest is for the training."""


def roomy(device: torch.device, nbytes: int) -> torch.device:
    """Where to keep `nbytes` that are read in every step: the device, or the CPU where they would take much of it."""
    if device.type != "cuda" or nbytes >= torch.cuda.get_device_properties(device).total_memory / SHARE:
        return torch.device("cpu")
    return device


class Resident:
    """Pictures (N, H', W', C) uint8 and their labels (N,), and views of H x W cut from them."""

    def __init__(
        self,
        pictures: NDArray[np.uint8],
        labels: NDArray[np.int64],
        image_size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.device = device
        self.shape: tuple[int, int, int] = (pictures.shape[1], pictures.shape[2], pictures.shape[3])
        self._size = image_size
        pixels = torch.from_numpy(pictures).to(device).view(-1)
        self._lines = pixels.unfold(0, image_size[1] * self.shape[2], self.shape[2])  # (N * H' * W' - W + 1, W * C)
        self._labels = torch.from_numpy(labels).to(device)

    def batch(self, indices: NDArray[np.int64], draws: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Views (B, C, H, W) uint8 in channels_last and labels (B,) int64, on the device.

        `draws` (B, 3) in [0, 1): how far down and right of its room a view lies, and below 1/2 it is mirrored.
        """
        (height, width), (rows, columns, channels) = self._size, self.shape
        top = (draws[:, 0] * (rows - height + 1)).astype(np.int64)
        left = (draws[:, 1] * (columns - width + 1)).astype(np.int64)
        first = (indices * rows + top) * columns + left  # the view's first pixel, (B,)
        mirrored = draws[:, 2] < 0.5
        # One copy for both. From ordinary memory, so what is copied is out of it when the call returns.
        here = torch.from_numpy(np.stack([indices, first, mirrored])).to(self.device, non_blocking=True)
        starts = here[1, :, None] + torch.arange(height, device=self.device) * columns  # (B, H)
        views = self._lines.index_select(0, starts.flatten()).view(-1, height, width, channels)
        if mirrored.any():
            views = torch.where(here[2].bool()[:, None, None, None], views.flip(2), views)
        return views.permute(0, 3, 1, 2), self._labels.index_select(0, here[0])
