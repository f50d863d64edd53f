"""Alarms of the bottleneck: its codes are not used, or its latents say nothing or run away."""

import math
from collections import deque
from statistics import median
from typing import NamedTuple

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.data.image_batches import Split
from stage1_tokenizer.diagnostics.alarms.base import Alarm, LogEntry

SETTLED = 1000
"""Steps until codes that were left behind by an encoder in its first steps are in use again: with a decay of 0.99, a
count of up to 1000 uses a step is below 0.05 by then. (In use in the quickstart 10 % at step 100, 65 % at 300, 77 % at
650, 96 % at 975.)"""
TOKENS_PER_CODE = 30
"""Tokens per code from which usage can be judged: a code with a tenth of its fair share is missed by as many tokens
with a probability of exp(-3), 5 %; by fewer, a healthy codebook would look unused."""
TOKENS_PER_PERPLEXITY = 5
"""Tokens per code in use from which perplexity can: n tokens of K codes give a factor of exp(-K / 2n), 0.9, too few."""


class CodeCounts(NamedTuple):
    """How many codes there are, and how many are seen (of each codebook, where there are several)."""

    size: int
    """V; 0: the bottleneck is continuous."""
    per_step: int
    """In a training step, by all processes."""
    validation: int
    """In the validation split."""

    def few_vectors_message(self, bottleneck: BottleneckConfig) -> str | None:
        """What to say before the first step where k-means has fewer vectors than it is to make codes of."""
        if not bottleneck.starts_from_batch or self.per_step >= self.size:
            return None
        return (
            f"the codebook starts from {self.per_step:,} latents, but has {self.size:,} codes: the others start at "
            "random and have to be revived. Raise batch_size, or lower bottleneck.codebook_size"
        )


class Collapse(Alarm):
    """Most tokens have become one of few codes."""

    name = "collapse"
    reads = ("train/code_usage", "train/code_perplexity")
    FALLEN = 0.5  # of the best; what a new discriminator or a revived code does to a healthy run is far less
    ONE_CODE = 1.05  # 99.3 % of the tokens are one code; drawn shapes, mostly background, have 1.6 at their worst

    def __init__(self, bottleneck: BottleneckConfig, codes: CodeCounts, beginning: int) -> None:
        self._bottleneck, self._codes, self._beginning, self._best = bottleneck, codes, beginning, 0.0

    def look(self, entry: LogEntry) -> str | None:
        usage, perplexity = (entry.scalars[name] for name in self.reads)
        enough = entry.interval * self._codes.per_step >= TOKENS_PER_PERPLEXITY * self._best
        if entry.step > self._beginning and enough:
            self._best = max(self._best, perplexity)
        fallen = enough and perplexity < self.FALLEN * self._best
        if not fallen and (perplexity > self.ONE_CODE or self._codes.size == 1):
            return None
        return (
            f"code perplexity {perplexity:.4g}{f', {self._best:.4g} at its best' if fallen else ''}, {usage:.2%} of "
            "the codebook in use. The codes say little about the image, and the decoder can only draw what they say. "
            f"If the images are not all alike: {codebook_advice(self._bottleneck)}"
        )


class DeadCodes(Alarm):
    """A large part of the codebook is never used."""

    name = "dead codes"
    USED = 0.5  # below it a codebook of half the size would do; our trials on photographs end above 90 %

    def __init__(self, split: Split, bottleneck: BottleneckConfig, codes: CodeCounts) -> None:
        self.reads = (f"{split}/code_usage",)
        self._split, self._bottleneck, self._codes = split, bottleneck, codes

    def look(self, entry: LogEntry) -> str | None:
        usage = entry.scalars[self.reads[0]]
        seen = self._codes.validation if self._split == "validation" else entry.interval * self._codes.per_step
        if entry.step < SETTLED or seen < TOKENS_PER_CODE * self._codes.size or usage >= self.USED:
            return None
        return (
            f"{1 - usage:.1%} of the {self._codes.size} codes were not used once among {seen:,} tokens of the "
            f"{self._split} images. They cost memory and the prior's attention, and carry nothing: "
            f"{codebook_advice(self._bottleneck)}, or a smaller codebook, which loses nothing then"
        )


class DeadCodesInValidation(DeadCodes):
    entries = 1  # the whole split, every time: no chance is in it


class CommitmentExploding(Alarm):
    """The encoder runs away from the codes."""

    name = "commitment exploding"
    reads = ("train/commitment",)
    entries = 4
    MANY_TIMES = 10.0  # the median. A healthy quickstart rises so high for two entries in a row, then falls again
    REMEMBERED = 100  # entries

    def __init__(self, bottleneck: BottleneckConfig, beginning: int) -> None:
        self._advice, self._beginning = sentence(["lower --optim.lr", *bottleneck.advice("commitment")]), beginning
        self._earlier: deque[float] = deque(maxlen=self.REMEMBERED)

    def look(self, entry: LogEntry) -> str | None:
        value = entry.scalars["train/commitment"]
        if entry.step <= self._beginning:  # latents begin near 0, and so does their distance from the codes
            return None
        usual = median(self._earlier) if len(self._earlier) >= self.entries else math.inf
        rising = bool(self._earlier) and value > self._earlier[-1]
        self._earlier.append(value)
        if value <= self.MANY_TIMES * usual or not rising:
            return None
        return (
            f"the commitment term is {value:.4g}, {value / usual:.3g} times its usual {usual:.4g}, and rising: latents "
            f"grow faster than the codes can follow, and the decoder sees ever coarser ones. {self._advice}"
        )


class PosteriorCollapse(Alarm):
    """No channel of a variational latent says anything about the image."""

    name = "posterior collapse"
    reads = ("train/active_channels", "train/kl")
    ACTIVE = 0.01  # share of channels: of the usual 4 to 64, none

    def __init__(self, bottleneck: BottleneckConfig, beginning: int) -> None:
        self._advice, self._beginning = sentence(bottleneck.advice("posterior")), beginning

    def look(self, entry: LogEntry) -> str | None:
        active, kl = (entry.scalars[name] for name in self.reads)
        if entry.step <= self._beginning or active >= self.ACTIVE:
            return None
        return (
            f"no channel of the latent is active, the KL is {kl:.3g} nats per image: whatever the image, the decoder "
            f"gets noise, and draws the mean of all. {self._advice}"
        )


def codebook_advice(bottleneck: BottleneckConfig) -> str:
    """Return what keeps codes in use."""
    return ", ".join([*bottleneck.advice("unused codes"), "a lower --optim.lr"])


def sentence(advice: list[str]) -> str:
    """Return advice as a sentence: `Do this, do that, or that`."""
    text = ", ".join([*advice[:-2], ", or ".join(advice[-2:])])
    return text[:1].upper() + text[1:]
