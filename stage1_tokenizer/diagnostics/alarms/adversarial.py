"""Alarms about the adversarial training: the discriminator's loss and logits, and the adaptive weight lambda."""

import math

from stage1_tokenizer.diagnostics.alarms.base import Alarm, LogEntry
from stage1_tokenizer.objective import LARGEST_WEIGHT, AdversarialConfig

UNDECIDED = {"hinge": 1.0, "vanilla": math.log(2.0)}
"""The discriminator's loss where all its logits are 0: it guesses."""


class LambdaAtItsClamp(Alarm):
    """The adaptive weight lambda is at one of its limits, so it is no longer the ratio of two gradients."""

    name = "lambda at its clamp"
    reads = ("train/lambda",)

    def __init__(self, adversarial: AdversarialConfig) -> None:
        self._largest = adversarial.weight * LARGEST_WEIGHT

    def look(self, entry: LogEntry) -> str | None:
        """Return a message if lambda is 0 or at its upper limit."""
        value = entry.scalars["train/lambda"]
        if 0.0 < value < 0.999 * self._largest:  # 0.999: lambda is a rounded mean over processes
            return None
        if value <= 0.0:
            return (
                "lambda is 0: the pixel and perceptual losses have no gradient at the decoder's last layer, so the "
                "discriminator has no influence either. Check that --pixel.l1, --pixel.l2 or --perceptual.weight is "
                "above 0, and that the reconstructions in samples/ have more than one colour"
            )
        return (
            f"lambda is {value:.4g}, its upper limit: the discriminator's gradient has vanished, and lambda multiplies "
            "what is left, which is noise. Try: start the discriminator later (a larger --adversarial.start), lower "
            "--adversarial.lr, or use a fixed weight (--no-adversarial.adaptive)"
        )


class DiscriminatorWinning(Alarm):
    """The discriminator tells every reconstruction from every image, with a large margin."""

    name = "discriminator winning"
    reads = ("discriminator/total", "discriminator/logits_real", "discriminator/logits_fake")
    entries = 5
    # Share of the loss at logits 0. Below it, logits are 1.8 apart (hinge) or 5 apart (vanilla); a balanced training
    # has a share of 0.4 to 0.9 (docs/real_data.md: 0.4 to 0.7 on flowers).
    NEAR_0 = 0.1

    def __init__(self, adversarial: AdversarialConfig) -> None:
        self._undecided = UNDECIDED[adversarial.loss]

    def look(self, entry: LogEntry) -> str | None:
        """Return a message if the discriminator's loss is near 0."""
        loss, real, fake = (entry.scalars[name] for name in self.reads)
        if loss >= self.NEAR_0 * self._undecided or real <= fake:
            return None
        return (
            f"the discriminator's loss is {loss:.4g} (guessing gives {self._undecided:.4g}), its logits are {real:.3g} "
            f"for images and {fake:.3g} for reconstructions: it rejects everything that the decoder makes, so its "
            "gradient does not show the decoder what is better. Try: lower --adversarial.lr or --adversarial.weight, "
            "start it later (a larger --adversarial.start), or make it smaller (--adversarial.discriminator.channels)"
        )


class DiscriminatorSilent(Alarm):
    """The discriminator has not learned to tell reconstructions from images."""

    name = "discriminator silent"
    reads = DiscriminatorWinning.reads
    entries = 5
    MARGIN = 0.02  # share of the loss at logits 0; under hinge, logits 0.04 apart. One batch changes a loss by more
    # Steps. A healthy one tells them apart after 100. On CIFAR-10 (docs/recipe.md) one that guessed for 600 steps made
    # reconstructions worse than none: Frechet distance 124 against 97.
    LONG_ENOUGH = 300

    def __init__(self, adversarial: AdversarialConfig) -> None:
        self._undecided, self._start = UNDECIDED[adversarial.loss], adversarial.start

    def look(self, entry: LogEntry) -> str | None:
        """Return a message if the discriminator still guesses long after its start."""
        loss, real, fake = (entry.scalars[name] for name in self.reads)
        steps = entry.step - self._start
        # A loss above that of guessing counts too, unless the logits are far apart: then it tells them apart, wrongly.
        if steps < self.LONG_ENOUGH or loss < (1 - self.MARGIN) * self._undecided or abs(real - fake) > 0.1:
            return None
        return (
            f"the discriminator still guesses {steps} steps after its start: its loss is {loss:.4g} (guessing gives "
            f"{self._undecided:.4g}), its logits are {real:.3g} for images and {fake:.3g} for reconstructions. Its "
            "gradient is noise, which lambda may amplify. Try: raise --adversarial.lr (and --optim.final_lr, if the "
            "schedule has made the learning rate too small) or --adversarial.discriminator.channels; give it a small "
            "fixed weight (--no-adversarial.adaptive --adversarial.weight 0.1); or train without it "
            "(--adversarial.weight 0), which is faster"
        )
