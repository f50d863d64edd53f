"""Alarms of the game between decoder and discriminator."""

import math

from stage1_tokenizer.diagnostics.alarms.base import Alarm, LogEntry
from stage1_tokenizer.objective import LARGEST_WEIGHT, AdversarialConfig

UNDECIDED = {"hinge": 1.0, "vanilla": math.log(2.0)}
"""The discriminator's loss at logits 0."""


class LambdaAtItsClamp(Alarm):
    """The adaptive weight is no longer a ratio of two gradients."""

    name = "lambda at its clamp"
    reads = ("train/lambda",)

    def __init__(self, adversarial: AdversarialConfig) -> None:
        self._largest = adversarial.weight * LARGEST_WEIGHT

    def look(self, entry: LogEntry) -> str | None:
        value = entry.scalars["train/lambda"]
        if 0.0 < value < 0.999 * self._largest:  # of a mean over processes, rounded
            return None
        if value <= 0.0:
            return (
                "lambda is 0: pixels and perceptual loss have no gradient at the decoder's last layer, so that the "
                "discriminator has no say either. Are --pixel.l1, --pixel.l2 or --perceptual.weight above 0, and are "
                "the reconstructions (samples/) more than one colour?"
            )
        return (
            f"lambda is {value:.4g}, the largest allowed: the discriminator's gradient has vanished, and what noise is "
            "left of it is multiplied by that. Let the tokenizer learn before it (a larger --adversarial.start), "
            "give it a lower --adversarial.lr, or take a fixed weight with --no-adversarial.adaptive"
        )


class DiscriminatorWinning(Alarm):
    """It tells every reconstruction from every image, and by a margin."""

    name = "discriminator winning"
    reads = ("discriminator/total", "discriminator/logits_real", "discriminator/logits_fake")
    entries = 5
    # Of the loss at logits 0. So low a hinge loss needs logits that are 1.8 apart, a vanilla one 5; a balanced game has
    # 0.4 to 0.9 (docs/real_data.md: 0.4 to 0.7 on flowers).
    NEAR_0 = 0.1

    def __init__(self, adversarial: AdversarialConfig) -> None:
        self._undecided = UNDECIDED[adversarial.loss]

    def look(self, entry: LogEntry) -> str | None:
        loss, real, fake = (entry.scalars[name] for name in self.reads)
        if loss >= self.NEAR_0 * self._undecided or real <= fake:
            return None
        return (
            f"the discriminator's loss is {loss:.4g} ({self._undecided:.4g} would be a guess), its logits {real:.3g} "
            f"for images and {fake:.3g} for reconstructions: it rejects whatever the decoder does, and its gradient "
            "does not say what would be better. Lower --adversarial.lr or --adversarial.weight, begin later with a "
            "larger --adversarial.start, or make it smaller with --adversarial.discriminator.channels"
        )


class DiscriminatorSilent(Alarm):
    """It has not learned to tell anything."""

    name = "discriminator silent"
    reads = DiscriminatorWinning.reads
    entries = 5
    MARGIN = 0.02  # of the loss at logits 0: under hinge, logits that are 0.04 apart. A loss moves more in one batch
    # Steps. On CIFAR-10 (docs/real_data.md) 500 steps of a falling 2e-4 taught it nothing yet, and nothing was wrong.
    LONG_ENOUGH = 1000

    def __init__(self, adversarial: AdversarialConfig) -> None:
        self._undecided, self._start = UNDECIDED[adversarial.loss], adversarial.start

    def look(self, entry: LogEntry) -> str | None:
        loss, real, fake = (entry.scalars[name] for name in self.reads)
        learning = entry.step - self._start
        # From above too: what is worse than a guess tells nothing either, unless the logits are far apart.
        if learning < self.LONG_ENOUGH or loss < (1 - self.MARGIN) * self._undecided or abs(real - fake) > 0.1:
            return None
        return (
            f"{learning} steps after its start the discriminator still guesses: its loss is {loss:.4g} (logits 0 give "
            f"{self._undecided:.4g}), its logits {real:.3g} and {fake:.3g}. Its gradient is noise, which lambda may "
            "blow up. Raise --adversarial.lr (and --optim.final_lr, if the schedule has starved it), or "
            "--adversarial.discriminator.channels; else --adversarial.weight 0 saves its time"
        )
