"""Stage one's loop on one process: when the discriminator starts, what accumulation adds up to, and the way back."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer
from tests.helpers.processes import RankFailedError, run_processes
from tests.helpers.training import assert_close, checksums, log, part, train

EVERYTHING_RANDOM: dict[str, Any] = {
    "network.kind": "vqgan",
    "network.channels": 4,
    "network.multipliers": "1,2",
    "network.latent_channels": 4,
    "network.dropout": 0.2,
    "bottleneck.revive_below": 2.0,
    "adversarial.start": 3,
    "adversarial.discriminator.norm": "batch",
    "optim.weight_decay": 0.1,
    "steps": 10,
    "save_every": 5,
    "validate_every": 5,
}
"""Dropout, flips, k-means, revival, batch norm, two optimizers, two groups, several epochs."""


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_discriminator_waits_for_its_step(tmp_path: Path, accumulation: int) -> None:
    """Traps 16 and 17: until `start` optimizer steps are done, however many micro-batches make one, neither the
    discriminator nor lambda is computed; the very next step trains it."""
    options = {"accumulation": accumulation, "adversarial.start": 3, "steps": 5}
    (seen,) = run_processes(1, train, tmp_path, options)
    before = [checksums(tmp_path, step) for step in range(1, 6)]
    untouched = [sums["discriminator.safetensors"] == before[0]["discriminator.safetensors"] for sums in before]
    assert untouched == [True, True, True, False, False]
    assert before[3]["discriminator.safetensors"] != before[4]["discriminator.safetensors"]
    assert part(tmp_path, 3, "discriminator_optimizer") == {}, "it has not stepped, not even from step 0 to 1"
    assert part(tmp_path, 4, "discriminator_optimizer")["0.step"] == 1
    assert seen["adaptive_calls"] == 2 * accumulation
    logged = {entry["step"]: entry for entry in log(tmp_path) if "train/total" in entry}
    assert [step for step in sorted(logged) if "train/lambda" in logged[step]] == [4, 5]
    assert [step for step in sorted(logged) if "discriminator/total" in logged[step]] == [4, 5]


def test_a_weight_of_zero_is_no_discriminator(tmp_path: Path) -> None:
    """Trap 16: nothing is built, saved or computed for a term that is not in the loss."""
    (seen,) = run_processes(1, train, tmp_path, {"adversarial.weight": 0.0, "adversarial.start": 0})
    assert seen["adaptive_calls"] == 0
    assert not any("discriminator" in name for name in checksums(tmp_path, 4))


def test_accumulation_adds_up_to_the_whole_batch(tmp_path: Path) -> None:
    """Traps 10 and 20: two micro-batches give the weights of one batch, of both models, and its EMA codebook, with
    k-means and revival. Adam's moments are compared too, since its steps hardly depend on the gradient's scale, and a
    forgotten division would not be seen.

    Left out is what a micro-batch cannot know of the other half: lambda is taken per micro-batch, and batch norm
    normalises with what it sees.
    """
    options = {
        "bottleneck.revive_below": 1.5,
        "adversarial.adaptive": False,
        "adversarial.start": 1,
        "optim.clip": 0.0,
        "steps": 3,
    }
    for number in (1, 2, 4):
        run_processes(1, train, tmp_path / str(number), {**options, "accumulation": number})
    for name in ("tokenizer", "ema", "optimizer", "discriminator", "discriminator_optimizer"):
        for accumulation in ("2", "4"):
            assert_close(part(tmp_path / accumulation, 3, name), part(tmp_path / "1", 3, name))
    logged = [[entry["train/l1"] for entry in log(tmp_path / n) if "train/l1" in entry] for n in ("1", "4")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4), "what is logged is the whole batch's"


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("stop", [("save", 5), ("log", 8)], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, stop: tuple[Literal["log", "save"], int], precision: Literal["no", "bf16"]
) -> None:
    """Trap 41: stopped right after a save or three steps later, and begun again in a new process, a run has the same
    weights, EMA, optimizers, discriminator and logged losses, bit for bit."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_processes(1, train, whole, EVERYTHING_RANDOM, precision=precision)
    run_processes(1, train, resumed, EVERYTHING_RANDOM, stop, precision=precision)
    assert not (resumed / "state" / "step-00000010").exists()
    (seen,) = run_processes(1, train, resumed, EVERYTHING_RANDOM, precision=precision)
    assert len(seen["batches"]) == 5, "it continued, and did not begin again"
    assert len(checksums(whole, 10)) == 7
    for step in (5, 10):
        assert checksums(resumed, step) == checksums(whole, step)
    assert log(resumed) == log(whole)
    ours, theirs = load_file(resumed / TOKENIZER_FILE), load_file(whole / TOKENIZER_FILE)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    """The same command once more trains nothing and logs nothing; weights that a stop right after the last state has
    kept from being written are written then."""
    run_processes(1, train, tmp_path, {}, ("save", 4))
    before = log(tmp_path), checksums(tmp_path, 4)
    assert LoadedTokenizer.load(tmp_path).step == 3
    (seen,) = run_processes(1, train, tmp_path, {})
    assert seen["batches"] == []
    assert before == (log(tmp_path), checksums(tmp_path, 4))
    assert LoadedTokenizer.load(tmp_path).step == 4
    weights, mean = load_file(tmp_path / TOKENIZER_FILE), part(tmp_path, 4, "ema")
    assert all(torch.equal(weights[name], tensor) for name, tensor in mean.items())


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    """Else the tests of equality above would hold for a run that ignores its seed, or that does not train at all."""
    (first,) = run_processes(1, train, tmp_path / "0", {})
    (second,) = run_processes(1, train, tmp_path / "1", {"seed": 1})
    assert not (first["batches"][0] == second["batches"][0]).all()
    drawn = [checksums(tmp_path / seed, 4) for seed in ("0", "1")]
    assert {name for name in drawn[0] if drawn[0][name] == drawn[1][name]} == {
        "tally.safetensors",
        "code_use.safetensors",
    }
    sums = [checksums(tmp_path / "0", step)["tokenizer.safetensors"] for step in range(1, 5)]
    assert len(set(sums)) == 4


def test_what_is_saved_is_the_running_mean(tmp_path: Path) -> None:
    """Traps 21 and 23: the file holds the EMA weights and the codebook that belongs to them, and nothing else."""
    run_processes(1, train, tmp_path, {})
    loaded = LoadedTokenizer.load(tmp_path)
    mean, own = part(tmp_path, 4, "ema"), part(tmp_path, 4, "tokenizer")
    weights = loaded.tokenizer.state_dict()
    assert weights.keys() == mean.keys() == own.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in mean.items())
    assert not torch.equal(mean["encoder.0.weight"], own["encoder.0.weight"])
    assert torch.equal(mean["bottleneck.codebook.weight"], own["bottleneck.codebook.weight"])
    assert (loaded.step, loaded.tokenizer.shape) == (4, (4, 4, 1, 8))


def test_another_config_does_not_resume(tmp_path: Path) -> None:
    """It would continue as something that neither config describes; the keys that differ are listed."""
    run_processes(1, train, tmp_path, {}, ("save", 2))
    with pytest.raises(RankFailedError, match=r"ConfigError.*\n.*bottleneck\.beta: 0\.25 -> 0\.5"):
        run_processes(1, train, tmp_path, {"bottleneck.beta": 0.5})


def test_one_kept_state_is_refused(tmp_path: Path) -> None:
    """Documented: the newest may be in the making when the power fails."""
    with pytest.raises(RankFailedError, match="ConfigError"):
        run_processes(1, train, tmp_path, {"keep": 1})
