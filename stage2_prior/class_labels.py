"""Convert classes, as users give them in options (names or numbers, one or several), to labels."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from stage1_tokenizer.engine.errors import ConfigError, shorten
from stage1_tokenizer.engine.file_names import normalise_name

LISTED = 50
"""Most classes that an error message lists."""
LONGEST_NUMBER = 18
"""Most digits of a class's number; Python refuses to convert thousands of digits."""


def parse_class(name: str, classes: tuple[str, ...]) -> int:
    """Return the label of a class that is given by its name (in any Unicode normal form) or its number.

    If any class name is a number (folders 1, 2, 10), a number is always taken as a name.

    Raises:
        ConfigError: there is no such class; the message lists the (first) classes.
    """
    label = _find_label(name, _labels_by_name(classes), _accepts_numbers(classes))
    if label is None:
        raise _unknown_class(name, classes)
    return label


def parse_classes(names: str | Sequence[str], classes: tuple[str, ...]) -> list[int]:
    """Return the labels of one or several classes.

    names: a class, several classes separated by commas, or a sequence of these. Class names may contain commas: the
    text is split into the longest names that fit.

    Raises:
        ConfigError: there is no such class.
    """
    if not isinstance(names, str):
        return [label for name in names for label in parse_classes(name, classes)]
    labels, is_numbered = _labels_by_name(classes), _accepts_numbers(classes)
    single = _find_label(names, labels, is_numbered)
    if single is not None:
        return [single]
    parts = names.split(",")
    longest = 1 + max((name.count(",") for name in classes), default=0)
    # labels_from[i]: the labels of parts[i:]; None: these parts are not a list of classes.
    labels_from: list[list[int] | None] = [*(None for _ in parts), []]
    for start in reversed(range(len(parts))):
        for end in range(min(len(parts), start + longest), start, -1):
            label, others = _find_label(",".join(parts[start:end]).strip(), labels, is_numbered), labels_from[end]
            if label is not None and others is not None:
                labels_from[start] = [label, *others]
                break
    if (all_labels := labels_from[0]) is not None:
        return all_labels
    unknown = [part.strip() for part in parts if _find_label(part.strip(), labels, is_numbered) is None]
    raise _unknown_class(unknown[0] if 0 < len(unknown) < len(parts) else names, classes)


def assign_labels(
    names: str | Sequence[str], classes: tuple[str, ...], indices: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the labels (n,) of images with these indices (n,), which have the classes `names` in turn.

    names: as for `parse_classes`, which also raises the ConfigError.
    """
    labels = np.array(parse_classes(names, classes), dtype=np.int64)
    return labels[indices % len(labels)]


def _labels_by_name(classes: tuple[str, ...]) -> Mapping[str, int]:
    """Map each name in its normal form to its label."""
    return {normalise_name(name): label for label, name in enumerate(classes)}


def _accepts_numbers(classes: tuple[str, ...]) -> bool:
    """Return True if a number can stand for a class: no class name is a number."""
    return not any(name.isdecimal() for name in classes)


def _find_label(name: str, labels: Mapping[str, int], is_numbered: bool) -> int | None:
    """Return the label of a name or number; None: there is no such class."""
    if normalise_name(name) in labels:
        return labels[normalise_name(name)]
    if is_numbered and len(name) <= LONGEST_NUMBER and name.isdecimal() and int(name) < len(labels):
        return int(name)
    return None


def _unknown_class(name: str, classes: tuple[str, ...]) -> ConfigError:
    """Return the error for a class that does not exist."""
    is_numbered = _accepts_numbers(classes)
    known = ", ".join(f"{label} {known}" if is_numbered else known for label, known in enumerate(classes[:LISTED]))
    known += f" and {len(classes) - LISTED:,} more" if len(classes) > LISTED else ""
    known = known or "none: this prior is unconditional"
    return ConfigError(f"class {json.dumps(shorten(name))}: there is no such class; the classes are: {known}")
