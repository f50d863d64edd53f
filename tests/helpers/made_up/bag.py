"""Prior `bag`: the context of a position is the sum of the earlier codes, without their order."""

from typing import Literal

from torch import Tensor, nn

from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.base import BasePriorConfig, Generation, Grid, PreparedPrior, Prior
from stage2_prior.fast_linear import Precision


class BagConfig(BasePriorConfig):
    """A prior of one layer over the sum of the embedded codes."""

    kind: Literal["bag"] = "bag"


class Bag(Prior):
    """Prior over codes of one TokenShape."""

    def __init__(self, config: BagConfig, shape: TokenShape, classes: int) -> None:
        super().__init__(config, shape, classes)
        self.label = nn.Embedding(classes + 1, config.width)
        self.layer = nn.Sequential(nn.Linear(config.width, config.width), nn.Tanh())

    def contexts(self, embedded: Tensor, labels: Tensor, grid: Grid) -> Tensor:
        """Return the context of each position, from the label and the sum of the earlier codes."""
        before = embedded.cumsum(dim=1) - embedded
        contexts: Tensor = self.layer(before + self.label(labels)[:, None])
        return contexts

    def prepare(self, precision: Precision = "float32") -> PreparedPrior:
        """Return the prior for generation; every precision is computed in float32."""
        return PreparedBag(self, precision)


class PreparedBag(PreparedPrior):
    """The prior itself, without any preparation."""

    prior: Bag

    def _begin(self, labels: Tensor, grid: Grid) -> Generation:
        return BagGeneration(self, labels)


class BagGeneration(Generation):
    """Generation state: the sum of the codes so far."""

    def __init__(self, prepared: PreparedBag, labels: Tensor) -> None:
        super().__init__(prepared)
        self._bag, self._sum = prepared.prior, prepared.prior.label(labels)

    def _next_context(self) -> Tensor:
        context: Tensor = self._bag.layer(self._sum)
        return context

    def _add_positions(self, embedded: Tensor) -> None:
        self._sum = self._sum + embedded.sum(dim=1)
