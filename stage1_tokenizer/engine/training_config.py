"""The config keys of a training with an optimizer, and the steps at which two runs are still the same run.

A run can be prolonged: the same command with more `steps`. It is then, bit for bit, the run that was planned that long
from the start, if it continues from a state before which all learning rates are the same in both. That is any state
with schedule `constant`, and the states up to the beginning of the decay with `wsd`. One of these is always kept.
"""

from stage1_tokenizer.config.run_config import RunConfig
from stage1_tokenizer.engine.optim import OptimConfig, count_equal_rates


class TrainingConfig(RunConfig):
    """Base of the configs of both trainings."""

    optim: OptimConfig = OptimConfig()
    init_from: str | None = None
    """Start from the weights of another run, given as its folder, its weights file, hf:OWNER/NAME[@REVISION] or
    pretrained:NAME, and train a new run: a fresh optimizer, from step 0. The architecture of that run is the default;
    null: start from random weights."""

    @property
    def kept_step(self) -> int | None:
        """Number of steps of the state that is saved and kept for good: the last one before `wsd` lowers the rate."""
        return self.optim.decay_start(self.steps)

    def is_save_step(self, done: int) -> bool:
        """Return True if a state is saved after `done` steps."""
        return done % self.save_every == 0 or done in (self.steps, self.kept_step)

    def count_shared_steps(self, other: "TrainingConfig") -> int:
        """Return the number of first steps that have the same learning rates under another config."""
        return count_equal_rates((self.optim, self.steps), (other.optim, other.steps))
