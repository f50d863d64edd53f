"""Comparison of a command with the run that its folder has: the same config, on the same data."""

from pathlib import Path
from typing import NamedTuple, Protocol

from stage1_tokenizer.config.base import Tree, differences, read_saved_yaml
from stage1_tokenizer.config.field_facts import Mark, remove_marked
from stage1_tokenizer.engine.console import say
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.state import list_states, step_of_state
from stage1_tokenizer.engine.training_config import TrainingConfig


class RunData(Protocol):
    """The data that a run is trained on, as far as the engine knows them (`OpenData` of the data package)."""

    def check_run_folder(self, folder: Path) -> None:
        """Raise ConfigError if a folder has data in it and is therefore no place for a new run."""

    def find_changes(self, folder: Path) -> list[str] | None:
        """Return lines that describe how the data differ from the record in a run's folder; None: it has no record."""

    def write_record(self, folder: Path) -> None:
        """Write the record of the data into a run's folder. Raise StorageError if that fails."""


class Changes(NamedTuple):
    """Differences between a command and the run that its folder has."""

    lines: list[str]
    """A line for each difference."""
    shared_steps: int | None = None
    """Largest number of steps of a state that belongs to the run of the command too; None: any state does."""


def find_changes(folder: Path, config: TrainingConfig, tree: Tree, data: RunData) -> Changes:
    """Return how the config and the data differ from those of the run in a folder.

    Only learning rates of later steps may differ (`steps` and the schedule): then the run is continued from a state
    that all equal rates lead to.

    tree: the values of the config to be compared. If the run has no record of its data, print that, and compare the
        config only.

    Raises:
        ConfigError: something else differs, or no state can be continued, and --allow_changed was not given.
        BadFileError: the saved config is damaged or missing.
    """
    file = folder / "config.yaml"
    if not file.exists():
        raise BadFileError(f"{folder}: has states of a run but no config.yaml. Choose another --out")
    data_changes = data.find_changes(folder)
    if data_changes is None:
        say(f"note: {folder} has no record of its data, so these data cannot be compared with them")
    saved = config.resolve_saved(_fill_defaults(type(config), read_saved_yaml(file)))
    # With a record the data are compared by content, so their paths may differ.
    marks = [Mark.FREE] if data_changes is None else [Mark.FREE, Mark.PATH]
    old, new = (remove_marked(type(config), values, *marks) for values in (saved, tree))
    changes = [*differences(old, new), *(data_changes or [])]
    if not changes or config.allow_changed:
        return Changes(changes)
    old, new = (remove_marked(type(config), values, Mark.RATE) for values in (old, new))
    if differences(old, new) or data_changes:
        raise ConfigError(
            f"{folder} has a run of another configuration; {format_changes(changes)}"
            "Give the saved values to continue that run, or another --out to start a new one. --allow_changed "
            "continues it with the given values; the result then differs from an uninterrupted run"
        )
    return Changes(changes, _find_shared_steps(folder, config, type(config).from_tree(saved, str(file)), changes))


def _find_shared_steps(folder: Path, config: TrainingConfig, saved: TrainingConfig, changes: list[str]) -> int:
    """Return the largest number of steps of a state that a run with other learning rates can be continued from.

    Raises:
        ConfigError: no saved state is such a state, or other steps than those of a decay would be lost.
    """
    shared = saved.count_shared_steps(config)
    steps = sorted(map(step_of_state, list_states(folder / "state")))
    loses_only_decay = saved.kept_step is not None and saved.kept_step <= shared and config.steps > saved.steps
    if steps[-1] <= shared or (steps[0] <= shared and loses_only_decay):
        return shared
    raise ConfigError(
        f"{folder} has a run with other learning rates; {format_changes(changes)}"
        f"With the given values, the learning rates differ from step {shared + 1:,} on, and the saved states are of "
        f"{', '.join(f'{step:,}' for step in steps)} steps. Give the saved values, or train a new run from these "
        f"weights (--init_from {folder} --out ANOTHER). --allow_changed continues the newest state with the given "
        "values; the result then differs from an uninterrupted run. A run with --optim.schedule constant or wsd can be "
        "prolonged"
    )


def format_changes(changes: list[str]) -> str:
    """Return lines of changes as a part of a message."""
    lines = "".join(f"  {line}\n" for line in changes)
    return f"these keys differ (saved -> given):\n{lines}"


def _fill_defaults(cls: type[TrainingConfig], saved: Tree) -> Tree:
    """Return a saved config with defaults for keys that are newer than it; unchanged if this version cannot read it."""
    try:
        return cls.from_tree(saved).tree()
    except ConfigError:
        return saved
