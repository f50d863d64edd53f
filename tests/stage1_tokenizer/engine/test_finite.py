"""The guard before each optimizer step: it names and saves what is not finite, and no weight changes."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn

from stage1_tokenizer import objective
from stage1_tokenizer.engine.errors import DivergedError
from stage1_tokenizer.engine.finite import SMALLEST_SCALE, FiniteGuard, Tally
from stage1_tokenizer.engine.run import Run
from tests.helpers.commands import lone_accelerator
from tests.helpers.processes import run_processes
from tests.helpers.training import part, train

NAN, INF = float("nan"), float("inf")
AT_STEP = 4
"""The step, counted from 1, at which the runs below meet with something; TINY's discriminator learns from it on."""


class Root(nn.Module):
    """The identity, with an infinite gradient at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x * 0.0).sqrt()


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def guarded(folder: Path, model: nn.Module, x: Tensor, term: float = 0.0, accelerator: Any = None) -> Tensor:
    """Run one backward pass of a loss with two terms, in two micro-batches, and the check before the optimizer step."""

    def loss_of(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = model(x).square().mean(), torch.tensor(term)
        return first + second, {"total": first + second, "squares": first, "other": second}

    inputs = [(half,) for half in x.chunk(2)]
    losses = [loss_of(*part)[0] for part in inputs]
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    tally, alarms = Tally(), []
    guard = FiniteGuard(
        accelerator or lone_accelerator(), folder, {"model": model}, loss_of, tally, 0, lambda *it: alarms.append(it)
    )
    return guard.check(7, torch.stack(losses).mean(), inputs, 0, lambda: {"x": x}).norm


def test_what_is_finite_passes(tmp_path: Path) -> None:
    """The result has the norm that clipping uses; nothing is written."""
    model = small()
    norm = guarded(tmp_path, model, torch.ones(4, 3))
    squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert float(norm) == pytest.approx(squares**0.5)
    assert list(tmp_path.iterdir()) == []


def spoil_nothing(model: nn.Sequential) -> nn.Sequential:
    return model


def spoil_parameter(model: nn.Sequential) -> nn.Sequential:
    model.get_parameter("2.weight").data[0, 0] = NAN
    return model


def overflow(model: nn.Sequential) -> nn.Sequential:
    model.get_parameter("0.weight").data.fill_(3e38)
    return model


def spoil_gradient(model: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(model[0], Root(), model[2])


@pytest.mark.parametrize(
    ("spoil", "pixel", "term", "name"),
    [
        (spoil_nothing, NAN, 0.0, r"the input batch \(1 of 6 values, NaN\)"),
        (spoil_parameter, 1.0, 0.0, r"the parameter model\.2\.weight \(1 of 8 values, NaN\)"),
        (overflow, 1.0, 0.0, r"the output of model\.0 \(Linear\) \(\d of 8 values, infinite\)"),
        (spoil_nothing, 1.0, INF, r"the loss's other \(1 of 1 values, infinite\)"),
        (spoil_gradient, 1.0, 0.0, r"the gradient of model\.0\.(weight|bias) \(\d+ of \d+ values, NaN\)"),
    ],
)
def test_the_first_that_is_not_finite_is_named(
    tmp_path: Path, spoil: Callable[[nn.Sequential], nn.Sequential], pixel: float, term: float, name: str
) -> None:
    """All later tensors are not finite either; only the first shows the cause."""
    x = torch.ones(4, 3)
    x[3, 2] = pixel  # in the second micro-batch
    with pytest.raises(DivergedError, match=rf"^step 7 of the model: {name} is not finite, on rank 0 of 1\."):
        guarded(tmp_path, spoil(small()), x, term)


def test_what_happens_once_is_not_blamed_on_a_tensor(tmp_path: Path) -> None:
    """After a fault of the device or an overflowing sum, the second computation is finite; the message says so."""
    guard = FiniteGuard(
        lone_accelerator(),
        tmp_path,
        {"model": (model := small())},
        lambda x: (model(x).mean(), {"mean": x.mean()}),
        Tally(),
        0,
        lambda *_: None,
    )
    model(torch.ones(1, 3)).mean().backward()
    with pytest.raises(DivergedError, match="computed again, all is finite"):
        guard.check(1, torch.tensor(NAN), [(torch.ones(1, 3),)], 0, lambda: {"x": torch.ones(1, 3)})


class Scaled:
    """An accelerator under float16, as far as the guard uses it."""

    def __init__(self, scale: float) -> None:
        self._own = lone_accelerator()
        self.scaler = self
        self.get_scale = lambda: scale
        self.updates = 0

    def update(self) -> None:
        self.updates += 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def test_an_overflow_under_float16_is_the_scalers_affair(tmp_path: Path) -> None:
    """It skips the step and lowers its scale, as in every healthy run; but not for ever, and not for a bad loss."""
    spoilt = spoil_gradient(small())
    assert not guarded(tmp_path, spoilt, torch.ones(4, 3), accelerator=Scaled(65536.0)).isfinite()
    with pytest.raises(DivergedError, match="gradient"):
        guarded(tmp_path, spoilt, torch.ones(4, 3), accelerator=Scaled(SMALLEST_SCALE / 2))
    with pytest.raises(DivergedError, match="the loss's other"):
        guarded(tmp_path, small(), torch.ones(4, 3), NAN, accelerator=Scaled(65536.0))


def test_a_full_disk_does_not_hide_the_cause(tmp_path: Path) -> None:
    """The message about the training matters more than the batch."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DivergedError, match=r"the loss's other .*cannot write"):
        guarded(tmp_path / "file", small(), torch.ones(4, 3), NAN)


