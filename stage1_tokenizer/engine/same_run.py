"""Whether a command continues the run that a folder holds: the same config, on the same data."""

from pathlib import Path

from stage1_tokenizer.config.base import Tree, differences, read_saved_yaml
from stage1_tokenizer.config.marks import Mark, without_marked
from stage1_tokenizer.config.run_config import RunConfig
from stage1_tokenizer.data.record import DataRecord
from stage1_tokenizer.engine.console import say
from stage1_tokenizer.engine.errors import BadFileError, ConfigError


def changes(folder: Path, config: RunConfig, tree: Tree, data: DataRecord | None) -> list[str]:
    """Lines that say what differs between the run in a folder and what is given now.

    tree: what the run is to be known by. data: what is there to train on now.

    Raises:
        ConfigError: something differs, and --allow_changed was not given.
        BadFileError: the saved config is damaged or gone.
    """
    file = folder / "config.yaml"
    if not file.exists():
        raise BadFileError(f"{folder}: holds states of a run but no config.yaml; choose another --out")
    before = DataRecord.saved_in(folder) if data else None
    if data and not before:
        say(f"note: {folder} does not say what data it was trained on so far; whether these are the same is not known")
    saved = config.resolved(with_defaults(type(config), read_saved_yaml(file)))
    marks = [Mark.FREE, Mark.PATH] if before is not None else [Mark.FREE]
    old, new = (without_marked(type(config), each, *marks) for each in (saved, tree))
    changed = differences(old, new)
    if before and data:
        changed += before.differences(data)
    if changed and not config.allow_changed:
        raise ConfigError(
            f"{folder} holds a run of another configuration; {listed(changed)}"
            "Give the saved values to continue that run, or another --out to begin a new one. (--allow_changed "
            "continues it with the given ones, and is no longer the same as one run.)"
        )
    return changed


def listed(changed: list[str]) -> str:
    """The lines of `changes` as a part of a message."""
    lines = "".join(f"  {line}\n" for line in changed)
    return f"these keys differ (saved -> given):\n{lines}"


def with_defaults(cls: type[RunConfig], saved: Tree) -> Tree:
    """A saved config with the keys that did not exist when it was saved, at their defaults. One that this version does
    not understand is returned as it is."""
    try:
        return cls.from_tree(saved).tree()
    except ConfigError:
        return saved
