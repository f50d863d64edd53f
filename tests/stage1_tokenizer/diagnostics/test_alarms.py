"""Alarms: each begins when it must, once, and none in a run that is well."""

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


def told(alarms: Alarms, first: int, *entries: dict[str, float], every: int = EVERY) -> list[tuple[int, str]]:
    """Which alarms begin at which of the entries, counted from 0."""
    alarms.look(first - every, {"train/total": 1.0})
    return [
        (number, name)
        for number, entry in enumerate(entries)
        for name, _ in alarms.look(first + every * number, {"train/total": 1.0, **entry})
    ]


def codes(perplexity: float, usage: float = 0.9) -> dict[str, float]:
    return {"train/code_perplexity": perplexity, "train/code_usage": usage}


def game(loss: float, real: float, fake: float, weight: float = 1.0) -> dict[str, float]:
    parts = {"total": loss, "logits_real": real, "logits_fake": fake}
    return {**{f"discriminator/{name}": value for name, value in parts.items()}, "train/lambda": weight}


def test_a_healthy_run_raises_none() -> None:
    """An alarm that cries in the quickstart is an alarm that nobody reads. (Its figures as measured.)"""
    entries = [
        {**codes(perplexity, usage), "train/commitment": commitment}
        for perplexity, usage, commitment in zip(PERPLEXITY, USAGE, COMMITMENT, strict=True)
    ]
    assert len(entries) == 40
    assert told(alarms_of(), EVERY, *entries) == []


def test_healthy_games_raise_none() -> None:
    """docs/real_data.md: the hinge loss at 1.00 for 500 steps, and between 0.4 and 0.7 with a lambda of 0.05."""
    assert told(alarms_of(), 510, *[game(1.0, 0.01, 0.005, 3.0)] * 50) == []
    assert told(alarms_of(), 510, *[game(0.4 + 0.3 * (n % 2), 0.6, -0.7, 0.05) for n in range(300)]) == []


def test_a_collapse_is_a_fall_or_one_code() -> None:
    """Fault 48: usage 1/V and perplexity 1, at whatever time; and less than half of what it had been."""
    assert told(alarms_of(), EVERY, *[codes(1.0, 1 / V)] * 9) == [(2, "collapse")]
    assert told(alarms_of(), LATE, *[codes(100.0)] * 5, *[codes(49.0)] * 9) == [(7, "collapse")]
    assert told(alarms_of(), LATE, *[codes(100.0)] * 5, *[codes(51.0)] * 9) == []


def test_the_beginning_is_no_best() -> None:
    """k-means' start spreads the codes over the latents of an untrained encoder; nothing has to be like that again."""
    end = BEGINNING + 2 * OptimConfig().warmup_steps
    assert told(alarms_of(), end - EVERY, codes(100.0), codes(100.0), *[codes(20.0)] * 9) == []
    assert told(alarms_of(), end, codes(100.0), codes(100.0), *[codes(20.0)] * 9) == [(4, "collapse")]


def test_a_short_interval_proves_nothing() -> None:
    """An entry made for a saved state may be one step after the last one: 3 tokens can only be 3 codes."""
    alarms = alarms_of(per_step=30)
    assert told(alarms, LATE, *[codes(60.0)] * 3) == []  # 300 tokens
    short = [alarms.look(LATE + 20 + n, {"train/total": 1.0, **codes(2.9)}) for n in range(1, 9)]
    assert short == [[]] * 8
    assert told(alarms, LATE + 50, *[codes(2.9)] * 3) == [(2, "collapse")]


def test_a_codebook_of_one_code_has_not_collapsed() -> None:
    """It has all that it can have."""
    assert told(alarms_of(size=1), EVERY, *[codes(1.0, 1.0)] * 9) == []


def test_an_alarm_is_raised_once_until_it_is_over() -> None:
    """Not at every entry while it lasts, not when it flickers, but again when it comes back."""
    alarms, bad, good = alarms_of(), codes(1.0, 1 / V), codes(50.0)
    entries = [*[bad] * 6, good, bad, good, good, bad, *[good] * 3, bad, bad, good, *[bad] * 4]
    assert told(alarms, EVERY, *entries) == [(2, "collapse"), (19, "collapse")]


