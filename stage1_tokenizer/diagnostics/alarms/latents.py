"""Alarms about the bottleneck: unused codes, latents that carry no information, latents that grow without limit."""

import math
from collections import deque
from statistics import median
from typing import NamedTuple

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.data.base import Split
from stage1_tokenizer.data.record import format_count
from stage1_tokenizer.diagnostics.alarms.base import Alarm, LogEntry

SETTLED = 1000
"""Steps until codes that the encoder left behind in its first steps are in use again: with a decay of 0.99, a count of
up to 1000 uses a step is below 0.05 by then. (In the quickstart 10 % are in use at step 100, 65 % at 300, 77 % at 650,
96 % at 975.)"""
TOKENS_PER_CODE = 30
"""Tokens per code that are needed to judge usage. A code with a tenth of its fair share is absent from as many tokens
with a probability of exp(-3), 5 %. With fewer tokens a healthy codebook would look unused."""
TOKENS_PER_PERPLEXITY = 5
"""Tokens per used code that are needed to judge perplexity: n tokens of K codes underestimate it by a factor of
exp(-K / 2n), here 0.9."""


class CodeCounts(NamedTuple):
    """The codebook's size and the numbers of tokens per codebook from which its use is judged."""

    size: int
    """V; 0: the bottleneck is continuous."""
    per_step: int
    """Tokens in one training step, over all processes."""
    validation: int
    """Tokens in the validation split."""

    def few_vectors_message(self, bottleneck: BottleneckConfig) -> str | None:
        """Return a message if the first batch has fewer latents than k-means has codes to start, else None."""
        if not bottleneck.starts_from_batch or self.per_step >= self.size:
            return None
        return (
            f"the codebook starts from {self.per_step:,} latents, but has {self.size:,} codes: the other codes start "
            "at random and must be revived. Try: raise --batch_size, or lower --bottleneck.codebook_size"
        )


class Collapse(Alarm):
    """Most tokens are one of a few codes."""

    name = "collapse"
    reads = ("train/code_usage", "train/code_perplexity")
    FALLEN = 0.5  # share of the best perplexity; a new discriminator or a revived code lowers a healthy run far less
    ONE_CODE = 1.05  # 99.3 % of the tokens are one code; drawn shapes, mostly background, have at least 1.6

    def __init__(self, bottleneck: BottleneckConfig, codes: CodeCounts, beginning: int) -> None:
        self._bottleneck, self._codes, self._beginning, self._best = bottleneck, codes, beginning, 0.0

    def look(self, entry: LogEntry) -> str | None:
        """Return a message if perplexity is near 1, or less than half of its best value."""
        usage, perplexity = (entry.scalars[name] for name in self.reads)
        is_enough = entry.interval * self._codes.per_step >= TOKENS_PER_PERPLEXITY * self._best
        if entry.step > self._beginning and is_enough:
            self._best = max(self._best, perplexity)
        has_fallen = is_enough and perplexity < self.FALLEN * self._best
        if not has_fallen and (perplexity > self.ONE_CODE or self._codes.size == 1):
            return None
        best = f" (its best was {self._best:.4g})" if has_fallen else ""
        return (
            f"the perplexity of the codes is {perplexity:.4g}{best}, with {usage * self._codes.size:,.0f} of "
            f"{self._codes.size:,} codes used in the last {format_count(entry.interval, 'step')}: the codes say little "
            "about the image, and the decoder can draw only what they say. If the training images are not all alike, "
            f"and PSNR on validation does not rise, try: {codebook_advice(self._bottleneck)}"
        )


class DeadCodes(Alarm):
    """More than half of the codebook is never used in one split."""

    name = "dead codes"
    USED = 0.5  # below it, a codebook of half the size would do; our trials on photographs end above 90 %

    def __init__(self, split: Split, bottleneck: BottleneckConfig, codes: CodeCounts) -> None:
        self.reads = (f"{split}/code_usage",)
        self._split, self._bottleneck, self._codes = split, bottleneck, codes

    def look(self, entry: LogEntry) -> str | None:
        """Return a message if enough tokens were seen and less than half of the codes are among them."""
        usage, size = entry.scalars[self.reads[0]], self._codes.size
        tokens = self._codes.validation if self._split == "validation" else entry.interval * self._codes.per_step
        if entry.step < SETTLED or tokens < TOKENS_PER_CODE * size or usage >= self.USED:
            return None
        return (
            f"{(1 - usage) * size:,.0f} of {size:,} codes ({1 - usage:.1%}) do not occur among {tokens:,} tokens of "
            f"{self._split} images: they take memory and make the prior larger, and carry no information. Try: "
            f"{codebook_advice(self._bottleneck)}, or a smaller codebook, which is no worse as long as these codes are "
            "unused"
        )


class DeadCodesInValidation(DeadCodes):
    """Dead codes in the validation split. One entry is enough, since it covers the whole split."""

    entries = 1


class CommitmentExploding(Alarm):
    """The latents move away from the codebook vectors faster than these can follow."""

    name = "commitment exploding"
    reads = ("train/commitment",)
    entries = 4
    MANY_TIMES = 10.0  # times the median. A healthy quickstart is above it for two entries in a row, then falls again
    REMEMBERED = 100  # entries in the median

    def __init__(self, bottleneck: BottleneckConfig, beginning: int) -> None:
        self._advice, self._beginning = join_advice(["lower --optim.lr", *bottleneck.advice("commitment")]), beginning
        self._earlier: deque[float] = deque(maxlen=self.REMEMBERED)

    def look(self, entry: LogEntry) -> str | None:
        """Return a message if the commitment term is far above its usual value and still rises."""
        value = entry.scalars["train/commitment"]
        if entry.step <= self._beginning:  # latents begin near 0, and so does their distance from the codes
            return None
        usual = median(self._earlier) if len(self._earlier) >= self.entries else math.inf
        is_rising = bool(self._earlier) and value > self._earlier[-1]
        self._earlier.append(value)
        if value <= self.MANY_TIMES * usual or not is_rising:
            return None
        return (
            f"the commitment loss is {value:.4g} and rising, {value / usual:.3g} times its usual {usual:.4g}: the "
            "latents grow faster than the codebook vectors can follow, and the decoder sees ever coarser latents. "
            f"Try: {self._advice}"
        )


class PosteriorCollapse(Alarm):
    """No channel of a variational latent carries information about the image."""

    name = "posterior collapse"
    reads = ("train/active_channels", "train/kl")
    ACTIVE = 0.01  # share of the channels; of the usual 4 to 64 channels this means none

    def __init__(self, bottleneck: BottleneckConfig, beginning: int) -> None:
        self._advice, self._beginning = join_advice(bottleneck.advice("posterior")), beginning

    def look(self, entry: LogEntry) -> str | None:
        """Return a message if no channel is active."""
        active, kl = (entry.scalars[name] for name in self.reads)
        if entry.step <= self._beginning or active >= self.ACTIVE:
            return None
        return (
            f"no channel of the latent is active (KL divergence {kl:.3g} nats per image): the decoder gets noise for "
            f"every image, and draws the mean of all images. Try: {self._advice}"
        )


def codebook_advice(bottleneck: BottleneckConfig) -> str:
    """Return options of this bottleneck that bring unused codes into use, as text."""
    return ", ".join([*bottleneck.advice("unused codes"), "a lower --optim.lr"])


def join_advice(advice: list[str]) -> str:
    """Join pieces of advice: `do this, do that, or do the other`."""
    return ", ".join([*advice[:-2], ", or ".join(advice[-2:])])
