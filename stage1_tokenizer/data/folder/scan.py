"""The image files below a folder, what else lies there, and which files the file system says cannot be read.

Neither what an operating system, an archive or a photo manager leaves behind is data, nor what Tessera wrote itself.
"""

import heapq
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL.PngImagePlugin import PngInfo

from stage1_tokenizer.data.bad_files import BadImageError, errors_of
from stage1_tokenizer.data.image_files import EXTENSIONS, RAW, REMAINS, is_image, read_image
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.lock import is_marked

Links = Literal["inside", "anywhere"]
FOLDER = "is a folder"
NOT_REGULAR = "is not a regular file"
LINKED_FOLDER = "is a link to a folder that is not in this one"
NO_FILES = (FOLDER, NOT_REGULAR, LINKED_FOLDER)
"""How the reasons begin for which something is no file at all. Other refused ones are files, of a class too."""
PERMIT = "--data.links anywhere permits that"
SYSTEM_FOLDERS = frozenset(
    {
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "@eadir",
        "@recycle",
        "@tmp",
        "__macosx",
        "__pycache__",
        "found.000",
        "lost+found",
        "network trash folder",
        "recycler",
        "system volume information",
        "temporary items",
    }
)
"""Folders of operating systems, archives and network disks, in lower case."""
PHOTO_MANAGER = (".aplibrary", ".lrdata", ".photoslibrary", ".photolibrary")
"""How the names of folders end that hold a photo manager's own files, previews among them."""
SYSTEM_FILES = frozenset({"desktop.ini", "ehthumbs.db", "thumbs.db"})
HIDDEN, SYSTEM, OURS, THUMBNAILS = "hidden", "system", "written by Tessera", "thumbnails"
THUMBNAIL_FOLDERS = frozenset({"_thumbs", "thumb", "thumbnail", "thumbnails", "thumbs"})
"""Folders with small copies of the images beside them, in lower case."""
OUR_ENDINGS = ("grid.png", "-nearest.png")
"""How the names of images of ours end that may lie in somebody else's folder: only these are opened to look for the
mark."""
SOFTWARE = "Tessera"
HEAD = 200
"""Bytes of a PNG's beginning in which the mark lies."""


@dataclass
class Seen:
    """What a walk met beside the image files."""

    ignored: Counter[str] = field(default_factory=Counter)
    """Number of files left out, by their kind: an extension, or `hidden`, `system`, `written by Tessera`."""
    folders: list[str] = field(default_factory=list)
    """Relative paths of the folders that were looked into."""
    ours: list[str] = field(default_factory=list)
    """Relative paths of folders that Tessera wrote, which were not."""


def image_files(
    root: Path, links: Links, seen: Seen | None = None, also_ours: bool = False
) -> Iterator[tuple[str, str]]:
    """(name, reason) of all images, in no order: the path relative to the root, with forward slashes, and why it is
    refused: because it leads out of the root, or is no file. An empty reason: it is a file, or it cannot be known
    before it is opened. What else is met is counted in `seen`. What Tessera wrote is left out unless `also_ours`.

    A file is an image by its extension, and where that says nothing, by its content. What a link to a folder inside the
    root shows is there already, at its own place. Others are followed where `links` is `anywhere`, each folder once, so
    there are no circles; else they are named and refused.

    Raises:
        BadFileError: a folder cannot be listed. Left out, it would be missing without a word.
    """
    home, start = os.path.join(os.path.realpath(root), ""), len(os.path.join(root, ""))
    folders, leading_out = [os.fspath(root)], list[str]()
    visited = set[tuple[int, int]]()
    seen = seen or Seen()
    while folders or leading_out:
        # Links after all others, and by name: where two lead to one folder, the first counts.
        folder = folders.pop() if folders else heapq.heappop(leading_out)
        try:
            with os.scandir(folder) as entries:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in visited:
                    continue
                visited.add((status.st_dev, status.st_ino))
                seen.folders.append(folder[start:].replace(os.sep, "/"))
                for entry in entries:
                    name = entry.path[start:].replace(os.sep, "/")
                    leads = entry.is_symlink() and _is_folder(entry) and not _is_inside(entry.path, home)
                    if entry.is_dir(follow_symlinks=False):
                        if kind := _kind_of_folder(entry, also_ours):
                            seen.ignored[kind] += _count(entry.path)
                            seen.ours += [name] * (kind == OURS)
                            continue
                        folders.append(entry.path)
                    elif leads and links == "anywhere":
                        heapq.heappush(leading_out, entry.path)
                    elif leads:
                        yield name, f"{LINKED_FOLDER}, but {os.path.realpath(entry.path)}; {PERMIT}"
                        continue
                    if not (kind := _kind_of(entry, home, links, also_ours)):
                        yield name, _refusal(entry, home, links)
                    elif kind != FOLDER:
                        seen.ignored[kind] += 1
        except OSError as error:
            raise BadFileError(f"{folder} cannot be listed ({error.strerror})") from None


