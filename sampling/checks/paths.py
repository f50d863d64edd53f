"""The checks that a path asks for: a run, a state, a file, a folder of samples or images, or a folder of these."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sampling.checks.finding import Finding
from sampling.checks.images import check_image, check_images, holds_images
from sampling.checks.runs import CONFIG, check_run, check_state, check_states, check_token_folder
from sampling.checks.samples import check_samples
from sampling.checks.weights import check_safetensors
from sampling.output import SETTINGS
from stage1_tokenizer.data.image_files import EXTENSIONS, is_image
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.engine.state import STATE_NAME, list_states
from stage1_tokenizer.tokenizer import TOKENIZER_FILE
from stage2_prior.prior import PRIOR_FILE
from stage2_prior.tokens import list_shards

RUN_FILES = (CONFIG, TOKENIZER_FILE, PRIOR_FILE)
"""Files of which one is enough to make a folder a run."""
DEPTH = 3
"""Levels of sub-folders in which runs are looked for: runs/stage1/NAME."""

CheckFunction = Callable[[Path], Iterator[Finding]]


class Check(NamedTuple):
    """A path, and the function that checks it."""

    path: Path
    function: CheckFunction

    def findings(self) -> Iterator[Finding]:
        """Yield the findings. An error that ends the check becomes a bad finding."""
        try:
            yield from self.function(self.path)
        except (BadFileError, ConfigError, OSError) as error:
            yield Finding.of_error(self.path, error)


def checks_of(path: Path) -> list[Check]:
    """Return the checks that a path asks for.

    Raises:
        ConfigError: there is nothing at the path, or nothing that Tessera writes or reads.
        BadFileError: a folder cannot be listed.
    """
    path = path if path.name else path.resolve()  # `.` may be a state, which is known by its name
    try:
        checks = _checks_of_folder(path, DEPTH) if path.is_dir() else _checks_of_file(path)
        if not checks and holds_images(path):
            checks = [Check(path, check_images)]
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror})") from None
    if checks:
        return checks
    if not path.exists():
        raise ConfigError(f"{describe_path(path)}: there is no such file or folder")
    raise ConfigError(f"{path}: is nothing that Tessera writes or reads; -h lists what can be checked")


def _checks_of_file(path: Path) -> list[Check]:
    if path.is_file() and path.suffix == ".safetensors":
        return [Check(path, check_safetensors)]
    if path.is_file() and (path.suffix.lower() in EXTENSIONS or is_image(str(path))):
        return [Check(path, check_image)]
    return []


def _checks_of_folder(path: Path, depth: int) -> list[Check]:
    """Return the check of a folder that is one thing, such as a run; else the checks of the folders and files in it;
    none for a folder with nothing but images."""
    function = _check_function(path)
    if function is not None:
        return [Check(path, function)]
    checks = [Check(file, check_safetensors) for file in sorted(path.glob("*.safetensors"))]
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.is_symlink()) * bool(depth)
    below = {folder: _checks_of_folder(folder, depth - 1) for folder in folders}
    if not checks and not any(below.values()):
        return []
    for folder, folder_checks in below.items():
        checks += folder_checks or [Check(folder, check_images)] * holds_images(folder)
    return checks


def _check_function(folder: Path) -> CheckFunction | None:
    """Return the function that checks a folder which is one thing, such as a run or a state; None for other folders."""
    if STATE_NAME.fullmatch(folder.name):
        return check_state
    if list_states(folder):
        return check_states
    if any((folder / name).exists() for name in RUN_FILES) or list_states(folder / "state"):
        return check_run
    if (folder / SETTINGS).exists():
        return check_samples
    return check_token_folder if list_shards(folder) else None
