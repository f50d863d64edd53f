"""Alarms: warnings with advice about a training that goes wrong but does not stop, read from its log.

    alarms.look(step, scalars)      called for each log entry, in order -> (name, message) of each alarm that begins

An alarm begins when several entries in a row show the problem. It ends when as many entries in a row do not show it;
only then can it begin again. Alarms depend on the log entries alone, so a resumed run that reads its old entries goes
on with the same alarms.
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
"""Steps, in addition to twice the warm-up, in which codes and latents adapt to each other; alarms about them wait.
k-means spreads the codes over the latents of an untrained encoder. In the quickstart, perplexity is 30 in the first ten
steps and 1.6 in the next ten, then it rises; the commitment term grows two hundredfold from near 0."""


def build_alarms(
    bottleneck: BottleneckConfig, adversarial: AdversarialConfig, optim: OptimConfig, codes: CodeCounts
) -> Alarms:
    """Build the alarms that apply to this run's bottleneck and losses."""
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
