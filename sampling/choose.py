"""From logits to a code, in this order: temperature, top-k, top-p, min-p, then a draw.

The order matters: filters cut the distribution that is drawn from, so the temperature comes before them, and each is
given what the former one left, which no longer adds up to 1. They follow each other in the order of their fields.

To add a filter: a function here, and a field of `ChooseConfig` that states it. All commands, the page and the report
then have it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, assert_never

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sampling.option_facts import AlwaysShown, Idle, facts_of
from stage1_tokenizer.config.base import Config
from stage1_tokenizer.config.value_types import Limit
from stage1_tokenizer.engine.precision import float64
from stage2_prior.generation import draw_codes


@dataclass(frozen=True, kw_only=True)
class Filter(Idle):
    """The option leaves only some of the codes to draw from."""

    keep: Callable[[Tensor, Any], Tensor]
    """Probabilities (B, V) and the option's value -> the same with 0 for all other codes; of logits, with -inf. It
    leaves at least one code of each row."""
    of_logits: bool = False
    """True: it is given the logits. False: the probabilities that the former filters have left, not renormalised. A
    filter whose threshold is not relative to them divides by the row's sum first."""
    beside: str = "tokenizer"
    reason: str = "it filters codes, and there are none"


def keep_top_k(logits: Tensor, k: int | None) -> Tensor:
    """logits (B, V) with all but exactly the k largest set to -inf; among equal ones the lower ids are kept."""
    if k is None or k >= logits.shape[-1]:
        return logits
    least = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1): of those that are kept; far cheaper than to sort all
    larger, equal = logits > least, logits == least
    room = k - larger.sum(dim=-1, keepdim=True)  # (B, 1): for codes that are equal to the least one
    return logits.masked_fill(~(larger | (equal & (equal.cumsum(dim=-1) <= room))), float("-inf"))


def keep_top_p(probabilities: Tensor, p: float) -> Tensor:
    """probabilities (B, V) with 0 for all but the smallest set of the likeliest codes whose sum reaches p.

    Nucleus sampling: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), equation 3.
    """
    if p >= 1.0:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # mass of the codes that are likelier
    dropped = before >= p
    dropped[:, 0] = False
    return probabilities.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)


def keep_min_p(probabilities: Tensor, p: float) -> Tensor:
    """probabilities (B, V) with 0 for all that lie below p times the row's largest; equal ones all remain.

    Nguyen et al., "Turning Up the Heat: Min-p Sampling" (2024), equation 2.
    """
    if p <= 0.0:
        return probabilities
    return probabilities.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), 0.0)


class ChooseConfig(Config):
    """How a code is chosen. The defaults draw from the prior's own distribution, unfiltered."""

    temperature: Annotated[float, AlwaysShown()] = Field(1.0, ge=0.0, allow_inf_nan=False)
    """Divides the logits: below 1 likelier codes gain; 0 always takes the likeliest."""
    temperature_end: Annotated[
        float | None, Idle(beside="tokenizer", reason="there are no positions one after the other")
    ] = Field(None, ge=0.0, allow_inf_nan=False)
    """Temperature at the picture's last position, reached from `temperature` at its first along
    `temperature_schedule`; null: the same everywhere."""
    temperature_schedule: Literal["linear", "cosine"] = "linear"
    """The way from one to the other: evenly, or slowly at both ends."""
    top_k: Annotated[Limit, Filter(keep=keep_top_k, of_logits=True)] = None
    """Only the k likeliest codes; 0, null, or more than there are is no filter."""
    top_p: Annotated[float, Filter(keep=keep_top_p)] = Field(1.0, ge=0.0, le=1.0)
    """Only the likeliest codes that together have this probability; at least one code always remains."""
    min_p: Annotated[float, Filter(keep=keep_min_p)] = Field(0.0, ge=0.0, le=1.0)
    """Only codes at least this many times as likely as the likeliest one; 1 leaves that alone."""

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.temperature_end is None and self.temperature_schedule != "linear":
            raise ValueError(
                f"temperature_schedule {self.temperature_schedule} says how temperature_end is reached; give that too"
            )
        return self

    def temperature_at(self, progress: float) -> float:
        """The temperature where `progress` in [0, 1] of the picture lies before."""
        if self.temperature_end is None:
            return self.temperature
        match self.temperature_schedule:
            case "linear":
                share = progress
            case "cosine":
                share = 0.5 * (1.0 - math.cos(math.pi * progress))
            case _:
                assert_never(self.temperature_schedule)
        return (1.0 - share) * self.temperature + share * self.temperature_end

    def filtered(self, values: Tensor, of_logits: bool) -> Tensor:
        """Logits or probabilities (B, V) after the filters of their kind, in the order of the fields."""
        for name, filters in facts_of(type(self), Filter).items():
            for each in filters:
                if each.of_logits == of_logits:
                    values = each.keep(values, getattr(self, name))
        return values


def choose(logits: Tensor, noise: Tensor, progress: float, config: ChooseConfig) -> Tensor:
    """logits (B, V), noise (B,) uniform in [0, 1), progress in [0, 1] -> codes (B,).

    The logits are not edited. They are finite or -inf; `generate` checks that.
    """
    temperature = config.temperature_at(progress)
    # Relative to the largest one and in float64, so that a tiny temperature neither overflows nor becomes 0.
    scaled = float64(logits - logits.amax(dim=-1, keepdim=True)) / (temperature or 1.0)
    kept = config.filtered(config.filtered(scaled, of_logits=True).softmax(dim=-1), of_logits=False)
    return draw_codes(kept, noise) if temperature else kept.argmax(dim=-1)
