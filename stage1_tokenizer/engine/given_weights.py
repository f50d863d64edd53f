"""Weights that the user names, or that were downloaded: found, hashed and read, never unpickled."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stage1_tokenizer.config.messages import shortened
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.names import located


def existing(path: Path, key: str, choices: str) -> Path:
    """The path, if there is such a file.

    Raises:
        ConfigError: there is none; `choices` says what could be given under `key`.
    """
    try:
        found = path.is_file()
    except OSError:  # a name too long, or a folder on the way that is closed to us
        found = False
    if not found:
        raise ConfigError(f"{key} {located(shortened(str(path)))}: there is no such file; {choices}")
    return path


def sha256_of(path: Path) -> str:
    """Raises BadFileError: the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror})") from None


def read_safetensors(path: Path, key: str, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose names begin with `prefix`; the others are not read.

    Raises:
        BadFileError: it is damaged, or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:  # of a shape of 2^63, a TypeError
        raise BadFileError(
            f"{key} {path}: is damaged or is not a safetensors file ({shortened(str(error))}); "
            "only safetensors are loaded"
        ) from None
