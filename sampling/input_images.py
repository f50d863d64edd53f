"""The images that a command works on: files and folders that the user names, or a validation split."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from einops import rearrange

from sampling.output import numbered_names
from stage1_tokenizer.data.bad_files import one_line, read_errors
from stage1_tokenizer.data.base import ImageArray
from stage1_tokenizer.data.folder.scan import FOLDER, find_images
from stage1_tokenizer.data.image_files import USUAL_EXTENSIONS, read_image
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.file_names import describe_path, normalise_name
from stage1_tokenizer.engine.launch import run_on_main
from stage1_tokenizer.tokenizer import LoadedTokenizer

VALIDATION_IMAGES = 64
"""Number of validation images, unless the user gives a number."""
LISTED = 10
"""Number of bad files that one error lists."""
LONGEST_NAME = 200
"""Bytes of a file name without its extension; systems allow 255, and the temporary name of a file is longer."""


class InputImages(NamedTuple):
    """Images that are read one at a time, and the names of the files that are made from them."""

    names: list[str]
    """Path, or position in the data set, of each image."""
    files: list[str]
    """Name of the output file of each image, relative to the output folder."""
    read: Callable[[int], ImageArray]
    """Number of an image -> (H, W, C) uint8."""
    errors: tuple[str, ...] = ()
    """Message for each file that cannot be read and is left out."""


def given_images(accelerator: Accelerator, paths: Sequence[str], n: int | None, channels: int) -> InputImages:
    """Return the first n images (None: all) of the files and folders that the user names, in this order.

    All files are read once, so that unreadable ones are named before the work begins. They are left out.

    Raises:
        ConfigError: a path does not exist, or a folder holds no image.
        BadFileError: no file can be read.
    """

    def find() -> tuple[dict[Path, str], list[str]]:
        names = {
            path: path.relative_to(given).as_posix() if path != Path(given) else path.name
            for given in paths
            for path in image_paths(Path(given), "pictures")
        }
        readable, errors = split_readable([*names][:n], channels)
        return dict(zip(readable, png_names([names[path] for path in readable]), strict=True)), errors

    file_of_path, errors = run_on_main(accelerator, find)
    readable = [*file_of_path]
    if not readable:
        raise bad_files_error(errors)
    for error in errors:
        accelerator.print(f"left out: {one_line(error)}")
    return InputImages(
        [str(path) for path in readable],
        [*file_of_path.values()],
        lambda index: read_image(readable[index], channels),
        tuple(errors),
    )


def validation_images(loaded: LoadedTokenizer, n: int | None) -> InputImages:
    """Return the first n images (None: 64) of the validation split of a tokenizer's own data set."""
    data = parse_data_config(loaded.data, str(loaded.path))
    split = open_data(data).image_batches("validation", seed=0)
    count = min(n or VALIDATION_IMAGES, len(split))

    def read(index: int) -> ImageArray:
        pixels, _ = split.batch(np.array([index]))
        image: ImageArray = rearrange(pixels, "1 C H W -> H W C").numpy()
        return image

    return InputImages(validation_names(data.kind, count), numbered_names(count), read)


def validation_names(kind: str, n: int) -> list[str]:
    """Return the names of validation images 0..n-1 in settings.json.

    They say "picture" as in former versions, because a command that continues a folder compares them.
    """
    return [f"validation picture {index} of {kind}" for index in range(n)]


def png_names(names: Sequence[str]) -> list[str]:
    """Return a name with the extension .png for each file name: `a.jpg` and `a.png` become `a.png` and `a-2.png`. The
    results are different on every file system, also where upper and lower case are the same. Long names are shortened.
    """
    used, results = set[str](), list[str]()
    for name in names:
        path, number = Path(name), 1
        stem = path.with_name(os.fsdecode(os.fsencode(path.stem)[:LONGEST_NAME])).as_posix()
        result = f"{stem}.png"
        while normalise_name(result).casefold() in used:
            number += 1
            result = f"{stem}-{number}.png"
        used.add(normalise_name(result).casefold())
        results.append(result)
    return results


def image_paths(source: Path, option: str) -> list[Path]:
    """Return the file itself, or all images in a folder and its sub-folders, sorted. Links are followed.

    Raises:
        ConfigError: the path does not exist, or the folder holds no image; the message names `option`.
        BadFileError: a folder cannot be listed.
    """
    if source.is_file():
        return [source]
    files = find_images(source, "anywhere") if source.is_dir() else ()
    paths = sorted(source / name for name, reason in files if reason != FOLDER)
    if not paths:
        reason = "holds no images" if source.is_dir() else "there is no such file or folder"
        raise ConfigError(
            f"{option} {describe_path(source)}: {reason} (images are {', '.join(USUAL_EXTENSIONS)} and all other "
            "formats that Pillow reads, recognised by their content)"
        )
    return paths


def split_readable(paths: list[Path], channels: int) -> tuple[list[Path], list[str]]:
    """Read every file once. Return the paths that could be read, and one error message for each of the others."""

    errors = list(read_errors(lambda path: read_image(path, channels), paths))
    good = [path for path, error in zip(paths, errors, strict=True) if error is None]
    return good, [str(error) for error in errors if error is not None]


def bad_files_error(messages: list[str]) -> BadFileError:
    """Return one error that lists the messages; of a long list only the first ones and the number of the rest."""
    more = [f"and {len(messages) - LISTED} more"] if len(messages) > LISTED else []
    return BadFileError("\n  ".join([*map(one_line, messages[:LISTED]), *more]))
