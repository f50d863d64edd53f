"""The config keys that the trainings of both stages have. A resumed run may change those marked FREE."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt

from stage1_tokenizer.config.base import CommandConfig, Tree
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.engine.console import ConsoleMetric


class RunConfig(CommandConfig):
    """Base of the configs of trainings."""

    console_metrics: ClassVar[tuple[ConsoleMetric, ...]] = ()
    """Metrics that the console shows; the log has all metrics."""

    out: Annotated[str | None, Mark.FREE] = None
    """Folder of the run; default: under runs/, named after the config file or after the data and the model."""
    seed: int = 0
    """Seed of all random numbers of the run."""
    steps: Annotated[PositiveInt, Mark.RATE]
    """Optimizer steps."""
    batch_size: PositiveInt = 64
    """Images per optimizer step, over all processes and micro-batches."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimizer step. Raise it if a batch does not fit the memory; the result is the same."""
    log_every: Annotated[PositiveInt, Mark.FREE] = 20
    """Steps between log entries."""
    validate_every: Annotated[PositiveInt, Mark.FREE]
    """Steps between validations on the whole validation split; also at the end."""
    save_every: Annotated[PositiveInt, Mark.FREE]
    """Steps between saved states; also at the end, and when the run is asked to stop."""
    keep: Annotated[int, Mark.FREE] = Field(2, ge=2)
    """Number of saved states to keep; at least 2, so that one is intact if the power fails during a save."""
    skips: Annotated[NonNegativeInt, Mark.FREE] = 3
    """Steps in a row that are skipped because loss or gradients are not finite; one more ends the run."""
    resume: Annotated[str, Mark.FREE] = "auto"
    """State to continue from, e.g. step-00000650; later states are removed then. `auto`: the newest intact state."""
    log_with: Annotated[tuple[str, ...], Mark.FREE] = ()
    """Experiment trackers beside TensorBoard and the log file, e.g. wandb, trackio or mlflow; several separated by
    commas. A resumed run goes on in the tracker's same run where the tracker can."""
    log_project: Annotated[str, Mark.FREE] = "tessera"
    """Project (mlflow: experiment) of the trackers that gets the run."""
    report: Annotated[bool, Mark.FREE] = True
    """Write report.html into the folder of the run at the end."""
    allow_changed: Annotated[bool, Mark.FREE] = False
    """Continue a run with a changed configuration, instead of ending with a list of the changes."""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        raise NotImplementedError

    def resolve_saved(self, saved: Tree) -> Tree:
        """Return the saved config of a run with the values that its nulls stand for."""
        return saved
