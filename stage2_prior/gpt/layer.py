"""One transformer layer: causal attention, then a feed-forward network, each in a residual branch behind a norm.

    x (B, n, width) -> RMSNorm -> query, key, value (B, n, 3, H, d) -> q and k to length 1, scaled (option), rotated
                    -> causal attention (B, n, H, d) -> projection (B, n, width)                       -> + x
                    -> RMSNorm -> up, gate (B, n, 2 * inner) -> SwiGLU (B, n, inner) -> (B, n, width)  -> + x

x-transformers makes and names the weights (attention after Vaswani et al., "Attention Is All You Need", 2017, equation
1). It computes with many small operators; each is a pass over a large tensor and one kernel to launch. `DecoderLayer`
computes the same result with fewer operators (`fused.py`). Its forward pass has no branches that depend on data, so the
compiler can trace it.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from stage2_prior.fast_linear import linear, use_onednn_linear
from stage2_prior.gpt.dropout import dropout
from stage2_prior.gpt.fused import causal_attention, normalise_and_rotate, rotate, swiglu

with warnings.catch_warnings():  # x-transformers calls torch.jit.script at import, deprecated since torch 2.11
    warnings.filterwarnings("ignore", message=".*torch.jit.script")
    from x_transformers import Decoder


class DecoderLayer(Decoder):  # type: ignore[misc]  # x-transformers has no types
    """One layer of x-transformers' decoder, with a faster forward pass."""

    norm_eps: float = 0.0
    """Number that both RMSNorms add to the mean square."""

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Compute the layer: x (B, n, width) -> (B, n, width).

        rotation: (n, d / 2, 2), cosine and sine of the angles of each position; d is the width of a head. None: none.
        """
        ((norm, *_), attention, _), ((ff_norm, *_), feed_forward, _) = self.layers
        x = x + self._attend(attention, _rms_norm(norm, x, self.norm_eps), rotation)
        project_in, ff_dropout, project_out = feed_forward.ff
        hidden = project_in.proj(_rms_norm(ff_norm, x, self.norm_eps))  # (B, n, 2 * inner)
        result: Tensor = x + project_out(dropout(swiglu(hidden), ff_dropout.p * self.training))
        return result

    def _attend(self, attention: Any, x: Tensor, rotation: Tensor | None) -> Tensor:
        """Compute the attention branch: normalised x (B, n, width) -> (B, n, width)."""
        projected = linear(x, query_key_value_weight(attention))  # (B, n, 3 H d)
        projected = projected.view(*x.shape[:2], 3, attention.heads, -1)  # (B, n, 3, H, d)
        query_key, v = torch.split(projected, [2, 1], dim=2)  # (B, n, 2, H, d), (B, n, 1, H, d)
        if attention.qk_norm:
            gains = torch.stack([attention.qk_norm_q_scale[:, 0], attention.qk_norm_k_scale[:, 0]])  # (2, H, d)
            query_key = normalise_and_rotate(query_key, gains, rotation)
        elif rotation is not None:
            query_key = rotate(query_key, rotation)
        q, k = query_key.unbind(dim=2)
        share = attention.attend.dropout * self.training
        y = causal_attention(q, k, v.squeeze(2), attention.attend.scale, share)  # (B, n, H, d)
        result: Tensor = attention.to_out(y.flatten(-2))
        return result


def query_key_value_weight(attention: Any) -> Tensor:
    """Join the library's three projections into the weight of one product: (3 H d, width)."""
    return torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])


def _rms_norm(norm: Any, x: Tensor, eps: float) -> Tensor:
    """Apply the library's RMSNorm, with `eps` added to the mean square: (..., width) -> (..., width)."""
    return normalise_and_rotate(x, (norm.g + float(norm.unit_offset)) * norm.scale, eps=eps)


def build_layer(
    width: int,
    heads: int,
    head_width: int,
    inner: int,
    dropout: float = 0.0,
    *,
    qk_norm: bool = True,
    norm_eps: float = 0.0,
    feed_forward_bias: bool = True,
) -> DecoderLayer:
    """Build one layer with H = `heads` heads of d = `head_width` channels and a feed-forward network of `inner`
    channels.

    It is a decoder of depth 1 without a final norm. So the caller can compute it again in the backward pass, cache its
    keys and values, and pass the rotation of its positions. The other options are those of GptConfig.
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
        attn_qk_norm=qk_norm,
        attn_qk_norm_dim_scale=qk_norm,
        attn_flash=torch.cuda.is_available(),
        attn_dropout=dropout,
        ff_dropout=dropout,
        verbose=False,
    )
    decoder.norm_eps = norm_eps
    if not feed_forward_bias:  # the library's own option leaves the bias of the first product
        expand, _, contract = decoder.layers[1][1].ff
        expand.proj.bias = contract.bias = None
    use_onednn_linear(decoder)
    return decoder
