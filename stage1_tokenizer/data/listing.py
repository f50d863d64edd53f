"""The image files below a folder, and which of them are not read for what the file system says of them."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from stage1_tokenizer.data.decode import EXTENSIONS
from stage1_tokenizer.errors import BadFileError

Links = Literal["inside", "anywhere"]


def image_files(root: Path, links: Links) -> Iterator[tuple[str, str]]:
    """(name, reason) of all that has an image's extension, in no order: the path relative to the root, with forward
    slashes, and why it is refused: because it leads out of the root, or is no file. An empty reason: it is a file, or
    it cannot be known before it is opened. Links to folders are not followed, so there are no circles.

    Raises:
        BadFileError: a folder cannot be listed. Left out, it would be missing without a word.
    """
    real, start = os.path.realpath(root), len(os.path.join(root, ""))
    folders = [os.fspath(root)]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    if os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                        yield entry.path[start:].replace(os.sep, "/"), _refusal(entry, real, links)
        except OSError as error:
            raise BadFileError(f"data.root {root}: {folder} cannot be listed ({error.strerror})") from None


def _refusal(entry: os.DirEntry[str], root: str, links: Links) -> str:
    if entry.is_file(follow_symlinks=False):
        return ""
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        if links == "inside" and not target.startswith(os.path.join(root, "")):
            return f"is a link that leads out of the folder, to {target}; --data.links anywhere permits that"
    try:
        mode = entry.stat().st_mode
    except OSError:  # a link to nothing or to itself; the reader says so
        return ""
    if stat.S_ISDIR(mode):
        return "is a folder"
    return "" if stat.S_ISREG(mode) else "is not a regular file"  # a pipe would keep its reader waiting for ever
