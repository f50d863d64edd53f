"""Reading and merging of the config of a command: defaults < YAML file (`--config FILE`) < command line.

A config is a tree of frozen pydantic models. Each config class stands directly above the module that it configures. A
key may be a choice of kinds (`bottleneck.kind: fsq`): the kinds are a union of small classes, and choosing another kind
drops the keys of the former one. `error_messages.py` explains mistakes.

A YAML file or the header of weights may come from anybody, so sizes and depths of files and trees are bounded, and so
are the numbers of layers and channels (`value_types.py`).
"""

import json
import os
import re
import sys
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    field_validator,
)
from pydantic_settings import CliSettingsSource, SettingsError

from stage1_tokenizer.config.command_line import prepare_words
from stage1_tokenizer.config.error_messages import explain_option_error, explain_validation_error
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.config.yaml_and_json import LARGEST_YAML, dump_yaml, parse_json, parse_yaml
from stage1_tokenizer.engine.console import print_note
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, UserError
from stage1_tokenizer.engine.file_names import describe_path, find_existing_path
from stage1_tokenizer.engine.files import write_file

Tree = dict[str, Any]
"""A config as plain values, as YAML and JSON have it."""
ConfigT = TypeVar("ConfigT", bound="Config")
CommandT = TypeVar("CommandT", bound="CommandConfig")


class Config(BaseModel):
    """Base of all configs: immutable, without unknown keys. The docstrings under the fields are the help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _check_value(cls, value: Any) -> Any:
        """Refuse texts that no path can have, and integers that no tensor can have; return paths as they are on disk.

        Any text may be a path. Later these values would be errors of the operating system or of torch.
        """
        if isinstance(value, tuple):
            return tuple(cls._check_value(part) for part in value)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("must be an integer of 64 bits")
        if isinstance(value, str):
            if "\0" in value:
                raise ValueError("must not have the character of code 0")
            try:
                value.encode("utf-8")
                os.fsencode(value)
            except UnicodeEncodeError:  # safetensors and TensorBoard need names in UTF-8
                encoding = sys.getfilesystemencoding()
                advice = "" if encoding == "utf-8" else f" (Python reads names as {encoding} here; set PYTHONUTF8=1)"
                raise ValueError(f"must be text in UTF-8, since it may be the name of a file{advice}") from None
            return find_existing_path(value)
        return value

    def tree(self) -> Tree:
        """Return the config as plain values, as YAML files and headers of weights have it."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], source: str = "config") -> Self:
        """Return the validated config of a tree of plain values. source: origin of the tree, for the message.

        Raises:
            ConfigError: has the dotted name of each wrong key, the given value, what is allowed, and the nearest key.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(f"in the {source}:\n{explain_validation_error(cls, error)}") from None


class CommandConfig(Config):
    """Base of the configs that a command line is parsed into."""

    reads_config: ClassVar[bool] = True
    """False if the file of `--config` is an input of the command, and not a file with values of its options."""

    config: Annotated[str | None, Mark.FREE] = None
    """YAML file with values that replace the defaults; the command line replaces both."""

    @classmethod
    def complete(cls, tree: Tree) -> Tree:
        """Return the tree with the values that come from files it names, e.g. the data config of a tokenizer.

        Most commands return it unchanged.
        """
        return tree


def parse_command_line(cls: type[CommandT], argv: Sequence[str] | None = None) -> CommandT:
    """Return the validated config of a command: defaults, then the file of `--config`, then the command line.

    Raises:
        ConfigError: an unknown key or option, a wrong value, or a config file that cannot be read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    source: CliSettingsSource[Any] = CliSettingsSource(
        cls,  # type: ignore[arg-type]  # it takes any model, as its documentation says
        formatter_class=_help_formatter(_defaults(cls)),
        cli_parse_args=False,
        cli_exit_on_error=False,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_parse_none_str="null",
    )
    words = prepare_words(source.root_parser, argv)
    for line in words.dropped:
        print_note(line)
    try:
        given: Tree = words.restore(source(args=words.argv)())
    except SettingsError as error:
        raise ConfigError(explain_option_error(cls, str(error))) from None
    return configure(cls, given)


