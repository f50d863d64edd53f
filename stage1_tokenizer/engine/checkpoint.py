"""Weights on disk, ours and those that the user names, and how every file is written. Nothing is ever pickled.

    tokenizer.safetensors    its header carries kind, config, step, format, and a checksum over all of it

Every write goes to a temporary name in the same folder, is flushed to disk, then renamed: whoever looks, at whatever
moment, finds the old file or the new one, whole.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from stage1_tokenizer.engine.errors import BadFileError, ConfigError, StorageError
from stage1_tokenizer.engine.names import located

FORMAT = 2
READABLE = ("1", "2")
"""Formats of weights that this version reads. Those of format 1 have no checksum."""
Header = dict[str, str]
SUM = "sha256"
LONGEST_QUOTE = 300
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a disk, a quota or a process's own limit is used up."""


def write_file(path: Path, *data: bytes | memoryview, flush: bool = True) -> None:
    """Write a file, these parts one after the other, whole or not at all.

    flush: to disk, so that it outlives a power cut; for one of very many files that takes too long.

    Raises:
        StorageError: no space, or no permission; a former file of this name is untouched.
    """
    with written_file(path, flush, sum(map(len, data))) as file:
        file.writelines(data)


@contextmanager
def written_file(path: Path, flush: bool = True, size: int | None = None) -> Iterator[IO[bytes]]:
    """Open a file to be written part by part, that appears when the block ends without an error, whole.

    size: how many bytes are to come, where that is known, for the message of a full disk.

    Raises:
        StorageError: no space, or no permission; a former file of this name is untouched.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if flush:
            sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error, size) from None
    finally:  # after an interruption too
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def storage_error(path: Path, error: OSError, needed: int | None = None) -> StorageError:
    """What to tell the user where writing `path` has failed; `needed` is its size in bytes."""
    size = "" if needed is None else f" ({needed:,} bytes)"
    if error.errno not in NO_SPACE:
        return StorageError(f"cannot write {path}{size}: {error.strerror}")
    return StorageError(
        f"no space left writing {path}: it needs {'more' if needed is None else f'{needed:,} bytes'}, "
        f"{free_space(path):,} are free ({error.strerror}). What was saved before is intact; make room, and the same "
        "command continues from there"
    )


def free_space(path: Path) -> int:
    """Bytes that this user may still write where `path` is, or is to be."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def write_weights(path: Path, module: nn.Module, kind: str, header: Mapping[str, str]) -> None:
    """Write a module's weights with a header that says what they are."""
    write_tensors(path, portable(uncompiled(module).state_dict()), {"kind": kind, "format": str(FORMAT), **header})


def read_weights(path: Path, kind: str) -> tuple[dict[str, Tensor], Header]:
    """Weights and header of a file written by `write_weights`.

    Raises:
        BadFileError: damaged, not safetensors, of another kind, or of a later format.
    """
    tensors, header = read_tensors(path)
    found = header.get("kind")
    if found != kind:
        what = f"a {brief(found)}" if found else "a safetensors file that Tessera did not write"
        raise BadFileError(f"{path}: this is {what}, but a {kind} is wanted here")
    if header.get("format") not in READABLE:
        raise BadFileError(
            f"{path}: has format {brief(header.get('format'))}, this version reads {' and '.join(READABLE)}"
        )
    if header["format"] != "1" and SUM not in header:
        raise BadFileError(f"{path}: is damaged: its header has no checksum ({SUM})")
    return tensors, {key: value for key, value in header.items() if key != SUM}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file with a checksum over header and tensors, which `read_tensors` looks at."""
    data = memoryview(serialise(dict(tensors), {**header, SUM: checksum(tensors, header)}))
    # The library writes the header's entries in any order; sorted, what is equal has equal bytes.
    start = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(bytes(data[8:start])), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    write_file(path, len(text).to_bytes(8, "little"), text, data[start:])


def existing(path: Path, key: str, choices: str) -> Path:
    """Return the path of a file that the user names, if there is such a file.

    Raises:
        ConfigError: there is none; `choices` says what could be given under `key`.
    """
    try:
        found = path.is_file()
    except OSError:  # a name too long, or a folder on the way that is closed to us
        found = False
    if not found:
        raise ConfigError(f"{key} {located(brief(path))}: there is no such file; {choices}")
    return path


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits. Raises BadFileError: the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror})") from None


def read_tensors(path: Path, key: str = "", prefix: str = "") -> tuple[dict[str, Tensor], Header]:
    """Read the tensors of a safetensors file, and its header.

    key: the option that names a file of somebody else's, for errors; its header means nothing to us. prefix: only
    tensors whose names begin with it are read.

    Raises:
        BadFileError: damaged, or not safetensors, or not what its checksum says, where it has one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
            tensors = {name: file.get_tensor(name) for name in names}
            header: Header = file.metadata() or {}
        if SUM in header and not (key or prefix) and header[SUM] != checksum(tensors, header):
            raise BadFileError(f"{path}: is damaged: its content does not have the checksum ({SUM}) in its header")
        return tensors, header
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:  # of a shape of 2^63, a TypeError
        source = f"{key} {path}" if key else path
        raise BadFileError(
            f"{source}: is damaged or is not a safetensors file ({brief(error)}); only safetensors are loaded"
        ) from None


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 over header (without its own entry) and tensors, in the order of their names."""
    rest = {key: value for key, value in header.items() if key != SUM}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load weights of which each must have its place and each place its weight.

    Raises:
        BadFileError: names the first missing, unexpected or misshapen keys.
    """
    module = uncompiled(module)
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    wrong += [
        f"{name} is {_described(tensors[name])}, should be {_described(own[name])}"
        for name in own
        if name in tensors and _described(tensors[name]) != _described(own[name])
    ]
    if wrong:
        shown = ", ".join(map(brief, wrong[:5])) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise BadFileError(f"{source}: does not fit the model: {shown}")
    module.load_state_dict(dict(tensors), strict=True)


def brief(value: object) -> str:
    """What a file says, for a message: cut short, since it may say anything at any length."""
    text = str(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def _described(tensor: Tensor) -> str:
    """Shape, and the type where it is not the usual one."""
    kind = "" if tensor.dtype == torch.float32 else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"


def uncompiled(module: nn.Module) -> nn.Module:
    """The module itself, where torch.compile has wrapped it: the wrapper puts a prefix before the names of weights."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


def portable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it outlives a power cut."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows, which opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
            raise
    finally:
        os.close(descriptor)
