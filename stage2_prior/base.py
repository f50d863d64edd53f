"""What a prior is: a distribution over the codes of images, given a class. It factorises position by position,
row-major, and within a position code by code (Lee et al., "Autoregressive Image Generation using Residual
Quantization", 2022, equation 5):

    p(codes | label) = product over positions t, depths k of  p(codes[t, k] | codes[< t], codes[t, < k], label)

    codes (B, h, w, K) -> embedding -> contexts (B, h*w, width) -> head -> logits (B, h*w*K, V)

The context of a position knows all codes before the position; a kind of prior (`gpt.py`, `pixelcnn.py`) is a way to
compute contexts. The head (`head.py`) turns a context, and the position's own codes so far, into logits. So training,
likelihood and sampling share one factorisation, for both kinds and for any K.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol, Self

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from stage1_tokenizer.config.base import Channels, Config, Count
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.head import build_head
from stage2_prior.products import Precision

Grid = tuple[int, int]
"""Rows and columns of codes."""


class BasePriorConfig(Config):
    """What every kind of prior has."""

    width: Channels = 128
    """Channels of embeddings and contexts."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the activations that training drops, wherever the kind does so."""
    label_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the training images whose class is withheld, so that guidance can compare; 0: no guidance."""
    depth_layers: Count = 2
    """Count of the transformer over the K codes of a position, where the tokenizer has several (rvq and its kin)."""

    # Facts that planning (plan.py) asks of a kind. The defaults hold for a kind without a decoder of its own making.
    copies_weights: ClassVar[bool] = False
    """True if decoding holds the weights a second time, prepared."""
    replays: ClassVar[bool] = False
    """True if a GPU replays the decoding of a position as one CUDA graph."""
    decodes_on_one_thread: ClassVar[bool] = False
    """True if decoding few images computes its small products on one thread of the CPU."""
    decodes_by_row: ClassVar[bool] = True
    """True if positions of one row differ in their work; False: each position has the same."""

    @property
    def computes_layers_twice(self) -> bool:
        """True if training computes each layer again in the backward pass."""
        return False

    def cached_numbers(self, grid: Grid) -> int:
        """Return the count of the numbers that decoding one image keeps; by default an embedding of each position."""
        return grid[0] * grid[1] * self.width

    def smallest(self) -> Self:
        """Return the same kind in so small a size that its time is that of the calls into torch."""
        return self.model_copy(update={"width": 16})


class Contexts(Protocol):
    """Contexts one after the other, while codes come in: what a kind of prior keeps between two positions."""

    def next(self) -> Tensor:
        """(B, width): the context of the first position whose codes are not known yet."""
        ...

    def take(self, embedded: Tensor) -> None:
        """The embedded codes (B, n, width) of the next n positions."""
        ...


ContextsDecoder = Callable[[Tensor, Grid], Contexts]
"""Begins contexts for labels (B,), on a grid."""


class Prior(nn.Module, ABC):
    """A prior over codes of one TokenShape, for images of `classes` classes (0: unconditional)."""

    def __init__(self, config: BasePriorConfig, shape: TokenShape, classes: int) -> None:
        super().__init__()
        self.config, self.shape, self.classes = config, shape, classes
        width = config.width
        # Row k * V + c is code c at depth k.
        self.embedding = nn.Embedding(shape.K * shape.V, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.head = build_head(width, config.depth_layers, shape)

    @property
    def null_label(self) -> int:
        """The label that stands for "no class given"."""
        return self.classes

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """codes (B, h, w, K) in 0..V-1, labels (B,) in 0..classes -> logits (B, L, V).

        The grid may be smaller than the trained one, as a window's is, but not larger.
        """
        grid = self._checked((codes.shape[1], codes.shape[2]))
        embedded = self.embed(rearrange(codes, "B h w K -> B (h w) K"))  # (B, h*w, K, width)
        contexts = self.contexts(embedded.sum(dim=2), labels, grid)  # (B, h*w, width)
        return rearrange(self.head(contexts, embedded), "B p K V -> B (p K) V")

    def embed(self, codes: Tensor) -> Tensor:
        """The first k codes of positions, (..., k) -> (..., k, width)."""
        if codes.shape[-1] > 1:
            codes = codes + torch.arange(codes.shape[-1], device=codes.device) * self.shape.V
        embedded: Tensor = self.embedding(codes)
        return embedded

    def decoder(self, precision: Precision = "float32") -> "Decoder":
        """Prepare to decode with the present weights; a change of them afterwards does not count.

        Raises:
            ConfigError: this kind of prior does not decode in this precision here.
        """
        return Decoder(self, precision)

    def begin(self, labels: Tensor, grid: Grid | None = None) -> "Decoding":
        """Decode once, in float32: see Decoder.begin."""
        return self.decoder().begin(labels, grid)

    @abstractmethod
    def contexts(self, embedded: Tensor, labels: Tensor, grid: Grid) -> Tensor:
        """Embedded positions (B, h*w, width) -> contexts (B, h*w, width); that of position t knows those before t."""

    @abstractmethod
    def contexts_decoder(self, precision: Precision) -> ContextsDecoder:
        """What computes the same contexts one by one, each from what was kept of the former ones."""

    def _checked(self, grid: Grid) -> Grid:
        assert 0 < grid[0] <= self.shape.h, f"{grid[0]} rows, trained on {self.shape.h}"
        assert 0 < grid[1] <= self.shape.w, f"{grid[1]} columns, trained on {self.shape.w}"
        return grid


class Decoder:
    """A prior whose weights are prepared for decoding, for as many generations as wanted, one after the other."""

    def __init__(self, prior: Prior, precision: Precision) -> None:
        self.prior, self.precision = prior, precision
        self.contexts = prior.contexts_decoder(precision)
        self.next_logits = prior.head.decoder(precision)

    def begin(self, labels: Tensor, grid: Grid | None = None) -> "Decoding":
        """Start to decode sequences of these labels (B,), on the trained grid or a smaller one."""
        shape = self.prior.shape
        return Decoding(self, labels, self.prior._checked(grid or (shape.h, shape.w)))


class Decoding:
    """A generation under way: codes go in one by one, or several positions at once; logits of the next one come out."""

    def __init__(self, decoder: Decoder, labels: Tensor, grid: Grid) -> None:
        self._prior, self._next_logits = decoder.prior, decoder.next_logits
        self._contexts = decoder.contexts(labels, grid)
        self._context: Tensor | None = None  # (B, width) of the present position, once somebody asked
        self._chosen: list[Tensor] = []  # (B,) each: the present position's codes so far

    def logits(self) -> Tensor:
        """(B, V) float32 for the next code."""
        if self._context is None:
            self._context = self._contexts.next()
        chosen = self._prior.embed(self._codes()) if self._chosen else self._context[:, None, :][:, :0]
        return self._next_logits(self._context, chosen).float()

    def append(self, codes: Tensor) -> None:
        """The codes (B,) that were chosen there."""
        self._chosen.append(codes)
        if len(self._chosen) == self._prior.shape.K:
            whole = self._codes()[:, None]  # (B, 1, K)
            self._chosen = []
            self.prefill(whole)

    def prefill(self, codes: Tensor) -> None:
        """Known codes (B, n, K) of the next n whole positions; cheaper than asking for logits at each."""
        assert not self._chosen, "the present position has codes already"
        self._context = None
        self._contexts.take(self._prior.embed(codes).sum(dim=2))

    def _codes(self) -> Tensor:
        return torch.stack(self._chosen, dim=-1)  # (B, k)
