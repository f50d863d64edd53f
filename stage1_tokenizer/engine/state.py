"""The states that a run resumes from: everything that it needs to continue exactly.

    state/step-00001000/NAME.safetensors    each registered part: a model, an optimizer
    state/step-00001000/manifest.json       step, plain values, and size and checksum of each of these files

A state is written under a temporary name, flushed to disk and renamed. Older states are removed only after that, so
the previous state is intact whenever a run is killed. The manifest is written last and has a checksum of itself.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import NonNegativeInt, StringConstraints, ValidationError
from safetensors.torch import save as serialise
from torch import Tensor, nn

from stage1_tokenizer.config.base import Config
from stage1_tokenizer.engine.checkpoint import Header, load_strict, read_tensors, to_cpu, unwrap_compiled
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.files import free_bytes, no_space_error, storage_error, sync_folder, write_file

FORMAT = 2
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 1_000_000
"""Bytes; a manifest has about a hundred for each part."""
STATE_NAME = re.compile(r"step-(\d{8,})")
TEMPORARY = ".tmp-"

Part = nn.Module | torch.optim.Optimizer


class FileEntry(Config):
    """Size and SHA-256 of one file in a state."""

    sha256: str
    """Hash of the content, 64 hexadecimal digits."""
    bytes: NonNegativeInt
    """Size of the file."""


class Manifest(Config):
    """Content of a state. `sha256` is the checksum of all other entries."""

    format: int
    """Version of the layout of states."""
    step: NonNegativeInt
    """Optimizer steps that were done."""
    scalars: dict[str, Any]
    """Numbers and texts beside the tensors: optimizer groups and the training precision."""
    files: dict[Annotated[str, StringConstraints(pattern=r"^\w+\.safetensors$")], FileEntry]
    """The files of the state by name, one for each part."""
    sha256: str
    """Checksum of the other entries, as 64 hexadecimal digits."""


def save_state(
    folder: Path,
    step: int,
    parts: Mapping[str, Part],
    scalars: Mapping[str, Any],
    keep: int = 2,
    kept_step: int | None = None,
) -> Path:
    """Save a state as `folder/step-XXXXXXXX`, and return its path.

    Then remove the states of later steps, and all but the newest `keep` states.

    parts: models and optimizers by name. scalars: plain values, ready for JSON. kept_step: the step of a state that
    is not removed.

    Raises:
        StorageError: the disk is full or read-only. Earlier states stay as they were.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{TEMPORARY}{final.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    needed = sum(map(_count_bytes, parts.values()))
    if needed > free_bytes(folder):
        raise no_space_error(final, needed)
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "scalars": dict(scalars), "files": {}}
    try:
        for name, part in parts.items():
            data = _serialise(part)
            write_file(temporary / f"{name}.safetensors", data)
            manifest["files"][f"{name}.safetensors"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        manifest["sha256"] = _checksum(manifest)
        write_file(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        _remove(final)  # a damaged state of the same step
        temporary.rename(final)
        sync_folder(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise storage_error(final, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    drop_states_after(folder, step)
    for old in list_states(folder)[keep:]:
        if step_of_state(old) != kept_step:
            _remove(old)
    return final


def find_newest_state(folder: Path, warn: Callable[[str], None], most: int | None = None) -> Path | None:
    """Return the newest intact state; None: nothing was saved yet. Damaged states are reported to `warn` and skipped.

    most: largest number of steps of the state; None: any.

    Raises:
        BadFileError: all states are damaged. To start the run again without a word would lose the user's work.
    """
    problems = []
    for state in list_states(folder):
        if most is not None and step_of_state(state) > most:
            continue
        problem = find_problem(state)
        if problem is None:
            return state
        problems.append(f"  {state.name}: {problem}")
        warn(f"{state} cannot be used ({problem}); trying the one before it")
    if problems:
        raise BadFileError(
            f"{folder}: none of its states can be used:\n" + "\n".join(problems) + "\nTo start again, give another "
            "--out or move that folder away"
        )
    return None


def find_named_state(folder: Path, name: str) -> Path:
    """Return the state in `folder` that the user names, by its name or its path.

    Raises:
        BadFileError: there is no such state, or it is damaged. No other state takes its place.
    """
    state = folder / Path(name).name
    if (Path(name).parent != Path() and Path(name).resolve() != state.resolve()) or not state.is_dir():
        names = ", ".join(other.name for other in list_states(folder)) or "none"
        raise BadFileError(f"--resume {name}: is no state of this run. The states in {folder} are: {names}")
    problem = find_problem(state)
    if problem:
        raise BadFileError(f"--resume {name}: {state} cannot be used: {problem}")
    return state


def load_state(state: Path, parts: Mapping[str, Part], optional: Collection[str] = ()) -> tuple[int, dict[str, Any]]:
    """Load a state into the parts that it was saved from. Return its step and its scalars.

    optional: names of parts that states of earlier versions lack; without them these parts stay as they are.

    Raises:
        BadFileError: the state is damaged, or does not fit these parts.
    """
    manifest = _read_manifest(state)
    for name, part in parts.items():
        path = state / f"{name}.safetensors"
        if path.name not in manifest.files:
            if name in optional:
                continue
            raise BadFileError(f"{state}: has no {name}, so a run of another kind saved it")
        tensors, header = read_tensors(path)
        if isinstance(part, nn.Module):
            load_strict(part, tensors, str(path))
        else:
            _load_optimizer(part, tensors, header, str(path))
    return manifest.step, manifest.scalars


def read_scalars(folder: Path) -> dict[str, Any]:
    """Return the scalars of the newest state in a folder of states whose manifest is intact; empty: there is none."""
    for state in list_states(folder):
        with suppress(BadFileError, OSError):
            return _read_manifest(state).scalars
    return {}


def drop_states_after(folder: Path, step: int) -> None:
    """Remove the states of later steps, so that a run that went back to `step` cannot resume from them."""
    for state in list_states(folder):
        if step_of_state(state) > step:
            _remove(state)


def list_states(folder: Path) -> list[Path]:
    """Return the states in a folder, newest first by the step in the name; copying changes modification times."""
    named = [path for path in folder.glob("step-*") if STATE_NAME.fullmatch(path.name)]
    return sorted(named, key=step_of_state, reverse=True)


def step_of_state(state: Path) -> int:
    """Return the step in the name of a state."""
    return int(state.name.removeprefix("step-"))


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a killed run has left. The caller must hold the lock of the run."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def find_problem(state: Path) -> str | None:
    """Return the reason why a state cannot be used; None: every byte of it is as it was written."""
    try:
        for name, entry in _read_manifest(state).files.items():
            path = state / name
            size = path.stat().st_size
            if size != entry.bytes:
                return f"{name} is damaged: {size:,} of {entry.bytes:,} bytes are there"
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


def _read_manifest(state: Path) -> Manifest:
    path = state / MANIFEST
    if path.is_file() and path.stat().st_size > LARGEST_MANIFEST:
        raise BadFileError(f"its manifest is damaged: it has more than {LARGEST_MANIFEST:,} bytes")
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"its manifest is damaged: {error}") from None
    version = tree.get("format") if isinstance(tree, dict) else None
    if version != FORMAT:
        raise BadFileError(f"its format is {version!s:.20}, this version reads {FORMAT}")
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
    """Return the SHA-256 of all entries of a manifest but its own."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _remove(state: Path) -> None:
    """Remove a state. It is renamed first, so that a crash never leaves half a state."""
    doomed = state.with_name(f"{TEMPORARY}dropped-{state.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    if state.exists():
        state.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _count_bytes(part: Part) -> int:
    """Return the size of a part's tensors in bytes."""
    if isinstance(part, nn.Module):
        return sum(tensor.nbytes for tensor in part.state_dict().values())
    return sum(value.nbytes for entry in part.state.values() for value in entry.values())


def _serialise(part: Part) -> bytes:
    """Return the content of a part's file."""
    if isinstance(part, nn.Module):
        return serialise(to_cpu(unwrap_compiled(part).state_dict()))
    # The state of an optimizer is {index of parameter: {name: tensor}} and a list of groups of plain values.
    state = part.state_dict()
    tensors = {f"{index}.{name}": value for index, entry in state["state"].items() for name, value in entry.items()}
    return serialise(to_cpu(tensors), {"groups": json.dumps(state["param_groups"])})


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], header: Header, source: str
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor
        groups = json.loads(header["groups"])
        # The settings come from the present configuration, which --allow_changed may have changed.
        own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        groups = [{**saved, **ours} for saved, ours in zip(groups, own, strict=True)]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, KeyError, TypeError) as error:
        raise BadFileError(f"{source}: does not fit the optimizer: {error}") from None
    # Files have row-major tensors. The fused step reads parameter and moments in memory order, so the moments of a
    # channels_last parameter need its layout, or the resumed run differs.
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if value.shape == parameter.shape:
                entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
