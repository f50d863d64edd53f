"""The keys that every training has; those marked FREE may change while it is stopped (same_run.py compares them)."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt

from stage1_tokenizer.config.base import CommandConfig, Tree
from stage1_tokenizer.config.marks import Mark
from stage1_tokenizer.engine.console import Figure


class RunConfig(CommandConfig):
    """What a training run is given beside what it trains."""

    figures: ClassVar[tuple[Figure, ...]] = ()
    """The figures that the console shows, where the run logs them; the log has all."""

    out: Annotated[str | None, Mark.FREE] = None
    """The run's folder; default: under runs/, by the name of the config file or of what is trained."""
    seed: int = 0
    """Everything random in the run follows from it."""
    steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt = 64
    """Images per optimizer step, over all processes and micro-batches."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimizer step; gradients and codebooks learn from the whole batch."""
    log_every: Annotated[PositiveInt, Mark.FREE] = 20
    """Steps between log entries."""
    validate_every: Annotated[PositiveInt, Mark.FREE]
    """Steps between validations on the whole validation split; also at the end."""
    save_every: Annotated[PositiveInt, Mark.FREE]
    """Steps between saved states; also at the end, and when the run is asked to stop."""
    keep: Annotated[int, Mark.FREE] = Field(2, ge=2)
    """Saved states to keep; at least 2, since the newest may be in the making when the power fails."""
    skips: Annotated[NonNegativeInt, Mark.FREE] = 3
    """Steps in a row that are left out because something in them is not finite; after one more the run ends."""
    resume: Annotated[str, Mark.FREE] = "auto"
    """State to continue from, e.g. step-00000650; later ones are dropped then. `auto`: the newest that is whole."""
    report: Annotated[bool, Mark.FREE] = True
    """At the end, write the page about the run, report.html in its folder."""
    allow_changed: Annotated[bool, Mark.FREE] = False
    """Continue a run although the configuration has changed; what differs is listed otherwise."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        raise NotImplementedError

    def resolved(self, saved: Tree) -> Tree:
        """The saved config of a run of this kind, with the values that a null in it stood for."""
        return saved