def spoilt_pixels(names: dict[str, Any], rank: int, on_rank: int) -> None:
    normalise, steps = names["normalise"], [0]

    def spoilt(pixels: Tensor) -> Tensor:
        steps[0] += 1
        x: Tensor = normalise(pixels)
        if steps[0] == AT_STEP and rank == on_rank:
            x[1, 0, 3, 5] = NAN
        return x

    names["normalise"] = spoilt


def spoilt_from_the_start(names: dict[str, Any], _: int) -> None:
    build = names["build_tokenizer"]

    def spoilt(*args: Any) -> nn.Module:
        tokenizer: nn.Module = build(*args)
        cast("Tensor", tokenizer.get_parameter("encoder.0.weight")).data[0, 0] = NAN
        return tokenizer

    names["build_tokenizer"] = spoilt


def spoilt_gradient(names: dict[str, Any], rank: int) -> None:
    loss_of = vars(objective)["reconstruction_loss"]

    def spoilt(x: Tensor, x_hat: Tensor, *args: Any) -> Any:
        total, terms = loss_of(x, x_hat, *args)
        return total + (x_hat * 0.0).sqrt().sum() * (rank == 1), terms

    if rank == 1:
        vars(objective)["reconstruction_loss"] = spoilt


def spoilt_judgement(names: dict[str, Any], _: int) -> None:
    loss_of = vars(objective)["discriminator_loss"]

    def spoilt(real: Tensor, fake: Tensor, kind: str) -> Any:
        loss = loss_of(real, fake, kind)
        return loss._replace(total=loss.total * INF)

    vars(objective)["discriminator_loss"] = spoilt


