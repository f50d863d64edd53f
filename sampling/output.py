"""A folder of images that can be interrupted: the same command, given again, makes only the missing images.

    settings.json     the settings that the images depend on; "finished" is false until all images are there
    000000.png, ...   each is complete or absent; an incomplete one is made again

A command that ends at any moment, for any reason, loses only the images that it was making.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray

from sampling.saved_images import ImageShape, is_complete_png
from stage1_tokenizer.config.base import Config, Tree, differences
from stage1_tokenizer.config.field_facts import Mark, remove_marked
from stage1_tokenizer.engine.errors import ConfigError, StorageError
from stage1_tokenizer.engine.files import sync_folder, write_file
from stage1_tokenizer.engine.launch import run_on_main
from stage1_tokenizer.engine.lock import lock_folder

SETTINGS = "settings.json"
MOST_IMAGES = 10_000_000
"""Number of images that one command makes at most; a damaged settings.json may hold any number."""
CHECKED_AT_ONCE = 256
"""Existing images that the threads check in one batch."""
MAY_DIFFER = ("prior", "tokenizer", "finished")
"""Settings that may differ when a command continues a folder: the paths of the weights (`weights` identifies their
content), and whether the folder is finished."""
LEFTOVER = re.compile(r"\.tmp-.+\.(png|npz|json)-\d+")
"""Names of files that a killed process was writing."""


class Output(NamedTuple):
    """A locked folder for images, and the images that it lacks."""

    path: Path
    names: Sequence[str]
    """File name of each image."""
    missing: NDArray[np.int64]
    """Positions in `names` of the images that are to be made."""


def build_settings(config: Config, facts: Mapping[str, object]) -> Tree:
    """Return the settings that the images depend on, in JSON types: the config without the options that change no image
    (`Mark.FREE`), and facts that are known only after loading."""
    given = remove_marked(type(config), config.tree(), Mark.FREE)
    tree: Tree = json.loads(json.dumps({**given, **facts, "finished": False}))
    return tree


def image_names(settings: Tree) -> list[str]:
    """Return the file names of the images that a settings.json describes.

    reconstruct.py lists them as `files` (former versions listed the originals as `pictures`); complete.py lists the
    originals as `sources` and has several variants of each; generate.py has a number `n`.
    """
    match settings:
        case {"sources": list(originals), "variants": int(variants)}:
            return [f"{number:06d}-{variant}.png" for number in range(len(originals)) for variant in range(variants)]
        case {"files": list(names)}:
            return [str(name) for name in names]
        case {"pictures": list(originals)}:
            return numbered_names(len(originals))
        case {"n": int(n)} if n <= MOST_IMAGES:
            return numbered_names(n)
        case _:
            return []


def numbered_names(n: int) -> list[str]:
    """Return the file names of images 0..n-1: 000000.png, 000001.png, ..."""
    return [f"{number:06d}.png" for number in range(n)]


def numbered_folders(parent: Path) -> list[Path]:
    """Return the numbered folders in a folder, the newest first; an empty list if there is no such folder."""
    folders = [path for path in parent.glob("*") if path.is_dir() and re.fullmatch(r"\d+", path.name, re.ASCII)]
    return sorted(folders, key=lambda path: int(path.name), reverse=True)


def open_output(
    accelerator: Accelerator,
    given: str | None,
    parent: Path,
    settings: Tree,
    images: Mapping[str, ImageShape],
) -> Output:
    """Open the folder `given`, or a numbered folder in `parent`: a new one, or an unfinished one with these settings.

    The main process looks for complete images and writes settings.json; all processes get the same result.

    Args:
        accelerator: this process among the others.
        given: the option --out; None: a numbered folder.
        parent: folder of the numbered folders.
        settings: see `build_settings`.
        images: shape of each image by its file name.

    Raises:
        ConfigError: the folder is a file, or holds something else or images of other settings (the message lists the
            differences), or another command uses it, or the processes have different settings.
        StorageError: the folder cannot be made or written to.
    """
    settings_by_process: list[Tree] = gather_object([settings])
    for others in settings_by_process:
        if others != settings_by_process[0]:
            raise ConfigError(
                "the processes have loaded different things, perhaps because a file was replaced while they started; "
                "start again. Different:\n" + _indent_lines(differences(settings_by_process[0], others))
            )
    out, missing = run_on_main(accelerator, lambda: _open(given, parent, settings, images))
    if len(missing) < len(images):
        existing = len(images) - len(missing)
        accelerator.print(f"{existing} of {len(images)} images are there already; making the rest")
    return Output(out, list(images), np.array(missing, dtype=np.int64))


def close_output(out: Output, names: Iterable[str]) -> None:
    """Flush these files to disk, then mark the folder as finished in its settings.json."""
    for name in names:
        with (out.path / name).open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(out.path)
    _write_settings(out.path, {**(_read_settings(out.path) or {}), "finished": True})


def is_finished(folder: Path) -> bool:
    """Return True if a command has made all images of the folder's settings."""
    saved = _read_settings(folder)
    return saved is not None and bool(saved["finished"])


