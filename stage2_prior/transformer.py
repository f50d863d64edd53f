"""One layer of x-transformers' decoder, with the options that all our transformers share, and its way of training.

The library computes a layer as a chain of small operators, each a pass over a large tensor; `DecoderLayer` gets the
same result from the same weights in fewer passes. What it does not know it leaves to the library: a cache, and code
that is being compiled (the compiler merges passes itself).
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from stage2_prior.fused import attend, gated, scaled_unit
from stage2_prior.onednn import give_to_onednn

with warnings.catch_warnings():  # x-transformers calls torch.jit.script at import, deprecated since torch 2.11
    warnings.filterwarnings("ignore", message=".*torch.jit.script")
    from x_transformers import Decoder

Rotation = tuple[Tensor, float]
"""Angles (1, n, head width), the same for two neighbouring channels, and 1: as x-transformers takes them."""


class DecoderLayer(Decoder):  # type: ignore[misc]  # x-transformers has no types
    """Causal attention, then a gated feed-forward network, each in a residual branch behind a norm."""

    def forward(self, x: Tensor, rotary_pos_emb: Rotation | None = None, **options: Any) -> Any:
        """(B, n, width) -> (B, n, width); with further options whatever the library's Decoder returns for them."""
        if options or torch.compiler.is_compiling():
            return super().forward(x, rotary_pos_emb=rotary_pos_emb, **options)
        ((norm, *_), attention, _), ((ff_norm, *_), feed_forward, _) = self.layers
        x = x + self._attend(attention, _normed(norm, x), rotary_pos_emb)
        into, dropout, out = feed_forward.ff
        hidden = into.proj(_normed(ff_norm, x))  # (B, n, 2 * inner)
        result: Tensor = x + out(dropout(gated(hidden)))
        return result

    def _attend(self, attention: Any, x: Tensor, rotation: Rotation | None) -> Tensor:
        """The attention branch: x (B, n, width) behind its norm -> (B, n, width)."""
        turns = None
        if rotation is not None:
            angles = rotation[0][0, :, None, ::2].to(attention.qk_norm_q_scale.dtype)  # (n, 1, head width / 2)
            turns = torch.polar(torch.ones_like(angles), angles)
        q, k, v = (
            projection(x).unflatten(-1, (attention.heads, -1))  # (B, n, heads, head width)
            for projection in (attention.to_q, attention.to_k, attention.to_v)
        )
        q = scaled_unit(q, attention.qk_norm_q_scale[:, 0], turns).to(v.dtype)
        k = scaled_unit(k, attention.qk_norm_k_scale[:, 0], turns).to(v.dtype)
        dropout = attention.attend.dropout if self.training else 0.0
        y = attend(q, k, v, attention.attend.scale, dropout)  # (B, n, heads, head width)
        result: Tensor = attention.to_out(y.flatten(-2))
        return result


def _normed(norm: Any, x: Tensor) -> Tensor:
    """The library's RMSNorm: (..., width) -> the same."""
    return scaled_unit(x, (norm.g + float(norm.unit_offset)) * norm.scale)


def layer(width: int, heads: int, head_width: int, inner: int, dropout: float = 0.0) -> DecoderLayer:
    """Causal attention, then a gated feed-forward network (SwiGLU), each in a residual branch behind an RMSNorm.

    A layer is a decoder of its own, without the norm that ends one, so that the caller can recompute it in the
    backward pass, keep its cache, and give it the rotation of its positions.
    """
    decoder = DecoderLayer(
        dim=width,
        depth=1,
        heads=heads,
        attn_dim_head=head_width,
        rotary_pos_emb=False,  # the caller passes rotations along the grid's two axes
        pre_norm_has_final_norm=False,
        use_rmsnorm=True,
        ff_mult=(inner + 0.5) / width,  # the library rounds width * mult down
        ff_swish=True,
        ff_glu=True,
        attn_qk_norm=True,
        attn_qk_norm_dim_scale=True,
        attn_flash=torch.cuda.is_available(),
        attn_dropout=dropout,
        ff_dropout=dropout,
        verbose=False,
    )
    give_to_onednn(decoder)
    return decoder
