"""Comparison, sorting and display of the names of files and classes."""

import os
import re
import unicodedata
from contextlib import suppress
from pathlib import Path

NUMBER = re.compile(r"([0-9]+)")


def normalise_name(name: str) -> str:
    """Return a name in the Unicode normal form NFC: a Mac stores `é` as two characters, keyboards give one."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def natural_sort_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a key that sorts numbers in names by value: 1, 2, 10, not 1, 10, 2."""
    parts = NUMBER.split(name)
    keys = [(int(part[:400]), "") if place % 2 else (0, part) for place, part in enumerate(parts)]
    return keys, name


def find_existing_path(given: str) -> str:
    """Return the path as it is on disk, with `~` replaced by the home folder and accents in the disk's normal form.

    A path that does not exist in any normal form is returned as given; the command that needs it reports it.
    """
    try:
        path = Path(given).expanduser() if given.startswith("~") else Path(given)
    except RuntimeError:  # `~` and a name that is not a user's
        return given
    if given.isascii() or os.path.lexists(path):
        return str(path) if given.startswith("~") else given
    found = Path(path.anchor)
    for part in path.parts[len(path.anchor) > 0 :]:
        forms = [part] if os.path.lexists(found / part) else _equal_names(found, part)
        if not forms:
            return str(path)
        found /= forms[0]
    return str(found)


def describe_path(path: str | Path) -> str:
    """Return a path for a message about a missing file; a relative path with the folder that it starts from."""
    return f"{path}" if Path(path).is_absolute() else f"{path} (in {Path.cwd()})"


def _equal_names(folder: Path, name: str) -> list[str]:
    """Return the names in a folder that have the same normal form as `name`."""
    with suppress(OSError):
        return [other for other in os.listdir(folder) if normalise_name(other) == normalise_name(name)]
    return []