def _open(given: str | None, parent: Path, settings: Tree, images: Mapping[str, ImageShape]) -> tuple[Path, list[int]]:
    """Lock the folder, remove leftovers, write settings.json. Return the path and the positions of missing images."""
    out = _choose_and_lock(given, parent, settings)
    for path in out.rglob(".tmp-*"):
        if LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
    saved = _read_settings(out)
    if saved is None or _list_changes(saved, settings):
        _write_settings(out, settings)
    names = {path.name for path in out.iterdir()}
    existing = [(position, out / name, shape) for position, (name, shape) in enumerate(images.items()) if name in names]
    complete: set[int] = set()
    with ThreadPoolExecutor() as threads:  # Pillow and zlib release the interpreter's lock
        for start in range(0, len(existing), CHECKED_AT_ONCE):
            positions, paths, shapes = zip(*existing[start : start + CHECKED_AT_ONCE], strict=True)
            complete.update(compress(positions, threads.map(is_complete_png, paths, shapes)))
    return out, [position for position in range(len(images)) if position not in complete]


def _choose_and_lock(given: str | None, parent: Path, settings: Tree) -> Path:
    """Return the folder, made and locked."""

    def choose_folder() -> Path:
        try:
            return _numbered_folder(parent, settings) if given is None else _given_folder(Path(given), settings)
        except OSError as error:
            raise StorageError(f"--out {given or parent}: cannot be made or read ({error.strerror})") from None

    out = choose_folder()
    while True:
        is_new = given is None and not (out / SETTINGS).exists()
        lock_folder(out)
        # Another command may have used or finished the folder before this one had the lock.
        now = out if is_new else choose_folder()
        if now == out:
            return out
        out = now


def _given_folder(out: Path, settings: Tree) -> Path:
    """Make the folder of the option --out. Raise ConfigError if it holds anything but a part of this output."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    saved = _read_settings(out)
    if names and (saved is None or saved["finished"]):
        raise ConfigError(f"--out {out}: is not empty, and nothing is overwritten; choose another folder")
    # A folder with nothing but settings.json has no image yet, so other settings lose nothing.
    if names > {SETTINGS} and saved is not None and (changed := _list_changes(saved, settings)):
        raise ConfigError(
            f"--out {out}: holds unfinished images of other settings; these differ (saved -> given):\n"
            + _indent_lines(changed)
            + "\nGive the saved settings to finish those images, or choose another folder."
        )
    return out


def _numbered_folder(parent: Path, settings: Tree) -> Path:
    """Return the newest numbered folder if it is unfinished and has these settings, else make the next one."""
    folders, number = numbered_folders(parent), 1
    if folders:
        newest = folders[0]
        saved = _read_settings(newest)
        if saved is not None and not saved["finished"] and not _list_changes(saved, settings):
            return newest
        number = int(newest.name) + 1
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        out = parent / f"{number:03d}"
        try:
            out.mkdir()
            return out
        except FileExistsError:  # another command was faster
            number += 1


def _read_settings(out: Path) -> Tree | None:
    """Return the content of settings.json; None if it cannot be read or does not say whether it is finished."""
    try:
        tree = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) and isinstance(tree.get("finished"), bool) else None


def _list_changes(saved: Tree, settings: Tree) -> list[str]:
    old, new = ({key: tree[key] for key in tree if key not in MAY_DIFFER} for tree in (saved, settings))
    return differences(old, new)


def _indent_lines(lines: list[str]) -> str:
    return "\n".join(f"  {line if len(line) < 200 else line[:200] + ' ...'}" for line in lines)


def _write_settings(out: Path, settings: Tree) -> None:
    write_file(out / SETTINGS, json.dumps(settings, indent=1).encode())
