"""Classifier-free guidance: move the logits away from those of "no class", by a scale that may depend on the position.

    training    the label of a share of the images is replaced by "no class" (`withhold_labels`; algorithm 1)
    sampling    logits = uncond + s (cond - uncond)          s: the scale (`mix_logits`; equation 6, s = 1 + w)

s = 1 is the conditional prior, s = 0 the unconditional one; larger s gives samples that show their class more clearly
and vary less. From Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022; for priors over tokens from Gafni et
al., "Make-A-Scene", 2022.
"""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

from stage1_tokenizer.data.order import BatchIndices
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.seeds import draw_uniforms
from stage2_prior.base import BasePriorConfig, Prior

GuidanceSchedule = Literal["constant", "linear", "cosine", "interval"]


@dataclass(frozen=True)
class Guidance:
    """A guidance scale and its schedule over the positions of an image."""

    scale: float = 1.0
    """1: the prior as trained; larger: samples follow their class more closely."""

    schedule: GuidanceSchedule = "constant"
    interval: tuple[float, float] = (0.0, 1.0)
    """First and last progress at which the schedule "interval" applies the scale; outside the scale is 1."""

    @property
    def is_needed(self) -> bool:
        """True if some position needs the logits of "no class"."""
        return self.scale != 1.0

    def scale_at(self, progress: float) -> float:
        """Return the scale at a position; progress is the share in [0, 1] of the image's positions before it.

        constant: `scale` everywhere. linear, cosine: rise from 1 to `scale`, so that early positions keep their variety
        and late positions follow the class (Chang et al., "Muse", 2023, section 2.7; Gao et al., "MDTv2", 2023, power-
        cosine). interval: `scale` inside the interval, else 1 (Kynkaanniemi et al., "Applying Guidance in a Limited
        Interval", 2024).
        """
        match self.schedule:
            case "constant":
                return self.scale
            case "linear":
                return 1.0 + (self.scale - 1.0) * progress
            case "cosine":
                return 1.0 + (self.scale - 1.0) * 0.5 * (1.0 - math.cos(math.pi * progress))
            case "interval":
                return self.scale if self.interval[0] <= progress <= self.interval[1] else 1.0
        assert_never(self.schedule)


def mix_logits(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return the guided logits (B, V) from both logits (B, V); at scale 1 and 0 exactly one of the two."""
    if scale == 1.0:
        return conditional
    if scale == 0.0:
        return unconditional
    return unconditional + scale * (conditional - unconditional)


def withhold_labels(labels: Tensor, batch_indices: BatchIndices, prior: Prior, seed: int) -> Tensor:
    """Replace labels (B,) by `prior.null_label`, each with probability `label_dropout` of the prior's config.

    The choice depends on the seed and on each image's index and epoch only, so that a resumed run, or a run on
    more processes, withholds the same labels.
    """
    indices, epochs = batch_indices
    is_withheld = draw_uniforms(seed, "label", epochs, indices, 1)[:, 0] < prior.config.label_dropout  # (B,)
    return labels.masked_fill(torch.from_numpy(is_withheld).to(labels.device, non_blocking=True), prior.null_label)


def check_guidance(config: BasePriorConfig, classes: int, guidance: Guidance) -> None:
    """Raise ConfigError if guidance is needed, but the prior has learned no logits of "no class", or has no classes."""
    if guidance.is_needed and (classes == 0 or config.label_dropout == 0.0):
        reason = "has no classes" if classes == 0 else "was trained with label_dropout 0"
        raise ConfigError(
            f"guidance {guidance.scale}: this prior {reason}, so it cannot compare images with and without a class; "
            "use guidance 1"
        )
