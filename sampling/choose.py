"""From logits to a token: temperature, then top-k, then top-p, then a draw.

The order matters: filters cut the distribution that is drawn from, so the temperature comes before them.
"""

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from stage1_tokenizer.config import Config
from stage2_prior.prior import draw


class NotFiniteError(ValueError):
    """Logits from which nothing can be chosen."""


class ChooseConfig(Config):
    """How a token is chosen. The defaults draw from the prior's own distribution, unfiltered."""

    temperature: NonNegativeFloat = 1.0
    """Divides the logits: below 1 likelier tokens gain; 0 always takes the likeliest."""
    top_k: PositiveInt | None = None
    """Only the k likeliest tokens; more than there are is no filter."""
    top_p: float = Field(1.0, ge=0.0, le=1.0)
    """Only the likeliest tokens that together have this probability; at least one token always remains."""


def choose(logits: Tensor, noise: Tensor, config: ChooseConfig) -> Tensor:
    """logits (B, V), noise (B,) uniform in [0, 1) -> tokens (B,). The logits are not edited.

    Raises:
        NotFiniteError: a logit is NaN, or a whole row is -inf. (Greedy choice would silently take token 0.)
    """
    largest = logits.amax(dim=-1, keepdim=True)
    if not torch.isfinite(largest).all():
        raise NotFiniteError(
            "the prior gave logits that are not finite: its weights are damaged or its training diverged"
        )
    if config.temperature == 0.0:
        return logits.argmax(dim=-1)
    # Relative to the largest one and in float64, so that a tiny temperature neither overflows nor becomes 0.
    scaled = (logits - largest).double() / config.temperature
    return draw(keep_top_p(keep_top_k(scaled, config.top_k).softmax(dim=-1), config.top_p), noise)


def keep_top_k(logits: Tensor, k: int | None) -> Tensor:
    """logits (B, V) with all but exactly the k largest set to -inf; among equal ones the lower ids are kept."""
    if k is None or k >= logits.shape[-1]:
        return logits
    order = logits.sort(dim=-1, descending=True, stable=True).indices  # (B, V)
    return logits.scatter(-1, order[:, k:], float("-inf"))


def keep_top_p(probabilities: Tensor, p: float) -> Tensor:
    """probabilities (B, V) with 0 for all but the smallest set of the likeliest tokens whose sum reaches p.

    Nucleus sampling: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), equation 3.
    """
    if p >= 1.0:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # mass of the tokens that are likelier
    dropped = before >= p
    dropped[:, 0] = False
    return probabilities.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)
