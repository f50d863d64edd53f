"""The image files below a folder, and which of them are not read for what the file system says of them."""

import heapq
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from stage1_tokenizer.data.decode import EXTENSIONS
from stage1_tokenizer.errors import BadFileError

Links = Literal["inside", "anywhere"]
FOLDER = "is a folder"
NOT_REGULAR = "is not a regular file"
LINKED_FOLDER = "is a link to a folder that is not in this one"
NO_FILES = (FOLDER, NOT_REGULAR, LINKED_FOLDER)
"""How the reasons begin for which something is no file at all. Other refused ones are files, of a class too."""
PERMIT = "--data.links anywhere permits that"


def image_files(root: Path, links: Links) -> Iterator[tuple[str, str]]:
    """(name, reason) of all that has an image's extension, in no order: the path relative to the root, with forward
    slashes, and why it is refused: because it leads out of the root, or is no file. An empty reason: it is a file, or
    it cannot be known before it is opened.

    What a link to a folder inside the root shows is there already, at its own place. Others are followed where `links`
    is `anywhere`, each folder once, so there are no circles; else they are named and refused.

    Raises:
        BadFileError: a folder cannot be listed. Left out, it would be missing without a word.
    """
    home, start = os.path.join(os.path.realpath(root), ""), len(os.path.join(root, ""))
    folders, leading_out = [os.fspath(root)], list[str]()
    seen = set[tuple[int, int]]()
    while folders or leading_out:
        # Links after all others, and by name: where two lead to one folder, the first counts.
        folder = folders.pop() if folders else heapq.heappop(leading_out)
        try:
            with os.scandir(folder) as entries:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                for entry in entries:
                    name = entry.path[start:].replace(os.sep, "/")
                    image = os.path.splitext(entry.name)[1].lower() in EXTENSIONS
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_symlink() and _is_folder(entry) and not _is_inside(entry.path, home):
                        if links == "anywhere":
                            heapq.heappush(leading_out, entry.path)
                        else:
                            yield name, f"{LINKED_FOLDER}, but {os.path.realpath(entry.path)}; {PERMIT}"
                            continue
                    if image:
                        yield name, _refusal(entry, home, links)
        except OSError as error:
            raise BadFileError(f"{folder} cannot be listed ({error.strerror})") from None


def _refusal(entry: os.DirEntry[str], home: str, links: Links) -> str:
    if entry.is_file(follow_symlinks=False):
        return ""
    if entry.is_symlink() and links == "inside" and not _is_inside(entry.path, home):
        return f"is a link that leads out of the folder, to {os.path.realpath(entry.path)}; {PERMIT}"
    try:
        mode = entry.stat().st_mode
    except OSError:  # a link to nothing or to itself; the reader says so
        return ""
    if stat.S_ISDIR(mode):
        return FOLDER
    return "" if stat.S_ISREG(mode) else NOT_REGULAR  # a pipe would keep its reader waiting for ever


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_inside(path: str, home: str) -> bool:
    """Whether what a link leads to is the root or lies in it; `home` is its real path, with a slash."""
    return os.path.join(os.path.realpath(path), "").startswith(home)
