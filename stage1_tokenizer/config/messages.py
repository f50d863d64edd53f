"""A mistake in a config in our words: which key, what is wrong with it, what was given, and which key was meant."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from stage1_tokenizer.config.hints import hint

MOST = 10
"""Mistakes that are listed; of a file that is no config at all, hundreds would hide the first."""
LONGEST = 120
"""Characters of a given value or of a reason."""
DASHES = ("-", "\u2013", "\u2014")
"""Beginnings of an option; text processors make long dashes of two short ones."""


def explain(cls: type[BaseModel], error: ValidationError) -> str:
    """pydantic's findings about a config class as lines, the first ten of them."""
    known = set(_keys(cls))
    found = error.errors(include_url=False)
    lines = [_explain_one(cls, known, dict(details)) for details in found[:MOST]]
    return "\n".join(f"  {line}" for line in lines + [f"and {len(found) - MOST} more"] * (len(found) > MOST))


def explain_flags(cls: type[BaseModel], message: str) -> str:
    """argparse's complaint in our words: unknown flags with the nearest known one."""
    head, _, rest = message.partition("unrecognized arguments: ")
    if not rest:
        return shortened(head.removeprefix("error parsing CLI: "))
    words = [word.split("=")[0] for word in rest.split() if word.startswith(DASHES)] or rest.split()[:1]
    known = set(_keys(cls))
    lines = [f"{shortened(word)}: {_unknown(word, known)}" for word in words[:MOST]]
    return "\n  ".join([*lines, "(-h lists all options)"])


def _unknown(word: str, known: set[str]) -> str:
    """The reason why a word of the command line is refused, and what may have been meant."""
    if word.startswith(DASHES):
        return f"there is no such option{hint(word.lstrip(''.join(DASHES)), known, typed=True)}"
    meant = hint(word, known, typed=True) or "; a value with spaces in it needs quotation marks"
    return f"is no option, and belongs to none{meant}"


def shown(value: object) -> str:
    """A given value as Python writes it, cut short: it may be a whole file."""
    try:
        return shortened(repr(value))
    except ValueError:  # Python does not print integers of more than 4,300 digits
        return "a number of thousands of digits"


def shortened(text: str) -> str:
    """Text of at most LONGEST characters."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The config classes that a field's annotation admits."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for argument in get_args(annotation):
            yield from models_of(argument)


def _keys(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys below a config class, over all kinds of its unions."""
    for name, field in cls.model_fields.items():
        models = list(models_of(field.annotation))
        if not models:
            yield prefix + (field.alias or name)
        for model in models:
            yield from _keys(model, f"{prefix}{name}.")


def _explain_one(cls: type[BaseModel], known: set[str], details: dict[str, Any]) -> str:
    """One pydantic error as one line: the dotted key, what is wrong, what was given, and the nearest known key."""
    # In a location inside a union, pydantic inserts the kind's name, which is not part of the key.
    parts: list[str] = []
    models: list[type[BaseModel]] = [cls]
    kinds: list[type[BaseModel]] = []
    kind = ""
    for part in details["loc"]:
        fields = {field.alias or name: field for model in models for name, field in model.model_fields.items()}
        fields |= {name: field for model in models for name, field in model.model_fields.items()}
        if part in fields:
            parts.append(str(part))
            models = list(models_of(fields[part].annotation)) or models
        elif narrowed := [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == part]:
            kinds, models, kind = models, narrowed, str(part)
        else:
            parts.append(shortened(str(part)))
    key, of_kind = ".".join(parts), f" (of kind {kind})" if kind else ""
    if details["type"] == "extra_forbidden" and key in known:
        return f"{key}: {_of_other_kinds(key, kind, kinds)}"
    if details["type"] == "extra_forbidden":
        return f"{key}{of_kind}: there is no such key{hint(key, known)}"
    if details["type"].startswith("union_tag"):
        names = sorted(str(m.model_fields["kind"].default) for m in models if "kind" in m.model_fields)
        given = details["input"].get("kind") if isinstance(details["input"], dict) else details["input"]
        listed = ", ".join(names)
        if given is None:
            return f"{key}.kind: is required (give --{key}.kind KIND; there are {listed})"
        close = hint(str(given), names) if isinstance(given, str) else ""
        return f"{key}.kind: {shown(given)} is not one of {listed}{close}"
    if details["type"] == "missing":
        return f"{key}: is required (give --{key} VALUE)"
    where = f"{key}{of_kind}: " if key else ""
    message = str(details["msg"]).removeprefix("Value error, ")
    message = message if len(message) <= 4 * LONGEST else f"{message[: 4 * LONGEST]}..."
    given = "" if details["type"] == "value_error" and not key else f", got {shown(details['input'])}"
    return f"{where}{message}{given}"


def _of_other_kinds(key: str, kind: str, models: list[type[BaseModel]]) -> str:
    """The reason why a key is refused that only other kinds have, and how to choose one of them.

    A kind that cannot do without the key is the likeliest to have been meant.
    """
    path, _, name = key.rpartition(".")
    owners = [model for model in models if name in model.model_fields]
    owners.sort(key=lambda model: not model.model_fields[name].is_required())
    names = [str(model.model_fields["kind"].default) for model in owners]
    if not names:
        return f"is no key of the kind {kind}"
    return f"is a key of {path}.kind {', '.join(names)}, but the kind is {kind}; give --{path}.kind {names[0]} too"
