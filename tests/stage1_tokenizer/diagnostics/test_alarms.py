"""Alarms: each begins once, when its problem is seen, and none in a healthy run."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.fsq import FsqConfig
from stage1_tokenizer.bottlenecks.kl import KlConfig
from stage1_tokenizer.bottlenecks.lfq import LfqConfig
from stage1_tokenizer.bottlenecks.none import NoBottleneckConfig
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.diagnostics.alarms import BEGINNING, build_alarms, latents
from stage1_tokenizer.diagnostics.alarms.base import Alarms
from stage1_tokenizer.diagnostics.alarms.latents import SETTLED, CodeCounts
from stage1_tokenizer.engine.optim import OptimConfig
from stage1_tokenizer.engine.run import Run
from stage1_tokenizer.objective import LARGEST_WEIGHT, AdversarialConfig
from tests.helpers.processes import run_processes
from tests.helpers.training import train

V, PER_STEP, EVERY = 256, 4096, 10
LATE = 1000
"""A step after all beginnings."""

# EncodedImages: the quickstart's first 400 steps, an entry every 10.
USAGE = [1.0, 0.0234, 0.0312, 0.0508, 0.0352, 0.0664, 0.043, 0.0352, 0.0312, 0.0352, 0.0547, 0.0352, 0.0352, 0.043]
USAGE += [0.043] * 11 + [0.0469, 0.0547, 0.0586, 0.0547, 0.0586, 0.137, 0.125, 0.125, 0.121, 0.125, 0.129, 0.133]
USAGE += [0.211, 0.207, 0.211]
PERPLEXITY = [30.0, 1.62, 3.52, 3.13, 2.64, 2.84, 4.08, 4.2, 3.65, 3.62, 3.98, 3.78, 3.72, 4.99, 4.65, 5.1, 5.46, 5.64]
PERPLEXITY += [5.52, 5.81, 5.65, 5.31, 6.29, 6.68, 6.42, 6.03, 5.63, 5.68, 4.68, 4.42, 11.5, 10.5, 10.6, 11.5, 11.6]
PERPLEXITY += [11.5, 11.8, 16.1, 16.1, 15.9]
COMMITMENT = [0.00133, 0.00402, 0.0419, 0.0221, 0.169, 0.0176, 0.0433, 0.262, 0.167, 0.0189, 0.0165, 0.0699, 0.367]
COMMITMENT += [0.0219, 0.0206, 0.0162, 0.0173, 0.0154, 0.0199, 0.394, 0.96, 0.076, 0.0373, 0.109, 0.599, 0.338, 0.167]
COMMITMENT += [0.347, 0.263, 0.135, 0.0108, 0.0059, 0.00563, 0.0048, 0.00457, 0.00446, 0.00448, 0.00261, 0.00214]
COMMITMENT += [0.00252]


def alarms_of(
    bottleneck: BottleneckConfig | None = None,
    loss: Literal["hinge", "vanilla"] = "hinge",
    size: int = V,
    per_step: int = PER_STEP,
    validation: int = 100 * V,
) -> Alarms:
    adversarial = AdversarialConfig(weight=0.5, start=500, loss=loss)
    return build_alarms(bottleneck or VqConfig(), adversarial, OptimConfig(), CodeCounts(size, per_step, validation))


def begun(alarms: Alarms, first: int, *entries: dict[str, float], every: int = EVERY) -> list[tuple[int, str]]:
    """Return (entry's number from 0, name) of each alarm that begins."""
    alarms.look(first - every, {"train/total": 1.0})
    return [
        (number, name)
        for number, entry in enumerate(entries)
        for name, _ in alarms.look(first + every * number, {"train/total": 1.0, **entry})
    ]


def codes(perplexity: float, usage: float = 0.9) -> dict[str, float]:
    """Return the scalars of one entry about codes."""
    return {"train/code_perplexity": perplexity, "train/code_usage": usage}


def scores(loss: float, real: float, fake: float, weight: float = 1.0) -> dict[str, float]:
    """Return the scalars of one entry about the adversarial training."""
    parts = {"total": loss, "logits_real": real, "logits_fake": fake}
    return {**{f"discriminator/{name}": value for name, value in parts.items()}, "train/lambda": weight}


def test_a_healthy_run_raises_none() -> None:
    """The quickstart, as measured, raises no alarm: nobody reads alarms that come without a problem."""
    entries = [
        {**codes(perplexity, usage), "train/commitment": commitment}
        for perplexity, usage, commitment in zip(PERPLEXITY, USAGE, COMMITMENT, strict=True)
    ]
    assert len(entries) == 40
    assert begun(alarms_of(), EVERY, *entries) == []


def test_healthy_adversarial_trainings_raise_none() -> None:
    """The hinge loss is 1.00 for the first 290 steps, or between 0.4 and 0.7 with a lambda of 0.05 (real_data.md)."""
    assert begun(alarms_of(), 510, *[scores(1.0, 0.01, 0.005, 3.0)] * 29) == []
    assert begun(alarms_of(), 510, *[scores(0.4 + 0.3 * (n % 2), 0.6, -0.7, 0.05) for n in range(300)]) == []


def test_a_collapse_is_a_fall_or_one_code() -> None:
    """Fault 48: usage 1/V and perplexity 1 at any time, or a perplexity below half of its best."""
    assert begun(alarms_of(), EVERY, *[codes(1.0, 1 / V)] * 9) == [(2, "collapse")]
    assert begun(alarms_of(), LATE, *[codes(100.0)] * 5, *[codes(49.0)] * 9) == [(7, "collapse")]
    assert begun(alarms_of(), LATE, *[codes(100.0)] * 5, *[codes(51.0)] * 9) == []


def test_the_first_steps_do_not_count_as_the_best() -> None:
    """k-means spreads the codes over the latents of an untrained encoder; a healthy run need not reach that again."""
    end = BEGINNING + 2 * OptimConfig().warmup_steps
    assert begun(alarms_of(), end - EVERY, codes(100.0), codes(100.0), *[codes(20.0)] * 9) == []
    assert begun(alarms_of(), end, codes(100.0), codes(100.0), *[codes(20.0)] * 9) == [(4, "collapse")]


def test_a_short_interval_is_not_judged() -> None:
    """An entry for a saved state may come one step after the previous one: 3 tokens have at most 3 codes."""
    alarms = alarms_of(per_step=30)
    assert begun(alarms, LATE, *[codes(60.0)] * 3) == []  # 300 tokens
    short = [alarms.look(LATE + 20 + n, {"train/total": 1.0, **codes(2.9)}) for n in range(1, 9)]
    assert short == [[]] * 8
    assert begun(alarms, LATE + 50, *[codes(2.9)] * 3) == [(2, "collapse")]


def test_a_codebook_of_one_code_has_not_collapsed() -> None:
    """Its perplexity is always 1."""
    assert begun(alarms_of(size=1), EVERY, *[codes(1.0, 1.0)] * 9) == []


def test_an_alarm_is_raised_once_until_it_is_over() -> None:
    """It does not repeat at every entry or after one good entry, but begins again after several good entries."""
    alarms, bad, good = alarms_of(), codes(1.0, 1 / V), codes(50.0)
    entries = [*[bad] * 6, good, bad, good, good, bad, *[good] * 3, bad, bad, good, *[bad] * 4]
    assert begun(alarms, EVERY, *entries) == [(2, "collapse"), (19, "collapse")]


@pytest.mark.parametrize(("usage", "step", "tokens", "raised"), [
    (0.49, SETTLED, 30 * V, True),
    (0.51, SETTLED, 30 * V, False),
    (0.49, SETTLED - 1, 30 * V, False),
    (0.49, SETTLED, 30 * V - 1, False),
])  # fmt: skip
def test_dead_codes_need_time_and_tokens(usage: float, step: int, tokens: int, raised: bool) -> None:
    """Codes are revived only after hundreds of steps, and few tokens cannot use a large codebook. One validation entry
    is enough, because it covers the whole split."""
    begun = alarms_of(validation=tokens).look(step, {"validation/code_usage": usage})
    assert [name for name, _ in begun] == ["dead codes"] * raised


def test_dead_codes_are_seen_in_training_too() -> None:
    """The next validation may be thousands of steps away. Training needs several intervals with enough tokens each. If
    both see dead codes, one alarm is raised."""
    dead = codes(20.0, 0.3)
    enough = -(-30 * V // EVERY)
    assert begun(alarms_of(per_step=enough), LATE, *[dead] * 6) == [(2, "dead codes")]
    assert begun(alarms_of(per_step=enough - 1), LATE, *[dead] * 6) == []
    alarms = alarms_of()
    assert begun(alarms, LATE, *[dead] * 6) == [(2, "dead codes")]
    assert alarms.look(LATE + 60, {"validation/code_usage": 0.3}) == []


def commitments(*values: float) -> list[dict[str, float]]:
    return [{"train/commitment": value} for value in values]


def test_commitment_explodes_when_it_rises_and_rises() -> None:
    """One or two high entries raise no alarm; values above ten times the usual that keep rising do."""
    usual = [0.02, 0.03, 0.02, 0.03, 0.02]
    rising = [0.3, 0.5, 0.9, 2.0, 5.0, 20.0]
    assert begun(alarms_of(), LATE, *commitments(*usual, *rising)) == [(8, "commitment exploding")]
    assert begun(alarms_of(), LATE, *commitments(*usual, 0.3, 0.5, 0.9, 0.8, 0.8, 0.9, 0.8)) == []
    assert begun(alarms_of(), LATE, *commitments(*usual, 0.1, 0.12, 0.14, 0.16, 0.18)) == []
    assert begun(alarms_of(), EVERY, *commitments(*usual, *rising)) == [], "latents grow from 0 in the beginning"


@pytest.mark.parametrize(("weight", "raised"), [
    (0.5 * LARGEST_WEIGHT, True),
    (0.0, True),
    (0.49 * LARGEST_WEIGHT, False),
    (1e-6, False),
])  # fmt: skip
def test_lambda_at_its_clamp(weight: float, raised: bool) -> None:
    """At a limit, lambda is not the quotient of equation 7: one of its gradients has vanished."""
    expected = [(2, "lambda at its clamp")] if raised else []
    assert begun(alarms_of(), LATE, *[scores(0.7, 0.3, -0.3, weight)] * 9) == expected


@pytest.mark.parametrize(("loss", "undecided"), [("hinge", 1.0), ("vanilla", math.log(2))])
def test_the_discriminator_wins(loss: Literal["hinge", "vanilla"], undecided: float) -> None:
    """Five entries in a row have a tenth of the loss of guessing; a single one may be an odd batch."""
    won, open_ = scores(0.09 * undecided, 2.0, -2.0), scores(0.11 * undecided, 2.0, -2.0)
    assert begun(alarms_of(loss=loss), LATE, *[won] * 9) == [(4, "discriminator winning")]
    assert begun(alarms_of(loss=loss), LATE, *[won, won, won, won, open_] * 3) == []


@pytest.mark.parametrize(("loss", "undecided"), [("hinge", 1.0), ("vanilla", math.log(2))])
def test_the_discriminator_is_silent(loss: Literal["hinge", "vanilla"], undecided: float) -> None:
    """The alarm waits 300 steps after the start: a healthy discriminator has learned something after 100."""
    silent = scores(0.99 * undecided, 0.02, 0.01)
    assert begun(alarms_of(loss=loss), 760, *[silent] * 9) == [(8, "discriminator silent")]
    assert begun(alarms_of(loss=loss), 1500, *[scores(0.97 * undecided, 0.1, 0.04)] * 9) == []
    assert begun(alarms_of(loss=loss), 1500, *[scores(1.2 * undecided, 1.0, -1.0)] * 9) == [], (
        "it tells them apart, wrongly"
    )


def test_posterior_collapse() -> None:
    """The decoder of a VAE gets no information and draws one image; its loss looks converged."""
    none, some = {"train/active_channels": 0.0, "train/kl": 0.003}, {"train/active_channels": 0.25, "train/kl": 9.0}
    alarms = partial(alarms_of, KlConfig(), size=0)
    assert begun(alarms(), LATE, *[none] * 6) == [(2, "posterior collapse")]
    assert begun(alarms(), LATE, *[some] * 6) == []
    assert begun(alarms(), EVERY, *[none] * 6) == [], "channels become active only as the decoder learns to read them"


def test_missing_scalars_and_values_that_are_not_finite_are_skipped() -> None:
    """Other bottlenecks log other scalars; under float16 a gradient norm may be infinite in a healthy run."""
    for bottleneck in (NoBottleneckConfig(), VqConfig()):
        entries: list[dict[str, float]] = [{}, {"train/gradient_norm": math.inf}, {"train/commitment": math.nan}]
        assert begun(alarms_of(bottleneck), LATE, *entries * 4) == []


@pytest.mark.parametrize(
    ("bottleneck", "keys"),
    [
        (VqConfig(kmeans_init=False), {"revive_below", "kmeans_init", "code_dim", "cosine"}),
        (VqConfig(code_dim=8, cosine=True), {"revive_below"}),
        (LfqConfig(), {"entropy_weight"}),
        (FsqConfig(), set()),
    ],
)
def test_the_advice_is_for_this_kind(bottleneck: BottleneckConfig, keys: set[str]) -> None:
    """Advice names only options that this kind has, and that are not already set."""
    for _ in range(2):
        alarms = alarms_of(bottleneck)
        begun = [found for step in (10, 20, 30) for found in alarms.look(step, codes(1.0, 1 / V))]
        ((_, message),) = begun
        assert {word.split()[0].strip(",)") for word in message.split("--bottleneck.")[1:]} == keys
        assert "--optim.lr" in message


def one_code(names: dict[str, Any], rank: int) -> None:
    """Make all training images black, lower the limits to those of a run of 12 steps, and record the messages."""
    say = Run.say

    def say_and_record(run: Run, message: str) -> None:
        say(run, message)
        with (run.folder / "said").open("a") as file:
            file.write(message + "\n")

    setattr(Run, "say", say_and_record)  # noqa: B010
    names["normalise"] = lambda pixels: torch.full_like(pixels, -1, dtype=torch.float32)
    latents.SETTLED = 7


COLLAPSING = {
    "bottleneck.kmeans_init": False,
    "bottleneck.revive_below": 0.0,
    "bottleneck.codebook_size": 4,
    "adversarial.weight": 0.0,
    "steps": 12,
    "save_every": 5,
}
"""A random codebook that nothing moves: the latents, near 0 at first, all have the same nearest code."""


def raised_alarms(out: Path) -> list[tuple[int, str]]:
    """Return (step, name) of each alarm in alarms.jsonl."""
    lines = (out / "alarms.jsonl").read_text().splitlines()
    return [(entry["step"], entry["alarm"]) for entry in map(json.loads, lines)]


@pytest.mark.parametrize("stop", [("save", 5), ("log", 9)], ids=str)
def test_a_collapse_in_a_real_run_and_a_resumed_one(tmp_path: Path, stop: tuple[Literal["log", "save"], int]) -> None:
    """Fault 48: constant images raise an alarm, and the run goes on. A stopped and resumed run raises the same alarms
    at the same steps: none twice, and none is lost."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_processes(1, train, whole, COLLAPSING, None, one_code)
    assert raised_alarms(whole) == [(3, "collapse"), (9, "dead codes")]
    said = (whole / "said").read_text()
    assert said.startswith(
        "step 3: ALARM collapse: the perplexity of the codes is 1, with 1 of 4 codes used in the last 1 step"
    )
    assert any(b"alarms/collapse" in events.read_bytes() for events in whole.glob("events*")), "TensorBoard has it"
    run_processes(1, train, resumed, COLLAPSING, stop, one_code)
    run_processes(1, train, resumed, COLLAPSING, None, one_code)
    assert (resumed / "alarms.jsonl").read_text() == (whole / "alarms.jsonl").read_text()
    assert (whole / "state" / "step-00000012").exists()


def test_a_discriminator_that_wins_in_a_real_run(tmp_path: Path) -> None:
    """The discriminator's learning rate is far above that of the generator, which hardly learns."""
    options = {
        "adversarial.start": 0,
        "adversarial.lr": 0.03,
        "optim.lr": 1e-6,
        "steps": 30,
        "save_every": 100,
    }
    run_processes(1, train, tmp_path, options)
    assert "discriminator winning" in {name for _, name in raised_alarms(tmp_path)}
