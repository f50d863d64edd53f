"""Alternatives to our priors, with one interface: GPTs over the codes of an image, which begin with its class."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Size:
    """Size of a GPT over a square grid of codes."""

    layers: int = 12
    width: int = 512
    heads: int = 8
    side: int = 16
    vocabulary: int = 1024
    classes: int = 10
    top_k: int = 100

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.side**2

    @property
    def gated(self) -> int:
        """Inner width of a feed-forward network of three matrices that has the weights of two of 4 * width."""
        return round(self.width * 8 / 3)

    @property
    def matrix_weights(self) -> int:
        """Weights of the matrices that every token is multiplied with: attention, feed-forward networks, logits."""
        return self.layers * 12 * self.width**2 + self.width * self.vocabulary


SECOND = Size(layers=4, width=128, heads=4, side=8, vocabulary=256)
"""A second size, about the quickstart's, for a table of its own."""


class Peer(Protocol):
    """A model with random weights that can sample."""

    def generate(self, labels: Tensor, tokens: int, greedy: bool = False, cached: bool = True) -> Tensor:
        """Return codes (B, tokens) for labels (B,), drawn from the top_k likeliest; greedy: always the likeliest."""
        ...
