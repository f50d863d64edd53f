"""The search for image files below a folder: which there are, which cannot be read, and which other files lie there.

Files of operating systems, archives and photo managers are not data, nor is anything that Tessera wrote.
"""

import heapq
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL.PngImagePlugin import PngInfo

from stage1_tokenizer.data.bad_files import BadImageError, read_errors
from stage1_tokenizer.data.image_files import EXTENSIONS, RAW_EXTENSIONS, is_image, read_image
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.lock import is_marked

Links = Literal["inside", "anywhere"]
FOLDER = "is a folder"
NOT_REGULAR = "is not a regular file"
LINKED_FOLDER = "is a link to a folder that is not in this one"
NOT_A_FILE = (FOLDER, NOT_REGULAR, LINKED_FOLDER)
"""Beginnings of the reasons for refusing something that is no file. Anything else that is refused is a file, and counts
for its class."""
PERMIT = "--data.links anywhere permits that"
SYSTEM_FOLDERS = frozenset({"#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recycle", "@tmp", "__macosx"}) | {
    *("__pycache__", "found.000", "lost+found", "network trash folder", "recycler", "system volume information"),
    "temporary items",
}
"""Folders of operating systems, archives and network disks, in lower case."""
PHOTO_MANAGER_ENDINGS = (".aplibrary", ".lrdata", ".photoslibrary", ".photolibrary")
"""Endings of folders that hold a photo manager's own files, previews among them."""
SYSTEM_FILES = frozenset({"desktop.ini", "ehthumbs.db", "thumbs.db"})
UNFINISHED_ENDINGS = ("~", ".bak", ".crdownload", ".download", ".orig", ".part", ".partial", ".swp", ".temp", ".tmp")
"""Endings of backup copies and of unfinished downloads."""
HIDDEN, SYSTEM, OURS, THUMBNAILS = "hidden", "system", "written by Tessera", "thumbnails"
UNFINISHED = "unfinished or a backup copy"
THUMBNAIL_FOLDERS = frozenset({"_thumbs", "thumb", "thumbnail", "thumbnails", "thumbs"})
"""Folders with small copies of the images beside them, in lower case."""
OUR_ENDINGS = ("grid.png", "-nearest.png")
"""Endings of images that Tessera writes into a folder of the user: only these are opened to look for our mark."""
SOFTWARE = "Tessera"
MARK_BYTES = 200
"""Number of bytes at the beginning of a PNG that contain the mark."""


@dataclass
class OtherFiles:
    """The folders, and the files that are no images, that `find_images` met."""

    ignored: Counter[str] = field(default_factory=Counter)
    """Number of ignored files by their kind: an extension, or `hidden`, `system`, `written by Tessera`."""
    folders: list[str] = field(default_factory=list)
    """Relative paths of the folders that were searched."""
    our_folders: list[str] = field(default_factory=list)
    """Relative paths of the folders that were not searched because Tessera wrote them."""


