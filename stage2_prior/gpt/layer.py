"""One transformer layer: causal attention, then a feed-forward network, each in a residual branch behind a norm.

    x (B, n, width) -> RMSNorm -> query, key, value (B, H, n, d) -> q and k to length 1, scaled (option), rotated
                    -> causal attention (B, H, n, d) -> projection (B, n, width)                       -> + x
                    -> RMSNorm -> up, gate (B, n, 2 * inner) -> SwiGLU (B, n, inner) -> (B, n, width)  -> + x

x-transformers makes, names and computes it (attention after Vaswani et al., "Attention Is All You Need", 2017, equation
1; rotation after Su et al., "RoFormer", 2021, equation 34; SwiGLU after Shazeer, "GLU Variants Improve Transformer",
2020, equation 6). This file is the only one that knows the library's insides: `build_layer` chooses its options,
`LayerWeights` reads its weights for generation.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.gpt.dropout import Dropout

with warnings.catch_warnings():  # x-transformers calls torch.jit.script at import, deprecated since torch 2.11
    warnings.filterwarnings("ignore", message=".*torch.jit.script")
    from x_transformers import Decoder
    from x_transformers.x_transformers import RMSNorm

LONG = 256
"""Longest sequence whose attention matrices are computed as a whole on a CPU; longer ones by torch's fused attention.
That needs less memory, and on a CPU it is slower: with 64 codes a step in bfloat16 took 1.3 times as long."""


class DecoderLayer(Decoder):  # type: ignore[misc]  # x-transformers has no types
    """One layer of x-transformers' decoder."""

    norm_eps: float = 0.0
    """Number that both RMSNorms add to the mean square."""

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """Compute the layer: x (B, n, width) -> (B, n, width).

        angles: (n, d / 2), rotation of each pair of neighbouring channels at each position, in radians; d is the width
            of a head. None: none.
        """
        rotation = None if angles is None else (angles.repeat_interleave(2, dim=-1)[None], 1.0)
        y: Tensor = super().forward(x, rotary_pos_emb=rotation)
        return y


class RmsNorm(RMSNorm):  # type: ignore[misc]
    """The library's RMSNorm, with a number added to the mean square."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalise vectors (..., width)."""
        return F.rms_norm(x, x.shape[-1:], self.g + float(self.unit_offset), self.eps)


class KeyOfZeros(nn.Linear):
    """The linear map to keys, whose first key is zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the keys (B, n, H d) of x (B, n, width)."""
        keys = super().forward(x)
        return torch.cat([torch.zeros_like(keys[:, :1]), keys[:, 1:]], dim=1)


def build_layer(
    width: int,
    heads: int,
    head_width: int,
    inner: int,
    dropout: float = 0.0,
    *,
    length: int = 0,
    qk_norm: bool = True,
    norm_eps: float = 0.0,
    feed_forward_bias: bool = True,
    start_rotation: Literal["left", "zero"] = "left",
) -> DecoderLayer:
    """Build one layer with H = `heads` heads of d = `head_width` channels and a feed-forward network of `inner`
    channels, for sequences of `length` positions.

    It is a decoder of depth 1 without a final norm. So the caller can compute it again in the backward pass, cache its
    keys and values, and pass the angles of its positions. The other options are those of GptConfig.
    """
    decoder = DecoderLayer(
        dim=width,
        depth=1,
        heads=heads,
        attn_dim_head=head_width,
        rotary_pos_emb=False,  # the caller passes angles along the grid's two axes
        pre_norm_has_final_norm=False,
        use_rmsnorm=True,
        ff_mult=(inner + 0.5) / width,  # the library rounds width * mult down
        ff_swish=True,
        ff_glu=True,
        attn_qk_norm=qk_norm,
        attn_qk_norm_dim_scale=qk_norm,
        attn_flash=torch.cuda.is_available() or length > LONG,
        attn_dropout=dropout,
        ff_dropout=dropout,
        verbose=False,
    )
    decoder.norm_eps = norm_eps
    (norms, attention, _), (feed_norms, feed_forward, _) = decoder.layers
    # Assigned classes add no parameters, so the names of the weights stay.
    if norm_eps:
        for norm in (norms[0], feed_norms[0]):
            norm.__class__, norm.eps = RmsNorm, norm_eps
    if start_rotation == "zero":
        attention.to_k.__class__ = KeyOfZeros
    if not feed_forward_bias:  # the library's own option leaves the bias of the first product
        feed_forward.ff[0].proj.bias = feed_forward.ff[2].bias = None
    if dropout:
        attention.attend.attn_dropout, feed_forward.ff[1] = Dropout(dropout), Dropout(dropout)
    return decoder


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer, as generation uses them."""

    norm_eps: float
    """Number that both RMSNorms add to the mean square."""
    has_qk_norm: bool
    """True if queries and keys are normalised."""
    gains: Tensor
    """(2 H, d) factors of queries and keys, after their norm to RMS 1; those of queries include the scale of
    attention."""
    query_key_value: Tensor
    """(3 H d, width), with the gain of the norm before it."""
    out: tuple[Tensor, Tensor | None] | None
    """Weight (width, H d) and bias of the projection after attention; None: there is none."""
    up_gate: tuple[Tensor, Tensor | None]
    """Weight (2 * inner, width) and bias, with the gain of the norm before it."""
    down: tuple[Tensor, Tensor | None]
    """Weight (width, inner) and bias."""

    @classmethod
    def of(cls, layer: DecoderLayer) -> "LayerWeights":
        """Read the weights of a layer."""
        (norms, attention, _), (feed_norms, feed_forward, _) = layer.layers
        # The library's RMSNorm is F.normalize(x) * sqrt(width) * (g + offset).
        gain, feed_gain = (norm.g + norm.unit_offset for norm in (norms[0], feed_norms[0]))  # (width,)
        expand, _, contract = feed_forward.ff
        joined = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
        # The library makes no output projection for a single head as wide as the model.
        has_projection = not isinstance(attention.to_out, nn.Identity)
        return cls(
            layer.norm_eps,
            attention.qk_norm,
            _query_key_gains(attention),
            joined * gain,
            (attention.to_out.weight, attention.to_out.bias) if has_projection else None,
            (expand.proj.weight * feed_gain, expand.proj.bias),
            (contract.weight, contract.bias),
        )


def _query_key_gains(attention: Any) -> Tensor:
    """Return LayerWeights.gains (2 H, d)."""
    d = attention.to_q.out_features // attention.heads
    if not attention.qk_norm:
        gains: Tensor = attention.to_q.weight.new_ones(2, attention.heads, d)
        gains[0] *= attention.attend.scale
        return gains.flatten(0, 1)
    gains = torch.cat([attention.qk_norm_q_scale * attention.attend.scale, attention.qk_norm_k_scale])  # (2 H, 1, d)
    return gains[:, 0] * d**-0.5  # queries and keys have length 1, not RMS 1
