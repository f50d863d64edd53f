"""The states that a run resumes from: whole or passed over, never lost, and exact.

    state/step-00001000/NAME.safetensors    each registered part: a model, an optimizer
    state/step-00001000/manifest.json       step, plain values, and size and checksum of each of these files

A state is made under a temporary name, flushed to disk and renamed, and only then are old ones dropped: at whatever
moment a run is killed, the state before is whole. The manifest is written last and has a checksum of itself.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import NonNegativeInt, StringConstraints, ValidationError
from safetensors.torch import save as serialise
from torch import Tensor, nn

from stage1_tokenizer.config.base import Config
from stage1_tokenizer.engine.checkpoint import (
    Header,
    free_space,
    load_strict,
    portable,
    read_tensors,
    storage_error,
    sync_folder,
    uncompiled,
    write_file,
)
from stage1_tokenizer.engine.errors import BadFileError, StorageError

FORMAT = 2
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 1_000_000
"""Bytes; one has about a hundred for each part."""
STATE_NAME = re.compile(r"step-(\d{8,})")
TEMPORARY = ".tmp-"

Part = nn.Module | torch.optim.Optimizer


class FileEntry(Config):
    """What a manifest says of a file."""

    sha256: str
    bytes: NonNegativeInt


class Manifest(Config):
    """What a state holds; `sha256` is that of all the rest."""

    format: int
    step: NonNegativeInt
    scalars: dict[str, Any]
    files: dict[Annotated[str, StringConstraints(pattern=r"^\w+\.safetensors$")], FileEntry]
    sha256: str


def save_state(folder: Path, step: int, parts: Mapping[str, Part], scalars: Mapping[str, Any], keep: int = 2) -> Path:
    """Save all that a resume needs as `folder/step-XXXXXXXX`; afterwards drop all but the newest `keep`.

    Raises:
        StorageError: the disk is full or read-only; former states are untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{TEMPORARY}{final.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    needed, free = sum(map(_size, parts.values())), free_space(folder)
    if needed > free:
        raise StorageError(
            f"no space left writing {final}: it needs {needed:,} bytes, {free:,} are free. What was saved before is "
            "intact; make room, and the same command continues from there"
        )
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "scalars": dict(scalars), "files": {}}
    try:
        for name, part in parts.items():
            data = _pack(part)
            write_file(temporary / f"{name}.safetensors", data)
            manifest["files"][f"{name}.safetensors"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        manifest["sha256"] = _checksum(manifest)
        write_file(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        _drop(final)  # one of this step that could not be used
        temporary.rename(final)
        sync_folder(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise storage_error(final, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    drop_later(folder, step)
    for old in states(folder)[keep:]:
        _drop(old)
    return final


def newest_state(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest state that is whole; damaged ones are named to `warn` and passed over. None: nothing was saved yet.

    Raises:
        BadFileError: there are states, and none of them is whole. (Silently, all of the run would be done again.)
    """
    problems = []
    for state in states(folder):
        problem = problem_of(state)
        if problem is None:
            return state
        problems.append(f"  {state.name}: {problem}")
        warn(f"{state} cannot be used ({problem}); trying the one before it")
    if problems:
        raise BadFileError(
            f"{folder}: none of its states can be used:\n" + "\n".join(problems) + "\nTo begin again, give another "
            "--out or move that folder away"
        )
    return None


def named_state(folder: Path, name: str) -> Path:
    """The state in `folder` that the user has named, by its own name or its path.

    Raises:
        BadFileError: there is none, or it is not whole: it was asked for, so no other one is taken in its place.
    """
    state = folder / Path(name).name
    if (Path(name).parent != Path() and Path(name).resolve() != state.resolve()) or not state.is_dir():
        there = ", ".join(each.name for each in states(folder)) or "none"
        raise BadFileError(f"--resume {name}: is no state of this run; in {folder} there are: {there}")
    problem = problem_of(state)
    if problem:
        raise BadFileError(f"--resume {name}: {state} cannot be used: {problem}")
    return state


def load_state(state: Path, parts: Mapping[str, Part], newer: Collection[str] = ()) -> tuple[int, dict[str, Any]]:
    """Put a whole state back into the parts it was saved from. Returns the step and the scalars.

    newer: names of parts that a state of an earlier version may lack; these stay as they are then.

    Raises:
        BadFileError: the state is damaged, or does not fit these parts.
    """
    manifest = _manifest(state)
    for name, part in parts.items():
        path = state / f"{name}.safetensors"
        if path.name not in manifest.files:
            if name in newer:
                continue
            raise BadFileError(f"{state}: holds no {name}; it was saved by a run of another kind")
        tensors, header = read_tensors(path)
        if isinstance(part, nn.Module):
            load_strict(part, tensors, str(path))
        else:
            _unpack_optimizer(part, tensors, header, str(path))
    return manifest.step, manifest.scalars


def drop_later(folder: Path, step: int) -> None:
    """Remove the states after a step to which a run has gone back: killed before its next save, it would find them."""
    for state in states(folder):
        if step_of(state) > step:
            _drop(state)


def states(folder: Path) -> list[Path]:
    """Newest first, by the step in the name: modification times lie."""
    named = [path for path in folder.glob("step-*") if STATE_NAME.fullmatch(path.name)]
    return sorted(named, key=step_of, reverse=True)


def step_of(state: Path) -> int:
    return int(state.name.removeprefix("step-"))


def sweep(folder: Path) -> None:
    """Remove what a killed run had not finished writing. Only who holds the run's lock may call it."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def problem_of(state: Path) -> str | None:
    """What makes a state unusable; None where every byte of it is as it was written."""
    try:
        for name, entry in _manifest(state).files.items():
            path = state / name
            found = path.stat().st_size
            if found != entry.bytes:
                return f"{name} is damaged: {found:,} of {entry.bytes:,} bytes are there"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    return f"{name} is damaged: its checksum (SHA-256) is not that of the manifest"
    except BadFileError as error:
        return str(error)
    except FileNotFoundError as error:
        return f"it is incomplete: {Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None


def _manifest(state: Path) -> Manifest:
    path = state / MANIFEST
    if path.is_file() and path.stat().st_size > LARGEST_MANIFEST:
        raise BadFileError(f"its manifest is damaged: it has more than {LARGEST_MANIFEST:,} bytes")
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"its manifest is damaged: {error}") from None
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != FORMAT:
        raise BadFileError(f"its format is {found!s:.20}, this version reads {FORMAT}")
    if tree.get("sha256") != _checksum(tree):
        raise BadFileError("its manifest is damaged: its checksum (SHA-256) differs")
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        raise BadFileError(f"its manifest is damaged: {error.errors()[0]['msg']}") from None
    if state.name != f"step-{manifest.step:08d}":
        raise BadFileError(f"its manifest is that of step {manifest.step}")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Of all of a manifest but its own entry."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _drop(state: Path) -> None:
    """Remove a state; under another name, so that no half of one is ever found."""
    doomed = state.with_name(f"{TEMPORARY}dropped-{state.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    if state.exists():
        state.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _size(part: Part) -> int:
    """Bytes of a part's tensors."""
    if isinstance(part, nn.Module):
        return sum(tensor.nbytes for tensor in part.state_dict().values())
    return sum(value.nbytes for entry in part.state.values() for value in entry.values())


def _pack(part: Part) -> bytes:
    if isinstance(part, nn.Module):
        return serialise(portable(uncompiled(part).state_dict()))
    # An optimizer's state is {index of parameter: {name: tensor}} and a list of groups of plain values. The learning
    # rate in the groups is a function of the step and is set anew before each step.
    state = part.state_dict()
    tensors = {f"{index}.{name}": value for index, entry in state["state"].items() for name, value in entry.items()}
    return serialise(portable(tensors), {"groups": json.dumps(state["param_groups"])})


def _unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], header: Header, source: str
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor
        groups = json.loads(header["groups"])
        # Settings are those of this run's configuration, which may have been allowed to change.
        own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        groups = [{**saved, **ours} for saved, ours in zip(groups, own, strict=True)]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, KeyError, TypeError) as error:
        raise BadFileError(f"{source}: does not fit the optimizer: {error}") from None
    # Files hold plain row-major tensors. The fused step goes through parameter and moments alike in memory, so the
    # moments of a channels_last parameter must lie as it does, or the resumed run differs.
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if value.shape == parameter.shape:
                entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
