"""Means of a step's named figures over its micro-batches and over all processes, for the log."""

import torch
from accelerate import Accelerator
from torch import Tensor


def mean(name: str, parts_of: list[dict[str, Tensor]]) -> Tensor:
    """The mean of a named part () over the micro-batches."""
    return torch.stack([parts[name] for parts in parts_of]).mean()


def means(prefix: str, parts_of: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each named part over the micro-batches, under prefix/name; of none where there are none."""
    return {f"{prefix}/{name}": mean(name, parts_of) for parts in parts_of[:1] for name in parts}


def over_processes(accelerator: Accelerator, scalars: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each scalar over all processes."""
    together: Tensor = accelerator.reduce(torch.stack([scalar.float() for scalar in scalars.values()]), "mean")
    return dict(zip(scalars, together.tolist(), strict=True))
