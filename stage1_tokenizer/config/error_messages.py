"""Messages about mistakes in a config: the key, what is wrong, the given value, and the key that was probably meant."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from stage1_tokenizer.config.field_facts import config_classes
from stage1_tokenizer.config.suggestions import suggest
from stage1_tokenizer.engine.errors import shorten

MOST_MISTAKES = 10
"""Largest number of mistakes in a message."""
LONGEST_VALUE = 120
"""Characters of a given value or of a reason."""
DASHES = ("-", "\u2013", "\u2014")
"""First characters of an option; text processors turn two hyphens into a long dash."""


def explain_validation_error(cls: type[BaseModel], error: ValidationError) -> str:
    """Return the errors of pydantic about a config class as lines, at most ten of them."""
    known = set(_keys(cls))
    found = error.errors(include_url=False)
    lines = [_explain_one(cls, known, dict(details)) for details in found[:MOST_MISTAKES]]
    if len(found) > MOST_MISTAKES:
        lines.append(f"and {len(found) - MOST_MISTAKES} more")
    return "\n".join(f"  {line}" for line in lines)


def explain_option_error(cls: type[BaseModel], message: str) -> str:
    """Return the error of argparse about a command line in our words, with the nearest option for each unknown one."""
    head, _, rest = message.partition("unrecognized arguments: ")
    if not rest:
        return shorten(head.removeprefix("error parsing CLI: "), LONGEST_VALUE)
    words = [word.split("=")[0] for word in rest.split() if word.startswith(DASHES)] or rest.split()[:1]
    known = set(_keys(cls))
    lines = [f"{shorten(word, LONGEST_VALUE)}: {_explain_word(word, known)}" for word in words[:MOST_MISTAKES]]
    return "\n  ".join([*lines, "(-h lists all options)"])


def _explain_word(word: str, known: set[str]) -> str:
    """Return the reason why a word of the command line is refused, and the option that may have been meant."""
    if word.startswith(DASHES):
        return f"there is no such option{suggest(word.lstrip(''.join(DASHES)), known, typed=True)}"
    meant = suggest(word, known, typed=True) or "; a value with spaces in it needs quotation marks"
    return f"is not an option or a value of one{meant}"


def quote_value(value: object) -> str:
    """Return a given value as Python writes it, shortened: it may be a whole file."""
    try:
        return shorten(repr(value), LONGEST_VALUE)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        return "a number of thousands of digits"


def _keys(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of a config class, of all kinds of its unions."""
    for name, field in cls.model_fields.items():
        classes = list(config_classes(field.annotation))
        if not classes:
            yield prefix + (field.alias or name)
        for below in classes:
            yield from _keys(below, f"{prefix}{name}.")


def _explain_one(cls: type[BaseModel], known: set[str], details: dict[str, Any]) -> str:
    """Return one error of pydantic as a line: the dotted key, what is wrong, the given value, the nearest known key."""
    key, kind, classes, kinds = _locate(cls, details["loc"])
    of_kind = f" (of kind {kind})" if kind else ""
    if details["type"] == "extra_forbidden" and key in known:
        return f"{key}: {_explain_other_kind(key, kind, kinds)}"
    if details["type"] == "extra_forbidden":
        return f"{key}{of_kind}: there is no such key{suggest(key, known)}"
    if details["type"].startswith("union_tag"):
        names = sorted(str(choice.model_fields["kind"].default) for choice in classes if "kind" in choice.model_fields)
        given = details["input"].get("kind") if isinstance(details["input"], dict) else details["input"]
        listed = ", ".join(names)
        if given is None:
            return f"{key}.kind: is required (give --{key}.kind KIND; there are {listed})"
        close = suggest(str(given), names) if isinstance(given, str) else ""
        return f"{key}.kind: {quote_value(given)} is not one of {listed}{close}"
    if details["type"] == "missing":
        return f"{key}: is required (give --{key} VALUE)"
    prefix = f"{key}{of_kind}: " if key else ""
    message = shorten(str(details["msg"]).removeprefix("Value error, "), 4 * LONGEST_VALUE)
    given = "" if details["type"] == "value_error" and not key else f", got {quote_value(details['input'])}"
    return f"{prefix}{message}{given}"


Classes = list[type[BaseModel]]


def _locate(cls: type[BaseModel], location: tuple[str | int, ...]) -> tuple[str, str, Classes, Classes]:
    """Return the dotted key of a location, its kind, the config classes at the key, and the classes of all kinds.

    pydantic inserts the name of the kind into a location inside a union; it is no part of the key.
    """
    parts: list[str] = []
    classes: Classes = [cls]
    kinds: Classes = []
    kind = ""
    for part in location:
        fields = {field.alias or name: field for choice in classes for name, field in choice.model_fields.items()}
        fields |= {name: field for choice in classes for name, field in choice.model_fields.items()}
        if part in fields:
            parts.append(str(part))
            classes = list(config_classes(fields[str(part)].annotation)) or classes
        elif of_kind := [c for c in classes if "kind" in c.model_fields and c.model_fields["kind"].default == part]:
            kinds, classes, kind = classes, of_kind, str(part)
        else:
            parts.append(shorten(part, LONGEST_VALUE))
    return ".".join(parts), kind, classes, kinds


def _explain_other_kind(key: str, kind: str, classes: Classes) -> str:
    """Return the reason why a key is refused that only other kinds have, and how to choose one of them.

    A kind that requires the key was most probably meant.
    """
    path, _, name = key.rpartition(".")
    owners = [choice for choice in classes if name in choice.model_fields]
    owners.sort(key=lambda choice: not choice.model_fields[name].is_required())
    names = [str(choice.model_fields["kind"].default) for choice in owners]
    if not names:
        return f"is not a key of the kind {kind}"
    return f"is a key of {path}.kind {', '.join(names)}, but the kind is {kind}; give --{path}.kind {names[0]} too"
