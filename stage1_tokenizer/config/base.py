"""How every command is configured: defaults < YAML file (`--config FILE`) < command line (`--optim.lr 1e-4`).

A config is a tree of frozen pydantic models. The class that a key configures stands directly above the module that
reads it; this file only reads and merges, and `messages.py` explains what is wrong. Where a key is a choice of
kinds (`bottleneck.kind: fsq`), the kinds are a union of small classes, and choosing another drops the former's keys.

A config may come from anybody, in a YAML file or in the header of weights. So files have a greatest size, trees a
greatest extent, and numbers that say how much is built have upper bounds.
"""

import json
import os
import re
import sys
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
)
from pydantic_settings import CliSettingsSource, SettingsError

from stage1_tokenizer.config.command_line import words_of
from stage1_tokenizer.config.marks import Mark
from stage1_tokenizer.config.messages import explain, explain_flags
from stage1_tokenizer.config.trees import LARGEST_YAML, dump_yaml, parse_json, parse_yaml
from stage1_tokenizer.engine.checkpoint import write_file
from stage1_tokenizer.engine.console import note
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, UserError
from stage1_tokenizer.engine.names import existing_path, located

Tree = dict[str, Any]
# A header could make a loop endless, so all that says how much is built is bounded, far above what anybody trains.
Count = Annotated[PositiveInt, Field(le=512)]
"""How many of something are built, or done, one after the other."""
Blocks = Annotated[NonNegativeInt, Field(le=32)]
"""How many of something are built within each of such."""
Channels = Annotated[PositiveInt, Field(le=65_536)]
"""Width of a layer."""
Codes = Annotated[PositiveInt, Field(le=2**24)]
"""Vectors of a codebook: float32 can count no further."""

ConfigT = TypeVar("ConfigT", bound="Config")
CommandT = TypeVar("CommandT", bound="CommandConfig")


class Config(BaseModel):
    """Base of all configs: immutable, strict about unknown keys, docstrings under the fields are the help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _can_be_used(cls, value: Any) -> Any:
        """Any text may be a path, and what no path can hold would be an error of the operating system, much later. So
        would whole numbers be that no tensor holds, and that Python itself does not print. A path becomes the one on
        disk where only the normal form of its accents differs, and `~` the home folder."""
        if isinstance(value, tuple):
            return tuple(cls._can_be_used(each) for each in value)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("must be a number of 64 bits")
        if isinstance(value, str):
            if "\0" in value:
                raise ValueError("must not hold the character of code 0")
            try:
                value.encode("utf-8")
                os.fsencode(value)
            except UnicodeEncodeError:  # safetensors and TensorBoard open no file whose name is not UTF-8
                encoding = sys.getfilesystemencoding()
                advice = "" if encoding == "utf-8" else f" (Python reads names as {encoding} here; set PYTHONUTF8=1)"
                raise ValueError(f"must be text in UTF-8, as names of files have to be{advice}") from None
            return existing_path(value)
        return value

    def tree(self) -> Tree:
        """The config as plain JSON-ready values, in the form in which YAML files and checkpoints hold it."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], source: str = "config") -> Self:
        """Validate a tree of plain values. `source` says where it came from, for the message.

        Raises:
            ConfigError: names each offending dotted key, what was given, what is allowed and the nearest known key.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(f"in the {source}:\n{explain(cls, error)}") from None


class CommandConfig(Config):
    """Base of the configs that a command line is parsed into."""

    config: Annotated[str | None, Mark.FREE] = None
    """YAML file that overrides the defaults; the command line overrides both."""

    @classmethod
    def completed(cls, tree: Tree) -> Tree:
        """The tree with what it takes from files that it names; of most commands, the same tree."""
        return tree


def parse_command_line(cls: type[CommandT], argv: Sequence[str] | None = None) -> CommandT:
    """Defaults, then the file given by `--config`, then the command line, as one validated config.

    Raises:
        ConfigError: an unknown key or flag, a value that does not fit, or a config file that cannot be read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    source: CliSettingsSource[Any] = CliSettingsSource(
        cls,  # type: ignore[arg-type]  # any model will do, as its documentation says
        formatter_class=_help_formatter(_defaults(cls)),
        cli_parse_args=False,
        cli_exit_on_error=False,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_parse_none_str="null",
    )
    words = words_of(source.root_parser, argv)
    for line in words.dropped:
        note(line)
    try:
        given: Tree = words.restore(source(args=words.argv)())
    except SettingsError as error:
        raise ConfigError(explain_flags(cls, str(error))) from None
    return configure(cls, given)


