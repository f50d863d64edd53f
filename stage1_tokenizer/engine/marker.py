"""The marks by which Tessera knows again what it wrote, so that no output is ever read as data.

A folder of ours holds a file `.tessera`. A picture that may lie in somebody else's folder (a grid, the nearest training
images) says so in its own header.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from stage1_tokenizer.engine.errors import ConfigError

MARKER = ".tessera"
TEXT = b"Tessera wrote this folder. Its images are not read as data unless the folder itself is named.\n"
SOFTWARE = "Tessera"
OUR_ENDINGS = ("grid.png", "-nearest.png")
"""How the names of such pictures end: only these files are opened to look for the mark."""
HEAD = 200
"""Bytes of a PNG's beginning in which the mark lies."""


def mark_folder(folder: Path) -> None:
    """Make a folder, and write the marker into it if it holds nothing but hidden files: whatever else lies there is not
    ours."""
    with suppress(OSError):  # a full disk ends the command where it saves
        folder.mkdir(parents=True, exist_ok=True)
        if all(name.startswith(".") for name in os.listdir(folder)):
            (folder / MARKER).write_bytes(TEXT)


def is_marked(folder: str | Path) -> bool:
    """True for a folder that Tessera wrote; versions before the marker are known by the files that say so."""
    there = os.path.exists
    if there(os.path.join(folder, MARKER)):
        return True
    settings = os.path.join(folder, "settings.json")  # of samples
    if there(settings):
        with suppress(OSError, ValueError, RecursionError):
            tree = json.loads(Path(settings).read_text(encoding="utf-8"))
            return isinstance(tree, dict) and isinstance(tree.get("finished"), bool)
    return all(there(os.path.join(folder, name)) for name in ("config.yaml", "environment.jsonl"))  # a run


def check_is_no_data(folder: Path) -> None:
    """Raises ConfigError where a folder that a run is to be written to holds images and no run: those are data."""
    if not folder.is_dir() or is_marked(folder) or (folder / "config.yaml").exists():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            raise ConfigError(
                f"--out {folder}: holds images ({path.name}); a run has a folder of its own, choose another"
            )


def png_mark() -> PngInfo:
    """The mark in the header of a PNG."""
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    return mark


def is_marked_picture(path: str) -> bool:
    """True for a PNG that carries the mark."""
    if not path.endswith(OUR_ENDINGS):
        return False
    if os.path.exists(path.removesuffix("-nearest.png") + ".json"):  # of an evaluation, before there was a mark
        return True
    try:
        with open(path, "rb") as file:
            return b"tEXtSoftware\0" + SOFTWARE.encode() in file.read(HEAD)
    except OSError:
        return False
