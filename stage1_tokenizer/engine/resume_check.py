"""Comparison of a command with the run that its folder has: the same config, on the same data."""

from pathlib import Path
from typing import Protocol

from stage1_tokenizer.config.base import Tree, differences, read_saved_yaml
from stage1_tokenizer.config.field_facts import Mark, remove_marked
from stage1_tokenizer.config.run_config import RunConfig
from stage1_tokenizer.engine.console import say
from stage1_tokenizer.engine.errors import BadFileError, ConfigError


class RunData(Protocol):
    """The data that a run is trained on, as far as the engine knows them (`OpenData` of the data package)."""

    def check_run_folder(self, folder: Path) -> None:
        """Raise ConfigError if a folder has data in it and is therefore no place for a new run."""

    def find_changes(self, folder: Path) -> list[str] | None:
        """Return lines that describe how the data differ from the record in a run's folder; None: it has no record."""

    def write_record(self, folder: Path) -> None:
        """Write the record of the data into a run's folder. Raise StorageError if that fails."""


def find_changes(folder: Path, config: RunConfig, tree: Tree, data: RunData) -> list[str]:
    """Return lines that describe how the config and the data differ from those of the run in a folder.

    tree: the values of the config to be compared. If the run has no record of its data, print that, and compare the
        config only.

    Raises:
        ConfigError: something differs, and --allow_changed was not given.
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
    if changes and not config.allow_changed:
        raise ConfigError(
            f"{folder} has a run of another configuration; {format_changes(changes)}"
            "Give the saved values to continue that run, or another --out to start a new one. --allow_changed "
            "continues it with the given values; the result then differs from an uninterrupted run"
        )
    return changes


def format_changes(changes: list[str]) -> str:
    """Return the lines of `find_changes` as a part of a message."""
    lines = "".join(f"  {line}\n" for line in changes)
    return f"these keys differ (saved -> given):\n{lines}"


def _fill_defaults(cls: type[RunConfig], saved: Tree) -> Tree:
    """Return a saved config with defaults for keys that are newer than it; unchanged if this version cannot read it."""
    try:
        return cls.from_tree(saved).tree()
    except ConfigError:
        return saved