def png_mark() -> PngInfo:
    """Return the mark in the header of a PNG by which we know it as ours."""
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    return mark


def is_marked_image(path: str) -> bool:
    """True for a PNG that carries our mark."""
    if not path.endswith(OUR_ENDINGS):
        return False
    if os.path.exists(path.removesuffix("-nearest.png") + ".json"):  # of an evaluation, before there was a mark
        return True
    try:
        with open(path, "rb") as file:
            return b"tEXtSoftware\0" + SOFTWARE.encode() in file.read(HEAD)
    except OSError:
        return False


def _kind_of_folder(entry: os.DirEntry[str], also_ours: bool) -> str:
    """Why a folder is not looked into; empty: it is."""
    name = entry.name.lower()
    if name.startswith("."):
        return HIDDEN
    if name in SYSTEM_FOLDERS or name.endswith(PHOTO_MANAGER):
        return SYSTEM
    if name in THUMBNAIL_FOLDERS:
        return THUMBNAILS
    return OURS if not also_ours and is_marked(entry.path) else ""


def _kind_of(entry: os.DirEntry[str], home: str, links: Links, also_ours: bool) -> str:
    """What an entry is counted as that is no image; empty: it is one, by its name or its content."""
    name = entry.name.lower()
    ending = os.path.splitext(name)[1]
    if not also_ours and is_marked_image(entry.path):
        return OURS
    if name[0] != "." and ending in EXTENSIONS:
        return ""
    if _is_folder(entry):
        return FOLDER
    if name[0] == "." or name in SYSTEM_FILES:
        return HIDDEN if name[0] == "." else SYSTEM
    if name.endswith(REMAINS):
        return "unfinished or a backup copy"
    regular = entry.is_file(follow_symlinks=False) or (entry.is_symlink() and not _refusal(entry, home, links))
    return "" if regular and ending not in RAW and is_image(entry.path) else ending or "no extension"


def _count(folder: str) -> int:
    """Number of files below a folder that is left out; what cannot be listed is not counted."""
    return sum(len(files) for _, _, files in os.walk(folder))


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
    """True where what a link leads to is the root or lies in it; `home` is its real path, with a slash."""
    return os.path.join(os.path.realpath(path), "").startswith(home)


def unreadable(
    root: Path, links: Links = "inside", seen: Callable[[], object] = lambda: None
) -> Iterator[BadImageError]:
    """Yield the path and the reason of each image file below the root that a training could not read, when it is found.

    seen: is called once for each file, good or bad.

    Raises:
        BadFileError: a folder cannot be listed.
    """

    def read(file: tuple[str, str]) -> None:
        name, reason = file
        if reason:
            raise BadImageError(root / name, reason)
        read_image(root / name, channels=3)

    for error in errors_of(read, image_files(root, links, also_ours=True)):
        seen()
        if error:
            yield error


def check_is_no_data(folder: Path) -> None:
    """Raises ConfigError where a folder that a run is to be written to holds images and no run: those are data."""
    if not folder.is_dir() or is_marked(folder) or (folder / "config.yaml").exists():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            raise ConfigError(
                f"--out {folder}: holds images ({path.name}); a run has a folder of its own, choose another"
            )
