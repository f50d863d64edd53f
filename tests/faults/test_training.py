"""Faults 15 to 17, 32, 36 to 40, 47, 48, 51, 54 and 55: what happens to a training from inside, and on a resume."""

import hashlib
import json
import math
import multiprocessing
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from stage1_tokenizer import objective, validation
from stage1_tokenizer.data.open_data import OpenData
from stage1_tokenizer.engine import launch
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.state import list_states, step_of_state
from stage1_tokenizer.objective import LARGEST_WEIGHT
from stage2_prior.tokens import load_or_encode
from tests.helpers.artefacts import edit_weights, files_of, shapes, write_tokenizer
from tests.helpers.commands import lone_accelerator, names_of, run
from tests.helpers.faults import (
    NAN,
    Names,
    at_step,
    chained,
    dies,
    killed,
    nan_pixels,
    trained,
    weights_of,
)
from tests.helpers.processes import RankFailedError, run_processes
from tests.helpers.training import checksums, log, part, train

OPTIONS: dict[str, Any] = {"steps": 6, "bottleneck.revive_below": 2.0, "keep": 100}


def alarms(out: Path) -> list[dict[str, Any]]:
    path = out / "alarms.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_fault_15_a_nan_is_skipped(tmp_path: Path) -> None:
    """Fault 15: NaN in step 4. Codebook, weights, EMA and moments are after it what they were before it, also those of
    the discriminator; the run goes on, says so, keeps the batch, and counts it in the log."""
    nan = partial(nan_pixels, steps=range(4, 5))
    ((code, err),) = run_processes(1, trained, tmp_path / "ours", OPTIONS, nan)
    assert (code, err) == (0, "")
    parts = ("tokenizer", "ema", "optimizer", "discriminator", "discriminator_optimizer")
    for name in parts:
        before, after = part(tmp_path / "ours", 3, name), part(tmp_path / "ours", 4, name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
        final = part(tmp_path / "ours", 6, name)
        assert all(tensor.isfinite().all() for tensor in final.values() if tensor.is_floating_point())
    sums = [checksums(tmp_path / "ours", step)["tokenizer.safetensors"] for step in (4, 5)]
    assert sums[0] != sums[1]
    (alarm,) = alarms(tmp_path / "ours")
    assert (alarm["step"], alarm["alarm"]) == (4, "not_finite")
    assert "step 4 of the tokenizer: the input batch (1 of" in alarm["message"]
    assert "skipped (1 in a row, at most 3)" in alarm["message"]
    assert (tmp_path / "ours/nonfinite-step-00000004-rank-0.safetensors").exists()
    entries = {entry["step"]: entry for entry in log(tmp_path / "ours") if "train/total" in entry}
    assert sorted(entries) == [1, 2, 3, 5, 6], "no entry of a step that was not"
    assert [entries[step]["train/skipped"] for step in sorted(entries)] == [0, 0, 0, 1, 0]
    assert all(math.isfinite(value) for entry in log(tmp_path / "ours") for value in entry.values())
    dies(trained, tmp_path / "killed", OPTIONS, partial(chained, changes=[nan, partial(at_step, step=5, fault=killed)]))
    run_processes(1, trained, tmp_path / "killed", OPTIONS, nan)
    assert checksums(tmp_path / "killed", 6) == checksums(tmp_path / "ours", 6), "a resume remembers what was skipped"
    assert log(tmp_path / "killed") == log(tmp_path / "ours")


def test_fault_15_too_many_in_a_row(tmp_path: Path) -> None:
    """Fault 15: after three in a row the fourth ends the run: code 4, step and what it was, and the last good state is
    the newest. A run that is killed in between does not begin to count anew."""
    nan = partial(nan_pixels, steps=range(3, 100))
    options = {**OPTIONS, "steps": 9}
    ((code, err),) = run_processes(1, trained, tmp_path / "ours", options, nan)
    assert code == 4
    assert "step 6 of the tokenizer: the input batch" in err
    assert "step number 4 in a row" in err
    assert "intact (step-00000003, step-00000004, step-00000005)" in err
    assert "Traceback" not in err
    assert part(tmp_path / "ours", 5, "tally")["in_a_row"] == 3
    both = [part(tmp_path / "ours", step, "tokenizer") for step in (2, 5)]
    assert all(torch.equal(tensor, both[1][name]) for name, tensor in both[0].items())
    dies(trained, tmp_path / "killed", options, partial(chained, changes=[nan, partial(at_step, step=5, fault=killed)]))
    ((code, again),) = run_processes(1, trained, tmp_path / "killed", options, nan)
    assert (code, again.replace("killed", "ours")) == (4, err)


def spoilt_judgement(names: Names, _: int) -> None:
    loss_of = vars(objective)["discriminator_loss"]

    def spoilt(real: Tensor, fake: Tensor, kind: str) -> Any:
        loss = loss_of(real, fake, kind)
        return loss._replace(total=loss.total * math.inf)

    vars(objective)["discriminator_loss"] = spoilt


def test_fault_15_a_discriminator_that_never_learns(tmp_path: Path) -> None:
    """Fault 15: the generator's good steps in between do not hide that the discriminator's are all left out."""
    options = {**OPTIONS, "steps": 20, "adversarial.start": 2, "skips": 2}
    ((code, err),) = run_processes(1, trained, tmp_path, options, spoilt_judgement)
    assert code == 4
    assert "step 5 of the discriminator" in err
    assert [alarm["step"] for alarm in alarms(tmp_path)] == [3, 4]


def test_fault_15_a_codebook_does_not_start_from_nan(tmp_path: Path) -> None:
    """Fault 15: k-means over a first batch with NaN is done again over the next, as if that had been the first."""
    run_processes(1, trained, tmp_path, {**OPTIONS, "steps": 2}, nan_latents)
    codebooks = [part(tmp_path, step, "tokenizer")["bottleneck.codebook.weight"] for step in (1, 2)]
    different = [len({tuple(code) for code in codebook.tolist()}) for codebook in codebooks]
    assert different == [1, 8], "all latents were NaN, then none"


def nan_latents(names: Names, _: int) -> None:
    normalise, calls = names["normalise"], [0]

    def spoilt(pixels: Tensor) -> Tensor:
        calls[0] += 1
        x: Tensor = normalise(pixels)
        return x * NAN if calls[0] == 1 else x

    names["normalise"] = spoilt


def test_fault_15_the_disk_does_not_fill_with_batches(tmp_path: Path) -> None:
    """Fault 15: a run that skips every second step for ever keeps eight batches, not all."""
    nan = partial(nan_pixels, steps=range(1, 100, 2))
    run_processes(1, trained, tmp_path, {**OPTIONS, "steps": 22, "save_every": 100}, nan)
    assert len(alarms(tmp_path)) == 11
    assert len(list(tmp_path.glob("nonfinite-*"))) == 8


def test_fault_16_nan_on_one_rank(tmp_path: Path) -> None:
    """Fault 16: NaN on rank 1 alone, in step 4: both skip it, none waits for the other, and codebooks and weights stay
    equal on both to the end."""
    ranks = run_processes(2, weights_of, tmp_path, OPTIONS, partial(nan_pixels, steps=range(4, 5), on_rank=1))
    assert [rank["code"] for rank in ranks] == [0, 0]
    for name, tensor in ranks[0]["weights"].items():
        assert np.isfinite(tensor).all()
        assert np.array_equal(tensor, ranks[1]["weights"][name]), name
    before, after = part(tmp_path, 3, "tokenizer"), part(tmp_path, 4, "tokenizer")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert "on rank 1 of 2" in alarms(tmp_path)[0]["message"]


def exploding(names: Names, _: int, factor: float) -> None:
    """From step 4 on the reconstruction's loss is scaled, so its gradient and lambda explode."""
    loss_of, judge = vars(objective)["reconstruction_loss"], vars(objective)["adversarial_loss"]

    def scaled(*args: Any) -> Any:
        total, terms = loss_of(*args)
        return total * factor, terms

    vars(objective)["reconstruction_loss"] = scaled
    vars(objective)["adversarial_loss"] = lambda discriminator, image, kind: (
        judge(discriminator, image, kind) + image.sum() * 0.0
    )


def silent_discriminator(names: Names, _: int) -> None:
    """The discriminator says nothing about the image: the last layer's gradient is 0, and lambda is divided by it."""
    vars(objective)["adversarial_loss"] = lambda discriminator, image, kind: (image * 0.0).sum()


@pytest.mark.parametrize(
    ("change", "largest"), [(partial(exploding, factor=1e15), LARGEST_WEIGHT), (silent_discriminator, LARGEST_WEIGHT)]
)
def test_fault_17_exploding_loss_and_lambda(tmp_path: Path, change: Any, largest: float) -> None:
    """Fault 17: lambda ends at its clamp, finite; gradients are clipped, and the log counts how often; the weights stay
    finite and move by no more than their learning rate."""
    options = {**OPTIONS, "optim.clip": 0.01, "adversarial.start": 0}
    ((code, _),) = run_processes(1, trained, tmp_path, options, change)
    assert code == 0
    entries = [entry for entry in log(tmp_path) if "train/lambda" in entry]
    assert entries
    assert all(entry["train/lambda"] == pytest.approx(0.5 * largest) for entry in entries)
    assert all(entry["train/clipped"] >= 1 for entry in entries)
    assert all(tensor.isfinite().all() for tensor in part(tmp_path, 6, "ema").values())


def test_fault_17_an_infinite_gradient_is_skipped(tmp_path: Path) -> None:
    """Fault 17: a loss of 1e38 whose gradient overflows is not clipped to 0 or NaN, but left out and counted."""
    ((code, err),) = run_processes(1, trained, tmp_path, {**OPTIONS, "skips": 2}, partial(exploding, factor=1e38))
    assert code == 4
    assert "is not finite" in err
    assert [alarm["alarm"] for alarm in alarms(tmp_path)] == ["not_finite"] * 2
    assert all(tensor.isfinite().all() for tensor in part(tmp_path, 2, "ema").values())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that was stopped after its third."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run_processes(1, train, folder, OPTIONS, ("save", 3))
    return folder


def test_fault_32_a_checkpoint_of_another_architecture(stopped: Path, tmp_path: Path) -> None:
    """Fault 32: even where the change is allowed, weights of other sizes do not fit: code 3 and the keys that differ,
    a few of the weights instead of all, and the run can still be continued as it was."""
    shutil.copytree(stopped, tmp_path / "run")
    options = {**OPTIONS, "network.channels": 12, "allow_changed": True}
    ((code, err),) = run_processes(1, trained, tmp_path / "run", options)
    assert code == 3
    assert "does not fit the model" in err
    assert "network.channels: 8 -> 12" in err
    assert "and" in err.split("does not fit the model")[1].split("\n")[0]
    assert len(err) < 2000
    assert "Traceback" not in err
    assert run_processes(1, trained, tmp_path / "run", OPTIONS)[0][0] == 0


def test_fault_39_a_changed_run(stopped: Path, tmp_path: Path) -> None:
    """Fault 39: another seed, data or batch is refused with what differs, and nothing changes; --allow_changed goes on
    with it, and is from then on a run of that configuration."""
    shutil.copytree(stopped, tmp_path / "run")
    before = files_of(tmp_path / "run")
    changed = {**OPTIONS, "seed": 7, "batch_size": 4, "data.train_images": 24}
    ((code, err),) = run_processes(1, trained, tmp_path / "run", changed)
    assert code == 2
    for line in ("seed: 0 -> 7", "batch_size: 8 -> 4", "data.train_images: 20 -> 24", "--allow_changed"):
        assert line in err
    after = files_of(tmp_path / "run")
    assert {name: after[name] for name in before if name != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }
    assert run_processes(1, trained, tmp_path / "run", {**changed, "allow_changed": True})[0][0] == 0
    ((code, err),) = run_processes(1, trained, tmp_path / "run", OPTIONS)
    assert code == 2
    assert "seed: 7 -> 0" in err


def test_fault_39_changed_settings_are_those_of_the_optimizer(stopped: Path, tmp_path: Path) -> None:
    """Fault 39: what is allowed to change does change: Adam's betas, which are in the state too."""
    shutil.copytree(stopped, tmp_path / "run")
    options = {**OPTIONS, "optim.betas": "0.5,0.6", "allow_changed": True}
    assert run_processes(1, trained, tmp_path / "run", options)[0][0] == 0
    with safe_open(tmp_path / "run/state/step-00000006/optimizer.safetensors", framework="pt") as file:
        groups = json.loads(file.metadata()["groups"])
    assert {tuple(group["betas"]) for group in groups} == {(0.5, 0.6)}


def test_fault_39_another_precision(stopped: Path, tmp_path: Path) -> None:
    """Fault 39: a node that computes in bfloat16 would go on in silence, and no longer bit for bit."""
    shutil.copytree(stopped, tmp_path / "run")
    ((code, err),) = run_processes(1, trained, tmp_path / "run", OPTIONS, precision="bf16")
    assert code == 2
    assert "mixed precision 'no' and would continue with 'bf16'" in err
    allowed = {**OPTIONS, "allow_changed": True}
    assert run_processes(1, trained, tmp_path / "run", allowed, precision="bf16")[0][0] == 0


def test_fault_38_another_number_of_processes(tmp_path: Path) -> None:
    """Fault 38: stopped on two processes and continued on one, and the other way round: the same global batches."""
    options = {**OPTIONS, "optim.clip": 0.0}
    (one,) = run_processes(1, train, tmp_path / "whole", options)
    for first, second in ((2, 1), (1, 2)):
        out = tmp_path / f"{first}{second}"
        begun = run_processes(first, train, out, options, ("save", 3))
        ended = run_processes(second, train, out, options)
        for ranks, steps in ((begun, range(3)), (ended, range(3, 6))):
            for number, step in enumerate(steps):
                together = np.concatenate([rank["batches"][number] for rank in ranks])
                assert np.array_equal(together, one["batches"][step])
        ours, whole = part(out, 6, "tokenizer"), part(tmp_path / "whole", 6, "tokenizer")
        assert all(torch.allclose(tensor, ours[name], atol=1e-3) for name, tensor in whole.items())
    with pytest.raises(RankFailedError, match=r"ConfigError: batch_size 7 must be divisible by .* 1 x 2"):
        run_processes(2, train, tmp_path / "odd", {**options, "batch_size": 7})


def damaged_from_step_5(names: Names, _: int) -> None:
    batches = names["training_batches"]

    def damaged(pictures: Any, order: Any, first: int, *args: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for step, batch in enumerate(batches(pictures, order, first, *args), start=first + 1):
            if step == 5:
                raise BadFileError("2 of 20 images cannot be read")
            yield batch

    names["training_batches"] = damaged


def test_fault_18_bad_input_loses_no_work(tmp_path: Path) -> None:
    """Fault 18: too many bad pictures, found in step 5, end the run with code 3, and its four steps are saved."""
    options = {**OPTIONS, "save_every": 100}
    ((code, err),) = run_processes(1, trained, tmp_path / "ours", options, damaged_from_step_5)
    assert (code, err) == (3, "BadFileError: 2 of 20 images cannot be read\n")
    assert [step_of_state(state) for state in list_states(tmp_path / "ours/state")] == [4]
    for name in ("ours", "whole"):
        assert run_processes(1, trained, tmp_path / name, options)[0][0] == 0
    assert checksums(tmp_path / "ours", 6) == checksums(tmp_path / "whole", 6)


def damaged_validation(names: Names, _: int) -> None:
    def damaged(*_: Any, **__: Any) -> None:
        raise BadFileError("9 of 9 images cannot be read")

    vars(validation)["validate"] = damaged


def test_fault_18_bad_validation_pictures_lose_no_work(tmp_path: Path) -> None:
    """Fault 18: what cannot be validated has been learned all the same."""
    options = {**OPTIONS, "save_every": 4, "validate_every": 4}
    ((code, _),) = run_processes(1, trained, tmp_path, options, damaged_validation)
    assert code == 3
    assert [step_of_state(state) for state in list_states(tmp_path / "state")] == [4]


def test_fault_40_processes_that_do_not_know_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 40: two were started, and each believes itself alone: code 2 with both numbers and what to type, before
    both would have written the same files."""
    alone = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    monkeypatch.setattr(launch, "Accelerator", lambda **_: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = run(names_of("stage1_tokenizer/train.py")["main"], "--out", tmp_path / "run")
    assert ended.code == 2
    assert "2 processes were started, but they form a group of 1" in ended.err
    assert "accelerate launch --multi_gpu" in ended.err
    assert not list(tmp_path.iterdir())


def tokens_of(folder: Path, out: Path, say: list[str]) -> tuple[Tensor, Tensor]:
    from stage1_tokenizer.tokenizer import LoadedTokenizer  # noqa: PLC0415

    accelerator = lone_accelerator()
    accelerator.print = lambda *words, **_: say.append(" ".join(map(str, words)))
    loaded = LoadedTokenizer.load(folder)
    tokens = load_or_encode(accelerator, loaded, OpenData(shapes()), "train", 1, 0, out)
    return tokens.codes, tokens.labels


def reshard(path: Path, **changed: Callable[[Tensor], Tensor]) -> None:
    """Change tensors of a shard, with a checksum that holds: not damage, but a mistake in whoever wrote it."""
    tensors = load_file(path)
    edit_weights(path, **{name: change(tensors[name].clone()) for name, change in changed.items()})


def set_first(value: int, tensor: Tensor) -> Tensor:
    tensor.view(-1)[0] = value
    return tensor


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
    "flipped": (lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x01" + path.read_bytes()[-8:]), "sha256"),
    "a code of V": (lambda path: reshard(path, codes=partial(set_first, 16)), r"codes are .*16.*must lie in 0..15"),
    "a code of -1": (
        lambda path: reshard(path, codes=partial(set_first, -1)),
        r"codes are -1..*must lie in 0..15",
    ),
    "a label of -1": (
        lambda path: reshard(path, labels=partial(set_first, -1)),
        "labels are -1..*must lie in 0..",
    ),
    "another shape": (lambda path: reshard(path, codes=lambda codes: codes[:, :, :1].contiguous()), "its codes are"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_fault_36_damaged_tokens(tmp_path: Path, damage: str) -> None:
    """Fault 36: tokens are a cache, so instead of ending with code 3 they are made anew, which loses nothing; what
    was wrong is said, and no index ever wraps. (`python -m sampling.check` ends with code 3.)"""
    write_tokenizer(tmp_path / "stage1")
    say: list[str] = []
    codes, labels = tokens_of(tmp_path / "stage1", tmp_path / "tokens", say)
    (shard,) = (tmp_path / "tokens").glob("train-*")
    harm, message = DAMAGES[damage]
    harm(shard)
    say.clear()
    again = tokens_of(tmp_path / "stage1", tmp_path / "tokens", say)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], labels)
    assert re.search(message, " ".join(say)), say
    say.clear()
    tokens_of(tmp_path / "stage1", tmp_path / "tokens", say)
    assert not say, "they are whole now, and are not made again"


def test_fault_37_tokens_of_a_tokenizer_that_was_trained_on(tmp_path: Path) -> None:
    """Fault 37: one weight has changed since the tokens were made: they are made anew; the run, which has learned the
    old ones, is refused with both fingerprints."""
    loaded = write_tokenizer(tmp_path / "stage1")
    say: list[str] = []
    before, _ = tokens_of(tmp_path / "stage1", tmp_path / "tokens", say)
    weight = loaded.tokenizer.state_dict()["encoder.0.weight"]
    edit_weights(loaded.path, **{"encoder.0.weight": weight.contiguous() * -1.0})
    say.clear()
    after, _ = tokens_of(tmp_path / "stage1", tmp_path / "tokens", say)
    assert "another tokenizer" in say[0]
    assert not torch.equal(before, after)


def test_fault_47_fewer_vectors_than_codes(tmp_path: Path) -> None:
    """Fault 47: k-means over 2 images of 16 positions for 64 codes: an alarm before the first step, a finite codebook
    of which the latents use several, and the run trains."""
    options = {**OPTIONS, "steps": 2, "batch_size": 2, "bottleneck.codebook_size": 64}
    ((code, _),) = run_processes(1, trained, tmp_path, options)
    assert code == 0
    assert alarms(tmp_path)[0]["alarm"] == "few vectors"
    assert "32 latents, but has 64 codes" in alarms(tmp_path)[0]["message"]
    codebook = part(tmp_path, 2, "tokenizer")["bottleneck.codebook.weight"]
    assert codebook.isfinite().all()
    assert log(tmp_path)[0]["train/code_usage"] > 8 / 64


def constant(names: Names, _: int) -> None:
    batches = names["training_batches"]
    names["training_batches"] = lambda *args: ((pixels * 0, labels) for pixels, labels in batches(*args))


def test_fault_48_all_images_are_one(tmp_path: Path) -> None:
    """Fault 48: constant images need one code. The log says so (1 of V in use, perplexity 1), an alarm too, and the run
    ends as any other."""
    options = {**OPTIONS, "bottleneck.kmeans_init": False, "bottleneck.codebook_size": 4, "adversarial.weight": 0.0}
    ((code, _),) = run_processes(1, trained, tmp_path, {**options, "bottleneck.revive_below": 0.0}, constant)
    assert code == 0
    entries = [entry for entry in log(tmp_path) if "train/total" in entry]
    assert [(entry["train/code_usage"], entry["train/code_perplexity"]) for entry in entries] == [(1 / 4, 1.0)] * 6
    assert [(alarm["step"], alarm["alarm"]) for alarm in alarms(tmp_path)] == [(3, "collapse")]


class Broken:
    """A tracker on a disk that is full, gone, or somebody else's."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.close = self.add_image = self.add_text = self.add_scalar

    def add_scalar(self, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")


class Unopened(Broken):
    def __init__(self, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")


def untracked(accelerator: Accelerator, out: Path, kind: type[Broken] | None) -> dict[str, Any]:
    from stage1_tokenizer.engine.run import Run  # noqa: PLC0415

    said: list[str] = []
    if kind is None:
        sys.modules["tensorboard"] = None  # type: ignore[assignment]  # as where it is not installed
    else:
        from torch.utils import tensorboard  # noqa: PLC0415

        setattr(tensorboard, "SummaryWriter", kind)  # noqa: B010
    setattr(Run, "say", lambda self, message: said.append(message))  # noqa: B010
    return {"ended": trained(accelerator, out, OPTIONS), "said": said}


@pytest.mark.parametrize("kind", [Broken, Unopened, None])
def test_fault_51_tensorboard_fails(tmp_path: Path, kind: type[Broken] | None) -> None:
    """Fault 51: where events cannot be written, or TensorBoard is not installed (None), this is told once, and the
    training goes on to its end, with its own log whole."""
    (result,) = run_processes(1, untracked, tmp_path, kind)
    assert result["ended"] == (0, "")
    assert len([line for line in result["said"] if "TensorBoard's events cannot be written" in line]) == 1
    assert [entry["step"] for entry in log(tmp_path) if "train/total" in entry] == [1, 2, 3, 4, 5, 6]


def with_threads(accelerator: Accelerator, out: Path, options: dict[str, Any], threads: int) -> None:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # data workers are children
    torch.set_num_threads(threads)
    trained(accelerator, out, options)


def test_fault_54_determinism(tmp_path: Path) -> None:
    """Fault 54: the same run twice is bit-equal, with one thread and with two, and with two data workers as without;
    also where the pictures are read anew in every epoch."""
    workers = {"data.cache": "none", "data.workers": 2}
    for threads, variants in ((1, [{}, {}, workers]), (2, [{}, {}])):
        sums = []
        for number, options in enumerate(variants):
            out = tmp_path / f"{threads}-{number}"
            run_processes(1, with_threads, out, {**OPTIONS, "steps": 4, "save_every": 4, **options}, threads)
            sums.append(checksums(out, 4))
        assert all(each == sums[0] for each in sums)


def killed_at_random(names: Names, rank: int, seed: int) -> None:
    """SIGKILL at a point that the seed decides: while a step is computed, or at any call that saving makes."""
    from stage1_tokenizer.engine import files, state  # noqa: PLC0415

    chance = random.Random(seed)
    if chance.random() < 0.5:
        at_step(names, rank, chance.randint(1, 16), killed)
        return
    owner, name = chance.choice(
        [(files, "sync_folder"), (state, "sync_folder"), (Path, "replace"), (Path, "rename"), (Path, "unlink")]
    )
    original, left = getattr(owner, name), [chance.randint(1, 40)]

    def doomed(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            killed()
        return original(*args, **kwargs)

    setattr(owner, name, doomed)


@pytest.mark.slow
def test_fault_55_soak(tmp_path: Path) -> None:
    """Fault 55: killed again and again at random points, at least five times, the run ends bit-equal to one that was
    not, and its folder never holds more than the states it keeps. (`make soak` does it hundreds of times, to both
    trainers and the sampler, on one process and on two.)"""
    options = {**OPTIONS, "steps": 16, "save_every": 2, "keep": 2}
    run_processes(1, trained, tmp_path / "whole", options)
    kills, number = 0, 0
    while True:
        number += 1
        # Later attempts are left alone, so that the test ends.
        change = partial(killed_at_random, seed=number) if kills < 5 else None
        try:
            ((code, err),) = run_processes(1, trained, tmp_path / "ours", options, *([change] if change else []))
        except RankFailedError:
            kills += 1
            assert len(list_states(tmp_path / "ours/state")) <= 3
            assert len(list((tmp_path / "ours/state").iterdir())) <= 4
            continue
        assert code == 0, err
        if kills >= 5 or change is None:
            break
        shutil.rmtree(tmp_path / "ours/state")  # it came through before it was killed often enough: once more
        (tmp_path / "ours/tokenizer.safetensors").unlink()
    assert kills >= 5
    assert checksums(tmp_path / "ours", 16) == checksums(tmp_path / "whole", 16)
    weights = [(tmp_path / name / "tokenizer.safetensors").read_bytes() for name in ("ours", "whole")]
    assert hashlib.sha256(weights[0]).digest() == hashlib.sha256(weights[1]).digest()
    assert [step_of_state(each) for each in list_states(tmp_path / "ours/state")] == [16, 14]
