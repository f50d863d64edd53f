"""Weights files: strict loading, the right kind, complete files, and no pickles."""

import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stage1_tokenizer.engine.checkpoint import load_strict, read_weights, write_weights
from stage1_tokenizer.engine.errors import BadFileError, StorageError
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.tokenizer import LoadedTokenizer


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def written(folder: Path, **header: str) -> Path:
    path = folder / "tokenizer.safetensors"
    write_weights(path, model(), "tokenizer", header)
    return path


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    """Weights with their header, of any memory layout, with the permissions of the user's other new files."""
    original = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    write_weights(tmp_path / "x", original, "tokenizer", {"config": "{}", "step": "12"})
    tensors, header = read_weights(tmp_path / "x", kind="tokenizer")
    assert header == {"kind": "tokenizer", "format": "2", "config": "{}", "step": "12"}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in original.state_dict().items())
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_loading_is_strict(tmp_path: Path) -> None:
    """Trap 43: a missing, unexpected or misshapen key is an error that names it, and nothing is loaded."""
    tensors, _ = read_weights(written(tmp_path), "tokenizer")
    mistakes: dict[str, dict[str, Any]] = {
        r"missing 2\.weight": {name: tensor for name, tensor in tensors.items() if name != "2.weight"},
        r"unexpected 3\.extra": {**tensors, "3.extra": torch.zeros(1)},
        r"0\.bias is \(5,\), should be \(4,\)": {**tensors, "0.bias": torch.zeros(5)},
        r"missing 1\.running_var": {name: tensor for name, tensor in tensors.items() if name != "1.running_var"},
    }
    for message, wrong in mistakes.items():
        other = model(seed=1)
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(BadFileError, match=f"from here.*{message}"):
            load_strict(other, wrong, "from here")
        assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in before.items())
    other = model(seed=1)
    load_strict(other, tensors, "from here")
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model().state_dict().items())


def test_a_long_list_of_keys_is_cut() -> None:
    """A file of another model gives one line, not hundreds."""
    with pytest.raises(BadFileError, match="and 8 more"):
        load_strict(model(), {f"other.{i}": torch.zeros(1) for i in range(4)}, "x")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    """One missing byte is enough. The message has the file's name, which the library's message has not."""
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadFileError, match=r"tokenizer\.safetensors.*damaged"):
        read_weights(path, "tokenizer")


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    """A header that promises terabytes, or is not JSON, costs neither memory nor a traceback."""
    path = written(tmp_path)
    data = path.read_bytes()
    for damage in (b"\xff" * 7 + b"\x7f" + data[8:], data[:8] + b"}" + data[9:], os.urandom(200)):
        path.write_bytes(damage)
        with pytest.raises(BadFileError, match="damaged"):
            read_weights(path, "tokenizer")


def test_the_kind_must_be_right(tmp_path: Path) -> None:
    """The message names the kind of a prior given as a tokenizer, and of a foreign file."""
    write_weights(tmp_path / "prior", model(), "prior", {})
    with pytest.raises(BadFileError, match="this is a prior, but a tokenizer is needed"):
        read_weights(tmp_path / "prior", "tokenizer")
    with pytest.raises(BadFileError, match="this is a prior"):
        LoadedTokenizer.load(tmp_path / "prior")
    save_file({"x": torch.zeros(1)}, tmp_path / "stranger")
    with pytest.raises(BadFileError, match="Tessera did not write"):
        read_weights(tmp_path / "stranger", "tokenizer")


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    """The message names both formats, so that the user knows which side to update."""
    with pytest.raises(BadFileError, match="format 3, this version reads 1 and 2"):
        read_weights(written(tmp_path, format="3"), "tokenizer")


class Evil:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    """Trap 44: a pickle is no safetensors file under any name, and its code does not run."""
    canary, path = tmp_path / "canary", tmp_path / "tokenizer.safetensors"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Evil(canary)))
    else:
        torch.save({"weights": Evil(canary)}, path)
    for read in (lambda: read_weights(path, "tokenizer"), lambda: LoadedTokenizer.load(tmp_path)):
        with pytest.raises(BadFileError, match="only safetensors are loaded"):
            read()
    assert not canary.exists()
    pickle.loads(pickle.dumps(Evil(canary)))
    assert canary.exists(), "the bait works"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A full disk gives one message; the older weights stay complete, and no temporary file is left."""
    path = written(tmp_path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_weights(path, model(seed=1), "tokenizer", {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is renamed before it is flushed would be empty after a power cut."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*args: Any, name: str = name, real: Any = real) -> Any:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, noted)
    write_file(tmp_path / "new" / "x", b"data")
    assert calls == ["fsync", "replace", "fsync"], "the file, its name, the folder"
    assert (tmp_path / "new" / "x").read_bytes() == b"data"


def test_a_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    """A failed write gives a message, not a traceback."""
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        write_file(tmp_path / "file" / "x", b"data")
