"""Weights files: our own, and safetensors files that the user names. Nothing is ever pickled.

tokenizer.safetensors, prior.safetensors    header: kind, config, data, step, format, checksum of header and tensors
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from stage1_tokenizer.engine.errors import BadFileError, shorten
from stage1_tokenizer.engine.files import write_file

FORMAT = 2
READABLE = ("1", "2")
"""Formats of weights files that this version reads. Files of format 1 have no checksum."""
PICKLE_MAGIC, ZIP_MAGIC = b"\x80", b"PK\x03\x04"
"""First bytes of the checkpoints of torch, which are pickles or zip archives with one."""
CHECKSUM_KEY = "sha256"
"""Key of the checksum in the header."""
Header = dict[str, str]


def write_weights(path: Path, module: nn.Module, kind: str, header: Mapping[str, str]) -> None:
    """Write the weights of a module with a header that describes them.

    kind: the kind of file, e.g. "tokenizer"; `read_weights` refuses other kinds.

    Raises:
        StorageError: no space, or no permission.
    """
    write_tensors(path, to_cpu(unwrap_compiled(module).state_dict()), {"kind": kind, "format": str(FORMAT), **header})


def read_weights(path: Path, kind: str, importer: str = "") -> tuple[dict[str, Tensor], Header]:
    """Read the weights and the header of a file that `write_weights` has written.

    Weights that are stored as bfloat16 are returned as float32, which has all values of bfloat16.

    importer: module of the command that imports files of other projects as this kind, for messages.

    Raises:
        BadFileError: damaged, not safetensors, of another kind, or of a later format.
    """
    stored, header = _read_ours(path, kind, importer)
    tensors = {name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in stored.items()}
    return tensors, {key: value for key, value in header.items() if key != CHECKSUM_KEY}


def read_header(path: Path, kind: str, importer: str = "") -> Header:
    """Read the header of a file that `write_weights` has written, without its tensors; the checksum is not compared.

    Parameters and errors are those of `read_weights`.
    """
    return _read_ours(path, kind, importer, prefix="\0")[1]  # no tensor has this name


def _read_ours(path: Path, kind: str, importer: str, prefix: str = "") -> tuple[dict[str, Tensor], Header]:
    """Read the tensors whose names begin with `prefix`, and the header, which must be ours and of this kind."""
    advice = f"; a {kind} of another project is imported by: python -m {importer} -h" if importer else ""
    if starts_as_pickle(path):
        reason = "is a checkpoint of torch (a pickle), which is not opened here: only safetensors are loaded"
        raise BadFileError(f"{path}: {reason}{advice}")
    tensors, header = read_tensors(path, prefix=prefix)
    given = header.get("kind")
    if given != kind:
        if given:
            raise BadFileError(f"{path}: this is a {shorten(given)}, but a {kind} is needed here")
        raise BadFileError(
            f"{path}: this is a safetensors file that Tessera did not write, but a {kind} is needed here{advice}"
        )
    if header.get("format") not in READABLE:
        raise BadFileError(
            f"{path}: has format {shorten(header.get('format'))}, this version reads {' and '.join(READABLE)}"
        )
    if header["format"] != "1" and CHECKSUM_KEY not in header:
        raise BadFileError(f"{path}: is damaged: its header has no checksum ({CHECKSUM_KEY})")
    return tensors, header


def starts_as_pickle(path: Path) -> bool:
    """Return True if a file begins as a checkpoint of torch does, and not as a safetensors file.

    The length of the header, with which a safetensors file begins, may have the same bytes; the header follows it.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:  # the reader reports it
        return False
    return start.startswith((PICKLE_MAGIC, ZIP_MAGIC)) and start[8:] != b"{"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file whose header has a checksum; `read_tensors` verifies it.

    Raises:
        StorageError: no space, or no permission.
    """
    data = memoryview(serialise(dict(tensors), {**header, CHECKSUM_KEY: checksum(tensors, header)}))
    # The library writes the entries of the header in any order. Sorted entries give equal files equal bytes.
    start = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(bytes(data[8:start])), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    write_file(path, len(text).to_bytes(8, "little"), text, data[start:])


def read_tensors(path: Path, key: str = "", prefix: str = "") -> tuple[dict[str, Tensor], Header]:
    """Read the tensors and the header of a safetensors file.

    key: the option that names a file of another program, for errors; the checksum in its header is not ours.
    prefix: read only the tensors whose names begin with it, without a check of the checksum.

    Raises:
        BadFileError: damaged, not safetensors, or different from its checksum.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
            tensors = {name: file.get_tensor(name) for name in names}
            header: Header = file.metadata() or {}
        if CHECKSUM_KEY in header and not (key or prefix) and header[CHECKSUM_KEY] != checksum(tensors, header):
            raise BadFileError(
                f"{path}: is damaged: its content does not match the checksum ({CHECKSUM_KEY}) in its header"
            )
        return tensors, header
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:  # TypeError: a shape with 2^63
        source = f"{key} {path}" if key else path
        raise BadFileError(
            f"{source}: is damaged or is not a safetensors file ({shorten(error)}); only safetensors are loaded"
        ) from None


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Return the SHA-256 of the header (without its checksum) and of the tensors, in the order of their names."""
    rest = {key: value for key, value in header.items() if key != CHECKSUM_KEY}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a module. Names, shapes and types must be exactly those of the module.

    Raises:
        BadFileError: names the first missing, unexpected or misshapen keys.
    """
    problems = find_misfits(module, tensors)
    if problems:
        rest = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BadFileError(f"{source}: does not fit the model: {', '.join(map(shorten, problems[:5]))}{rest}")
    unwrap_compiled(module).load_state_dict(dict(tensors), strict=True)


def find_misfits(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a description of each tensor whose name, shape or type is not that of the module's."""
    own = unwrap_compiled(module).state_dict()
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {_describe(tensors[name])}, should be {_describe(own[name])}"
        for name in own
        if name in tensors and _describe(tensors[name]) != _describe(own[name])
    ]
    return problems


def _describe(tensor: Tensor) -> str:
    """Return the shape of a tensor, and its type if it is not float32."""
    kind = "" if tensor.dtype == torch.float32 else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """Return the module inside the wrapper of torch.compile, which adds a prefix to the names of weights."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, detached and contiguous, as safetensors needs them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
