"""Classes as people name them -> labels: by name, by number, several at once."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from stage1_tokenizer.engine.errors import ConfigError, shorten
from stage1_tokenizer.engine.file_names import normalise_name

LISTED = 50
"""Classes that an error lists."""
LONGEST_NUMBER = 18
"""Digits of a class's number: of thousands Python makes none."""


def label_of(name: str, classes: tuple[str, ...]) -> int:
    """A class given by its name, in any normal form, or by its number -> its label. Where names are numbers themselves
    (folders 1, 2, 10), a number is always a name.

    Raises:
        ConfigError: there is no such class; lists those there are, of many the first ones.
    """
    label = _found(name, _labels(classes), _are_numbered(classes))
    if label is None:
        raise _unknown(name, classes)
    return label


def labels_of(names: str | Sequence[str], classes: tuple[str, ...]) -> list[int]:
    """The labels of one or several classes. A text that is no class is several with commas between them; where names
    hold commas themselves, it is cut into the longest ones.

    Raises:
        ConfigError: there is no such class.
    """
    if not isinstance(names, str):
        return [label for name in names for label in labels_of(name, classes)]
    labels, numbered = _labels(classes), _are_numbered(classes)
    whole = _found(names, labels, numbered)
    if whole is not None:
        return [whole]
    parts = names.split(",")
    longest = 1 + max((name.count(",") for name in classes), default=0)
    # The labels of the parts from each place on; None where these cannot be cut into classes.
    after: list[list[int] | None] = [*(None for _ in parts), []]
    for start in reversed(range(len(parts))):
        for end in range(min(len(parts), start + longest), start, -1):
            label, others = _found(",".join(parts[start:end]).strip(), labels, numbered), after[end]
            if label is not None and others is not None:
                after[start] = [label, *others]
                break
    if (found := after[0]) is not None:
        return found
    unknown = [part.strip() for part in parts if _found(part.strip(), labels, numbered) is None]
    raise _unknown(unknown[0] if 0 < len(unknown) < len(parts) else names, classes)


def labels_in_turn(
    names: str | Sequence[str], classes: tuple[str, ...], indices: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The label of each image, by its number, where images have these classes in turn; see `labels_of`."""
    labels = np.array(labels_of(names, classes), dtype=np.int64)
    return labels[indices % len(labels)]


def _labels(classes: tuple[str, ...]) -> Mapping[str, int]:
    return {normalise_name(name): label for label, name in enumerate(classes)}


def _are_numbered(classes: tuple[str, ...]) -> bool:
    return not any(name.isdecimal() for name in classes)


def _found(name: str, labels: Mapping[str, int], numbered: bool) -> int | None:
    if normalise_name(name) in labels:
        return labels[normalise_name(name)]
    if numbered and len(name) <= LONGEST_NUMBER and name.isdecimal() and int(name) < len(labels):
        return int(name)
    return None


def _unknown(name: str, classes: tuple[str, ...]) -> ConfigError:
    numbered = _are_numbered(classes)
    known = ", ".join(f"{label} {known}" if numbered else known for label, known in enumerate(classes[:LISTED]))
    known += f" and {len(classes) - LISTED:,} more" if len(classes) > LISTED else ""
    known = known or "none: this prior is unconditional"
    return ConfigError(f"class {json.dumps(shorten(name))}: there is no such class; the classes are: {known}")
