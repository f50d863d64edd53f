"""How every command is configured: defaults < YAML file (`--config FILE`) < command line (`--optim.lr 1e-4`).

A config is a tree of frozen pydantic models. The class that a key configures stands directly above the module that
reads it; this file only reads, merges and explains. Where a key is a choice of kinds (`bottleneck.kind: fsq`), the
kinds are a union of small classes, and choosing another kind drops the keys of the former one.
"""

import difflib
import json
import re
import sys
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

from stage1_tokenizer.errors import BadFileError, ConfigError

Tree = dict[str, Any]
ConfigT = TypeVar("ConfigT", bound="Config")
CommandT = TypeVar("CommandT", bound="CommandConfig")


class Config(BaseModel):
    """Base of all configs: immutable, strict about unknown keys, docstrings under the fields are the help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True)

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
            lines = [_explain(cls, dict(details)) for details in error.errors()]
            raise ConfigError(f"in the {source}:\n" + "\n".join(f"  {line}" for line in lines)) from None


class CommandConfig(Config):
    """Base of the configs that a command line is parsed into."""

    config: str | None = None
    """YAML file that overrides the defaults; the command line overrides both."""


def parse_command_line(cls: type[CommandT], argv: Sequence[str] | None = None) -> CommandT:
    """Defaults, then the file given by `--config`, then the command line, as one validated config.

    Raises:
        ConfigError: an unknown key or flag, a value that does not fit, or a config file that cannot be read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    defaults = _defaults(cls)
    try:
        given: Tree = CliSettingsSource(
            cls,  # type: ignore[arg-type]  # any model will do, as its documentation says
            formatter_class=_help_formatter(defaults),
            cli_parse_args=argv,
            cli_exit_on_error=False,
            cli_avoid_json=True,
            cli_hide_none_type=True,
            cli_implicit_flags=True,
            cli_parse_none_str="null",
        )()
    except SettingsError as error:
        raise ConfigError(_explain_flags(cls, str(error))) from None
    tree = merge(defaults, read_yaml(given["config"])) if given.get("config") else defaults
    return cls.from_tree(merge(tree, _with_nulls(given)), "configuration")


def read_yaml(path: str | Path) -> Tree:
    """Read a YAML config file.

    Raises:
        ConfigError: there is no such file, or it is not YAML, or it does not hold a mapping.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: is not YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--config {path}: holds a {type(tree).__name__}, but a config is a mapping of keys to values"
        )
    return tree


def write_yaml(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False), encoding="utf-8")


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
        return cls.from_tree(json.loads(text or ""), f"header of {source}")
    except (json.JSONDecodeError, ConfigError) as error:
        raise BadFileError(f"{source}: its header holds no usable {cls.__name__}: {error}") from None


def _as_pair(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return (value, value) if isinstance(value, (int, str)) else value


Size = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_as_pair)]
"""Height and width in pixels; a single number means a square. On the command line: `64` or `64,96`."""


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


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The config classes that a field's annotation admits."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _models(argument)


def _keys(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys below a config class, over all kinds of its unions."""
    for name, field in cls.model_fields.items():
        models = list(_models(field.annotation))
        if not models:
            yield prefix + (field.alias or name)
        for model in models:
            yield from _keys(model, f"{prefix}{name}.")


def _nearest(key: str, known: set[str]) -> str:
    # A misspelt last part is likelier than a misspelt path, so look for the last part alone too.
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in sorted(known, reverse=True)}
    close = difflib.get_close_matches(key, known, 1, 0.75) or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_leaf, 1, 0.7)
    ]
    return f"; did you mean {'-' * (len(close[0]) == 1)}{close[0]}?" if close else ""


def _explain(cls: type[BaseModel], details: Tree) -> str:
    """One pydantic error as one line: the dotted key, what is wrong, what was given, and the nearest known key."""
    known = set(_keys(cls))
    # In a location inside a union, pydantic inserts the kind's name, which is not part of the key.
    parts, models = [], [cls]
    kind = ""
    for part in details["loc"]:
        fields = {field.alias or name: field for model in models for name, field in model.model_fields.items()}
        fields |= {name: field for model in models for name, field in model.model_fields.items()}
        if part in fields:
            parts.append(str(part))
            models = list(_models(fields[part].annotation)) or models
        elif narrowed := [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == part]:
            models, kind = narrowed, f" (of kind {part})"
        else:
            parts.append(str(part))
    key = ".".join(parts)
    if details["type"] == "extra_forbidden" and key in known:
        return f"{key}: is a key of another kind than {kind.removeprefix(' (of kind ').rstrip(')')}"
    if details["type"] == "extra_forbidden":
        return f"{key}{kind}: there is no such key{_nearest(key, known)}"
    if details["type"].startswith("union_tag"):
        kinds = sorted(str(m.model_fields["kind"].default) for m in models if "kind" in m.model_fields)
        given = details["input"].get("kind") if isinstance(details["input"], dict) else details["input"]
        return f"{key}.kind: {given!r} is not one of {', '.join(kinds)}"
    if details["type"] == "missing":
        return f"{key}: is required (give --{key} VALUE)"
    where = f"{key}{kind}: " if key else ""
    message = str(details["msg"]).removeprefix("Value error, ")
    given = "" if details["type"] == "value_error" and not key else f", got {details['input']!r}"
    return f"{where}{message}{given}"


def _explain_flags(cls: type[BaseModel], message: str) -> str:
    """argparse's complaint in our words: unknown flags with the nearest known one."""
    head, _, rest = message.partition("unrecognized arguments: ")
    if not rest:
        return head.removeprefix("error parsing CLI: ")
    words = [word.split("=")[0] for word in rest.split() if word.startswith("-")] or rest.split()[:1]
    known = set(_keys(cls))
    lines = [f"{word}: there is no such option{_nearest(word.lstrip('-'), known)}" for word in words]
    return "\n  ".join([*lines, "(-h lists all options)"])