def configure(cls: type[CommandT], given: Tree) -> CommandT:
    """Return the validated config of given values: defaults, then the file at key `config`, then the given values.

    Raises:
        ConfigError: a wrong value, or a config file that cannot be read.
    """
    defaults = _defaults(cls)
    if not given.get("config") or not cls.reads_config:
        return cls.from_tree(cls.complete(merge(defaults, _with_nulls(given))), "configuration")
    file = read_yaml(find_existing_path(given["config"]))
    for line in explain_dropped_keys(file, given):
        print_note(line)
    return cls.from_tree(cls.complete(merge(merge(defaults, file), _with_nulls(given))), "configuration")


def read_yaml(path: str | Path) -> Tree:
    """Read a YAML config file that the user named.

    Raises:
        ConfigError: there is no such file, or it is not YAML, too large, or not a mapping.
    """
    return _read_yaml(path, f"--config {describe_path(path)}", ConfigError)


def read_saved_yaml(path: str | Path) -> Tree:
    """Read the config.yaml of a run.

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
        raise error_class(f"{name}: is a {type(tree).__name__}, but a config is a mapping of keys to values")
    return tree


def write_yaml(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a config as YAML.

    Raises:
        StorageError: no space, or no permission.
    """
    write_file(path, dump_yaml(tree))


def merge(base: Tree, change: Mapping[str, Any]) -> Tree:
    """Return `base` with the values of `change`, key by key; a sub-tree of another `kind` replaces the former one."""
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


def explain_dropped_keys(file: Tree, given: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield lines that name the keys of a file that do not count, since the command line chooses another `kind`."""
    for key, value in file.items():
        new = given.get(key)
        if not isinstance(value, dict) or not isinstance(new, Mapping):
            continue
        if new.get("kind", value.get("kind")) == value.get("kind"):
            yield from explain_dropped_keys(value, new, f"{prefix}{key}.")
        elif lost := [f"{prefix}{key}.{name} {json.dumps(old)}" for name, old in value.items() if name not in new]:
            yield (
                f"{prefix}{key}.kind {new['kind']} replaces {value.get('kind')} of the file, so these keys of the file "
                f"do not count: {', '.join(lost)}"
            )


def differences(old: Tree, new: Tree, prefix: str = "") -> list[str]:
    """Return a line `key: old -> new` for each dotted key whose value differs between two trees."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {json.dumps(before)} -> {json.dumps(after)}")
    return lines


def config_from_json(cls: type[ConfigT], text: str | None, source: str) -> ConfigT:
    """Read the config in the header of a weights file. source: the file, for the message.

    Raises:
        BadFileError: the header has no config, or one that this version cannot read.
    """
    try:
        return cls.from_tree(parse_json(text), f"header of {source}")
    except ValueError as error:  # a ConfigError is one too
        raise BadFileError(f"{source}: its header has no usable {cls.__name__}: {error}") from None


def _defaults(cls: type[Config]) -> Tree:
    """Return the defaults of all fields that have one, as a tree."""
    fields = {name: field for name, field in cls.model_fields.items() if not field.is_required()}
    return cls.model_construct(
        **{name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    ).tree()


def _with_nulls(given: Tree) -> Tree:
    """Return the tree with null for [None], which the parser makes of `--key null` for a key with several values."""
    return {
        key: _with_nulls(value) if isinstance(value, dict) else None if value == [None] else value
        for key, value in given.items()
    }


def _help_formatter(defaults: Tree) -> type[RawDescriptionHelpFormatter]:
    """Return a formatter for -h that names the true default kind; pydantic-settings names the last kind."""

    class Formatter(RawDescriptionHelpFormatter):
        def _expand_help(self, action: Action) -> str:
            text = super()._expand_help(action) or ""
            name = "".join(action.option_strings[:1]).removeprefix("--").removesuffix(".kind")
            if name in defaults and name != "".join(action.option_strings[:1]).removeprefix("--"):
                kind = (defaults[name] or {}).get("kind", "null")
                text = re.sub(r"\(default: [^)]*\)", f"(default: {kind})", text)
            return text

    return Formatter
