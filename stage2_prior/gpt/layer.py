"""One layer of x-transformers' decoder, with the options that all our transformers share, and its way of training.

The library makes a layer's weights and names them. It computes with them as a chain of many small operators, each a
pass over a large tensor and a kernel to launch; `DecoderLayer` gets the same result in fewer. It is also what the
compiler sees: there are no branches in it that would have to be traced.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from stage2_prior.fast_linear import linear, use_onednn_linear
from stage2_prior.gpt.fused import attend, gated, scaled_unit

with warnings.catch_warnings():  # x-transformers calls torch.jit.script at import, deprecated since torch 2.11
    warnings.filterwarnings("ignore", message=".*torch.jit.script")
    from x_transformers import Decoder


class DecoderLayer(Decoder):  # type: ignore[misc]  # x-transformers has no types
    """Causal attention, then a gated feed-forward network, each in a residual branch behind a norm."""

    def forward(self, x: Tensor, turns: Tensor | None = None) -> Tensor:
        """x (B, n, width) -> (B, n, width). turns (n, head width / 2, 2): cosine and sine of the angles by which pairs
        of channels of each position's query and key are turned."""
        ((norm, *_), attention, _), ((ff_norm, *_), feed_forward, _) = self.layers
        x = x + self._attend(attention, _normed(norm, x), turns)
        into, dropout, out = feed_forward.ff
        hidden = into.proj(_normed(ff_norm, x))  # (B, n, 2 * inner)
        result: Tensor = x + out(dropout(gated(hidden)))
        return result

    def _attend(self, attention: Any, x: Tensor, turns: Tensor | None) -> Tensor:
        """The attention branch: x (B, n, width) behind its norm -> (B, n, width)."""
        projected = linear(x, query_key_value_weight(attention))  # (B, n, 3 H d)
        projected = projected.view(*x.shape[:2], 3, attention.heads, -1)  # (B, n, 3, H, d)
        gains = torch.stack([attention.qk_norm_q_scale[:, 0], attention.qk_norm_k_scale[:, 0]])  # (2, H, d)
        q, k = scaled_unit(projected[:, :, :2], gains, turns).to(projected.dtype).unbind(dim=2)
        dropout = attention.attend.dropout if self.training else 0.0
        y = attend(q, k, projected[:, :, 2], attention.attend.scale, dropout)  # (B, n, H, d)
        result: Tensor = attention.to_out(y.flatten(-2))
        return result


def query_key_value_weight(attention: Any) -> Tensor:
    """Join the three projections of the library's attention, so that they are one product: (3 H d, width)."""
    return torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])


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
    use_onednn_linear(decoder)
    return decoder
