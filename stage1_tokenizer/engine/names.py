"""Names of files and classes as they are compared and shown: one Unicode normal form, numbers by their value, paths
with the folder that they start from."""

import os
import re
import unicodedata
from contextlib import suppress
from pathlib import Path

NUMBER = re.compile(r"([0-9]+)")


def folded(name: str) -> str:
    """A name in the normal form NFC: a Mac writes `é` as two characters, and most keyboards give one."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """A key that sorts 1, 2, 10, and not 1, 10, 2."""
    parts = NUMBER.split(name)
    keys = [(int(part[:400]), "") if place % 2 else (0, part) for place, part in enumerate(parts)]
    return keys, name


def existing_path(given: str) -> str:
    """The path as it is on disk, if only the normal form of its accents differs there; `~` is the home folder.

    A path that does not exist in any form is returned as it is: the command says what is missing.
    """
    try:
        path = Path(given).expanduser() if given.startswith("~") else Path(given)
    except RuntimeError:  # `~` and a name that is no user's
        return given
    if given.isascii() or os.path.lexists(path):
        return str(path) if given.startswith("~") else given
    found = Path(path.anchor)
    for part in path.parts[len(path.anchor) > 0 :]:
        forms = [part] if os.path.lexists(found / part) else _forms_in(found, part)
        if not forms:
            return str(path)
        found /= forms[0]
    return str(found)


def located(path: str | Path) -> str:
    """A path for a message that says it is not there: a relative one with the folder that it starts from."""
    return f"{path}" if Path(path).is_absolute() else f"{path} (in {Path.cwd()})"


def _forms_in(folder: Path, name: str) -> list[str]:
    """The names in a folder that differ from a name in their normal form alone."""
    with suppress(OSError):
        return [other for other in os.listdir(folder) if folded(other) == folded(name)]
    return []
