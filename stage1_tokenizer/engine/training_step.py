"""One optimizer step of a training: learning rate, micro-batches, clipping and update; and mean losses for the log."""

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stage1_tokenizer.engine.finite import CheckedStep, Tally, clip_gradients
from stage1_tokenizer.engine.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate

ModuleT = TypeVar("ModuleT", bound=nn.Module)
MicroBatchT = TypeVar("MicroBatchT")


class TrainedNetwork(Generic[ModuleT]):
    """A network (`module`), the same network as Accelerate has wrapped it (`model`), and its optimizer."""

    def __init__(
        self, accelerator: Accelerator, module: ModuleT, config: OptimConfig, steps: int, peak: float | None = None
    ) -> None:
        """Build the optimizer, and let Accelerate wrap network and optimizer.

        steps: optimizer steps of the whole training. peak: the highest learning rate; None: that of the config.
        """
        self._accelerator, self._config, self._steps = accelerator, config, steps
        self._peak = peak or config.lr
        self.module = module
        self.model, self.optimizer = accelerator.prepare(module, build_optimizer(module, config))

    @property
    def rate(self) -> float:
        """Present learning rate."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def begin_step(self, step: int) -> None:
        """Set the learning rate of a step (counted from 0), and put the network into training mode."""
        set_learning_rate(self.optimizer, learning_rate(self._config, self._peak, step, self._steps))
        self.model.train()

    def micro_batches(self, parts: Sequence[MicroBatchT]) -> Iterator[MicroBatchT]:
        """Yield the micro-batches of a step, for one forward and one backward pass each.

        The processes exchange gradients in the backward pass of the last one only.
        """
        for part in parts[:-1]:
            with self._accelerator.no_sync(self.model):
                yield part
        yield parts[-1]

    def learn(self, checked: CheckedStep, tally: Tally) -> None:
        """Clip the gradients and take the optimizer step, unless the check failed; then clear the gradients."""
        if checked.is_finite:
            clip_gradients(self.module, self._config.clip, checked.norm, tally)
            self.optimizer.step()
        self.optimizer.zero_grad()


def mean_part(name: str, parts: Sequence[dict[str, Tensor]]) -> Tensor:
    """Return the mean () over the micro-batches of one named part of the loss."""
    return torch.stack([part[name] for part in parts]).mean()


def mean_parts(prefix: str, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean () over the micro-batches of each part of the loss, under `prefix/name`; empty without parts."""
    return {f"{prefix}/{name}": mean_part(name, parts) for name in (parts[0] if parts else ())}


def average_over_processes(accelerator: Accelerator, scalars: dict[str, Tensor]) -> dict[str, float]:
    """Return the mean of each scalar () over all processes."""
    means: Tensor = accelerator.reduce(torch.stack([scalar.float() for scalar in scalars.values()]), "mean")
    return dict(zip(scalars, means.tolist(), strict=True))
