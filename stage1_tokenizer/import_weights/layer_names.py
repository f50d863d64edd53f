"""The names of the layers of a VQGAN in the files of another project."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

Side = Literal["encoder", "decoder"]


class AttentionNames(NamedTuple):
    """Names of the parts of an attention block."""

    norm: str
    q: str
    k: str
    v: str
    out: str


class LayerNames(ABC):
    """Names of all layers of encoder and decoder. Level 0 is the full resolution."""

    shortcut: ClassVar[str] = "nin_shortcut"
    norm_out: ClassVar[str] = "norm_out"
    attention_parts: ClassVar[tuple[AttentionNames, ...]] = (AttentionNames("norm", "q", "k", "v", "proj_out"),)
    """The names that versions of the project use; a file has one of them."""

    def __init__(self, levels: int = 0) -> None:
        """levels: number of levels, for projects that count the decoder's from the lowest resolution."""
        self.levels = levels

    @abstractmethod
    def block(self, side: Side, level: int, index: int) -> str:
        """Return the name of a residual block."""

    @abstractmethod
    def attention(self, side: Side, level: int, index: int) -> str:
        """Return the name of the attention block behind a residual block."""

    @abstractmethod
    def resample(self, side: Side, level: int) -> str:
        """Return the name of the convolution that halves (encoder) or doubles (decoder) the resolution of a level."""

    @abstractmethod
    def middle(self, side: Side) -> tuple[str, str, str]:
        """Return the names of the first residual block, the attention and the second block at the lowest resolution."""