def find_images(
    root: Path, links: Links, others: OtherFiles | None = None, also_ours: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield (name, reason) for all images below a folder, in no order.

    The name is the path relative to the root, with forward slashes. The reason says why the image is refused: it leads
    out of the root, or is no file. It is empty for a file that may be opened. A file is an image by its extension, and
    if that says nothing, by its content.

    A link to a folder inside the root is skipped, because its images are found at their own place. With `links`
    "anywhere", other linked folders are searched, each folder once, so there are no circles; else they are refused.

    others: receives the files that are ignored.
    also_ours: also yield images that Tessera wrote.

    Raises:
        BadFileError: a folder cannot be listed. Without the error its images would be missing silently.
    """
    home, start = os.path.join(os.path.realpath(root), ""), len(os.path.join(root, ""))
    folders, linked_folders = [os.fspath(root)], list[str]()
    visited = set[tuple[int, int]]()
    others = others or OtherFiles()
    while folders or linked_folders:
        # Links last, and by name: if two links lead to one folder, the first name counts.
        folder = folders.pop() if folders else heapq.heappop(linked_folders)
        try:
            with os.scandir(folder) as entries:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in visited:
                    continue
                visited.add((status.st_dev, status.st_ino))
                others.folders.append(folder[start:].replace(os.sep, "/"))
                for entry in entries:
                    name = entry.path[start:].replace(os.sep, "/")
                    leads_out = entry.is_symlink() and _is_folder(entry) and not _is_inside(entry.path, home)
                    if entry.is_dir(follow_symlinks=False):
                        if kind := _ignored_folder(entry, also_ours):
                            others.ignored[kind] += _count_files(entry.path)
                            others.our_folders += [name] * (kind == OURS)
                            continue
                        folders.append(entry.path)
                    elif leads_out and links == "anywhere":
                        heapq.heappush(linked_folders, entry.path)
                    elif leads_out:
                        yield name, f"{LINKED_FOLDER}, but {os.path.realpath(entry.path)}; {PERMIT}"
                        continue
                    if not (kind := _ignored_entry(entry, home, links, also_ours)):
                        yield name, _refusal(entry, home, links)
                    elif kind != FOLDER:
                        others.ignored[kind] += 1
        except OSError as error:
            raise BadFileError(f"{folder} cannot be listed ({error.strerror})") from None


def png_mark() -> PngInfo:
    """Return the text for a PNG's header that marks the image as written by Tessera."""
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    return mark


def is_marked_image(path: str) -> bool:
    """Return True for a PNG that carries our mark."""
    if not path.endswith(OUR_ENDINGS):
        return False
    if os.path.exists(path.removesuffix("-nearest.png") + ".json"):  # an evaluation of a version without marks
        return True
    try:
        with open(path, "rb") as file:
            return b"tEXtSoftware\0" + SOFTWARE.encode() in file.read(MARK_BYTES)
    except OSError:
        return False


def _ignored_folder(entry: os.DirEntry[str], also_ours: bool) -> str:
    """Return the kind as which a folder's files are ignored; empty for a folder to search."""
    name = entry.name.lower()
    if name.startswith("."):
        return HIDDEN
    if name in SYSTEM_FOLDERS or name.endswith(PHOTO_MANAGER_ENDINGS):
        return SYSTEM
    if name in THUMBNAIL_FOLDERS:
        return THUMBNAILS
    return OURS if not also_ours and is_marked(entry.path) else ""


def _ignored_entry(entry: os.DirEntry[str], home: str, links: Links, also_ours: bool) -> str:
    """Return the kind as which an entry is ignored; empty for an image, by its extension or its content."""
    name = entry.name.lower()
    extension = os.path.splitext(name)[1]
    if not also_ours and is_marked_image(entry.path):
        return OURS
    if name[0] != "." and extension in EXTENSIONS:
        return ""
    if _is_folder(entry):
        return FOLDER
    if name[0] == "." or name in SYSTEM_FILES:
        return HIDDEN if name[0] == "." else SYSTEM
    if name.endswith(UNFINISHED_ENDINGS):
        return UNFINISHED
    may_open = entry.is_file(follow_symlinks=False) or (entry.is_symlink() and not _refusal(entry, home, links))
    has_image = may_open and extension not in RAW_EXTENSIONS and is_image(entry.path)
    return "" if has_image else extension or "no extension"


def _count_files(folder: str) -> int:
    """Return the number of files below an ignored folder; folders that cannot be listed are left out."""
    return sum(len(files) for _, _, files in os.walk(folder))


def _refusal(entry: os.DirEntry[str], home: str, links: Links) -> str:
    """Return the reason for not opening an entry; empty if it may be opened."""
    if entry.is_file(follow_symlinks=False):
        return ""
    if entry.is_symlink() and links == "inside" and not _is_inside(entry.path, home):
        return f"is a link that leads out of the folder, to {os.path.realpath(entry.path)}; {PERMIT}"
    try:
        mode = entry.stat().st_mode
    except OSError:  # a link to nothing or to itself, which the reader reports
        return ""
    if stat.S_ISDIR(mode):
        return FOLDER
    return "" if stat.S_ISREG(mode) else NOT_REGULAR  # the reader of a pipe would wait for ever


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_inside(path: str, home: str) -> bool:
    """Return True if a link leads to the root or into it. home: the real path of the root, with a final slash."""
    return os.path.join(os.path.realpath(path), "").startswith(home)


def try_images(root: Path, links: Links = "inside") -> Iterator[BadImageError | None]:
    """Read all images below a folder as a training does, and yield the error of each; None for one that can be read.

    Raises:
        BadFileError: a folder cannot be listed.
    """

    def read(file: tuple[str, str]) -> None:
        name, reason = file
        if reason:
            raise BadImageError(root / name, reason)
        read_image(root / name, channels=3)

    return read_errors(read, find_images(root, links, also_ours=True))


def check_is_no_data(folder: Path) -> None:
    """Check that a folder for a run does not hold the user's images.

    Raises:
        ConfigError: the folder holds images and no run.
    """
    if not folder.is_dir() or is_marked(folder) or (folder / "config.yaml").exists():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            raise ConfigError(
                f"--out {folder}: holds images ({path.name}), but a run needs a folder of its own; choose another"
            )
