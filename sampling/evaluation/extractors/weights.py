"""Weights of an extractor: read without unpickling, hashed, and fitted to the network or refused."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stage1_tokenizer.checkpoint import brief
from stage1_tokenizer.config_errors import shortened
from stage1_tokenizer.errors import BadFileError, ConfigError


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
        raise ConfigError(f"{key} {shortened(str(path))}: there is no such file; {choices}")
    return path


def sha256_of(path: Path) -> str:
    """Raises BadFileError: the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror})") from None


def read_safetensors(path: Path, key: str) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        BadFileError: it is damaged, or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:  # of a shape of 2^63, a TypeError
        raise BadFileError(
            f"{key} {path}: is damaged or is not a safetensors file ({shortened(str(error))}); "
            "only safetensors are loaded"
        ) from None


def fit(network: nn.Module, given: Mapping[str, Tensor], source: str) -> None:
    """Load weights, in any floating-point format, into the network as float32, and freeze it in eval mode.

    BatchNorm's counts of batches are of no use here and may be missing; else each weight must have its place and each
    place its weight. Whole numbers are tables that the network has computed itself, and must be equal. The network may
    be one built on the meta device, if it has no such tables.

    Raises:
        BadFileError: names the source and the key that is missing, unexpected, misshapen, or holds what is not finite.
    """
    own = network.state_dict()  # with the versions of its layers
    places = {name: tensor for name, tensor in own.items() if not _counts_batches(name)}
    given = {name: tensor for name, tensor in given.items() if not _counts_batches(name)}
    kind = type(network).__name__
    for name in (*places, *given):
        if name not in given:
            raise BadFileError(f"{source}: is not of {kind}: no {name}")
        if name not in places:
            raise BadFileError(f"{source}: is not of {kind}: it has no {brief(name)}")
        fits = given[name].shape == places[name].shape
        if not fits or given[name].is_floating_point() != places[name].is_floating_point():
            raise BadFileError(
                f"{source}: is not of {kind}: {name} is {given[name].dtype} {tuple(given[name].shape)}, "
                f"should be {tuple(places[name].shape)}"
            )
    try:
        weights = {
            name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for name, tensor in given.items()
        }
    except RuntimeError as error:  # safetensors knows formats of four bits, from which torch does not convert
        raise BadFileError(f"{source}: holds numbers of a format that cannot be read ({error})") from None
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise BadFileError(f"{source}: {name} holds numbers that are not finite")
        if not tensor.is_floating_point() and not torch.equal(tensor, places[name]):
            raise BadFileError(f"{source}: is not of {kind}: {name} has other values")
    own.update(weights)
    own.update({name: torch.zeros((), dtype=torch.int64) for name in own if _counts_batches(name)})
    network.load_state_dict(own, strict=True, assign=True)
    network.requires_grad_(False).eval()


def _counts_batches(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == "num_batches_tracked"
