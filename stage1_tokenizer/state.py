"""The states that a run resumes from: whole or passed over, never lost, and exact.

state/step-00001000/NAME.safetensors    each registered part: a model, an optimizer
state/step-00001000/manifest.json       {"format", "step", "scalars", "files": {name: {"sha256", "bytes"}}}
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from stage1_tokenizer.checkpoint import FORMAT, Header, load_strict, portable, sync_folder, write_file
from stage1_tokenizer.errors import BadFileError, StorageError

Part = nn.Module | torch.optim.Optimizer


def save_state(folder: Path, step: int, parts: Mapping[str, Part], scalars: Mapping[str, Any], keep: int = 2) -> Path:
    """Save all that a resume needs as `folder/step-XXXXXXXX`; afterwards drop all but the newest `keep`.

    Raises:
        StorageError: the disk is full or read-only; former states are untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "scalars": dict(scalars), "files": {}}
    try:
        for name, part in parts.items():
            data = _pack(part)
            write_file(temporary / f"{name}.safetensors", data)
            manifest["files"][f"{name}.safetensors"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        write_file(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_folder(folder)
    except OSError as error:
        raise StorageError(f"cannot write {final}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # States of later steps are those that were damaged when this run resumed before them.
    forsaken = [state for state in _states(folder) if state.name > final.name]
    for old in forsaken + _states(folder)[len(forsaken) + keep :]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest_state(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest state whose every file is as its manifest says; a damaged one is named to `warn` and passed over."""
    for state in _states(folder):
        problem = _problem(state)
        if problem is None:
            return state
        warn(f"{state} cannot be used ({problem}); trying the one before it")
    return None


def load_state(state: Path, parts: Mapping[str, Part]) -> tuple[int, dict[str, Any]]:
    """Put a state back into the parts it was saved from. Returns the step and the scalars.

    Raises:
        BadFileError: the state does not fit these parts.
    """
    manifest = json.loads((state / "manifest.json").read_text())
    for name, part in parts.items():
        path = state / f"{name}.safetensors"
        if not path.is_file():
            raise BadFileError(f"{state}: holds no {name}; it was saved by a run of another kind")
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            header = file.metadata() or {}
        if isinstance(part, nn.Module):
            load_strict(part, tensors, str(path))
        else:
            _unpack_optimizer(part, tensors, header, str(path))
    return manifest["step"], manifest["scalars"]


def _states(folder: Path) -> list[Path]:
    """Newest first, by the step in the name: modification times lie."""
    return sorted(folder.glob("step-[0-9]*"), key=lambda path: path.name, reverse=True)


def _problem(state: Path) -> str | None:
    try:
        manifest = json.loads((state / "manifest.json").read_text())
        if state.name != f"step-{manifest['step']:08d}":
            return f"its manifest is that of step {manifest['step']}"
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        for name, entry in manifest["files"].items():
            data = (state / name).read_bytes()
            if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
                return f"{name} is damaged: {len(data)} of {entry['bytes']} bytes, or its checksum differs"
    except FileNotFoundError as error:
        return f"it is incomplete: {Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read: {error}"
    return None


def _pack(part: Part) -> bytes:
    if isinstance(part, nn.Module):
        return serialise(portable(part.state_dict()))
    # An optimizer's state is {index of parameter: {name: tensor}} and a list of groups of plain values. The learning
    # rate in the groups is a function of the step and is set anew before each step.
    state = part.state_dict()
    tensors = {f"{index}.{name}": value for index, entry in state["state"].items() for name, value in entry.items()}
    return serialise(portable(tensors), {"groups": json.dumps(state["param_groups"])})


def _unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], header: Header, source: str
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    try:
        optimizer.load_state_dict({"state": state, "param_groups": json.loads(header["groups"])})
    except (ValueError, KeyError) as error:
        raise BadFileError(f"{source}: does not fit the optimizer: {error}") from None
    # Files hold plain row-major tensors. The fused step goes through parameter and moments alike in memory, so the
    # moments of a channels_last parameter must lie as it does, or the resumed run differs.
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if value.shape == parameter.shape:
                entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
