"""Guidance: the mix of logits, its schedule over the image, and the generated codes."""

import math

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.generation import generate, sample_softmax
from stage2_prior.gpt.model import GptConfig
from stage2_prior.guidance import Guidance, GuidanceSchedule, check_guidance, mix_logits
from stage2_prior.pixelcnn.model import PixelCnnConfig
from tests.helpers.artefacts import MAKERS, noise_of

SHAPE = TokenShape(3, 4, 2, 11)
KINDS = pytest.mark.parametrize("kind", MAKERS)
SCHEDULES: list[GuidanceSchedule] = ["constant", "linear", "cosine", "interval"]
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES)
SHARES = torch.linspace(0, 1, 101, dtype=torch.float64).tolist()
N = 24
LABELS = torch.arange(N) % 2


def test_scales_1_and_0_are_exact() -> None:
    """Trap 32: u + (c - u) is not c in floating point, and infinities would even make it none."""
    conditional, unconditional = torch.randn(2, 500, 11, generator=torch.Generator().manual_seed(0))
    conditional[0, 0], unconditional[1, 1] = -torch.inf, torch.inf
    assert not torch.equal(unconditional + (conditional - unconditional), conditional), "else the test is for nothing"
    assert torch.equal(mix_logits(conditional, unconditional, 1.0), conditional)
    assert torch.equal(mix_logits(conditional, unconditional, 0.0), unconditional)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0])
def test_a_mix_moves_away_from_no_class(scale: float) -> None:
    """Trap 32: uncond + s (cond - uncond), not the (1 + s) cond - s uncond of other papers; inputs are not edited."""
    conditional, unconditional = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    found = mix_logits(conditional, unconditional, scale)
    assert torch.allclose(found, torch.tensor([[3.0 - 2.0 * scale, -1.0 + 3.0 * scale]]))
    assert conditional.tolist() == [[1.0, 2.0]]
    assert unconditional.tolist() == [[3.0, -1.0]]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", (5.0, 5.0, 5.0, 5.0)),
        ("linear", (1.0, 2.0, 3.0, 5.0)),
        ("cosine", (1.0, 1.0 + 4.0 * (1.0 - math.sqrt(0.5)) / 2.0, 3.0, 5.0)),
        ("interval", (5.0, 5.0, 5.0, 5.0)),  # its default is the whole image
    ],
)
def test_schedules_at_the_ends_and_between(schedule: GuidanceSchedule, values: tuple[float, ...]) -> None:
    """Each schedule's formula by hand, for scale 5 at 0, 1/4, 1/2 and 1."""
    guidance = Guidance(5.0, schedule)
    assert [guidance.scale_at(share) for share in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(values, abs=1e-12)


def test_an_interval_has_both_its_ends() -> None:
    """Outside it is the conditional prior, not the unconditional one."""
    guidance = Guidance(5.0, "interval", (0.25, 0.5))
    shares = (0.0, math.nextafter(0.25, 0.0), 0.25, 0.4, 0.5, math.nextafter(0.5, 1.0), 1.0)
    assert [guidance.scale_at(share) for share in shares] == [1.0, 1.0, 5.0, 5.0, 5.0, 1.0, 1.0]


@EVERY_SCHEDULE
def test_scale_1_is_1_everywhere(schedule: GuidanceSchedule) -> None:
    """Nothing is mixed then, so a schedule that strayed from 1 in the last digit would be silently left out."""
    guidance = Guidance(1.0, schedule, (0.2, 0.7))
    assert {guidance.scale_at(share) for share in SHARES} == {1.0}
    assert not guidance.is_needed
    assert Guidance(0.0, schedule).is_needed
    assert Guidance(1.0 + 1e-9, schedule).is_needed


@pytest.mark.parametrize("scale", [0.0, 4.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rising_schedules_rise_and_are_symmetric(schedule: GuidanceSchedule, scale: float) -> None:
    """The scale rises from 1 at the first position to its value at the last, symmetrically and never back."""
    values = [Guidance(scale, schedule).scale_at(share) for share in SHARES]
    moved = [(value - 1.0) / (scale - 1.0) for value in values]
    assert moved == sorted(moved)
    assert moved == pytest.approx([1.0 - share for share in reversed(moved)], abs=1e-12)


@KINDS
@EVERY_SCHEDULE
def test_scale_1_samples_the_class(kind: str, schedule: GuidanceSchedule) -> None:
    """Trap 32: guidance 1 is no guidance, under any schedule, and computes no logits of no class."""
    model, noise, batches = MAKERS[kind](SHAPE), noise_of(N, SHAPE.length), set()
    prepared = model.prepare()
    begin = prepared.begin

    def spy(labels: Tensor, grid: tuple[int, int] | None = None) -> object:
        batches.add(len(labels))
        return begin(labels, grid)

    prepared.begin = spy  # type: ignore[assignment, method-assign]
    guided = generate(model, LABELS, noise, guidance=Guidance(1.0, schedule), prepared=prepared)
    assert batches == {N}
    assert torch.equal(guided, generate(model, LABELS, noise))


@KINDS
def test_scale_0_samples_no_class(kind: str) -> None:
    """Trap 32: the codes are those of the null label, whatever class was asked for."""
    model, noise = MAKERS[kind](SHAPE), noise_of(N, SHAPE.length)
    without = generate(model, torch.full_like(LABELS, model.null_label), noise)
    assert torch.equal(generate(model, LABELS, noise, guidance=Guidance(0.0)), without)
    assert not torch.equal(generate(model, LABELS, noise), without)


@KINDS
@EVERY_SCHEDULE
def test_each_position_has_its_scale(kind: str, schedule: GuidanceSchedule) -> None:
    """Trap 32: progress runs from 0 at the first position to 1 at the last, and the K codes of one share theirs."""
    model, guidance, seen = MAKERS[kind](SHAPE), Guidance(4.0, schedule, (0.3, 0.7)), []

    def choose(logits: Tensor, noise: Tensor, progress: float) -> Tensor:
        seen.append(logits.clone())
        return sample_softmax(logits, noise, progress)

    codes = generate(model, LABELS, noise_of(N, SHAPE.length), choose, guidance)
    conditional, unconditional = model(codes, LABELS), model(codes, torch.full_like(LABELS, model.null_label))
    for t, found in enumerate(seen):
        scale = guidance.scale_at(t // SHAPE.K / (SHAPE.h * SHAPE.w - 1))
        wanted = unconditional[:, t] + scale * (conditional[:, t] - unconditional[:, t])
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("config", [GptConfig(), PixelCnnConfig()], ids=lambda config: config.kind)
def test_guidance_needs_both_kinds_of_logits(config: GptConfig | PixelCnnConfig) -> None:
    """Trap 32: the row of "no class" must exist and have been trained; a scale of 1 needs neither."""
    never = config.model_copy(update={"label_dropout": 0.0})
    for scale in (0.0, 0.5, 2.0):
        check_guidance(config, 2, Guidance(scale))
        with pytest.raises(ConfigError, match=rf"guidance {scale}.*no classes.*use guidance 1"):
            check_guidance(config, 0, Guidance(scale))
        with pytest.raises(ConfigError, match=rf"guidance {scale}.*label_dropout 0.*use guidance 1"):
            check_guidance(never, 2, Guidance(scale, "linear"))
    for schedule in SCHEDULES:
        check_guidance(never, 0, Guidance(1.0, schedule))
