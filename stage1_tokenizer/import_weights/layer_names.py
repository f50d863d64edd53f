"""The names of the layers of a VQGAN in the files of another project."""

from typing import ClassVar, Literal, NamedTuple

Side = Literal["encoder", "decoder"]


class SideNames(NamedTuple):
    """Names of what encoder and decoder have each."""

    encoder: str
    decoder: str

    def of(self, side: Side) -> str:
        """Return the name in the encoder or in the decoder."""
        return self.encoder if side == "encoder" else self.decoder


class AttentionNames(NamedTuple):
    """Names of the parts of an attention block."""

    norm: str
    q: str
    k: str
    v: str
    out: str


class LayerNames:
    """Names of all layers of encoder and decoder. Level 0 is the full resolution. A project states its words."""

    folders: ClassVar[SideNames]
    """Name of the list of levels."""
    decoder_from_lowest: ClassVar[bool]
    """True if the decoder's levels count from the lowest resolution."""
    blocks: ClassVar[str]
    """Name of the list of a level's residual blocks."""
    attentions: ClassVar[str]
    """Name of the list of a level's attention blocks; each is behind a residual block."""
    resamplers: ClassVar[SideNames]
    """Name of the convolution that halves (encoder) or doubles (decoder) the resolution of a level."""
    middles: ClassVar[tuple[str, str, str]]
    """Names of the first residual block, the attention and the second block at the lowest resolution."""
    shortcut: ClassVar[str] = "nin_shortcut"
    """Name of the 1x1 convolution of a residual block that changes the number of channels."""
    norm_out: ClassVar[str] = "norm_out"
    """Name of the last norm of encoder and decoder."""
    attention_parts: ClassVar[tuple[AttentionNames, ...]] = (AttentionNames("norm", "q", "k", "v", "proj_out"),)
    """The names that versions of the project use; a file has one of them."""

    def __init__(self, levels: int = 0) -> None:
        """levels: number of levels, for projects that count the decoder's from the lowest resolution."""
        self.levels = levels

    def block(self, side: Side, level: int, index: int) -> str:
        """Return the name of a residual block."""
        return f"{self._level(side, level)}.{self.blocks}.{index}"

    def attention(self, side: Side, level: int, index: int) -> str:
        """Return the name of the attention block behind a residual block."""
        return f"{self._level(side, level)}.{self.attentions}.{index}"

    def resample(self, side: Side, level: int) -> str:
        """Return the name of the convolution that changes the resolution of a level."""
        return f"{self._level(side, level)}.{self.resamplers.of(side)}"

    def middle(self, side: Side) -> tuple[str, str, str]:
        """Return the names of the first residual block, the attention and the second block at the lowest resolution."""
        first, between, second = self.middles
        return f"{side}.{first}", f"{side}.{between}", f"{side}.{second}"

    def _level(self, side: Side, level: int) -> str:
        if side == "decoder" and self.decoder_from_lowest:
            level = self.levels - 1 - level
        return f"{side}.{self.folders.of(side)}.{level}"
