"""A run that is prolonged: which states belong to the longer run too, bit for bit, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest

from stage1_tokenizer.engine.optim import OptimConfig, count_equal_rates, learning_rate
from stage1_tokenizer.engine.state import list_states
from tests.helpers.commands import Ended, names_of, run
from tests.helpers.processes import run_processes
from tests.helpers.training import TINY, checksums, log, train

WSD: dict[str, Any] = {"optim.schedule": "wsd", "optim.decay_share": 0.5, "optim.warmup_steps": 1}


def words(out: Path, **options: Any) -> list[str]:
    """The command line of a tiny training, with an option's two underscores for a dot."""
    given = {**TINY, **WSD, "out": out, **{key.replace("__", "."): value for key, value in options.items()}}
    return [
        word for key, value in given.items() for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]


def command(out: Path, **options: Any) -> Ended:
    """Run a tiny training in this process."""
    return run(names_of("stage1_tokenizer/train.py")["main"], *words(out, **options))


def test_wsd_is_constant_and_then_falls() -> None:
    """Warm-up, peak, and 1 - sqrt over the last fifth, down to final_lr at the end (Hägele et al. 2024, equation 1)."""
    config = OptimConfig(schedule="wsd", warmup_steps=10, decay_share=0.2, final_lr=0.1)
    rates = [learning_rate(config, 2.0, step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10:81] == [2.0] * 71
    assert rates[85] == pytest.approx(2.0 * (0.1 + 0.9 * (1 - math.sqrt(5 / 20))))
    assert rates[100] == pytest.approx(0.2)
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert config.decay_start(100) == 80
    assert OptimConfig(schedule="constant").decay_start(100) is None
    assert {learning_rate(OptimConfig(schedule="constant"), 0.3, step, 9) for step in range(50, 99)} == {0.3}
    assert OptimConfig(schedule="wsd", warmup_steps=90, decay_share=0.5).decay_start(100) == 90


@pytest.mark.parametrize(
    ("schedule", "other", "shared"),
    [
        (("cosine", 100), ("cosine", 200), 11),  # the cosine of step 10, its first, is 1 in both
        (("constant", 100), ("constant", 200), 100),
        (("wsd", 100), ("wsd", 200), 81),  # sqrt(0) is 0: the first step of the decay has the peak too
        (("constant", 100), ("wsd", 100), 81),
        (("wsd", 200), ("wsd", 100), 81),
        (("constant", 100), ("cosine", 100), 11),
    ],
)
def test_the_steps_that_two_runs_share(schedule: tuple[Any, int], other: tuple[Any, int], shared: int) -> None:
    """The rates of the first `shared` steps are the same numbers, and the next ones differ."""
    runs = [(OptimConfig(schedule=name, warmup_steps=10), steps) for name, steps in (schedule, other)]
    assert count_equal_rates(runs[0], runs[1]) == shared
    rates = [[learning_rate(config, config.lr, step, steps) for step in range(100)] for config, steps in runs]
    assert rates[0][:shared] == rates[1][:shared]
    assert shared == 100 or rates[0][shared] != rates[1][shared]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_constant_run_is_prolonged_exactly(tmp_path: Path, processes: int) -> None:
    """Three steps and then seven are, bit for bit, ten that were planned from the start: weights, mean, optimizers,
    discriminator, counters and log."""
    options = {"optim.schedule": "constant", "adversarial.start": 1}
    run_processes(processes, train, tmp_path / "long", {**options, "steps": 10})
    for steps in (3, 10):
        run_processes(processes, train, tmp_path / "short", {**options, "steps": steps, "validate_every": 100})
    for step in (1, 3, 4, 10):
        assert checksums(tmp_path / "short", step) == checksums(tmp_path / "long", step)
    entries = [[entry for entry in log(tmp_path / name) if "train/total" in entry] for name in ("short", "long")]
    assert entries[0] == entries[1]


def test_a_finished_wsd_run_is_prolonged_from_before_its_decay(tmp_path: Path) -> None:
    """The state where the decay begins is saved between two saves and kept beside the newest two; more steps continue
    it, and give the weights of the run that was planned that long. Its later states are removed, which is said."""
    options = {"save_every": 100, "keep": 2}
    assert command(tmp_path / "long", steps=14, **options).code == 0
    assert command(tmp_path / "short", steps=6, **options).code == 0
    assert [state.name for state in list_states(tmp_path / "short" / "state")] == ["step-00000006", "step-00000003"]
    for _ in range(2):  # twice: the second time there is nothing to do
        ended = command(tmp_path / "short", steps=14, **options)
        assert ended.code == 0, ended.err
    assert "is finished already" in ended.out
    assert checksums(tmp_path / "short", 14) == checksums(tmp_path / "long", 14)
    assert [state.name for state in list_states(tmp_path / "short" / "state")] == ["step-00000014", "step-00000007"]


def test_the_kept_state_survives_newer_ones(tmp_path: Path) -> None:
    """`--keep 2` keeps the newest two, and the one before the decay."""
    ended = command(tmp_path, steps=8, save_every=1, keep=2)
    assert ended.code == 0
    names = [state.name for state in list_states(tmp_path / "state")]
    assert names == ["step-00000008", "step-00000007", "step-00000004"]
    ended = command(tmp_path, steps=16, save_every=1, keep=2)
    assert "steps: 8 -> 16" in ended.out
    assert "removing the states after step-00000004" in ended.out
    assert "from step 4" in ended.out


def test_a_constant_run_may_end_with_a_decay(tmp_path: Path) -> None:
    """Another schedule is the same run as long as all rates so far are the same: the decay is decided at its start."""
    assert command(tmp_path / "planned", steps=8).code == 0
    assert command(tmp_path / "late", steps=4, optim__schedule="constant").code == 0
    ended = command(tmp_path / "late", steps=8)
    assert ended.code == 0, ended.err
    assert "from step 4" in ended.out
    assert checksums(tmp_path / "late", 8) == checksums(tmp_path / "planned", 8)


def test_a_cosine_run_is_not_prolonged_silently(tmp_path: Path) -> None:
    """Its rates depend on the number of steps from the first one after the warm-up on. The refusal changes nothing, and
    names the ways out, one of which is taken here."""
    assert command(tmp_path, steps=4, optim__schedule="cosine").code == 0
    before = checksums(tmp_path, 4)
    ended = command(tmp_path, steps=8, optim__schedule="cosine", keep=2)
    assert ended.code == 2
    for text in ("steps: 4 -> 8", "differ from step 3 on", "--allow_changed", "--init_from"):
        assert text in ended.err, ended.err
    assert checksums(tmp_path, 4) == before
    ended = command(tmp_path, steps=8, optim__schedule="constant", allow_changed=True)
    assert ended.code == 0, ended.err
    assert "from step 4" in ended.out


def test_states_are_not_lost_by_fewer_steps(tmp_path: Path) -> None:
    """A number of steps below that of the newest state is refused, and so is a state of the decay by name."""
    assert command(tmp_path, steps=8).code == 0
    ended = command(tmp_path, steps=4)
    assert ended.code == 2
    assert "the saved states are of" in ended.err
    ended = command(tmp_path, steps=16, resume="step-00000007")
    assert ended.code == 2
    assert "Name a state of at most 5 steps" in ended.err
    assert next(state.name for state in list_states(tmp_path / "state")) == "step-00000008"


def test_other_changes_are_refused_as_before(tmp_path: Path) -> None:
    """A longer run with another batch size is another run."""
    assert command(tmp_path, steps=4, optim__schedule="constant").code == 0
    ended = command(tmp_path, steps=8, optim__schedule="constant", batch_size=4)
    assert ended.code == 2
    assert "batch_size: 8 -> 4" in ended.err
