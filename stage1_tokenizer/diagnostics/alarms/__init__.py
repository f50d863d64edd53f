"""Alarms with advice: what goes wrong in a training that goes on all the same, read off its log.

    alarms.look(step, scalars)      each log entry, in order -> (name, message) of each alarm that begins with it

An alarm begins once what it looks for has been seen in several entries in a row, and is over after as many without it;
only then can it begin again. All follows from the entries, so a resumed run is given those in its log, and goes on.
"""

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.diagnostics.alarms.adversarial import DiscriminatorSilent, DiscriminatorWinning, LambdaAtItsClamp
from stage1_tokenizer.diagnostics.alarms.base import Alarm, Alarms
from stage1_tokenizer.diagnostics.alarms.latents import (
    CodeCounts,
    Collapse,
    CommitmentExploding,
    DeadCodes,
    DeadCodesInValidation,
    PosteriorCollapse,
)
from stage1_tokenizer.engine.optim import OptimConfig
from stage1_tokenizer.objective import AdversarialConfig

BEGINNING = 100
"""Steps, beside twice the warm-up, in which codes and latents find each other. k-means spreads the codes over the
latents of an untrained encoder: in the quickstart perplexity is 30 in the first ten steps, 1.6 in the next, then rises,
and the commitment term grows two hundredfold from near 0."""


def build_alarms(
    bottleneck: BottleneckConfig, adversarial: AdversarialConfig, optim: OptimConfig, codes: CodeCounts
) -> Alarms:
    """Those that have a meaning in this run."""
    beginning = BEGINNING + 2 * optim.warmup_steps
    alarms: list[Alarm] = [CommitmentExploding(bottleneck, beginning), PosteriorCollapse(bottleneck, beginning)]
    if codes.size:
        alarms.append(Collapse(bottleneck, codes, beginning))
        alarms.append(DeadCodesInValidation("validation", bottleneck, codes))
        alarms.append(DeadCodes("train", bottleneck, codes))
    if adversarial.weight:
        alarms += [DiscriminatorWinning(adversarial), DiscriminatorSilent(adversarial)]
        alarms += [LambdaAtItsClamp(adversarial)] if adversarial.adaptive else []
    return Alarms(alarms)
