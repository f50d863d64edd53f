"""A folder of pictures that may take several goes: the same command, given again, makes only what is missing.

    settings.json     what the pictures follow from; "finished": false before the first one is written, true at the end
    000000.png, ...   each whole or not there; one that is not whole is made again

So whatever ends a command, at whatever moment, costs no more than the pictures that were under way.
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

from sampling.saved_images import Shape, is_whole
from stage1_tokenizer.config.base import Config, Tree, differences
from stage1_tokenizer.config.field_facts import Mark, remove_marked
from stage1_tokenizer.engine.errors import ConfigError, StorageError
from stage1_tokenizer.engine.files import sync_folder, write_file
from stage1_tokenizer.engine.launch import run_on_main
from stage1_tokenizer.engine.lock import lock_folder

SETTINGS = "settings.json"
MOST_IMAGES = 10_000_000
"""The most that one command makes; a damaged settings.json may name any number."""
AT_ONCE = 256
"""Pictures that are looked at together."""
NOT_COMPARED = ("prior", "tokenizer", "finished")
"""Settings that two goes at the same pictures may have different: where the weights lie (`weights` says which they
are), and whether all is done."""
LEFTOVER = re.compile(r"\.tmp-.+\.(png|npz|json)-\d+")
"""Names of files that were being written when their process was killed."""


class Output(NamedTuple):
    """A folder for pictures, and those that it lacks."""

    path: Path
    names: Sequence[str]
    """The file of each picture."""
    missing: NDArray[np.int64]
    """Places among the names: the pictures that are to be made."""


def settings_of(config: Config, found: Mapping[str, object]) -> Tree:
    """The settings that pictures follow from, as JSON has them: a command's configuration without the options that
    change no picture, and what was found out by loading."""
    given = remove_marked(type(config), config.tree(), Mark.FREE)
    tree: Tree = json.loads(json.dumps({**given, **found, "finished": False}))
    return tree


def image_names(settings: Tree) -> list[str]:
    """The names of the pictures that settings lead to; the commands write them, and check.py looks for them.

    reconstruct.py lists them as `files` (former versions had their originals as `pictures`); complete.py lists the
    originals as `sources`, each with several variants; generate.py has a number.
    """
    match settings:
        case {"sources": list(originals), "variants": int(variants)}:
            return [f"{number:06d}-{variant}.png" for number in range(len(originals)) for variant in range(variants)]
        case {"files": list(names)}:
            return [str(name) for name in names]
        case {"pictures": list(originals)}:
            return [file_name(number) for number in range(len(originals))]
        case {"n": int(n)} if n <= MOST_IMAGES:
            return [file_name(number) for number in range(n)]
        case _:
            return []


def file_name(number: int) -> str:
    """The name of picture number 0, 1, ..."""
    return f"{number:06d}.png"


def open_output(
    accelerator: Accelerator,
    given: str | None,
    parent: Path,
    settings: Tree,
    pictures: Mapping[str, Shape],
) -> Output:
    """The folder `given`, or else a numbered one in `parent`: a new one, or one in which these settings are unfinished.

    pictures: the name and shape of each. The main process looks, and writes settings.json; all hear what it found.

    Raises:
        ConfigError: the folder is a file, or holds something else or pictures of other settings (those that differ are
            listed), or another command is at work there, or the processes do not have the same settings.
        StorageError: it cannot be made or written to.
    """
    everyones: list[Tree] = gather_object([settings])
    for theirs in everyones:
        if theirs != everyones[0]:
            raise ConfigError(
                "the processes have loaded different things; was a file replaced while they started? Start again.\n"
                + _listed(differences(everyones[0], theirs))
            )
    out, missing = run_on_main(accelerator, lambda: _open(given, parent, settings, pictures))
    if len(missing) < len(pictures):
        there = len(pictures) - len(missing)
        accelerator.print(f"{there} of {len(pictures)} pictures are there already; making the rest")
    return Output(out, list(pictures), np.array(missing, dtype=np.int64))


def close_output(out: Output, names: Iterable[str]) -> None:
    """Say in settings.json that all is there, once these files are on disk."""
    for name in names:
        with (out.path / name).open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(out.path)
    _write_settings(out.path, {**(_saved(out.path) or {}), "finished": True})


def is_finished(folder: Path) -> bool:
    """Whether a command has made all pictures of its settings there."""
    saved = _saved(folder)
    return saved is not None and bool(saved["finished"])


def _open(given: str | None, parent: Path, settings: Tree, pictures: Mapping[str, Shape]) -> tuple[Path, list[int]]:
    out = _claim(given, parent, settings)
    for path in out.rglob(".tmp-*"):
        if LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
    saved = _saved(out)
    if saved is None or _changed(saved, settings):
        _write_settings(out, settings)
    there = {path.name for path in out.iterdir()}
    looked_at = [(place, out / name, shape) for place, (name, shape) in enumerate(pictures.items()) if name in there]
    whole: set[int] = set()
    with ThreadPoolExecutor() as threads:  # Pillow and zlib release the interpreter's lock
        for start in range(0, len(looked_at), AT_ONCE):
            places, paths, shapes = zip(*looked_at[start : start + AT_ONCE], strict=True)
            whole.update(compress(places, threads.map(is_whole, paths, shapes)))
    return out, [place for place in range(len(pictures)) if place not in whole]


def _claim(given: str | None, parent: Path, settings: Tree) -> Path:
    """The folder, made and locked."""

    def choose() -> Path:
        try:
            return _numbered(parent, settings) if given is None else _given(Path(given), settings)
        except OSError as error:
            raise StorageError(f"--out {given or parent}: cannot be made or read ({error.strerror})") from None

    out = choose()
    while True:
        new = given is None and not (out / SETTINGS).exists()
        lock_folder(out)
        # Before the lock was ours another command may have worked here, or finished.
        again = out if new else choose()
        if again == out:
            return out
        out = again


def _given(out: Path, settings: Tree) -> Path:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    saved = _saved(out)
    if there and (saved is None or saved["finished"]):
        raise ConfigError(f"--out {out}: is not empty, and nothing is written over; choose another folder")
    # Where settings alone are there, no picture was made with them, and nothing is lost.
    if there > {SETTINGS} and saved is not None and (changed := _changed(saved, settings)):
        raise ConfigError(
            f"--out {out}: holds unfinished pictures of other settings; these differ (there -> given):\n"
            + _listed(changed)
            + "\nGive the former ones to complete the pictures, or choose another folder."
        )
    return out


def _numbered(parent: Path, settings: Tree) -> Path:
    folders = [path for path in parent.glob("*") if path.is_dir() and re.fullmatch(r"\d+", path.name, re.ASCII)]
    number = 1
    if folders:
        newest = max(folders, key=lambda path: int(path.name))
        saved = _saved(newest)
        if saved is not None and not saved["finished"] and not _changed(saved, settings):
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


def _saved(out: Path) -> Tree | None:
    """The settings in a folder, where they are such as say whether they are finished."""
    try:
        tree = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) and isinstance(tree.get("finished"), bool) else None


def _changed(saved: Tree, settings: Tree) -> list[str]:
    old, new = ({key: tree[key] for key in tree if key not in NOT_COMPARED} for tree in (saved, settings))
    return differences(old, new)


def _listed(lines: list[str]) -> str:
    return "\n".join(f"  {line if len(line) < 200 else line[:200] + ' ...'}" for line in lines)


def _write_settings(out: Path, settings: Tree) -> None:
    write_file(out / SETTINGS, json.dumps(settings, indent=1).encode())
