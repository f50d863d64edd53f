"""What a kind of bottleneck states about itself, what it returns, and what it must be able to do."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import NonNegativeFloat
from torch import Tensor, nn

from stage1_tokenizer.config.base import Config
from stage1_tokenizer.config.value_types import Channels

Trouble = Literal["unused codes", "commitment", "posterior"]
"""Troubles of a bottleneck that alarms see: codes without use, a commitment term that grows, a KL of about 0."""


@dataclass(frozen=True)
class Advice:
    """A way out of a trouble by a key, stated at its field: `cosine: Annotated[bool, Advice(...)] = False`."""

    trouble: Trouble
    text: str
    """What to do; `{}` stands for the present value."""
    helps: Callable[[Any], bool] = lambda value: True
    """False for a value with which it is done already."""


Beta = Annotated[NonNegativeFloat, Advice("commitment", "raise --bottleneck.beta")]
"""Weight of a commitment term."""
CodeDim = Annotated[
    Channels | None, Advice("unused codes", "--bottleneck.code_dim 8", lambda dim: dim is None or dim > 8)
]
"""Dimension of code vectors; None: that of the latent."""


class BaseBottleneckConfig(Config):
    """Base of the config classes."""

    def advice(self, trouble: Trouble) -> list[str]:
        """Return what this kind can do against a trouble and does not do yet, in the order of its keys."""
        return [
            each.text.format(getattr(self, name))
            for name, key in type(self).model_fields.items()
            for each in key.metadata
            if isinstance(each, Advice) and each.trouble == trouble and each.helps(getattr(self, name))
        ]

    @property
    def starts_from_batch(self) -> bool:
        """True if the codes start from the latents of the first batch, which should not be fewer then."""
        return False


@dataclass(frozen=True)
class Bottlenecked:
    """The latent after the bottleneck.

    `loss` is already weighted and enters the total as it is; `stats` are scalars for the log.
    """

    z_q: Tensor
    """(B, D, h, w), with the gradient path that the bottleneck defines (straight-through for a quantizer)."""
    codes: Tensor | None
    """(B, h, w, K) int64 in 0..V-1, or None where the bottleneck is continuous."""
    loss: Tensor
    """() float32."""
    stats: dict[str, Tensor] = field(default_factory=dict)


class Bottleneck(nn.Module, ABC):
    """A module between encoder and decoder.

    What it learns by gradient are parameters. What it learns otherwise (running means, warm-up) it learns in `start`
    and `finish_step`, which the training loop calls in every process, and never in `forward`: so a step of several
    micro-batches is one step, and a batch that turns out not to be finite has changed nothing.
    """

    depth: int = 0
    """K, the codes per position; 0 where the bottleneck is continuous."""
    codebook_size: int = 0
    """V; 0 where the bottleneck is continuous."""
    noise_channels: int = 0
    """Channels of the normal noise that `sample` turns into latents; 0 where a prior must be trained for sampling."""

    @abstractmethod
    def forward(self, z: Tensor) -> Bottlenecked:
        """z (B, D, h, w) -> Bottlenecked."""

    def vectors(self, codes: Tensor) -> Tensor:
        """codes (B, h, w, K) -> z_q (B, D, h, w), exactly what the forward pass in eval mode decodes."""
        raise AssertionError("a continuous bottleneck has no codes; Tokenizer.decode_codes refuses before this")

    def codebooks(self) -> list[Tensor]:
        """The code vectors of each of the K codes, (V, d) float32, detached; empty where there are none."""
        return []

    def learned_buffers(self) -> list[Tensor]:
        """Return the buffers that count as learned beside the parameters: codebooks that are running means."""
        return []

    def sample(self, noise: Tensor) -> Tensor:
        """noise (B, noise_channels, h, w) from N(0, 1) -> z_q (B, D, h, w): a draw from the bottleneck's own prior."""
        raise AssertionError("this bottleneck has no prior of its own; noise_channels says so")

    def start(self, z: Tensor) -> None:
        """Before the first step of a run: z (B, D, h, w), this process's latents of the whole first batch."""

    def finish_step(self) -> None:
        """After each step of the optimizer: learn from what the forward passes in train mode have seen since."""

    def drop_step(self) -> None:
        """In place of `finish_step`, after a step that is left out: forget what the forward passes have seen."""
