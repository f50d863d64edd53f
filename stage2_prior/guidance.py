"""Classifier-free guidance: how far logits are moved away from those of no class, and where in the picture.

    logits = uncond + s (cond - uncond)        s = 1: the conditional prior, 0: the unconditional one, more: insists

Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022); over tokens as in Gafni et al., "Make-A-Scene" (2022).
"""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

from torch import Tensor

from stage1_tokenizer.engine.errors import ConfigError
from stage2_prior.base import BasePriorConfig

GuidanceSchedule = Literal["constant", "linear", "cosine", "interval"]


@dataclass(frozen=True)
class Guidance:
    """A scale, and how it depends on `progress`: the share in [0, 1] of the picture's positions that lie before."""

    scale: float = 1.0
    schedule: GuidanceSchedule = "constant"
    interval: tuple[float, float] = (0.0, 1.0)
    """For schedule "interval": where the scale applies, both ends included."""

    @property
    def is_needed(self) -> bool:
        """Whether any position wants the logits of no class."""
        return self.scale != 1.0

    def at(self, progress: float) -> float:
        """The scale at a position.

        linear and cosine rise from 1 to `scale`: early positions lay out the picture and keep their variety, late ones
        insist (Chang et al., "Muse", 2023, section 2.7, and Gao et al., "MDTv2", 2023, their power-cosine). interval is
        1 outside (Kynkaanniemi et al., "Applying Guidance in a Limited Interval", 2024).
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


def mix(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Logits (B, V) twice -> (B, V); at scale 1 and 0 bit for bit one of the two."""
    if scale == 1.0:
        return conditional
    if scale == 0.0:
        return unconditional
    return unconditional + scale * (conditional - unconditional)


def check_guidance(config: BasePriorConfig, classes: int, guidance: Guidance) -> None:
    """Raises ConfigError where guidance is asked of a prior that does not know images both with and without a class."""
    if guidance.is_needed and (classes == 0 or config.label_dropout == 0.0):
        reason = "has no classes" if classes == 0 else "was trained with label_dropout 0"
        raise ConfigError(
            f"guidance {guidance.scale}: this prior {reason}, so it does not know images without a class; use "
            "guidance 1"
        )
