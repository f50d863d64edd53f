"""Prior `bag`: a position knows the sum of the codes before it, and not their order."""

from typing import Literal

from torch import Tensor, nn

from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.base import BasePriorConfig, ContextsDecoder, Grid, Prior
from stage2_prior.products import Precision


class BagConfig(BasePriorConfig):
    """Sums of embedded codes, and one layer."""

    kind: Literal["bag"] = "bag"


class Bag(Prior):
    """Prior over codes of one TokenShape."""

    def __init__(self, config: BagConfig, shape: TokenShape, classes: int) -> None:
        super().__init__(config, shape, classes)
        self.label = nn.Embedding(classes + 1, config.width)
        self.layer = nn.Sequential(nn.Linear(config.width, config.width), nn.Tanh())

    def contexts(self, embedded: Tensor, labels: Tensor, grid: Grid) -> Tensor:
        before = embedded.cumsum(dim=1) - embedded
        contexts: Tensor = self.layer(before + self.label(labels)[:, None])
        return contexts

    def contexts_decoder(self, precision: Precision) -> ContextsDecoder:
        return lambda labels, grid: BagContexts(self, labels)


class BagContexts:
    """The sum so far."""

    def __init__(self, bag: Bag, labels: Tensor) -> None:
        self._bag, self._sum = bag, bag.label(labels)

    def next(self) -> Tensor:
        context: Tensor = self._bag.layer(self._sum)
        return context

    def take(self, embedded: Tensor) -> None:
        self._sum = self._sum + embedded.sum(dim=1)
