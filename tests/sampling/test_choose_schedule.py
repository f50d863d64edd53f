"""The temperature along an image: from its first position to its last, and that `choose` follows it."""

import math
from typing import Literal

import pytest
import torch

from sampling.choose import ChooseConfig, choose
from tests.helpers.artefacts import noise_of


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_temperature_goes_from_one_end_to_the_other(schedule: Literal["linear", "cosine"]) -> None:
    """Both schedules meet at the ends and in the middle, and differ between: a cosine leaves slowly."""
    config = ChooseConfig(temperature=2.0, temperature_end=0.5, temperature_schedule=schedule)
    assert config.temperature_at(0.0) == 2.0
    assert config.temperature_at(0.5) == pytest.approx(1.25)
    assert config.temperature_at(1.0) == 0.5
    quarter = {"linear": 0.25, "cosine": (1 - math.sqrt(0.5)) / 2}[schedule]
    assert config.temperature_at(0.25) == pytest.approx(2.0 - 1.5 * quarter)
    values = [config.temperature_at(i / 20) for i in range(21)]
    assert values == sorted(values, reverse=True)
    assert ChooseConfig(temperature=0.7).temperature_at(0.8) == 0.7


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_temperature_of_the_place_is_the_one_used(progress: float) -> None:
    """A schedule that is computed and not applied would draw the same at every place."""
    row = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 3
    config = ChooseConfig(temperature=3.0, temperature_end=0.5)
    n = 2_000
    codes = choose(row.expand(n, -1), (torch.arange(n) + 0.5) / n, progress, config)
    wanted = (row / (3.0 - 2.5 * progress)).softmax(-1)
    assert torch.allclose(torch.bincount(codes, minlength=12) / n, wanted, atol=2e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_end_of_0_is_greedy_at_the_last_place_alone(schedule: Literal["linear", "cosine"]) -> None:
    """Trap 33: dividing by 0 there would give NaN, and before it there is still something to draw."""
    config = ChooseConfig(temperature=1.0, temperature_end=0.0, temperature_schedule=schedule)
    logits = torch.tensor([[0.0, 0.01]]).expand(100, -1)
    spread = [choose(logits, noise_of(100, 1)[:, 0], progress, config).float().mean() for progress in (0, 0.5, 0.9, 1)]
    assert spread[3] == 1.0
    assert all(0.1 < share < 0.9 for share in spread[:3])
