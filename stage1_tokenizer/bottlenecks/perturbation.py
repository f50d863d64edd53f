"""Perturbation of codes: a share of them is replaced by codes whose codebook vectors are near.

Qiu et al., "Robust Latent Matters: Boosting Image Generation with Sampling Error Synthesis" (RobustTok, 2025): a prior
draws wrong codes now and then, so a decoder is measured, or trained, on codes of which some are wrong. A code is
replaced by one of the `nearest` codebook vectors nearest to its own in its codebook; all are equally likely. In the
paper the true code is one of them; here it is not, so exactly the stated share is wrong.

Each of the K codes of a position is replaced by itself, in its own codebook. The codes that follow it in a residual
quantizer stay as they are.
"""

from collections.abc import Callable, Sequence

from pydantic import Field, PositiveInt
from torch import Tensor

from stage1_tokenizer.config.base import Config
from stage1_tokenizer.engine.errors import ConfigError


class PerturbationConfig(Config):
    """Share of the codes to replace, and the codes that may replace them."""

    codes: float = Field(0.0, ge=0.0, le=1.0)
    """Share of the codes of an image that are replaced by near ones; 0: none."""
    nearest: PositiveInt = 16
    """Number of nearest codes, without the code itself, of which one replaces a code; less than the codebook has."""

    def check(self, codebook_size: int) -> None:
        """Raise ConfigError if codes are to be replaced and the codebook has too few; size 0: the bottleneck is
        continuous."""
        if not self.codes:
            return
        if not codebook_size:
            raise ConfigError(
                f"perturbation.codes {self.codes}: the bottleneck of this tokenizer is continuous, so there are no "
                "codes to replace; leave the option out, or take a quantizer, e.g. bottleneck.kind vq"
            )
        if self.nearest >= codebook_size:
            raise ConfigError(
                f"perturbation.nearest {self.nearest}: a codebook of {codebook_size} codes has only "
                f"{codebook_size - 1} others to replace a code by; give a smaller number"
            )


def replace_codes(
    codes: Tensor, neighbours: Sequence[Callable[[Tensor], Tensor]], is_replaced: Tensor, ranks: Tensor
) -> Tensor:
    """Replace chosen codes by neighbours of theirs: codes (B, h, w, K) -> (B, h, w, K).

    neighbours: for each of the K codebooks, a function from codes (n,) to their neighbours (n, count).
    is_replaced: (B, h, w, K) bool. ranks: (B, h, w, K) int64, the number in 0..count-1 of the neighbour to take.
    """
    replaced = codes.clone()
    for k, find in enumerate(neighbours):
        chosen = is_replaced[..., k]  # (B, h, w)
        near = find(codes[..., k][chosen])  # (n, count)
        replaced[..., k][chosen] = near.gather(1, ranks[..., k][chosen][:, None])[:, 0]
    return replaced
