"""A prior's file has the weights of the best validation; patience may end a run; a stopped run continues."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sampling import summary
from stage1_tokenizer.diagnostics.alarms.base import Alarms
from stage1_tokenizer.engine.state import MANIFEST, _checksum
from stage2_prior.best_weights import MARGIN, Overfitting
from stage2_prior.prior import PRIOR_FILE, load_prior
from tests.helpers.artefacts import write_tokenizer
from tests.helpers.commands import Ended
from tests.helpers.prior_training import train
from tests.helpers.training import checksums, log, part

EVERY: dict[str, Any] = {"validate_every": 1, "samples": 0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer of random weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def finding(values: Sequence[float]) -> Callable[[dict[str, Any]], None]:
    """A change of the script: its validations find these nats per token, one after the other, in all its runs."""
    found: Iterator[float] = iter(values)

    def change(names: dict[str, Any]) -> None:
        names["validate"] = lambda *_: {"validation/nats_per_token": next(found)}

    return change


def header_of(run: Path) -> Mapping[str, str]:
    with safe_open(run / PRIOR_FILE, framework="pt") as file:
        header: dict[str, str] = file.metadata()
        return header


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([3.0, 2.0, 2.5, 2.1], 2),
        ([4.0, 3.0, 2.0, 1.0], 4),
        ([2.0, 2.0, 2.0, 2.0], 1),
        ([math.nan, 3.0, math.nan, 4.0], 2),
    ],
)
def test_the_saved_prior_is_the_best_by_validation(
    tokenizer: Path, tmp_path: Path, values: list[float], best: int
) -> None:
    """The file has the running mean of the weights of the best step, and says so in its header and in the summary; the
    first of equal ones, and none whose figure is not a number. The last weights are in the state."""
    ended = train(tmp_path, tokenizer, None, finding(values), steps=4, **EVERY)
    assert ended.code == 0, ended.err
    assert equal(load_file(tmp_path / PRIOR_FILE), part(tmp_path, best, "ema"))
    assert load_prior(tmp_path).step == best
    header = header_of(tmp_path)
    assert (header["best_by"], float(header["best_value"])) == ("validation/nats_per_token", values[best - 1])
    assert f"those of step {best}, best on validation" in ended.out
    assert ("those of step 4 are in state/" in ended.out) == (best != 4)


def test_a_run_that_was_never_validated_has_its_last_weights(tokenizer: Path, tmp_path: Path) -> None:
    """A stop before the first validation leaves a prior all the same, whose header claims nothing."""
    assert train(tmp_path, tokenizer, stop_after=3, steps=9, validate_every=9).code == -9
    assert equal(load_file(tmp_path / PRIOR_FILE), part(tmp_path, 2, "ema"))
    assert "best_by" not in header_of(tmp_path)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resume_knows_the_best(tokenizer: Path, tmp_path: Path, stop: int) -> None:
    """A stop at any step changes neither the best weights, nor the state, nor the log, bit for bit."""
    values = [3.0, 2.0, 2.5, 2.6, 1.9]
    assert train(tmp_path / "whole", tokenizer, None, finding(values), steps=5, **EVERY).code == 0
    change = finding(values)
    assert train(tmp_path / "halves", tokenizer, stop, change, steps=5, **EVERY).code == -9
    assert train(tmp_path / "halves", tokenizer, None, change, steps=5, **EVERY).code == 0
    assert checksums(tmp_path / "halves", 5) == checksums(tmp_path / "whole", 5)
    assert log(tmp_path / "halves") == log(tmp_path / "whole")
    assert (tmp_path / "halves" / PRIOR_FILE).read_bytes() == (tmp_path / "whole" / PRIOR_FILE).read_bytes()


def test_going_back_to_a_state_goes_back_to_its_best(tokenizer: Path, tmp_path: Path) -> None:
    """--resume step-00000002 forgets what was better later."""
    train(tmp_path, tokenizer, None, finding([3.0, 2.5, 2.0, 1.0]), steps=4, **EVERY)
    ended = train(tmp_path, tokenizer, None, finding([2.8, 2.9]), steps=4, resume="step-00000002", **EVERY)
    assert ended.code == 0, ended.err
    assert equal(load_file(tmp_path / PRIOR_FILE), part(tmp_path, 2, "ema"))


def without_best(run: Path, step: int) -> None:
    """Make a state what an earlier version would have saved."""
    state = run / "state" / f"step-{step:08d}"
    manifest = json.loads((state / MANIFEST).read_text())
    for name in ("best", "best_weights"):
        (state / f"{name}.safetensors").unlink()
        del manifest["files"][f"{name}.safetensors"]
    manifest["sha256"] = _checksum(manifest)
    (state / MANIFEST).write_text(json.dumps(manifest))


def test_a_run_of_an_earlier_version_goes_on(tokenizer: Path, tmp_path: Path) -> None:
    """Its states hold no best weights; the first validation from there on is the best so far."""
    train(tmp_path, tokenizer, 2, finding([1.0, 2.0]), steps=4, keep=2, **EVERY)
    for step in (1, 2):
        without_best(tmp_path, step)
    ended = train(tmp_path, tokenizer, None, finding([3.0, 4.0]), steps=4, **EVERY)
    assert ended.code == 0, ended.err
    assert equal(load_file(tmp_path / PRIOR_FILE), part(tmp_path, 3, "ema"))


def test_patience_ends_a_run_early(tokenizer: Path, tmp_path: Path) -> None:
    """After so many validations without a better one, with a saved state; the same command again does nothing, and one
    without it goes on to the end, as a run that never had it."""

    def trained(folder: str, values: list[float], **options: Any) -> Ended:
        ended = train(tmp_path / folder, tokenizer, None, finding(values), steps=8, save_every=5, **EVERY, **options)
        assert ended.code == 0, ended.err
        return ended

    values = [3.0, 2.0, 2.1, 1.9, 2.2, 2.0, 2.3, 2.4]
    ended = trained("run", values[:6], patience=2)
    assert "run: 6 steps in" in ended.out
    assert "those of step 4, best on validation" in ended.out
    assert load_prior(tmp_path / "run").step == 4
    before = (tmp_path / "run" / PRIOR_FILE).read_bytes()
    assert "has ended (--patience)" in trained("run", [], patience=2).out
    assert (tmp_path / "run" / PRIOR_FILE).read_bytes() == before
    trained("run", values[6:])
    trained("whole", values)
    assert checksums(tmp_path / "run", 8) == checksums(tmp_path / "whole", 8)


def test_the_summary_has_the_figures_of_the_weights(tmp_path: Path) -> None:
    """The summary has the metrics of the weights' step, or of the last validation for a file of an earlier version."""
    shared = {"validation/unigram_bits_per_token": 4.0, "validation/bigram_bits_per_token": 3.0}
    entries = [{"step": step, "validation/bits_per_token": value, **shared} for step, value in ((1, 1.0), (2, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    assert [line.value for line in summary.prior_lines(tmp_path, 1)] == ["75.0%"]
    assert [line.value for line in summary.prior_lines(tmp_path, 7)] == ["50.0%"]


def begun(*rounds: tuple[float, float]) -> list[int]:
    """The rounds, counted from 0, of (training, validation) nats per token at which the alarm begins."""
    alarms, found = Alarms([Overfitting()]), []
    for number, (training, validation) in enumerate(rounds):
        for place in range(3):
            told = alarms.look(10 * number + place, {"train/nats_per_token": training + 0.01 * place})
            assert not told, "a training entry alone says nothing new"
        if alarms.look(10 * number + 2, {"validation/nats_per_token": validation}):
            found.append(number)
    return found


def test_validation_that_rises_while_training_falls_is_an_alarm() -> None:
    """It is raised at the second such validation in a row, once, and again after validation was better than ever."""
    fit, over = [(3.0, 3.0), (2.5, 2.6)], [(2.0, 2.8), (1.5, 3.0), (1.0, 3.3)]
    assert begun(*fit, *over) == [3]
    assert begun(*fit, *over, (0.9, 2.5), (0.8, 2.7), (0.7, 2.8)) == [3, 7]


def test_what_is_no_overfitting_raises_no_alarm() -> None:
    """A prior that still improves, one that has converged, one whose training rises too, and one bad validation."""
    assert begun((3.0, 3.0), (2.5, 2.6), (2.0, 2.3), (1.5, 2.2)) == []
    assert begun((3.0, 3.0), *[(2.9 - 0.1 * n, 3.0 * (1 + 0.9 * MARGIN)) for n in range(6)]) == []
    assert begun((3.0, 3.0), *[(3.1, 3.5)] * 6) == []
    assert begun((3.0, 3.0), (2.5, 3.5), (2.4, 2.9), (2.3, 3.2), (2.2, 2.8)) == []


def test_a_runs_alarm_is_raised_by_its_log(tokenizer: Path, tmp_path: Path) -> None:
    """Also by a run that was stopped between the two validations that it takes."""
    change = finding([1.0, 2.0, 2.0, 2.0])
    falling = iter([4.0, 3.0, 2.0, 1.0])

    def scripted(names: dict[str, Any]) -> None:
        change(names)
        loss = names["token_loss"]
        names["token_loss"] = lambda logits, codes: loss(logits, codes) * 0.0 + next(falling)

    assert train(tmp_path, tokenizer, 2, scripted, steps=4, **EVERY).code == -9
    assert train(tmp_path, tokenizer, None, scripted, steps=4, **EVERY).code == 0
    alarms = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert [(alarm["step"], alarm["alarm"]) for alarm in alarms] == [(3, "overfitting")]
    assert "--patience" in alarms[0]["message"]
