"""The base class of all priors, and of their generation.

A prior is a distribution over the codes of an image, given its class. It factorises position by position in row-major
order, and within a position depth by depth (Lee et al., "Autoregressive Image Generation using Residual Quantization",
2022, equation 5):

    p(codes | label) = product over positions t and depths k of  p(codes[t, k] | codes[< t], codes[t, < k], label)

    codes (B, h, w, K) -> embedding -> contexts (B, h*w, width) -> output head -> logits (B, h*w*K, V)

The context of position t summarises the label and all codes of the positions before t. A kind of prior (`gpt/`,
`pixelcnn/`) is a way to compute contexts. The output head (`output_head.py`) turns a context, and the codes at depths
below k of the same position, into the logits of the code at depth k. All kinds share this factorisation in training,
likelihood and generation.

`Prior.forward` computes the logits of given codes in one pass (teacher forcing). To generate, `Prior.prepare` returns a
`PreparedPrior`, and its `begin` returns a `Generation`, which computes the same logits one code after the other.
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
from stage2_prior.fast_linear import Precision
from stage2_prior.output_head import build_head

Grid = tuple[int, int]
"""Rows and columns of a grid of codes."""


class BasePriorConfig(Config):
    """Options of every kind of prior."""

    width: Channels = 128
    """Channels of embeddings and contexts."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Probability with which training sets an activation to 0. Raise it (0.1) when the overfitting alarm begins."""
    label_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the training images whose class is replaced by "no class", which classifier-free guidance needs; 0:
    sampling cannot use guidance."""
    depth_layers: Count = 2
    """Layers of the output head's transformer over the K codes of a position. No effect for a tokenizer with K = 1."""

    # Facts about a kind that plan.py needs. The defaults hold for a kind that arranges no weights for generation.
    copies_weights: ClassVar[bool] = False
    """True if generation holds a second copy of the weights."""
    replays: ClassVar[bool] = False
    """True if a GPU runs the step for one position as a replayed CUDA graph."""
    generates_on_one_thread: ClassVar[bool] = False
    """True if generation of few images at once uses one CPU thread."""
    generates_by_row: ClassVar[bool] = True
    """True if the positions of one row differ in their arithmetic; False: all positions need the same."""

    @property
    def computes_layers_twice(self) -> bool:
        """True if training computes each layer again in the backward pass (activation checkpointing)."""
        return False

    def cached_numbers(self, grid: Grid) -> int:
        """Return how many numbers generation keeps for one image; by default one embedding per position."""
        return grid[0] * grid[1] * self.width

    def smallest(self) -> Self:
        """Return a copy of this config so small that its computing time is the cost of calling torch."""
        return self.model_copy(update={"width": 16})


class LabelEmbedding(nn.Embedding):
    """A learned vector of each of `classes` classes, and a last one of "no class".

    A training that starts from another prior (--init_from) matches its rows by the names of the classes.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(classes + 1, width)


class Prior(nn.Module, ABC):
    """A prior over the codes of one TokenShape, for images of `classes` classes (0: unconditional)."""

    def __init__(self, config: BasePriorConfig, shape: TokenShape, classes: int) -> None:
        super().__init__()
        self.config, self.shape, self.classes = config, shape, classes
        width = config.width
        # Row k * V + c is the vector of code c at depth k.
        self.embedding = nn.Embedding(shape.K * shape.V, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.head = build_head(width, config.depth_layers, shape)

    @property
    def null_label(self) -> int:
        """The label of "no class": `classes`, one more than the largest label of a class."""
        return self.classes

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Compute the logits of all codes: codes (B, h, w, K) in 0..V-1, labels (B,) in 0..classes -> (B, L, V).

        The grid h x w may be smaller than the trained grid (as a window is), but not larger.
        """
        grid = self.check_grid((codes.shape[1], codes.shape[2]))
        embedded = self.embed(rearrange(codes, "B h w K -> B (h w) K"))  # (B, h*w, K, width)
        contexts = self.contexts(embedded.sum(dim=2), labels, grid)  # (B, h*w, width)
        return rearrange(self.head(contexts, embedded), "B p K V -> B (p K) V")

    def embed(self, codes: Tensor) -> Tensor:
        """Look up the vectors of the codes at the first k depths of positions: (..., k) -> (..., k, width)."""
        if codes.shape[-1] > 1:
            codes = codes + torch.arange(codes.shape[-1], device=codes.device) * self.shape.V
        embedded: Tensor = self.embedding(codes)
        return embedded

    def begin(self, labels: Tensor, grid: Grid | None = None) -> "Generation":
        """Begin one generation in float32; see PreparedPrior.begin."""
        return self.prepare().begin(labels, grid)

    @abstractmethod
    def contexts(self, embedded: Tensor, labels: Tensor, grid: Grid) -> Tensor:
        """Compute the contexts of all positions: embedded positions (B, h*w, width), labels (B,) -> (B, h*w, width).

        An embedded position is the sum of its K code vectors. The context of position t depends on positions before t
        only.
        """

    @abstractmethod
    def prepare(self, precision: Precision = "float32") -> "PreparedPrior":
        """Arrange the present weights for generation. Do not change the weights while the result is in use.

        Raises:
            ConfigError: this kind of prior, or this device, does not support the precision.
        """

    def check_grid(self, grid: Grid) -> Grid:
        """Return the grid; assert that it is no larger than the trained one."""
        assert 0 < grid[0] <= self.shape.h, f"{grid[0]} rows, trained on {self.shape.h}"
        assert 0 < grid[1] <= self.shape.w, f"{grid[1]} columns, trained on {self.shape.w}"
        return grid


