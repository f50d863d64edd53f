"""The steps that every trainer takes with a network that learns, between its loss and its new weights."""

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from accelerate import Accelerator
from torch import nn

from stage1_tokenizer.engine.finite import Checked, Tally, clip
from stage1_tokenizer.engine.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate

ModuleT = TypeVar("ModuleT", bound=nn.Module)
MicroBatch = TypeVar("MicroBatch")


class Learner(Generic[ModuleT]):
    """A network, the same as Accelerate has wrapped it (`model`), and its optimizer."""

    def __init__(
        self, accelerator: Accelerator, module: ModuleT, config: OptimConfig, steps: int, peak: float | None = None
    ) -> None:
        """peak: the highest learning rate; None: that of the config."""
        self._accelerator, self._config, self._steps = accelerator, config, steps
        self._peak = peak or config.lr
        self.module = module
        self.model, self.optimizer = accelerator.prepare(module, build_optimizer(module, config))

    @property
    def rate(self) -> float:
        """The present learning rate."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def begin_step(self, step: int) -> None:
        """Set the learning rate of a step, counted from 0, and switch to training."""
        set_learning_rate(self.optimizer, learning_rate(self._config, self._peak, step, self._steps))
        self.model.train()

    def micro_batches(self, parts: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """The parts of a batch, for a forward and a backward pass each. Processes exchange gradients at the last."""
        for part in parts[:-1]:
            with self._accelerator.no_sync(self.model):
                yield part
        yield parts[-1]

    def learn(self, checked: Checked, tally: Tally) -> None:
        """Take the optimizer's step, unless something in it was not finite, and clear the gradients."""
        if checked.finite:
            clip(self.module, self._config.clip, checked.norm, tally)
            self.optimizer.step()
        self.optimizer.zero_grad()
