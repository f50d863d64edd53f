"""A prior: a distribution over the codes of images, given a class. It factorises position by position, row-major, and
within a position code by code (Lee et al., "Autoregressive Image Generation using Residual
Quantization", 2022, equation 5):

    p(codes | label) = product over positions t, depths k of  p(codes[t, k] | codes[< t], codes[t, < k], label)

    codes (B, h, w, K) -> embedding -> contexts (B, h*w, width) -> head -> logits (B, h*w*K, V)

The context of a position knows all codes before the position; a kind of prior (`gpt/`, `pixelcnn/`) is a way to
compute contexts. The head (`head.py`) turns a context, and the position's own codes so far, into logits. So training,
likelihood and sampling share one factorisation, for both kinds and for any K.

`Prior.forward` computes the logits of codes that are all given. Where the codes are still to be chosen,
`Prior.prepare` gives a `PreparedPrior`, whose `begin` gives a `Generation`: the same logits, one code after the other.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from stage1_tokenizer.config.base import Config
from stage1_tokenizer.config.value_types import Channels, Count
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.head import build_head
from stage2_prior.products import Precision

Grid = tuple[int, int]
"""Rows and columns of codes."""


class BasePriorConfig(Config):
    """Options of every kind of prior."""

    width: Channels = 128
    """Channels of embeddings and contexts."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the activations that training drops, wherever the kind does so."""
    label_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the training images whose class is withheld, so that guidance can compare; 0: no guidance."""
    depth_layers: Count = 2
    """Count of the transformer over the K codes of a position, where the tokenizer has several (rvq and its kin)."""

    # Facts that planning (plan.py) asks of a kind. The defaults hold for a kind that prepares nothing.
    copies_weights: ClassVar[bool] = False
    """True if generation holds the weights a second time, prepared."""
    replays: ClassVar[bool] = False
    """True if a GPU replays the step for one position as a CUDA graph."""
    generates_on_one_thread: ClassVar[bool] = False
    """True if generating few images computes its small products on one thread of the CPU."""
    generates_by_row: ClassVar[bool] = True
    """True if positions of one row differ in their work; False: each position has the same."""

    @property
    def computes_layers_twice(self) -> bool:
        """True if training computes each layer again in the backward pass."""
        return False

    def cached_numbers(self, grid: Grid) -> int:
        """Return the count of the numbers that generating one image keeps; by default an embedding of each position."""
        return grid[0] * grid[1] * self.width

    def smallest(self) -> Self:
        """Return the same kind in so small a size that its time is that of the calls into torch."""
        return self.model_copy(update={"width": 16})


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
        grid = self.check_grid((codes.shape[1], codes.shape[2]))
        embedded = self.embed(rearrange(codes, "B h w K -> B (h w) K"))  # (B, h*w, K, width)
        contexts = self.contexts(embedded.sum(dim=2), labels, grid)  # (B, h*w, width)
        return rearrange(self.head(contexts, embedded), "B p K V -> B (p K) V")

    def embed(self, codes: Tensor) -> Tensor:
        """The first k codes of positions, (..., k) -> (..., k, width)."""
        if codes.shape[-1] > 1:
            codes = codes + torch.arange(codes.shape[-1], device=codes.device) * self.shape.V
        embedded: Tensor = self.embedding(codes)
        return embedded

    def begin(self, labels: Tensor, grid: Grid | None = None) -> "Generation":
        """Begin one generation in float32: see PreparedPrior.begin."""
        return self.prepare().begin(labels, grid)

    @abstractmethod
    def contexts(self, embedded: Tensor, labels: Tensor, grid: Grid) -> Tensor:
        """Embedded positions (B, h*w, width) -> contexts (B, h*w, width); that of position t knows those before t."""

    @abstractmethod
    def prepare(self, precision: Precision = "float32") -> "PreparedPrior":
        """Arrange the present weights for generation; do not change them while the result is in use.

        Raises:
            ConfigError: this kind of prior does not generate in this precision here.
        """

    def check_grid(self, grid: Grid) -> Grid:
        """Return the grid, which a caller has made no larger than the trained one."""
        assert 0 < grid[0] <= self.shape.h, f"{grid[0]} rows, trained on {self.shape.h}"
        assert 0 < grid[1] <= self.shape.w, f"{grid[1]} columns, trained on {self.shape.w}"
        return grid


class PreparedPrior(ABC):
    """A prior with its weights arranged for one precision; serves any number of generations."""

    def __init__(self, prior: Prior, precision: Precision) -> None:
        self.prior, self.precision = prior, precision
        self.next_logits = prior.head.prepare(precision)

    def begin(self, labels: Tensor, grid: Grid | None = None) -> "Generation":
        """Begin to generate sequences of these labels (B,), on the trained grid or a smaller one."""
        shape = self.prior.shape
        return self._begin(labels, self.prior.check_grid(grid or (shape.h, shape.w)))

    @abstractmethod
    def _begin(self, labels: Tensor, grid: Grid) -> "Generation":
        """Begin on a grid that was checked."""


class Generation(ABC):
    """A batch of sequences under way: codes go in one by one, or several positions at once; logits come out.

    Each kind of prior keeps what a next context needs of the former positions, so that none is computed twice.
    """

    def __init__(self, prepared: PreparedPrior) -> None:
        self._prior, self._next_logits = prepared.prior, prepared.next_logits
        self._context: Tensor | None = None  # (B, width) of the present position, once somebody asked
        self._chosen: list[Tensor] = []  # (B,) each: the present position's codes so far

    def logits(self) -> Tensor:
        """Compute the logits (B, V) of the next code, in float32."""
        if self._context is None:
            self._context = self._next_context()
        chosen = self._prior.embed(self._codes()) if self._chosen else self._context[:, None, :][:, :0]
        return self._next_logits(self._context, chosen).float()

    def append(self, codes: Tensor) -> None:
        """Take the codes (B,) that were chosen there."""
        self._chosen.append(codes)
        if len(self._chosen) == self._prior.shape.K:
            whole = self._codes()[:, None]  # (B, 1, K)
            self._chosen = []
            self.prefill(whole)

    def prefill(self, codes: Tensor) -> None:
        """Take known codes (B, n, K) of the next n whole positions; cheaper than asking for logits at each."""
        assert not self._chosen, "the present position has codes already"
        self._context = None
        self._take(self._prior.embed(codes).sum(dim=2))

    def _codes(self) -> Tensor:
        return torch.stack(self._chosen, dim=-1)  # (B, k)

    @abstractmethod
    def _next_context(self) -> Tensor:
        """Compute the context (B, width) of the first position whose codes are not known yet."""

    @abstractmethod
    def _take(self, embedded: Tensor) -> None:
        """Take the embedded codes (B, n, width) of the next n positions."""