def configure(cls: type[CommandT], given: Tree) -> CommandT:
    """Defaults, then the file that `given` names as `config`, then what is given, as one validated config.

    Raises:
        ConfigError: a value that does not fit, or a config file that cannot be read.
    """
    defaults = _defaults(cls)
    if not given.get("config"):
        return cls.from_tree(cls.completed(merge(defaults, _with_nulls(given))), "configuration")
    file = read_yaml(existing_path(given["config"]))
    for line in dropped_keys(file, given):
        note(line)
    return cls.from_tree(cls.completed(merge(merge(defaults, file), _with_nulls(given))), "configuration")


def read_yaml(path: str | Path) -> Tree:
    """Read a YAML config file that the user named.

    Raises:
        ConfigError: there is no such file, or it is not YAML, too large, or does not hold a mapping.
    """
    return _read_yaml(path, f"--config {located(path)}", ConfigError)


def read_saved_yaml(path: str | Path) -> Tree:
    """Read the YAML file in which a run keeps its config.

    Raises:
        BadFileError: it is damaged.
    """
    return _read_yaml(path, str(path), BadFileError)


def _read_yaml(path: str | Path, name: str, error_class: type[UserError]) -> Tree:
    try:
        with Path(path).open("rb") as file:
            tree = parse_yaml(file.read(LARGEST_YAML + 1))
    except OSError as error:
        raise error_class(f"{name}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise error_class(f"{name}: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise error_class(f"{name}: holds a {type(tree).__name__}, but a config is a mapping of keys to values")
    return tree


def write_yaml(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a config whole or not at all.

    Raises:
        StorageError: no space, or no permission.
    """
    write_file(path, dump_yaml(tree))


def merge(base: Tree, change: Mapping[str, Any]) -> Tree:
    """`base` overridden by `change`, key by key; a sub-tree that names another `kind` replaces the old one whole."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if (
            isinstance(old, dict)
            and isinstance(value, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind")
        ):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def dropped_keys(file: Tree, given: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Lines that say which keys of a file do not count, since another `kind` was chosen on the command line."""
    for key, value in file.items():
        new = given.get(key)
        if not isinstance(value, dict) or not isinstance(new, Mapping):
            continue
        if new.get("kind", value.get("kind")) == value.get("kind"):
            yield from dropped_keys(value, new, f"{prefix}{key}.")
        elif lost := [f"{prefix}{key}.{name} {json.dumps(old)}" for name, old in value.items() if name not in new]:
            yield (
                f"{prefix}{key}.kind {new['kind']} takes the place of {value.get('kind')} in the file, whose "
                f"{', '.join(lost)} do not count"
            )


def differences(old: Tree, new: Tree, prefix: str = "") -> list[str]:
    """One line `key: old -> new` for each dotted key whose value differs between two trees."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {json.dumps(before)} -> {json.dumps(after)}")
    return lines


def config_from_json(cls: type[ConfigT], text: str | None, source: str) -> ConfigT:
    """Read the config that a checkpoint's header carries.

    Raises:
        BadFileError: the header has none, or one that this version cannot read.
    """
    try:
        return cls.from_tree(parse_json(text), f"header of {source}")
    except ValueError as error:  # a ConfigError is one too
        raise BadFileError(f"{source}: its header holds no usable {cls.__name__}: {error}") from None


def _defaults(cls: type[Config]) -> Tree:
    """The defaults of every field that has one, as a tree."""
    fields = {name: field for name, field in cls.model_fields.items() if not field.is_required()}
    return cls.model_construct(
        **{name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    ).tree()


def _with_nulls(given: Tree) -> Tree:
    """`--key null` for a key that takes several values arrives as [None]."""
    return {
        key: _with_nulls(value) if isinstance(value, dict) else None if value == [None] else value
        for key, value in given.items()
    }


def _help_formatter(defaults: Tree) -> type[RawDescriptionHelpFormatter]:
    """For -h. Of a choice of kinds, pydantic-settings shows the last one as the default; this shows the true one."""

    class Formatter(RawDescriptionHelpFormatter):
        def _expand_help(self, action: Action) -> str:
            text = super()._expand_help(action) or ""
            name = "".join(action.option_strings[:1]).removeprefix("--").removesuffix(".kind")
            if name in defaults and name != "".join(action.option_strings[:1]).removeprefix("--"):
                kind = (defaults[name] or {}).get("kind", "null")
                text = re.sub(r"\(default: [^)]*\)", f"(default: {kind})", text)
            return text

    return Formatter
