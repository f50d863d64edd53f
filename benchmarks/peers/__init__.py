"""What people would use instead, brought to one form: GPTs over the codes of an image that start from its class."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Size:
    """Of a GPT over a square grid of codes."""

    layers: int = 12
    width: int = 512
    heads: int = 8
    side: int = 16
    vocabulary: int = 1024
    classes: int = 10
    top_k: int = 100

    @property
    def tokens(self) -> int:
        """Of one image."""
        return self.side**2

    @property
    def gated(self) -> int:
        """Inner width of a feed-forward network of three matrices that has the weights of two of 4 * width."""
        return round(self.width * 8 / 3)

    @property
    def matrix_weights(self) -> int:
        """Weights that every token is multiplied with: attention, feed-forward networks, logits."""
        return self.layers * 12 * self.width**2 + self.width * self.vocabulary


class Peer(Protocol):
    """A model with random weights and its own way to sample from itself."""

    def generate(self, labels: Tensor, tokens: int, greedy: bool = False, cached: bool = True) -> Tensor:
        """Ids (B, tokens) for labels (B,), drawn from the top_k likeliest, or each the likeliest."""
        ...
