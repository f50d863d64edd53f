"""float64 on devices that have it, and on the CPU for those that do not: Apple's GPUs (mps) have float32 at most."""

import torch
from torch import Tensor


def device_of_float64(device: torch.device) -> torch.device:
    """The device itself, or the CPU where the device has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def float64(x: Tensor) -> Tensor:
    """x in float64, on its device or on the CPU."""
    return x.to(device_of_float64(x.device)).double()