@pytest.mark.parametrize(("usage", "step", "tokens", "raised"), [
    (0.49, SETTLED, 30 * V, True),
    (0.51, SETTLED, 30 * V, False),
    (0.49, SETTLED - 1, 30 * V, False),
    (0.49, SETTLED, 30 * V - 1, False),
])  # fmt: skip
def test_dead_codes_need_time_and_tokens(usage: float, step: int, tokens: int, raised: bool) -> None:
    """Codes are revived only after hundreds of steps, and a few tokens do not show a large codebook. On validation one
    entry is enough, for it is the whole split."""
    begun = alarms_of(validation=tokens).look(step, {"validation/code_usage": usage})
    assert [name for name, _ in begun] == ["dead codes"] * raised


def test_dead_codes_are_seen_in_training_too() -> None:
    """Validation may be thousands of steps away; but then several intervals must say so, each of enough tokens. What
    both have seen is said once."""
    dead = codes(20.0, 0.3)
    enough = -(-30 * V // EVERY)
    assert told(alarms_of(per_step=enough), LATE, *[dead] * 6) == [(2, "dead codes")]
    assert told(alarms_of(per_step=enough - 1), LATE, *[dead] * 6) == []
    alarms = alarms_of()
    assert told(alarms, LATE, *[dead] * 6) == [(2, "dead codes")]
    assert alarms.look(LATE + 60, {"validation/code_usage": 0.3}) == []


def commitments(*values: float) -> list[dict[str, float]]:
    return [{"train/commitment": value} for value in values]


def test_commitment_explodes_when_it_rises_and_rises() -> None:
    """A high entry or two are nothing; ten times the usual and no end is a run that will not come back."""
    usual = [0.02, 0.03, 0.02, 0.03, 0.02]
    rising = [0.3, 0.5, 0.9, 2.0, 5.0, 20.0]
    assert told(alarms_of(), LATE, *commitments(*usual, *rising)) == [(8, "commitment exploding")]
    assert told(alarms_of(), LATE, *commitments(*usual, 0.3, 0.5, 0.9, 0.8, 0.8, 0.9, 0.8)) == []
    assert told(alarms_of(), LATE, *commitments(*usual, 0.1, 0.12, 0.14, 0.16, 0.18)) == []
    assert told(alarms_of(), EVERY, *commitments(*usual, *rising)) == [], "latents grow from 0 in the beginning"


@pytest.mark.parametrize(("weight", "raised"), [
    (0.5 * LARGEST_WEIGHT, True),
    (0.0, True),
    (0.49 * LARGEST_WEIGHT, False),
    (1e-6, False),
])  # fmt: skip
def test_lambda_at_its_clamp(weight: float, raised: bool) -> None:
    """Equation 7's quotient is then not what is used: one of its gradients has vanished."""
    expected = [(2, "lambda at its clamp")] if raised else []
    assert told(alarms_of(), LATE, *[game(0.7, 0.3, -0.3, weight)] * 9) == expected


@pytest.mark.parametrize(("loss", "undecided"), [("hinge", 1.0), ("vanilla", math.log(2))])
def test_the_discriminator_wins(loss: Literal["hinge", "vanilla"], undecided: float) -> None:
    """A tenth of the loss of a guess, five entries in a row; a single one is an odd batch."""
    won, open_ = game(0.09 * undecided, 2.0, -2.0), game(0.11 * undecided, 2.0, -2.0)
    assert told(alarms_of(loss=loss), LATE, *[won] * 9) == [(4, "discriminator winning")]
    assert told(alarms_of(loss=loss), LATE, *[won, won, won, won, open_] * 3) == []


@pytest.mark.parametrize(("loss", "undecided"), [("hinge", 1.0), ("vanilla", math.log(2))])
def test_the_discriminator_is_silent(loss: Literal["hinge", "vanilla"], undecided: float) -> None:
    """Only 1000 steps after its start: half as many taught it nothing on CIFAR-10, and nothing was wrong."""
    silent = game(0.99 * undecided, 0.02, 0.01)
    assert told(alarms_of(loss=loss), 1460, *[silent] * 9) == [(8, "discriminator silent")]
    assert told(alarms_of(loss=loss), 1500, *[game(0.97 * undecided, 0.1, 0.04)] * 9) == []
    assert told(alarms_of(loss=loss), 1500, *[game(1.2 * undecided, 1.0, -1.0)] * 9) == [], "it tells, and badly now"


def test_posterior_collapse() -> None:
    """The decoder of a variational autoencoder that gets nothing draws one picture, and its loss looks converged."""
    none, some = {"train/active_channels": 0.0, "train/kl": 0.003}, {"train/active_channels": 0.25, "train/kl": 9.0}
    alarms = partial(alarms_of, KlConfig(), size=0)
    assert told(alarms(), LATE, *[none] * 6) == [(2, "posterior collapse")]
    assert told(alarms(), LATE, *[some] * 6) == []
    assert told(alarms(), EVERY, *[none] * 6) == [], "channels become active only as the decoder learns to read them"


def test_names_that_are_not_there_and_values_that_are_not_finite_say_nothing() -> None:
    """Other bottlenecks have other statistics; under float16 a gradient norm may be infinite in a healthy run."""
    for bottleneck in (NoBottleneckConfig(), VqConfig()):
        entries: list[dict[str, float]] = [{}, {"train/gradient_norm": math.inf}, {"train/commitment": math.nan}]
        assert told(alarms_of(bottleneck), LATE, *entries * 4) == []


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
    """An option that the kind does not have is refused by the command line, and one that is set already is no help."""
    for _ in range(2):
        alarms = alarms_of(bottleneck)
        begun = [found for step in (10, 20, 30) for found in alarms.look(step, codes(1.0, 1 / V))]
        ((_, message),) = begun
        assert {word.split()[0].strip(",)") for word in message.split("--bottleneck.")[1:]} == keys
        assert "--optim.lr" in message


def one_code(names: dict[str, Any], rank: int) -> None:
    """All training images black, and limits that a run of 12 steps can meet; what is said is kept too."""
    say = Run.say

    def heard(run: Run, message: str) -> None:
        say(run, message)
        with (run.folder / "said").open("a") as file:
            file.write(message + "\n")

    setattr(Run, "say", heard)  # noqa: B010
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


def raised(out: Path) -> list[tuple[int, str]]:
    lines = (out / "alarms.jsonl").read_text().splitlines()
    return [(entry["step"], entry["alarm"]) for entry in map(json.loads, lines)]


@pytest.mark.parametrize("stop", [("save", 5), ("log", 9)], ids=str)
def test_a_collapse_in_a_real_run_and_a_resumed_one(tmp_path: Path, stop: tuple[Literal["log", "save"], int]) -> None:
    """Fault 48: constant images are reported, and the run goes on. Stopped and continued, it raises the same alarms in
    the same steps: none twice, and none is lost that began in the steps which are run again."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_processes(1, train, whole, COLLAPSING, None, one_code)
    assert raised(whole) == [(3, "collapse"), (9, "dead codes")]
    said = (whole / "said").read_text()
    assert said.startswith("step 3: ALARM collapse: only 1 of 4 codes were used in the last 1 step (perplexity 1)")
    assert any(b"alarms/collapse" in events.read_bytes() for events in whole.glob("events*")), "TensorBoard has it"
    run_processes(1, train, resumed, COLLAPSING, stop, one_code)
    run_processes(1, train, resumed, COLLAPSING, None, one_code)
    assert (resumed / "alarms.jsonl").read_text() == (whole / "alarms.jsonl").read_text()
    assert (whole / "state" / "step-00000012").exists()


def test_a_discriminator_that_wins_a_real_game(tmp_path: Path) -> None:
    """With a learning rate far above that of a generator which hardly learns, it tells all of them apart."""
    options = {
        "adversarial.start": 0,
        "adversarial.lr": 0.03,
        "optim.lr": 1e-6,
        "steps": 30,
        "save_every": 100,
    }
    run_processes(1, train, tmp_path, options)
    assert "discriminator winning" in {name for _, name in raised(tmp_path)}
