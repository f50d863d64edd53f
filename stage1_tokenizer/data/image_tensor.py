"""Images of one size as one tensor, on the CPU or a GPU. Batches are cropped and mirrored there, without a loop.

The pixels of all images lie in one row. A line of a crop (W pixels from some pixel on) is a window of that row, and one
gather takes the lines of all crops of a batch. Only indices and draws are copied to a GPU for each batch.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GPU_SHARE = 1 / 8
"""Share of a GPU's memory that cached data may take; the rest is for the training."""


def device_with_room(device: torch.device, nbytes: int) -> torch.device:
    """Return the device if it is a GPU and `nbytes` take a small share of its memory, otherwise the CPU."""
    if device.type != "cuda" or nbytes >= torch.cuda.get_device_properties(device).total_memory * GPU_SHARE:
        return torch.device("cpu")
    return device


class ImageTensor:
    """Images (N, H', W', C) uint8 and their labels (N,), from which batches of H x W crops are cut."""

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        image_size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.device = device
        self.shape: tuple[int, int, int] = (images.shape[1], images.shape[2], images.shape[3])
        self._size = image_size
        pixels = torch.from_numpy(images).to(device).view(-1)
        self._lines = pixels.unfold(0, image_size[1] * self.shape[2], self.shape[2])  # (N * H' * W' - W + 1, W * C)
        self._labels = torch.from_numpy(labels).to(device)

    def batch(self, indices: NDArray[np.int64], draws: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Return crops (B, C, H, W) uint8 in channels_last and labels (B,) int64, on the device.

        draws (B, 3) in [0, 1): the place of the crop, from top to bottom and from left to right; a third number below
        1/2 mirrors the crop.
        """
        (height, width), (rows, columns, channels) = self._size, self.shape
        top = (draws[:, 0] * (rows - height + 1)).astype(np.int64)
        left = (draws[:, 1] * (columns - width + 1)).astype(np.int64)
        first = (indices * rows + top) * columns + left  # the first pixel of each crop, (B,)
        mirrored = draws[:, 2] < 0.5
        # One copy for all three. The source is pageable memory, so the call returns after the data has been read.
        on_device = torch.from_numpy(np.stack([indices, first, mirrored])).to(self.device, non_blocking=True)
        starts = on_device[1, :, None] + torch.arange(height, device=self.device) * columns  # (B, H)
        crops = self._lines.index_select(0, starts.flatten()).view(-1, height, width, channels)
        if mirrored.any():
            crops = torch.where(on_device[2].bool()[:, None, None, None], crops.flip(2), crops)
        return crops.permute(0, 3, 1, 2), self._labels.index_select(0, on_device[0])
