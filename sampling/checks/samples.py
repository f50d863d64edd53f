"""A folder of pictures that a command of sampling/ made: are all there, and whole?

settings.json     what they follow from; "finished"
000000.png, ...   and beside them grid.png, samples.npz or figures.json
"""

import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from sampling.checks.finding import Finding, bad, check_leftovers, note, ok
from sampling.checks.images import check_images, holds_images
from sampling.output import SETTINGS, image_names
from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.engine.lock import find_lock_holder


def check_samples(folder: Path) -> Iterator[Finding]:
    """Settings, pictures, and what was made of them all."""
    holder = find_lock_holder(folder)
    settings, wrong = _json(folder / SETTINGS)
    if settings is None:
        yield bad(folder / SETTINGS, wrong)
    else:
        yield _progress(folder, settings, holder)
    for path in sorted(folder.glob("*.json")):
        if path.name != SETTINGS:
            tree, wrong = _json(path)
            yield bad(path, wrong) if tree is None else ok(path, "can be read")
    for path in sorted(folder.glob("*.npz")):
        yield _check_npz(path)
    if holds_images(folder):
        yield from check_images(folder)
    yield from check_leftovers(folder, holder)


def _progress(folder: Path, settings: Tree, holder: str | None) -> Finding:
    path, wanted, finished = folder / SETTINGS, image_names(settings), settings.get("finished")
    missing = [name for name in wanted if not (folder / name).is_file()]
    of = f"{len(wanted) - len(missing):,} of {len(wanted):,} pictures"
    if not isinstance(finished, bool):
        return note(path, f"does not say whether all was finished, as in format 1; {of} are there")
    if holder is not None and not finished:
        return note(path, f"is in use by a running process ({holder}); {of} are there so far")
    if not finished:
        return bad(path, f"unfinished: {of} are there; the command that began it makes the rest")
    if missing:
        return bad(path, f"finished, but only {of} are there; the first that is missing is {missing[0]}")
    return ok(path, f"finished, {of} are there")


def _json(path: Path) -> tuple[Tree | None, str]:
    """An object from a file; or None, and what is wrong with it."""
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        return None, f"is damaged: not JSON ({error})"
    return (tree, "") if isinstance(tree, dict) else (None, "is damaged: not a JSON object")


def _check_npz(path: Path) -> Finding:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError) as error:
        return bad(path, f"is damaged: {error}")
    return (
        bad(path, f"is damaged: the checksum of its {broken} differs") if broken else ok(path, "whole by its checksums")
    )