class PreparedPrior(ABC):
    """A prior with its weights arranged for generation in one precision. One object serves many generations."""

    def __init__(self, prior: Prior, precision: Precision) -> None:
        self.prior, self.precision = prior, precision
        self.next_logits = prior.head.prepare(precision)

    def begin(self, labels: Tensor, grid: Grid | None = None) -> "Generation":
        """Begin to generate the codes of B images with labels (B,), on `grid` (None: the trained grid)."""
        shape = self.prior.shape
        return self._begin(labels, self.prior.check_grid(grid or (shape.h, shape.w)))

    @abstractmethod
    def _begin(self, labels: Tensor, grid: Grid) -> "Generation":
        """Begin on a grid that `check_grid` has checked."""


class Generation(ABC):
    """The state of one generation: a batch of sequences whose codes are chosen one after the other.

        generation.logits()          (B, V) of the next code
        generation.append(codes)     (B,) the codes chosen from these logits
        generation.prefill(codes)    (B, n, K) codes of the next n positions, where they are known

    Each kind of prior keeps a cache of former positions, so that no position is computed twice.
    """

    def __init__(self, prepared: PreparedPrior) -> None:
        self._prior, self._next_logits = prepared.prior, prepared.next_logits
        self._context: Tensor | None = None  # (B, width) of the present position; None: not computed yet
        self._chosen: list[Tensor] = []  # (B,) each: codes of the present position at depths 0, 1, ...

    def logits(self) -> Tensor:
        """Compute the logits (B, V) of the next code, in float32."""
        if self._context is None:
            self._context = self._next_context()
        chosen = self._prior.embed(self._codes()) if self._chosen else self._context[:, None, :][:, :0]
        return self._next_logits(self._context, chosen).float()

    def append(self, codes: Tensor) -> None:
        """Add the codes (B,) that were chosen from the last logits."""
        self._chosen.append(codes)
        if len(self._chosen) == self._prior.shape.K:
            position = self._codes()[:, None]  # (B, 1, K)
            self._chosen = []
            self.prefill(position)

    def prefill(self, codes: Tensor) -> None:
        """Add the known codes (B, n, K) of the next n positions; cheaper than n calls of `logits` and `append`."""
        assert not self._chosen, "the present position has codes already"
        self._context = None
        self._add_positions(self._prior.embed(codes).sum(dim=2))  # (B, n, width)

    def _codes(self) -> Tensor:
        """Return the codes of the present position so far: (B, k)."""
        return torch.stack(self._chosen, dim=-1)

    @abstractmethod
    def _next_context(self) -> Tensor:
        """Compute the context (B, width) of the first position whose codes are not known yet."""

    @abstractmethod
    def _add_positions(self, embedded: Tensor) -> None:
        """Add the next n embedded positions (B, n, width)."""