def diverge(
    accelerator: Accelerator, out: Path, options: dict[str, Any], change: Callable[[dict[str, Any], int], object]
) -> dict[str, Any]:
    """Run a training that must diverge; return its message and all tensors in memory after it."""
    kept: dict[str, Any] = {"message": None, "weights": {}, "batches": []}
    parts: dict[str, Any] = {}

    def changed(names: dict[str, Any], rank: int) -> None:
        resume, batches = Run.resume, names["training_batches"]

        def watched(run: Run, given: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            parts.update(given)
            resume(run, given, *args, **kwargs)

        def recorded(*args: Any) -> Any:
            for pixels, labels in batches(*args):
                kept["batches"].append((pixels.numpy().copy(), labels.numpy().copy()))
                yield pixels, labels

        setattr(Run, "resume", watched)  # noqa: B010
        names["training_batches"] = recorded
        change(names, rank)

    try:
        train(accelerator, out, {"skips": 0, **options}, None, changed)
    except DivergedError as error:
        kept["message"] = str(error)
    for name in ("tokenizer", "ema"):
        kept["weights"] |= {f"{name}.{key}": value.numpy() for key, value in parts[name].state_dict().items()}
    for index, entry in parts["optimizer"].state_dict()["state"].items():
        kept["weights"] |= {f"optimizer.{index}.{key}": value.numpy() for key, value in entry.items()}
    return kept


def saved(out: Path, step: int) -> dict[str, Tensor]:
    return {f"{p}.{key}": value for p in ("tokenizer", "ema", "optimizer") for key, value in part(out, step, p).items()}


@pytest.mark.parametrize(("processes", "on_rank"), [(1, 0), (2, 1)])
def test_a_nan_stops_all_ranks_before_anything_learns_from_it(tmp_path: Path, processes: int, on_rank: int) -> None:
    """Faults 15 and 16: all ranks stop in the same step with the same message, wherever the NaN is.

    Weights, running means, codebook and moments are those after the step before, and the batch is on disk.
    """
    options = {"steps": 8, "accumulation": 2, "bottleneck.revive_below": 2.0}
    ranks = run_processes(processes, diverge, tmp_path, options, partial(spoilt_pixels, on_rank=on_rank))
    assert len({rank["message"] for rank in ranks}) == 1
    file = tmp_path / f"nonfinite-step-{AT_STEP:08d}-rank-{on_rank}.safetensors"
    for words in (
        f"step {AT_STEP} of the tokenizer: the input batch (1 of ",
        f"on rank {on_rank} of {processes}",
        "step-00000003",
        str(file),
        "optim.lr",
    ):
        assert words in ranks[0]["message"]
    before = saved(tmp_path, AT_STEP - 1)
    for rank in ranks:
        assert rank["weights"].keys() == before.keys()
        for name, tensor in before.items():
            assert np.array_equal(rank["weights"][name], tensor.numpy()), name
    assert not (tmp_path / "state" / f"step-{AT_STEP:08d}").exists()
    assert [path.name for path in tmp_path.glob("nonfinite-*")] == [file.name]
    with safe_open(file, framework="np") as found:
        pixels, labels = ranks[on_rank]["batches"][AT_STEP - 1]
        assert found.metadata()["step"] == str(AT_STEP)
        assert np.array_equal(found.get_tensor("pixels"), pixels)
        assert np.array_equal(found.get_tensor("labels"), labels)
        assert found.get_tensor("indices").shape == found.get_tensor("epochs").shape == labels.shape
        assert found.get_tensor("indices").max() < 20
    assert all(np.isfinite(list(entry.values())).all() for entry in map(json.loads, log_lines(tmp_path)))


def log_lines(out: Path) -> list[str]:
    return (out / "metrics.jsonl").read_text().splitlines()


def test_a_gradient_is_traced_to_its_rank(tmp_path: Path) -> None:
    """The loss is finite on all ranks; after averaging, the gradients are bad on all of them."""
    ranks = run_processes(2, diverge, tmp_path, {"adversarial.weight": 0.0}, spoilt_gradient)
    assert "step 1 of the tokenizer: the gradient of tokenizer.decoder." in ranks[0]["message"]
    assert "on rank 1 of 2" in ranks[0]["message"]
    assert ranks[0]["message"] == ranks[1]["message"]
    assert (tmp_path / "nonfinite-step-00000001-rank-1.safetensors").exists()


def test_a_parameter_that_is_nan_from_the_start_is_named(tmp_path: Path) -> None:
    """K-means runs before the first step, and must not fail with a message of its own."""
    (rank,) = run_processes(1, diverge, tmp_path, {}, spoilt_from_the_start)
    assert "step 1 of the tokenizer: the parameter tokenizer.encoder.0.weight (" in rank["message"]
    assert "no state was saved yet" in rank["message"]


def test_the_discriminators_loss_is_looked_at_too(tmp_path: Path) -> None:
    """It would spoil the generator one step later, and a state could be saved in between."""
    (rank,) = run_processes(1, diverge, tmp_path, {}, spoilt_judgement)
    assert f"step {AT_STEP} of the discriminator: the loss's total (1 of 1 values, infinite)" in rank["message"]
    assert part(tmp_path, 3, "discriminator_optimizer") == {}
    assert not (tmp_path / "state" / "step-00000004").exists()
