"""Images that a user names: the files behind the paths, and the ones that cannot be read."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.data.folder.scan import FOLDER, image_files
from stage1_tokenizer.data.image_files import USUAL, read_image
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.names import located

LISTED = 10
"""Number of bad files that one error lists."""


def image_paths(source: Path, option: str) -> list[Path]:
    """Return the file itself, or all images in a folder and its sub-folders, sorted. Links are followed.

    Raises:
        ConfigError: the path does not exist, or the folder holds no image; the message names `option`.
        BadFileError: a folder cannot be listed.
    """
    if source.is_file():
        return [source]
    files = image_files(source, "anywhere") if source.is_dir() else ()
    paths = sorted(source / name for name, reason in files if reason != FOLDER)
    if not paths:
        reason = "holds no images" if source.is_dir() else "there is no such file or folder"
        raise ConfigError(
            f"{option} {located(source)}: {reason} (images are {', '.join(USUAL)} and all other formats that Pillow "
            "reads, recognised by their content)"
        )
    return paths


def split_readable(paths: list[Path], channels: int) -> tuple[list[Path], list[str]]:
    """Read every file once. Return the paths that could be read, and one error message for each of the others."""

    def error_of(path: Path) -> str | None:
        try:
            read_image(path, channels)
        except BadFileError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max_workers=4) as threads:  # Pillow releases the interpreter's lock while it decodes
        errors = list(threads.map(error_of, paths))
    good = [path for path, error in zip(paths, errors, strict=True) if error is None]
    return good, [error for error in errors if error is not None]


def bad_files_error(messages: list[str]) -> BadFileError:
    """Return one error that lists the messages; of a long list only the first ones and the number of the rest."""
    more = [f"and {len(messages) - LISTED} more"] if len(messages) > LISTED else []
    return BadFileError("\n  ".join([*map(one_line, messages[:LISTED]), *more]))
