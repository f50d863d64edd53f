"""Weights on disk, for others to open, and how every file is written. Nothing is ever pickled.

    tokenizer.safetensors    its header carries kind, config, step, version

Every write goes to a temporary name in the same folder, is flushed to disk, then renamed: whoever looks, at whatever
moment, finds the old file or the new one, whole.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from stage1_tokenizer.errors import BadFileError, StorageError

FORMAT = 1
Header = dict[str, str]


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        StorageError: no space, or no permission; a former file of this name is untouched.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path} ({len(data):,} bytes): {error.strerror}") from None


def write_weights(path: Path, module: nn.Module, kind: str, header: Mapping[str, str]) -> None:
    """Write a module's weights with a header that says what they are."""
    full = {"kind": kind, "format": str(FORMAT), **header}
    write_file(path, serialise(portable(module.state_dict()), full))


def read_weights(path: Path, kind: str) -> tuple[dict[str, Tensor], Header]:
    """Weights and header of a file written by `write_weights`.

    Raises:
        BadFileError: damaged, not safetensors, of another kind, or of a later format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadFileError(
            f"{path}: is damaged or is not a safetensors file ({error}); only safetensors are loaded"
        ) from None
    found = header.get("kind")
    if found != kind:
        what = f"a {found}" if found else "a safetensors file that Tessera did not write"
        raise BadFileError(f"{path}: this is {what}, but a {kind} is wanted here")
    if header.get("format") != str(FORMAT):
        raise BadFileError(f"{path}: has format {header.get('format')}, this version reads {FORMAT}")
    return tensors, header


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load weights of which each must have its place and each place its weight.

    Raises:
        BadFileError: names the first missing, unexpected or misshapen keys.
    """
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)}, should be {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise BadFileError(f"{source}: does not fit the model: {shown}")
    module.load_state_dict(dict(tensors), strict=True)


def portable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
