"""Are these files whole, and do they belong together?   python sampling/check.py PATH [PATH ...]

A path may be a run's folder of either stage, or a folder of runs; a state, a safetensors file, a folder of tokens; a
folder of samples, a folder of images, or one image. Nothing is changed, and nothing is unpickled. Prints a line for
each thing it has looked at,

    ok   runs/stage1/shapes_vq/state/step-00001500: whole by its checksums, format 2; a resume takes this one

beginning with ok, bad, or note (harmless, or not to be judged), and at last their numbers. Exit code 0: nothing is bad;
3: something is; 2: a path is nothing that could be checked.
"""

import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import Field
from pydantic_settings import CliPositionalArg

from sampling.checks.finding import Finding, bad, reason
from sampling.checks.images import check_image, check_images, holds_images
from sampling.checks.runs import CONFIG, check_run, check_state, check_states, check_token_folder
from sampling.checks.samples import check_samples
from sampling.checks.weights import check_safetensors
from sampling.output import SETTINGS
from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.data.image_files import EXTENSIONS, is_image
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import say
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.engine.state import STATE_NAME, list_states
from stage1_tokenizer.tokenizer import TOKENIZER_FILE
from stage2_prior.prior import PRIOR_FILE
from stage2_prior.tokens import list_shards

OF_A_RUN = (CONFIG, TOKENIZER_FILE, PRIOR_FILE)
DEPTH = 3
"""So far below a folder runs are looked for: runs/stage1/NAME."""

Look = Callable[[Path], Iterator[Finding]]


class Check(NamedTuple):
    """A path to look at, and the function that looks."""

    path: Path
    look: Look


class CheckConfig(CommandConfig):
    """Say of files and folders whether they are whole and belong together. Nothing is changed."""

    paths: CliPositionalArg[tuple[str, ...]] = Field(min_length=1)
    """Runs of either stage, or folders of them; states, safetensors files, folders of tokens; folders of samples,
    folders of images, images."""


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may hold what the terminal's encoding does not
        sys.stdout.reconfigure(errors="backslashreplace")
    # All paths are understood before the first is looked at, for that may take an hour.
    checks = [check for path in parse_command_line(CheckConfig).paths for check in checks_of(Path(path))]
    numbers: Counter[str] = Counter()
    for check in checks:
        for finding in _all_of(check):
            numbers[finding.verdict] += 1
            say(str(finding))
    print(", ".join(f"{numbers[verdict]:,} {verdict}" for verdict in ("ok", "bad", "note")))
    if numbers["bad"]:
        sys.exit(BadFileError.exit_code)


def checks_of(path: Path) -> list[Check]:
    """The checks that a path asks for.

    Raises:
        ConfigError: there is nothing at the path, or nothing that Tessera writes or reads.
        BadFileError: a folder cannot be listed.
    """
    path = path if path.name else path.resolve()  # `.` may be a state, which is known by its name
    try:
        found = _checks_of_folder(path, DEPTH) if path.is_dir() else _checks_of_file(path)
        if not found and holds_images(path):
            found = [Check(path, check_images)]
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror})") from None
    if found:
        return found
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
    """The check of a folder that is one thing; else those of what lies below it, and none where that is only images."""
    look = _look_for(path)
    if look is not None:
        return [Check(path, look)]
    files = [Check(file, check_safetensors) for file in sorted(path.glob("*.safetensors"))]
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.is_symlink()) * bool(depth)
    below = {folder: _checks_of_folder(folder, depth - 1) for folder in folders}
    if not files and not any(below.values()):
        return []
    for folder, checks in below.items():
        files += checks or [Check(folder, check_images)] * holds_images(folder)
    return files


def _look_for(folder: Path) -> Look | None:
    """The function that looks at a folder which is one thing, such as a run or a state; None for other folders."""
    if STATE_NAME.fullmatch(folder.name):
        return check_state
    if list_states(folder):
        return check_states
    if any((folder / name).exists() for name in OF_A_RUN) or list_states(folder / "state"):
        return check_run
    if (folder / SETTINGS).exists():
        return check_samples
    return check_token_folder if list_shards(folder) else None


def _all_of(check: Check) -> Iterator[Finding]:
    """The findings of a check. An error that ends it is a finding too, a bad one."""
    try:
        yield from check.look(check.path)
    except (BadFileError, ConfigError, OSError) as error:
        what = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else reason(error, check.path)
        yield bad(check.path, what)


if __name__ == "__main__":
    run_command(main)
