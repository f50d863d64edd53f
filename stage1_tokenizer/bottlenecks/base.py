"""The bottleneck's contract: what a bottleneck returns, what it must implement, and what its config states about it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import NonNegativeFloat
from torch import Tensor, nn

from stage1_tokenizer.config.base import Config
from stage1_tokenizer.config.value_types import Channels
from stage1_tokenizer.engine.processor import FastPath

Trouble = Literal["unused codes", "commitment", "posterior"]
"""Problems that alarms detect: many codes are never used, the commitment term grows, or the KL is near 0."""


@dataclass(frozen=True)
class Advice:
    """Advice to change a key, stated in the annotation of its field: `cosine: Annotated[bool, Advice(...)] = False`."""

    trouble: Trouble
    text: str
    """The text of the advice; `{}` stands for the key's present value."""
    helps: Callable[[Any], bool] = lambda value: True
    """Function of the present value that returns False if the advice is already followed."""


Beta = Annotated[NonNegativeFloat, Advice("commitment", "raise --bottleneck.beta")]
"""Weight of a commitment term."""
CodeDim = Annotated[
    Channels | None, Advice("unused codes", "--bottleneck.code_dim 8", lambda dim: dim is None or dim > 8)
]
"""Dimension d of codebook vectors; None: that of the latent."""


class BaseBottleneckConfig(Config):
    """Base of the config classes of all bottlenecks."""

    fast_paths: ClassVar[tuple[FastPath, ...]] = ()
    """Fast paths of the processor that training with this bottleneck uses (engine/processor.py)."""

    def advice(self, trouble: Trouble) -> list[str]:
        """Return the advice against a trouble that this config does not follow yet, in the order of its keys."""
        return [
            advice.text.format(getattr(self, name))
            for name, key in type(self).model_fields.items()
            for advice in key.metadata
            if isinstance(advice, Advice) and advice.trouble == trouble and advice.helps(getattr(self, name))
        ]

    @property
    def starts_from_batch(self) -> bool:
        """True if the codebook starts from the latents of the first batch; that batch then needs at least V latents."""
        return False


@dataclass(frozen=True)
class Bottlenecked:
    """The output of a bottleneck."""

    z_q: Tensor
    """(B, D, h, w), with the gradient path that the bottleneck defines (straight-through for a quantizer)."""
    codes: Tensor | None
    """(B, h, w, K) int64 in 0..V-1; None if the bottleneck is continuous."""
    loss: Tensor
    """() float32, already weighted: it is added to the total loss as it is."""
    stats: dict[str, Tensor] = field(default_factory=dict)
    """Scalars () for the log, detached."""


class Bottleneck(nn.Module, ABC):
    """The module between encoder and decoder.

    Parameters learn by gradient. Running means, counters and the like change only in `start` and `finish_step`, which
    the training loop calls in every process; `forward` at most remembers its input for `finish_step`. So several
    micro-batches make one step, and a step with values that are not finite changes nothing.
    """

    depth: int = 0
    """K, the codes per position; 0 if the bottleneck is continuous."""
    codebook_size: int = 0
    """V; 0 if the bottleneck is continuous."""
    is_frozen: bool = False
    """True if a training leaves this bottleneck as it is: nothing in it learns, by gradient or otherwise."""
    noise_channels: int = 0
    """Channels of the normal noise that `sample` turns into latents; 0 if this bottleneck cannot sample by itself."""

    @abstractmethod
    def forward(self, z: Tensor) -> Bottlenecked:
        """Pass the latent z (B, D, h, w) through the bottleneck."""

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Return z_q (B, D, h, w) of codes (B, h, w, K), equal bit for bit to the z_q of `forward` in eval mode."""
        raise AssertionError("a continuous bottleneck has no codes; Tokenizer.decode_codes refuses before this")

    def codebooks(self) -> list[Tensor]:
        """Return the codebook vectors (V, d) float32, detached, of each of the K codes; an empty list if continuous."""
        return []

    def learned_buffers(self) -> list[Tensor]:
        """Return the buffers that are learned like parameters: codebooks that are running means."""
        return []

    def sample(self, noise: Tensor) -> Tensor:
        """Turn noise (B, noise_channels, h, w) from N(0, 1) into z_q (B, D, h, w), a draw from the latent's prior."""
        raise AssertionError("this bottleneck has no prior of its own; noise_channels says so")

    def start(self, z: Tensor) -> None:
        """Start from z (B, D, h, w), this process's latents of the first batch; called before the first step."""

    def end_step(self, has_learned: bool) -> None:
        """End a training step: learn from it, unless it was skipped (`has_learned` is False) or this is frozen."""
        if has_learned and not self.is_frozen:
            self.finish_step()
        else:
            self.drop_step()

    def finish_step(self) -> None:
        """Learn from what the forward passes in train mode have remembered; called after each optimizer step."""

    def drop_step(self) -> None:
        """Forget what the forward passes have remembered; called instead of `finish_step` if a step is not learned."""
