"""Checks of a folder of images that a command of sampling/ made: are all images there, and undamaged?

settings.json     the settings that the images depend on; "finished"
000000.png, ...   and beside them grid.png, samples.npz or figures.json
"""

import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from sampling.checks.finding import Finding, check_leftovers
from sampling.checks.images import check_images, holds_images
from sampling.output import SETTINGS, image_names
from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.engine.lock import find_lock_holder


def check_samples(folder: Path) -> Iterator[Finding]:
    """Check settings.json, the other JSON files, .npz files and images of a folder of samples."""
    holder = find_lock_holder(folder)
    settings = _read_json(folder / SETTINGS)
    yield settings if isinstance(settings, Finding) else _check_progress(folder, settings, holder)
    for path in sorted(folder.glob("*.json")):
        if path.name != SETTINGS:
            tree = _read_json(path)
            yield tree if isinstance(tree, Finding) else Finding.ok(path, "can be read")
    for path in sorted(folder.glob("*.npz")):
        yield _check_npz(path)
    if holds_images(folder):
        yield from check_images(folder)
    yield from check_leftovers(folder, holder)


def _check_progress(folder: Path, settings: Tree, holder: str | None) -> Finding:
    """Check that all images that the settings describe are there."""
    path, names, finished = folder / SETTINGS, image_names(settings), settings.get("finished")
    missing = [name for name in names if not (folder / name).is_file()]
    progress = f"{len(names) - len(missing):,} of {len(names):,} images"
    if not isinstance(finished, bool):
        return Finding.note(path, f"does not say whether all was finished, as in format 1; {progress} are there")
    if holder is not None and not finished:
        return Finding.note(path, f"is in use by a running process ({holder}); {progress} are there so far")
    if not finished:
        return Finding.bad(path, f"unfinished: {progress} are there; the command that began it makes the rest")
    if missing:
        return Finding.bad(path, f"finished, but only {progress} are there; the first that is missing is {missing[0]}")
    return Finding.ok(path, f"finished, {progress} are there")


def _read_json(path: Path) -> Tree | Finding:
    """Return the object in a JSON file, or a bad finding."""
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        return Finding.of_error(path, error)
    except (ValueError, RecursionError) as error:
        return Finding.bad(path, f"is damaged: not JSON ({error})")
    return tree if isinstance(tree, dict) else Finding.bad(path, "is damaged: not a JSON object")


def _check_npz(path: Path) -> Finding:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged_member = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError) as error:
        return Finding.bad(path, f"is damaged: {error}")
    if damaged_member:
        return Finding.bad(path, f"is damaged: the checksum of its {damaged_member} differs")
    return Finding.ok(path, "whole by its checksums")
