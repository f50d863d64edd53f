"""States: exact when loaded, skipped when damaged, and never lost by a failed save."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stage1_tokenizer.engine.errors import BadFileError, StorageError
from stage1_tokenizer.engine.optim import OptimConfig, build_optimizer
from stage1_tokenizer.engine.state import Part, find_newest_state, load_state, save_state


def parts(seed: int = 0, steps: int = 3) -> dict[str, Part]:
    """Return a model with a buffer and an AdamW with two groups, trained for some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    for _ in range(steps):
        torch.autograd.backward(model(torch.randn(5, 3)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def flat(part: Any) -> dict[str, Any]:
    """Return everything in the state of a part, each value under one name."""
    state = part.state_dict()
    if isinstance(part, nn.Module):
        return dict(state)
    groups = {
        f"group {i} {key}": value for i, group in enumerate(state["param_groups"]) for key, value in group.items()
    }
    return groups | {f"{i} {key}": value for i, entry in state["state"].items() for key, value in entry.items()}


def same(left: dict[str, Part], right: dict[str, Part]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return list(a) == list(b) if isinstance(a, list | tuple) else bool(a == b)

    pairs = [(flat(left[name]), flat(right[name])) for name in left]
    return all(a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a) for a, b in pairs)


def quiet(message: str) -> None:
    raise AssertionError(f"no warning was due: {message}")


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Trap 41: model, buffers, Adam's moments and step count, groups and scalars, into newly built parts."""
    saved = parts()
    save_state(tmp_path, 12, saved, {"best": 0.25})
    fresh = parts(seed=1, steps=0)
    newest = find_newest_state(tmp_path, quiet)
    assert newest is not None
    assert load_state(newest, fresh) == (12, {"best": 0.25})
    assert same(saved, fresh)
    for each in (saved, fresh):  # and both go on alike
        model, optimizer = each["model"], each["optimizer"]
        assert isinstance(model, nn.Module)
        assert isinstance(optimizer, torch.optim.Optimizer)
        torch.autograd.backward(model(torch.ones(5, 3).cumsum(0)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert same(saved, fresh)


def test_a_loaded_optimizer_steps_alike_in_channels_last(tmp_path: Path) -> None:
    """Trap 41: AdamW's fused step reads memory in order, so moments need the layout of the weights."""

    def step(conv: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        torch.autograd.backward(conv(torch.randn(2, 4, 5, 5)).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def built() -> dict[str, Any]:
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        return {"conv": conv, "optimizer": build_optimizer(conv, OptimConfig())}

    whole, resumed = built(), built()
    step(**whole, seed=0)
    load_state(save_state(tmp_path, 1, whole, {}), resumed)
    assert same(whole, resumed)
    for each in (whole, resumed):
        step(**each, seed=1)
    assert same(whole, resumed)


def test_the_newest_is_so_by_its_step(tmp_path: Path) -> None:
    """Modification times are wrong after a copy or a change of the clock."""
    for step in (9, 10, 100):
        save_state(tmp_path, step, parts(), {}, keep=9)
    os.utime(tmp_path / "step-00000009", (2**33, 2**33))
    assert find_newest_state(tmp_path, quiet) == tmp_path / "step-00000100"


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_state_is_passed_over_with_a_warning(tmp_path: Path, file: str, damage: str) -> None:
    """safetensors loads a file with one flipped byte without an error; the manifest's checksum finds it."""
    for step in (1, 2):
        save_state(tmp_path, step, parts(seed=step), {})
    path = tmp_path / "step-00000002" / file
    if damage == "flip":
        flip(path, -5)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    warnings: list[str] = []
    assert find_newest_state(tmp_path, warnings.append) == tmp_path / "step-00000001"
    assert len(warnings) == 1
    assert "step-00000002" in warnings[0]
    assert file in warnings[0]


@pytest.mark.parametrize(
    "manifest",
    [*("", "[]", "{}", '{"format": 1}', None), *(f'{{"format": {n}, "step": 2, "files": []}}' for n in (1, 2))],
)
def test_an_incomplete_state_is_passed_over(tmp_path: Path, manifest: str | None) -> None:
    """The manifest is written last, so a folder without a good one was left by a stop."""
    save_state(tmp_path, 1, parts(), {})
    newer = tmp_path / "step-00000002"
    shutil.copytree(tmp_path / "step-00000001", newer)
    if manifest is None:
        (newer / "manifest.json").unlink()
    else:
        (newer / "manifest.json").write_text(manifest)
    warnings: list[str] = []
    assert find_newest_state(tmp_path, warnings.append) == tmp_path / "step-00000001"
    assert len(warnings) == 1


def test_a_manifest_of_another_step_is_damaged(tmp_path: Path) -> None:
    """A flipped bit in the step would resume at another step without a message."""
    for step in (1, 2):
        save_state(tmp_path, step, parts(), {})
    path = tmp_path / "step-00000002" / "manifest.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 6'))
    warnings: list[str] = []
    assert find_newest_state(tmp_path, warnings.append) == tmp_path / "step-00000001"
    assert warnings


def test_no_state_is_a_new_run(tmp_path: Path) -> None:
    """A missing folder, temporary folders and other files are no states."""
    assert find_newest_state(tmp_path / "gone", quiet) is None
    save_state(tmp_path, 1, parts(), {})
    (tmp_path / "step-00000001").rename(tmp_path / ".tmp-step-00000001-99")
    (tmp_path / "step-latest").mkdir()
    assert find_newest_state(tmp_path, quiet) is None


def test_two_are_kept(tmp_path: Path) -> None:
    """The power may fail while the newest is written; saving one step twice replaces it."""
    for step in (1, 2, 3, 3):
        save_state(tmp_path, step, parts(), {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert find_newest_state(tmp_path, quiet) is not None


def test_what_was_just_saved_is_kept(tmp_path: Path) -> None:
    """After a resume past damaged states the new state has a lower number than they, and must not be removed."""
    for step in (5, 20, 25):
        save_state(tmp_path, step, parts(), {}, keep=3)
    for step in (20, 25):
        flip(tmp_path / f"step-{step:08d}" / "model.safetensors", -5)
    assert find_newest_state(tmp_path, lambda _: None) == tmp_path / "step-00000005"
    saved = save_state(tmp_path, 10, parts(), {}, keep=2)
    assert find_newest_state(tmp_path, lambda _: None) == saved


@pytest.mark.parametrize(("step", "nth"), [("fsync", 1), ("fsync", 2), ("fsync", 5), ("replace", 3), ("rename", 1)])
def test_a_failed_save_leaves_the_former_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, nth: int
) -> None:
    """A disk that is full at any moment leaves the older states complete, and no half of a new one."""
    save_state(tmp_path, 1, parts(), {})
    real, calls = getattr(os, step), []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == nth:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, step, full)
    with pytest.raises(StorageError, match="No space left on device"):
        save_state(tmp_path, 2, parts(seed=1), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert find_newest_state(tmp_path, quiet) == tmp_path / "step-00000001"


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    """The message names a part that was not saved, or one of another shape."""
    state = save_state(tmp_path, 1, parts(), {})
    with pytest.raises(BadFileError, match="has no discriminator"):
        load_state(state, {"discriminator": nn.Linear(1, 1)})
    with pytest.raises(BadFileError, match=r"model\.safetensors.*missing 0\.bias|unexpected"):
        load_state(state, {"model": nn.Linear(1, 1)})


def test_an_optimizer_of_another_run_is_refused(tmp_path: Path) -> None:
    """BadFileError if the state does not fit, also if the groups of the optimizer do not."""
    saved = parts()
    state = save_state(tmp_path, 1, saved, {})
    with pytest.raises(BadFileError, match="optimizer"):
        load_state(state, {"optimizer": build_optimizer(nn.Linear(3, 4), OptimConfig())})
