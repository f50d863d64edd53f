"""The keys that every training has, and which of them may change while it is stopped (same_run.py compares them)."""

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt

from stage1_tokenizer.config.base import CommandConfig, Tree

FREE_KEYS = (
    "config",
    "out",
    "log_every",
    "validate_every",
    "save_every",
    "keep",
    "patience",
    "skips",
    "resume",
    "allow_changed",
    "cache",
    "workers",
    "bad_share",
    "report",
)
"""Keys that say where, how often or how stubbornly, not what: a resumed run may change them."""


DATA_PATHS = ("root", "classes", "labels", "files", "validation_files", "validation_root")
"""Keys of the data that are paths. What lies there is compared by its identity, so it may lie elsewhere on a resume."""


class RunConfig(CommandConfig):
    """What a training run is given beside what it trains."""

    out: str | None = None
    """The run's folder; default: under runs/, by the name of the config file or of what is trained."""
    seed: int = 0
    """Everything random in the run follows from it."""
    steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt = 64
    """Images per optimizer step, over all processes and micro-batches."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimizer step; gradients and codebooks learn from the whole batch."""
    log_every: PositiveInt = 20
    """Steps between log entries."""
    validate_every: PositiveInt
    """Steps between validations on the whole validation split; also at the end."""
    save_every: PositiveInt
    """Steps between saved states; also at the end, and when the run is asked to stop."""
    keep: int = Field(2, ge=2)
    """Saved states to keep; at least 2, since the newest may be in the making when the power fails."""
    skips: NonNegativeInt = 3
    """Steps in a row that are left out because something in them is not finite; after one more the run ends."""
    resume: str = "auto"
    """State to continue from, e.g. step-00000650; later ones are dropped then. `auto`: the newest that is whole."""
    report: bool = True
    """At the end, write the page about the run, report.html in its folder."""
    allow_changed: bool = False
    """Continue a run although the configuration has changed; what differs is listed otherwise."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        raise NotImplementedError

    def resolved(self, saved: Tree) -> Tree:
        """The saved config of a run of this kind, with the values that a null in it stood for."""
        return saved
