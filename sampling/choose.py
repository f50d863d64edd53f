"""One code from the prior's logits: temperature, then filters (top-k, top-p, min-p), then a random draw.

    logits (B, V) / temperature -> top-k -> softmax -> top-p -> min-p -> draw(probabilities, noise (B,)) -> codes (B,)

The temperature comes first, because the filters cut the distribution that the code is drawn from. The filters run in
the order of their fields in `ChooseConfig`. Each one receives the probabilities that the former filters have left;
these add up to less than 1.

To add a filter, write a function and a field of `ChooseConfig` that names it (`Filter(keep=...)`). All commands, the
page of `app.py` and the report then have it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, assert_never

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sampling.option_facts import AlwaysShown, Idle, PartOf, facts_of_kind
from stage1_tokenizer.config.base import Config
from stage1_tokenizer.config.value_types import Limit
from stage1_tokenizer.engine.precision import to_float64
from stage2_prior.generation import draw_codes


@dataclass(frozen=True, kw_only=True)
class Filter(Idle):
    """The option is a filter: it excludes some of the codes from the draw."""

    keep: Callable[[Tensor, Any], Tensor]
    """(probabilities (B, V), the option's value) -> (B, V) with 0 at the excluded codes. With `takes_logits`:
    (logits (B, V), the option's value) -> (B, V) with -inf there. At least one code of each row must remain."""
    takes_logits: bool = False
    """True: the filter receives logits, before the softmax. False: it receives the probabilities that the former
    filters have left, not renormalised; a filter with an absolute threshold must first divide by the row's sum."""
    beside: str = "tokenizer"
    reason: str = "it filters codes, and this tokenizer has none"


def keep_top_k(logits: Tensor, k: int | None) -> Tensor:
    """Set all but exactly the k largest logits (B, V) of each row to -inf; of equal logits the lower codes are kept."""
    if k is None or k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1); topk is much faster than sorting all V
    is_larger, is_equal = logits > smallest_kept, logits == smallest_kept
    room = k - is_larger.sum(dim=-1, keepdim=True)  # (B, 1): number of codes to keep among the equal ones
    return logits.masked_fill(~(is_larger | (is_equal & (is_equal.cumsum(dim=-1) <= room))), float("-inf"))


def keep_top_p(probabilities: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely codes whose probabilities (B, V) add up to p; set the others to 0.

    Nucleus sampling: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), equation 3.
    """
    if p >= 1.0:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    sum_before = ordered.cumsum(dim=-1) - ordered  # (B, V): total probability of the more likely codes
    excluded = sum_before >= p
    excluded[:, 0] = False
    return probabilities.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), 0.0)


def keep_min_p(probabilities: Tensor, p: float) -> Tensor:
    """Set each probability (B, V) below p times the largest one of its row to 0.

    Nguyen et al., "Turning Up the Heat: Min-p Sampling" (2024), equation 2.
    """
    if p <= 0.0:
        return probabilities
    return probabilities.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), 0.0)


class ChooseConfig(Config):
    """Settings of the draw of one code. The defaults draw from the prior's own distribution, without a filter."""

    temperature: Annotated[float, AlwaysShown()] = Field(1.0, ge=0.0, allow_inf_nan=False)
    """Divides the logits: below 1 makes likely codes more likely, above 1 less; 0 always takes the most likely code."""
    temperature_end: Annotated[
        float | None, Idle(beside="tokenizer", reason="noise has no positions in an order"), PartOf(whole="temperature")
    ] = Field(None, ge=0.0, allow_inf_nan=False)
    """Temperature at the last position of the image; `temperature` is the one at the first position, and
    `temperature_schedule` says how it changes between them. null: the same temperature at all positions."""
    temperature_schedule: Annotated[Literal["linear", "cosine"], PartOf(whole="temperature")] = "linear"
    """Change from `temperature` to `temperature_end`: linear: even; cosine: slow at the first and last positions."""
    top_k: Annotated[Limit, Filter(keep=keep_top_k, takes_logits=True)] = None
    """Draw only from the k most likely codes; 0, null or a k above the codebook size is no filter."""
    top_p: Annotated[float, Filter(keep=keep_top_p)] = Field(1.0, ge=0.0, le=1.0)
    """Draw only from the most likely codes that together have this probability, at least one; 1 is no filter."""
    min_p: Annotated[float, Filter(keep=keep_min_p)] = Field(0.0, ge=0.0, le=1.0)
    """Draw only from codes with at least this fraction of the most likely code's probability; 0 is no filter, 1 keeps
    only the most likely code."""

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.temperature_end is None and self.temperature_schedule != "linear":
            raise ValueError(
                f"temperature_schedule {self.temperature_schedule} needs temperature_end, the temperature at the last "
                "position; give that too"
            )
        return self

    def temperature_at(self, progress: float) -> float:
        """Return the temperature at a position; `progress` in [0, 1] is the share of positions before it."""
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

    def apply_filters(self, values: Tensor, takes_logits: bool) -> Tensor:
        """Apply the filters of logits, or those of probabilities (B, V), in the order of the fields."""
        for name, filters in facts_of_kind(type(self), Filter).items():
            for filter_ in filters:
                if filter_.takes_logits == takes_logits:
                    values = filter_.keep(values, getattr(self, name))
        return values


def choose(logits: Tensor, noise: Tensor, progress: float, config: ChooseConfig) -> Tensor:
    """Draw one code per row. `logits` is not changed.

    Args:
        logits: (B, V), finite or -inf (`generate` checks that).
        noise: (B,) uniform in [0, 1); it decides which code is drawn.
        progress: share in [0, 1] of the image's positions that are before this one.
        config: temperature and filters.

    Returns:
        Codes (B,) int64.
    """
    temperature = config.temperature_at(progress)
    # Relative to the largest logit and in float64: a tiny temperature then neither overflows nor becomes 0.
    scaled = to_float64(logits - logits.amax(dim=-1, keepdim=True)) / (temperature or 1.0)
    probabilities = config.apply_filters(scaled, takes_logits=True).softmax(dim=-1)
    probabilities = config.apply_filters(probabilities, takes_logits=False)
    return draw_codes(probabilities, noise) if temperature else probabilities.argmax(dim=-1)
